"""Models in ComfyUI's own quantised formats, read by the pack in a real ComfyUI."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

# How far a format may be from 16 bits, as a share of the norm of a weight: the steps of 3, 2, 1 and 3 bits of mantissa
# are 1/16 to 1/4 of a number, of which a rounding is off by a part; the fifth has 255 steps for all of a weight.
FAR = {"float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 8, "nvfp4": 1 / 4, "mxfp8": 1 / 16, "int8_tensorwise": 1 / 16}


def test_the_weights_are_those_that_the_host_makes_of_them(host, real_host, tmp_path):
    path, python = real_host
    script = Path(__file__).with_name("read_quantised.py")
    told = subprocess.check_output([python, script, host.base / "models", ROOT, tmp_path], cwd=path, text=True)
    found = json.loads(told)
    if not found:
        pytest.skip("this version of the host has no quantised formats")
    for kind, layers in found.items():
        assert len(layers) > 10
        for theirs, whole in layers.values():
            assert theirs == 0
            assert 0 < whole < FAR[kind]
