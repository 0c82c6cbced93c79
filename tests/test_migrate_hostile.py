"""What a migration never does: its processes run under a hook of the interpreter, which ends one that does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reliability import seeds
from tests.library import COMMAND

ROOT = Path(__file__).parents[1]
# Loaded by every interpreter before its work. What processes send each other is pickled by `multiprocessing`; what
# modules do when they are imported is theirs.
HOOK = """
import os, sys
FORBIDDEN = ("socket.", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "urllib.Request", "http.client", "ftplib", "smtplib", "webbrowser", "marshal.load")
def told(event, arguments):
    if not event.startswith(FORBIDDEN):
        return
    frame = sys._getframe(1)
    if event == "pickle.find_class" and "multiprocessing" in frame.f_code.co_filename:
        return
    while frame:
        if "importlib" in frame.f_code.co_filename:
            return
        frame = frame.f_back
    os.write(2, f"FORBIDDEN: {event} {arguments!r}"[:500].encode())
    os._exit(99)
sys.addaudithook(told)
open(os.path.join(os.path.dirname(__file__), f"hooked.{os.getpid()}"), "w").close()
"""


@pytest.fixture
def hooked(tmp_path):
    """Runs Python under the hook; returns what came of it, and how many processes had it."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "LORAX_CACHE": str(tmp_path / "cache")}

    def run(*words):
        done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
        return done, len([*folder.glob("hooked.*")])

    return run


@pytest.mark.slow
def test_no_network_no_pickle_no_other_program(tmp_path, hooked):
    loras = tmp_path / "loras"
    (loras / "peft").mkdir(parents=True)
    for i in range(2):
        seeds.base_file(tmp_path / f"{i}.safetensors", change=0.2 * i)
    for name in ("lora", "dora", "loha"):
        (loras / f"{name}.safetensors").write_bytes(seeds.adapters()[name])
    (loras / "peft" / "adapter_model.safetensors").write_bytes(seeds.adapters()["peft"])
    (loras / "peft" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "auto_mapping": "os"}))
    torch.save({"x": torch.ones(1)}, loras / "pickle.safetensors")
    (tmp_path / "moves.toml").write_text(
        "[[move]]\nadapters = '**/*'\nsource = '0.safetensors'\ntarget = '1.safetensors'\nmethod = 'project'\n"
    )
    words = [
        *COMMAND,
        loras,
        "--manifest",
        tmp_path / "moves.toml",
        "-o",
        tmp_path / "out",
        "--workers",
        "1",
        "--rank",
        8,
    ]
    for resumed, status in (([], "4 done, 0 kept"), (["--resume"], "0 done, 4 kept")):
        done, processes = hooked(*words, "--report", tmp_path / "r.json", *resumed)
        assert done.returncode == 1, done.stderr
        assert f"{status}, 1 failed of 5" in done.stdout
        assert "pickle files are never read" in done.stderr
        assert "FORBIDDEN" not in done.stderr
    assert processes >= 4  # the command and a worker, twice


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["import pickle; pickle.loads(b'cos\\nsystem\\n.')", "import os; os.system('true')",
    "import socket; socket.socket()", "import subprocess; subprocess.run(['true'])"])  # fmt: skip
def test_the_hook_sees_what_is_forbidden(hooked, deed):
    done, processes = hooked(sys.executable, "-c", deed)
    assert (done.returncode, processes) == (99, 1)
    assert "FORBIDDEN" in done.stderr
