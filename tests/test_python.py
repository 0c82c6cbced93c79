"""What a Python that is too old says of the pack."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

ENTRY = Path(__file__).parents[1] / "__init__.py"


def test_an_old_python_gets_a_sentence(monkeypatch):
    ast.parse(ENTRY.read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(sys, "version", "3.9.18 (main)")
    with pytest.raises(ImportError, match=r"LoRA-X needs Python 3\.10 or newer, and this ComfyUI runs on 3\.9\.18"):
        runpy.run_path(str(ENTRY))


def test_the_others_get_the_pack():
    assert "comfy_entrypoint" in runpy.run_path(str(ENTRY))
