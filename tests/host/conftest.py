"""Finds the two hosts: ComfyUI's library from the package registry, and a real ComfyUI checkout with its own Python."""

import os
import socket
import subprocess
import time
import urllib.error
from importlib import metadata
from pathlib import Path

import pytest
from chromium import chromium
from client import Host
from prompts import sampling, transfer

# The user's own cache is none of the tests' business.
os.environ["LORAX_CACHE"] = "off"

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / ".venv" / "notcomfy"
# A folder with another front end than the one that the checkout's Python has: `--front-end-root`.
FRONT_END = os.environ.get("COMFYUI_FRONT_END")


def comfyui() -> tuple[Path, Path] | None:
    """Return the checkout and its Python, or None."""
    given = os.environ.get("COMFYUI_PATH")
    for path in [Path(given)] if given else [ROOT.parent / "ComfyUI", Path.home() / "ComfyUI"]:
        pythons = [os.environ.get("COMFYUI_PYTHON"), path / ".venv/bin/python", path / "venv/bin/python"]
        for python in filter(None, pythons):
            if (path / "main.py").is_file() and Path(python).is_file():
                return path, Path(python)
    return None


def comfyui_gguf() -> Path | None:
    """Return the checkout of ComfyUI-GGUF, or None."""
    given = os.environ.get("COMFYUI_GGUF")
    found = Path(given) if given else (comfyui() or [Path()])[0] / "custom_nodes" / "ComfyUI-GGUF"
    return found if (found / "loader.py").is_file() else None


def front_end_version(python: Path) -> str:
    """Return the version of the front end that the server gives to a browser, as its package says it."""
    if FRONT_END:
        packages = metadata.distributions(name="comfyui-frontend-package", path=[str(Path(FRONT_END).parents[1])])
        return f"{next((one.version for one in packages), 'of unknown version')} at {FRONT_END}"
    show = "from importlib.metadata import version; print(version('comfyui-frontend-package'))"
    return subprocess.check_output([python, "-c", show], text=True).strip()


def pytest_report_header() -> list[str]:
    found = comfyui()
    version = "not found (set COMFYUI_PATH and COMFYUI_PYTHON): that tier is skipped"
    if found:
        show = "from comfyui_version import __version__ as v; print(v)"
        version = (
            f"{subprocess.check_output([found[1], '-c', show], cwd=found[0], text=True).strip()} at {found[0].name}, "
            f"front end {front_end_version(found[1])}"
        )
    return [f"host library: {'notcomfy 0.1.0' if LIBRARY.is_dir() else 'not installed'}", f"real ComfyUI: {version}"]


@pytest.fixture(scope="session")
def real_host() -> tuple[Path, Path]:
    found = comfyui()
    if found is None:
        pytest.skip("no ComfyUI with a Python of its own (set COMFYUI_PATH and COMFYUI_PYTHON)")
    return found


@pytest.fixture(scope="session")
def gguf_pack(real_host):
    found = comfyui_gguf()
    if found is None:
        pytest.skip("no ComfyUI-GGUF among the host's custom nodes (or set COMFYUI_GGUF)")
    if subprocess.run([real_host[1], "-c", "import gguf"], check=False, capture_output=True).returncode:
        pytest.skip("the host's Python has no gguf, which ComfyUI-GGUF needs")
    return found


@pytest.fixture(scope="session")
def host(real_host, tmp_path_factory):
    path, python = real_host
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("models", "input", "output", "temp", "user", "custom_nodes"):
        (base / folder).mkdir()
    subprocess.run([python, Path(__file__).with_name("make_models.py"), base / "models"], cwd=path, check=True)
    (base / "models/diffusion_models").symlink_to(base / "models/checkpoints")
    if loader := comfyui_gguf():
        (base / "custom_nodes/ComfyUI-GGUF").symlink_to(loader)
    (base / "models/loras/broken.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    (base / "custom_nodes/comfyui-lora-x").symlink_to(ROOT)
    (base / "custom_nodes/testing_nodes").symlink_to(Path(__file__).with_name("testing_nodes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "log.txt"
    words = ["main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
    words += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    words += ["--front-end-root", FRONT_END] if FRONT_END else []
    with log.open("w") as out:
        server = subprocess.Popen([python, *words], cwd=path, stdout=out, stderr=subprocess.STDOUT)
    found = Host(f"http://127.0.0.1:{port}", log)
    try:
        for _ in range(600):
            try:
                found.get("/system_stats")
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
        found.base = base
        yield found
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def info(host):
    return host.json("/object_info")


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def plain(host):
    """The latents of the targets without an adapter."""
    return {
        target: host.run({"2": transfer(target=target)["2"], **sampling("2", target == "ssd-1b")}).latent()
        for target in ("sd15-tuned", "sd15-base", "ssd-1b")
    }
