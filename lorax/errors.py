"""The one family of exceptions: what is wrong, what came, what to do."""


def printable(text: str) -> str:
    """Return `text` with every control or unprintable character escaped, safe for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LoraxError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: The rule that was broken, in words.
        got: What came instead, with the file name or key.
        fix: What the user can do.
    """

    def __init__(self, what: str, got: str, fix: str) -> None:
        self.what, self.got, self.fix = printable(what), printable(got), printable(fix)
        super().__init__(f"{self.what}: {self.got}; {self.fix}")


class FileError(LoraxError):
    """A file cannot be opened, is damaged, or is of a kind that is never read (pickle)."""


class FormatError(LoraxError):
    """A sound file that does not hold what was asked for (no adapter, no known base)."""


class MismatchError(LoraxError):
    """Adapter, source and target do not belong together."""


class NumericsError(LoraxError):
    """NaN or Inf where a finite number is needed."""


class OptionError(LoraxError):
    """An argument is out of its range, or two arguments exclude one another."""


class OutputError(LoraxError):
    """The result cannot be written."""
