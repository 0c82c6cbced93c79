"""Moving a whole library of adapters to another base: a job that survives interruption, bad files and dead workers."""

from .job import Task as Task
from .job import input_files as input_files
from .job import plan_folder as plan_folder
from .job import plan_manifest as plan_manifest
from .run import Summary as Summary
from .run import dry_run as dry_run
from .run import migrate as migrate
from .run import output_files as output_files
from .work import Record as Record
