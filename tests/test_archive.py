"""What the registry of ComfyUI makes of the pack, by its own tool: it is valid, and its archive has what users need."""

import re
import zipfile
from pathlib import Path

import pytest
import setuptools
from setuptools.config.pyprojecttoml import apply_configuration

import lorax

parser = pytest.importorskip("comfy_cli.registry.config_parser")
files = pytest.importorskip("comfy_cli.file_utils")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        files.zip_files(path)
    with zipfile.ZipFile(path) as found:
        return {entry.filename: entry.compress_size for entry in found.infolist()}


def test_the_registry_reads_the_pack_without_a_warning(capsys):
    found = parser.extract_node_configuration(str(ROOT / "pyproject.toml"))
    assert capsys.readouterr().out == ""
    assert found.project.version == lorax.__version__
    assert (found.project.name, found.tool_comfy.publisher_id) == ("comfyui-lora-x", "lora-x")
    assert found.tool_comfy.display_name == "LoRA-X"
    assert found.project.supported_comfyui_version == ">=0.3.64"
    assert found.project.license.text == "Apache-2.0"
    assert "OS Independent" in found.project.supported_os


def test_an_install_into_a_host_brings_no_torch_and_one_without_a_host_does():
    """The registry reads `[project] dependencies`, its installers `requirements.txt`, pip what setuptools makes."""
    found = parser.extract_node_configuration(str(ROOT / "pyproject.toml"))
    assert found.project.dependencies == []
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ['tomli>=2; python_version < "3.11"']
    distribution = setuptools.Distribution()
    apply_configuration(distribution, ROOT / "pyproject.toml")
    assert {re.split("[>;]", need)[0] for need in distribution.install_requires} == {
        "torch",
        "safetensors",
        "numpy",
        "tomli",
    }


def test_the_archive_has_what_the_pack_needs_and_no_more(archive):
    tops = {name.partition("/")[0] for name in archive}
    assert tops == {
        "__init__.py", "nodes", "lorax", "web", "locales", "example_workflows", "pyproject.toml", "requirements.txt",
        "core-requirements.txt", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", ".comfyignore",
    }  # fmt: skip
    for folder, pattern in (("web/docs", "*.md"), ("lorax/models/tables", "*.toml"), ("locales", "*/*.json")):
        inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern)}
        assert inside
        assert inside <= archive.keys()
    assert sum(archive.values()) < 2 * 2**20
