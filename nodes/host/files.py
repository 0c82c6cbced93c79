"""Files of ComfyUI's folders: adapters and base models to read, free names to write."""

import os
import posixpath
import re
from pathlib import Path

from ...lorax.errors import FormatError, OutputError
from ...lorax.files import output
from ...lorax.files.longpath import on_disk
from ...lorax.files.tensorfile import natural_order
from ...lorax.models.basefiles import KINDS, SHARD

# Of the name of a saved file: with a number and an ending its parts stay within the 255 bytes of file systems.
NAME_BYTES = 200
PREFIX_CHARACTERS = 1000
# Where base models lie, and what their files are called.
BASE_FOLDERS = ("checkpoints", "diffusion_models")
BASE_ENDINGS = (*KINDS, ".sft")
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def adapter_files() -> list[str]:
    """Return the names of the files in the host's `loras` folders."""
    import folder_paths

    return folder_paths.get_filename_list("loras")


def adapter_path(name: str) -> str:
    """Return the path of a file in the host's `loras` folders.

    Raises:
        FormatError: There is no such file.
    """
    return _path("loras", name)


def base_files() -> list[str]:
    """Return the base models in the host's folders, each name once: of a model in parts the first file.

    Those that the host's own loaders never list are among them (GGUF), pickles are not. A name that an earlier folder
    has too begins with its folder.
    """
    import folder_paths

    found: dict[str, None] = {}
    for folder in BASE_FOLDERS:
        names: dict[str, None] = {}
        for root in folder_paths.get_folder_paths(folder):
            for name in sorted(folder_paths.recursive_search(root, [".git"])[0], key=natural_order):
                part = SHARD.fullmatch(name)
                if name.lower().endswith(BASE_ENDINGS) and (part is None or int(part[2]) == 1):
                    names[name] = None
        found |= {f"{folder}/{name}" if name in found else name: None for name in names}
    return list(found)


def base_path(name: str) -> str:
    """Return the path of a base model that `base_files` names.

    Raises:
        FormatError: There is no such file.
    """
    import folder_paths

    for folder in BASE_FOLDERS:
        if path := folder_paths.get_full_path(folder, name):
            return path
    folder, _, inside = name.partition("/")
    return _path(folder, inside) if folder in BASE_FOLDERS else _path(BASE_FOLDERS[0], name)


def _path(folder: str, name: str) -> str:
    """Return the path of a file in the host's folders of one kind.

    Raises:
        FormatError: There is no such file.
    """
    import folder_paths

    path = folder_paths.get_full_path(folder, name)
    if path is None:
        got = f"{name} in {folder}"
        raise FormatError("no such file in ComfyUI's models", got, "refresh the node list (R) and choose again")
    return path


def file_state(path: str) -> str:
    """Return what changes when a file is written again."""
    state = os.stat(path)
    return f"{state.st_mtime_ns}:{state.st_size}"


def check_prefix(prefix: str) -> None:
    """Check the name that a file shall be saved under, before any work is done.

    Raises:
        OutputError: It is empty, too long, leads out of its folder, or has characters or names that the system refuses.
    """
    plain = prefix.replace("\\", "/")
    parts = posixpath.normpath(plain).split("/")
    wrong = next(filter(_is_refused, parts), None)
    if parts[0] == "..":
        raise OutputError("a name outside the host's folders", prefix[:200], "give a name without ..")
    if plain.rpartition("/")[2] in ("", ".", ".."):
        raise OutputError("a name of no file", prefix[:200] or "nothing", "give a name such as lorax/adapter")
    if wrong is not None:
        raise OutputError("a name that the system refuses", wrong[:200], "use letters, digits, - and _")
    if len(prefix) > PREFIX_CHARACTERS or max(len(part.encode()) for part in parts) > NAME_BYTES:
        got = f"{prefix[:40]}... has {len(prefix)} characters in {len(parts)} parts"
        raise OutputError("a name that is too long", got, f"give at most {NAME_BYTES} bytes for each part")


def _is_refused(name: str) -> bool:
    """Whether the system refuses the name of a file or folder, or writes it as another one."""
    return bool(UNWRITABLE.search(name) or (output.WINDOWS and output.UNNAMEABLE.fullmatch(name)))


def free_path(folder: str, prefix: str) -> tuple[str, str]:
    """Return a path that does not exist yet, `<prefix>_00001_.safetensors`, and its name below a folder of the host.

    Args:
        folder: `output` or `loras`.
        prefix: Name, with subfolders if wanted; never outside the folder.

    Raises:
        OutputError: The name is none (`check_prefix`), leads outside the folder, or the folder cannot be written.
    """
    import folder_paths

    check_prefix(prefix)
    root = folder_paths.get_output_directory() if folder == "output" else folder_paths.get_folder_paths("loras")[0]
    inside, name = os.path.realpath(root), os.path.realpath(os.path.join(root, prefix))
    if not Path(name).is_relative_to(inside):
        raise OutputError("a name outside the host's folders", prefix, f"give a name below {folder}")
    output.make_folder(Path(name).parent)
    count = 1
    while os.path.exists(on_disk(path := f"{name}_{count:05}_.safetensors")):
        count += 1
    return path, os.path.relpath(path, inside)
