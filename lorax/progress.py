"""How work that takes long tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what); an exception that it raises stops the work."""


def silent(done: int, total: int, what: str) -> None:
    """Say nothing: the default."""


def unheard(what: str) -> None:
    """Say nothing of one thing that is done."""


def counter(progress: Progress, total: int) -> Callable[[str], None]:
    """Return a function to be called with the name of each thing that is done; it counts, at most to `total`."""
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total, what)

    return tick
