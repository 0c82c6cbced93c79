"""Files that are damaged, odd or hostile give a result or a clear error: never another exception, hang or flood."""

import pytest

from lorax import open_base
from reliability import seeds
from reliability.__main__ import mutations, soak
from reliability.readers import Tally, read_adapter

# Of each kind; `python -m reliability mutations` reads more.
FILES = 40
TRANSFERS = 100
# Beyond the warm-up the memory of a process must stay as it is; what 1,000 transfers would add.
GROWTH_BYTES = 10 * 2**20


@pytest.mark.parametrize("kind", seeds.adapters())
def test_the_seeds_are_sound(tmp_path, kind):
    source, target = (open_base(seeds.base_file(tmp_path / f"{i}.safetensors", change=0.2 * i)) for i in range(2))
    tally, path = Tally(), tmp_path / "a.safetensors"
    path.write_bytes(seeds.adapters()[kind])
    for choice in range(3):
        read_adapter(tally, path, source, target, choice)
    assert tally.results == 3
    tally.check()


@pytest.mark.slow
def test_mutated_files(tmp_path):
    found = mutations(FILES, 1, tmp_path)
    assert len(found) == len(seeds.adapters()) + 5
    for kind, tally in found.items():
        assert tally.files >= FILES, kind
        assert tally.errors, kind
        assert tally.results, kind
        tally.check()


@pytest.mark.slow
def test_memory_stays_as_it_is(tmp_path):
    assert soak(TRANSFERS, tmp_path)["bytes_per_transfer"] * 1000 < GROWTH_BYTES
