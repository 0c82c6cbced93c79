"""Checks of the numbers that a user gives."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import OptionError

if TYPE_CHECKING:
    from .models.layers import Layer


def check_positive(rank: int, name: str = "rank") -> None:
    """Refuse a rank below 1.

    Raises:
        OptionError: It is.
    """
    if rank < 1:
        raise OptionError("a rank is at least 1", f"{name} {rank}", "give a whole number from 1, for example 64")


def highest_rank(layers: "Iterable[Layer]") -> int:
    """Return the highest rank that one of `layers` can have: the largest `min(m, n)`."""
    return max((min(layer.matrix_shape) for layer in layers), default=0)


def check_rank(rank: int | None, layers: "Iterable[Layer]") -> None:
    """Refuse a rank below 1 or above what every one of `layers` has.

    Raises:
        OptionError: `rank` is out of range.
    """
    most = highest_rank(layers)
    if rank is not None and not 1 <= rank <= most:
        raise OptionError(
            "the rank is out of range", str(rank), f"give a whole number from 1 to {most} for these bases"
        )
