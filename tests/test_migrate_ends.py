"""Migrations that are killed, interrupted, or lose a process: nothing is lost or doubled, and nothing stays behind."""

import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from lorax import OutputError, TransferOptions
from lorax.migration import Task, migrate, plan_folder
from lorax.migration.journal import JOURNAL
from lorax.migration.local import _in_pool
from reliability import seeds
from tests.library import BROKEN, COMMAND, contents, words

# Each starts processes of its own, and ends some.
pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]


@pytest.mark.parametrize("files", [1, 3])
def test_killed_and_resumed(library, bases, tmp_path, expected, files):
    """SIGKILL of the whole process group once so many results are there."""
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out), start_new_session=True, stderr=subprocess.PIPE)
    while process.poll() is None and (not out.exists() or len(contents(out)) < files):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = (
        {name: content for name, content in contents(out).items() if not name.endswith(".part")} if out.exists() else {}
    )
    assert done.items() <= expected.items()
    end = subprocess.run(words(library, bases, out, "--resume"), capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr.count("failed")) == (1, len(BROKEN)), end.stderr
    assert contents(out) == expected
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines() if line.endswith("}")]
    outputs = [line["output"] for line in lines if line["status"] == "done"]
    assert sorted(outputs) == sorted(set(outputs)) == sorted(expected)


def kill_one(process, candidates):
    """Kill the first worker of a running migration that `candidates` finds."""
    killed = 0
    while process.poll() is None and not killed:
        time.sleep(0.005)
        for child in itertools.islice(candidates(), 1):
            child.kill()
            killed += 1
    assert killed


def workers_of(process, seconds):
    """Yield the workers of a migration that have computed so long; other children come and go meanwhile."""
    for child in psutil.Process(process.pid).children() if process.poll() is None else []:
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()) and child.cpu_times().user > seconds:
                yield child


def test_a_killed_worker_costs_nothing(library, bases, tmp_path, expected):
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out), stderr=subprocess.PIPE)

    kill_one(process, lambda: workers_of(process, 0.5))
    assert process.wait(timeout=120) == 1
    assert contents(out) == expected


DEADLY = """
import os
from lorax.migration import Record
def work(task, previous):
    if task.name == "poison":
        os._exit(9)
    return Record(task.name, task.output, "done")
"""


def test_what_kills_its_process_is_told_from_what_ran_beside_it(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    work = import_module("deadly").work
    tasks = [Task("", name, name, "", "") for name in ("good", "poison", "better")]
    pool = _in_pool(work, [list(tasks)], {}, 1)
    found, left = [], None
    while left is None:
        try:
            found.append(next(pool).name)
        except StopIteration as end:
            left = [task.name for task in end.value]
    assert (found, left) == (["good"], ["poison"])


def test_a_worker_killed_between_two_adapters_costs_nothing(tasks, tmp_path, expected):
    """The pool is broken when the next adapter is handed to it."""
    threads = set(threading.enumerate())

    def progress(done, total, name):
        if done == 1:
            for worker in multiprocessing.active_children():
                worker.kill()
            for thread in set(threading.enumerate()) - threads:  # they end when they have seen it
                thread.join(60)

    summary = migrate(tasks, tmp_path / "out", workers=1, progress=progress)
    assert {record.name for record in summary.records if record.status == "failed"} == BROKEN
    assert contents(tmp_path / "out") == expected


def test_one_process_at_a_time(library, bases, tasks, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out), start_new_session=True, stderr=subprocess.PIPE)
    while process.poll() is None and not (out / JOURNAL).exists():
        time.sleep(0.01)
    with pytest.raises(OutputError, match="another process"):
        migrate(tasks, out, resume=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_full_disk(library, bases, tmp_path, expected):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    out = tmp_path / "out"
    environment = os.environ | {"LORAX_CACHE": "off"}
    end = subprocess.run(
        words(library, bases, out), preexec_fn=limit, env=environment, capture_output=True, text=True, check=False
    )
    assert end.returncode == 1
    assert "cannot write the output" in end.stderr
    assert "Traceback" not in end.stderr
    assert contents(out).items() <= expected.items()
    subprocess.run(words(library, bases, out, "--resume"), capture_output=True, check=False)
    assert contents(out) == expected


def test_a_killed_worker_of_ray_costs_nothing(library, bases, tmp_path, expected):
    out = tmp_path / "out"
    process = subprocess.Popen(words(library, bases, out, "--engine", "ray"), stderr=subprocess.PIPE)

    def moving():
        for child in psutil.process_iter(["cmdline"]):
            if (child.info["cmdline"] or [""])[0].startswith("ray::_move"):
                yield child

    kill_one(process, moving)
    assert process.wait(timeout=300) == 1
    assert contents(out) == expected


def test_a_lost_machine_of_ray_costs_nothing(tasks, tmp_path, expected):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        lost = []

        def progress(done, total, name):
            if not lost:
                lost.append(name)
                cluster.remove_node(other, allow_graceful=False)

        migrate(tasks, tmp_path / "out", run="ray", progress=progress)
        assert lost
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def many(tmp_path):
    """A hundred adapters and two bases, all small: a migration that is still going on when it is ended."""
    paths = [seeds.base_file(tmp_path / f"{i}.safetensors", change=0.2 * i) for i in range(2)]
    (tmp_path / "loras").mkdir()
    for i in range(100):
        (tmp_path / "loras" / f"{i}.safetensors").write_bytes(seeds.adapters()["lora"])
    return [*COMMAND, tmp_path / "loras", "--source", paths[0], "--target", paths[1], "-o", tmp_path / "out",
            "--no-cache", "--workers", "2"]  # fmt: skip


def started(command, journal, **options):
    """Start a migration; return it once an adapter is done, and all the processes that it has started."""
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, **options)
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    return process, psutil.Process(process.pid).children(recursive=True)


