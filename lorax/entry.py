"""How the command line meets the system: consoles that know few characters, what ends it from outside, exit status."""

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from .console import fail
from .errors import LoraxError, printable

# What ends a program from outside: Ctrl-C, the system, a terminal that closes. Windows has SIGBREAK and no SIGHUP.
ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


class _Interrupted(SystemExit):
    """One of ENDINGS came. What is half done is cleared away as after any error."""


def _interrupted(number: int, _: object) -> NoReturn:
    raise _Interrupted(128 + number)


def run(command: Callable[[], object]) -> None:
    """Run a command of the command line.

    Its exit status: 0; 1 an error, in one line; 2 wrong usage; 128 and the number of the signal that ended it, such as
    130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the console of Windows knows 256 characters
            stream.reconfigure(errors="backslashreplace")
    for number in ENDINGS:
        if number in ENDINGS[:2] or signal.getsignal(number) is not signal.SIG_IGN:  # nohup: it outlives the terminal
            signal.signal(number, _interrupted)
    try:
        command()
    except LoraxError as error:
        _fail(str(error))
    except _Interrupted as end:
        _fail("interrupted", end.code)
    except OSError as error:  # of a file that nothing else looks after, such as the terminal
        where = "" if error.filename is None else f"{error.filename}: "
        _fail(f"the system refuses: {where}{error.strerror or error}; see to the disk and its permissions")


def _fail(error: str, status: int | str | None = 1) -> NoReturn:
    with suppress(OSError):
        fail(printable(error))
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: no console
        try:
            stream.flush()
        except OSError:  # else the interpreter tries again at its end, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
