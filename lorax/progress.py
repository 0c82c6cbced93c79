"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what); an exception that it raises stops the work."""


def silent(done: int, total: int, what: str) -> None:
    """Say nothing: the default."""