def outliving(processes):
    """Return those that do not end by themselves, and end them: they would hold the pipes of the test open."""
    left = psutil.wait_procs(processes, timeout=20)[1]
    for process in left:
        process.kill()
    return left


# What each ends with; SIGKILL tells no one.
ENDS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -9}


@pytest.mark.parametrize(("name", "status"), ENDS.items(), ids=ENDS)
def test_what_ends_the_command_ends_its_workers_and_leaves_a_journal_to_go_on_with(many, tmp_path, name, status):
    """The signal goes to the command alone, as `kill` and `systemctl` send it."""
    process, children = started(many, tmp_path / "out" / JOURNAL)
    assert [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == status
    assert outliving(children) == []
    _, err = process.communicate(timeout=60)
    assert err == "error: interrupted\n" or name == "SIGKILL"  # then Python tells of its semaphores
    records = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    assert {record["status"] for record in records} == {"done"}
    assert 0 < len(records) < 100


def test_ctrl_c_while_the_workers_start(many):
    """A terminal sends it to them too, before they have come to say that they ignore it: only the command ends them."""
    process = subprocess.Popen([*map(str, many)], stderr=subprocess.PIPE, text=True)
    while not (workers := [*workers_of(process, 0.1)]):
        assert process.poll() is None
        time.sleep(0.005)
    workers[0].send_signal(signal.SIGINT)
    with pytest.raises(psutil.TimeoutExpired):
        workers[0].wait(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ("error: interrupted\n", 130)


def test_a_terminal_that_closes_does_not_end_what_nohup_started(many, tmp_path):
    many = ["nohup", *many[:4], tmp_path / "few", *many[5:]]
    (tmp_path / "few").mkdir()
    for name in "ab":
        (tmp_path / "few" / f"{name}.safetensors").write_bytes(seeds.adapters()["lora"])
    process, _ = started(many, tmp_path / "out" / JOURNAL, stdout=subprocess.DEVNULL)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_other_children_of_a_program_live_on(tmp_path, many, error):
    """And a migration that its caller ends, by an error in its own function, leaves no worker behind."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tasks = plan_folder(tmp_path / "loras", tmp_path / "0.safetensors", tmp_path / "1.safetensors", TransferOptions())

    def progress(done, total, name):
        raise error("enough")

    with pytest.raises(error, match="enough"):
        migrate(tasks, tmp_path / "out", workers=1, progress=progress)
    assert multiprocessing.active_children() == []
    assert other.poll() is None
    other.communicate(b"\n", timeout=60)
    assert other.returncode == 0


FORKED = """
import os, sys, time
from pathlib import Path
from lorax import TransferOptions
from lorax.migration import migrate, plan_folder
def progress(done, total, name):
    if done == 1 and os.fork() == 0:
        time.sleep(600)
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tasks = plan_folder(folder / "loras", folder / "0.safetensors", folder / "1.safetensors", TransferOptions())
    migrate(tasks, folder / "out", workers=2, progress=progress)
"""


def test_a_fork_of_the_program_keeps_no_worker_alive(many, tmp_path):
    """It holds the pipes of its parent open, which tell the workers that it is gone."""
    (tmp_path / "forked.py").write_text(FORKED)
    command = [sys.executable, tmp_path / "forked.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process, children = started(command, tmp_path / "out" / JOURNAL, env=environment)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    while len(forks := psutil.Process(process.pid).children()) < len(children) + 1:
        time.sleep(0.01)
    process.kill()
    try:
        assert workers
        assert outliving(workers) == []
    finally:
        for left in set(forks) - set(children):
            left.kill()
        process.communicate(timeout=60)


def test_what_ends_the_command_ends_its_cluster(many, tmp_path):
    process, children = started([*many, "--engine", "ray"], tmp_path / "out" / JOURNAL)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "error: interrupted\n")
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.fixture
def windows(monkeypatch):
    """Loads a module with the signals that Windows has: SIGBREAK (here a number that this system knows), no SIGHUP."""
    module = types.ModuleType("signal")
    posix = ("SIGHUP", "pthread_sigmask")
    module.__dict__.update({name: value for name, value in vars(signal).items() if name not in posix})
    module.SIGBREAK = signal.SIGUSR1
    loaded = []

    def load(name):
        loaded.append(sys.modules[name])
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "signal", module)
            return importlib.reload(loaded[0])

    yield load
    importlib.reload(loaded[0])


def test_workers_of_windows(windows):
    local = windows("lorax.migration.local")
    assert local.FROM_TERMINAL == [signal.SIGINT]
    with local._Pool(1) as pool, local._unheard():
        assert pool.submit(os.getpid).result() != os.getpid()


def test_what_ends_a_command_on_windows(windows):
    """SIGBREAK, which a console that closes sends too."""
    entry = windows("lorax.entry")
    assert entry.ENDINGS == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = {number: signal.getsignal(number) for number in entry.ENDINGS}
    try:
        with pytest.raises(SystemExit) as end:
            entry.run(lambda: signal.raise_signal(signal.SIGUSR1))
        assert end.value.code == 128 + signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
