"""What the product must never do: talk to the network, unpickle, or run another program."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from reliability import seeds
from tests.commands import FORBIDDEN, ROOT, RUN


@pytest.mark.slow
def test_no_network_no_pickle_no_other_program(tmp_path, pair):
    """The whole command line, under a hook of the interpreter that ends it at the first forbidden thing."""
    a, x = tmp_path / "a.safetensors", tmp_path / "x.safetensors"
    a.write_bytes(seeds.adapters()["lora"])
    folder = seeds.base_folder(tmp_path / "folder")
    s, t = (base.files[0] for base in pair)
    bases = ["--source", s, "--target", t]
    pickle = tmp_path / "old.ckpt"
    torch.save({"x": torch.ones(1)}, pickle)
    commands = [
        (0, "inspect", a), (0, "inspect", s), (0, "inspect", folder), (1, "inspect", pickle),
        (0, "similarity", s, t, "--json", tmp_path / "s.json", "--png", tmp_path / "s.png",
            "--html", tmp_path / "s.html"),
        (0, "transfer", a, *bases, "-o", tmp_path / "m", "--report", tmp_path / "r.json", "--png", tmp_path / "r.png",
            "--save-assignment", tmp_path / "pairs.json", "--html", tmp_path / "r.html",
            "--method", "project", "--rank", "8"),
        (0, "transfer", a, "--source", folder, "--target", t, "-o", tmp_path / "m", "--method", "align",
            "--assignment", tmp_path / "pairs.json"),
        (1, "transfer", pickle, *bases, "-o", tmp_path / "n"),
        (1, "transfer", a, "--source", pickle, "--target", t, "-o", x),
        (0, "convert", a, "--to", "lora-x", "--source", s, "-o", x, "--rank", "8"),
        (0, "convert", x, "--to", "lora", "--source", s, "-o", tmp_path / "l"),
        (0, "cache", "info"), (0, "cache", "verify"), (0, "cache", "clear"), (2, "nonsense"), (0, "--version"),
    ]  # fmt: skip
    words = json.dumps([[status, [*map(str, words)]] for status, *words in commands])
    environment = os.environ | {"LORAX_CACHE": str(tmp_path / "cache")}
    code = FORBIDDEN + RUN
    done = subprocess.run(
        [sys.executable, "-c", code, words], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("=== ") == len(commands)


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["import socket; socket.socket()", "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    "import subprocess; subprocess.run(['true'])", "import os; os.system('true')"])  # fmt: skip
def test_the_hook_sees_what_is_forbidden(deed):
    done = subprocess.run([sys.executable, "-c", FORBIDDEN + deed], capture_output=True, text=True, check=False)
    assert done.returncode == 99
    assert "FORBIDDEN" in done.stderr


SOURCES = sorted(path for part in ("lorax", "nodes") for path in (ROOT / part).rglob("*.py"))
# Modules that unpickle, talk to the network, run other programs or code.
MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "socket", "ssl", "http",
    "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests", "httpx", "aiohttp", "urllib3",
    "huggingface_hub", "subprocess", "ctypes", "pty", "webbrowser", "code", "codeop", "runpy", "xml",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv", "os.startfile",
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package", "np.load", "numpy.load",
    "np.memmap", "yaml.load", "tempfile.mktemp", "input",
}  # fmt: skip


def forbidden(tree):
    """Return what a module imports or calls of these, as far as its text tells."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in MODULES:
                yield node.module
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.startswith(("torch.hub.", "torch.jit.", "torch.package.")):
                yield name
            elif name.endswith("import_module") and not ast.unparse(node.args[0]).startswith("f'.{"):
                yield f"{name}({ast.unparse(node.args[0])})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_imports_and_calls_nothing_forbidden(path):
    assert not [*forbidden(ast.parse(path.read_text()))]


def test_the_look_at_the_source_sees_what_is_forbidden():
    text = "import pickle, os.path\nfrom urllib.request import urlopen\ntorch.load(x)\neval('1')\nimport_module(name)"
    assert sorted(forbidden(ast.parse(text))) == [
        "eval",
        "import_module(name)",
        "pickle",
        "torch.load",
        "urllib.request",
    ]
