"""Finds the two hosts: ComfyUI's library from the package registry, and a real ComfyUI checkout with its own Python."""

import os
import subprocess
from pathlib import Path

import pytest

# The user's own cache is none of the tests' business.
os.environ["LORAX_CACHE"] = "off"

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / ".venv" / "notcomfy"


def comfyui() -> tuple[Path, Path] | None:
    """Return the checkout and its Python, or None."""
    given = os.environ.get("COMFYUI_PATH")
    for path in [Path(given)] if given else [ROOT.parent / "ComfyUI", Path.home() / "ComfyUI"]:
        pythons = [os.environ.get("COMFYUI_PYTHON"), path / ".venv/bin/python", path / "venv/bin/python"]
        for python in filter(None, pythons):
            if (path / "main.py").is_file() and Path(python).is_file():
                return path, Path(python)
    return None


def pytest_report_header() -> list[str]:
    found = comfyui()
    version = "not found (set COMFYUI_PATH and COMFYUI_PYTHON): that tier is skipped"
    if found:
        show = "from comfyui_version import __version__ as v; print(v)"
        version = (
            f"{subprocess.check_output([found[1], '-c', show], cwd=found[0], text=True).strip()} at {found[0].name}"
        )
    return [f"host library: {'notcomfy 0.1.0' if LIBRARY.is_dir() else 'not installed'}", f"real ComfyUI: {version}"]


@pytest.fixture(scope="session")
def real_host() -> tuple[Path, Path]:
    found = comfyui()
    if found is None:
        pytest.skip("no ComfyUI with a Python of its own (set COMFYUI_PATH and COMFYUI_PYTHON)")
    return found
