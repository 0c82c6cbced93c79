"""The regular expressions of PEFT's configurations, matched in time that is linear in the path.

Python's own `re` takes exponential time for a hostile pattern, and a configuration comes from outside. So a pattern is
made an automaton that follows all its ways at once (K. Thompson, "Regular expression search algorithm", 1968).
"""

import math
import re
from collections.abc import Iterable, Mapping

from ..errors import FormatError

# The numbers are ours: a pattern that names layers has some 60 characters, and takes some 100 steps for a path.
STATES = 2_000
GROUPS = 100
STEPS = 5_000_000
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{\d*,?\d*\}|.", re.DOTALL)
ESCAPE = re.compile(r"\\[\W_wWdDsS]")
REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Pattern:
    """A regular expression: literals, `.`, classes, groups, `|`, `* + ? {m,n}`, `^` and `$`.

    Raises:
        ValueError: It is none, asks for more than this (such as a look-ahead), or is too large.
    """

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = TOKEN.findall(text)
        if text.count("(") > GROUPS:
            raise ValueError(f"a pattern of more than {GROUPS} groups")
        self._position = 0
        # for each state the characters that lead on, and the states that follow without one
        self._steps: list[list[tuple[re.Pattern[str], int]]] = []
        self._free: list[list[tuple[str, int]]] = []
        self._start = self._state()
        self._end = self._either(self._start)
        if self._position < len(self._tokens):
            raise ValueError(f"the pattern {text!r} closes a group that it does not open")

    def matches(self, path: str) -> tuple[bool, int]:
        """Return whether the path, or its end after a dot, is what the pattern describes; and the steps that took."""
        states: set[int] = set()
        steps = 0
        for position in range(len(path) + 1):
            if position == 0 or path[position - 1] == ".":
                states.add(self._start)
            states = self._reached(states, position == 0, position == len(path))
            steps += len(states)
            if position < len(path):
                states = {to for state in states for one, to in self._steps[state] if one.match(path[position])}
        return self._end in states, steps

    def _reached(self, states: Iterable[int], is_start: bool, is_end: bool) -> set[int]:
        """Return the states and all that follow them without a character."""
        found = set(states)
        waiting = list(found)
        while waiting:
            for condition, state in self._free[waiting.pop()]:
                if state not in found and {"": True, "^": is_start, "$": is_end}[condition]:
                    found.add(state)
                    waiting.append(state)
        return found

    def _state(self) -> int:
        if len(self._steps) >= STATES:
            raise ValueError(f"a pattern of more than {STATES} states")
        self._steps.append([])
        self._free.append([])
        return len(self._steps) - 1

    def _follow(self, state: int, condition: str = "", to: int | None = None) -> int:
        to = self._state() if to is None else to
        self._free[state].append((condition, to))
        return to

    def _take(self, *wanted: str) -> str:
        """Return the next token and go past it, if it is one of these (or none is given); else an empty one."""
        token = self._tokens[self._position] if self._position < len(self._tokens) else ""
        if not token or (wanted and token not in wanted):
            return ""
        self._position += 1
        return token

    def _either(self, start: int) -> int:
        """Read alternatives up to the end of their group; return the state after them."""
        end = self._state()
        while True:
            state = self._follow(start)
            while self._position < len(self._tokens) and self._tokens[self._position] not in ("|", ")"):
                state = self._repeated(state)
            self._follow(state, to=end)
            if not self._take("|"):
                return end

    def _repeated(self, start: int) -> int:
        """Read one part with its repeats; return the state after it."""
        begins = self._position
        first = self._follow(start)
        state = self._part(first)
        least, most = self._repeats()
        ends = self._position
        after = [start] * (least == 0) + [state] * (least <= 1 and most != 0)
        for count in range(2, (most or max(least, 1)) + 1):
            self._position = begins
            first = self._follow(state)
            state = self._part(first)
            after += [state] * (count >= least)
        if most is None:
            self._follow(state, to=first)
        self._position = ends
        end = self._state()
        for state in after:
            self._follow(state, to=end)
        return end

    def _repeats(self) -> tuple[int, int | None]:
        """Return how often the part before this position may come at least and at most; None is without an end."""
        token = self._tokens[self._position] if self._position < len(self._tokens) else ""
        counted = re.fullmatch(r"\{(\d*)(,?)(\d*)\}", token)
        if token in REPEATS:
            least, most = REPEATS[token]
        elif counted and (counted[1] or counted[3]):
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        else:
            return 1, 1
        self._position += 1
        self._take("?")  # lazy or not, the same paths match
        again = self._tokens[self._position : self._position + 1]
        if (again and again[0][0] in "*+?{") or (most is not None and most < least):
            raise ValueError(f"a repeat that is none, {token}")
        return least, most

    def _part(self, start: int) -> int:
        token = self._take()
        if token in ("(", "(?:"):
            if token == "(" and self._tokens[self._position : self._position + 1] == ["?"]:
                raise ValueError("a group of a kind that is not known, (?")
            end = self._either(start)
            if not self._take(")"):
                raise ValueError("a group that is not closed")
            return end
        if token in ("^", "$"):
            return self._follow(start, token)
        if token in REPEATS or token[0] == "{" or token == "[" or (token[0] == "\\" and not ESCAPE.fullmatch(token)):
            raise ValueError(f"{token} where a character is expected")
        end = self._state()
        is_set = len(token) > 1 or token == "."
        self._steps[start].append((re.compile(token if is_set else re.escape(token)), end))
        return end


class Patterns:
    """Values by pattern, as PEFT looks them up: the first pattern that matches the path, or its end after a dot.

    Raises:
        ValueError: A pattern is none that is known.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        plain = {key: re.sub(r"\\(?=[.\-])", "", key) for key in values}
        self._plain = {
            path: (position, values[key])
            for position, (key, path) in reversed(list(enumerate(plain.items())))
            if re.fullmatch(r"[\w.\-]+", path)
        }
        self._other = [
            (position, Pattern(key), value)
            for position, (key, value) in enumerate(values.items())
            if not re.fullmatch(r"[\w.\-]+", plain[key])
        ]
        self._steps = 0

    def value(self, path: str, default: float | None) -> float | None:
        """Return the value of the first pattern that matches a module path; `default` if none does.

        Raises:
            FormatError: The patterns take too long.
        """
        ends = (path[start:] for start in (0, *(dot.end() for dot in re.finditer(r"\.", path))))
        found = min((self._plain[end] for end in ends if end in self._plain), default=(math.inf, default))
        for position, pattern, value in self._other:
            if position > found[0]:
                break
            if self._steps > STEPS:
                got = f"more than {STEPS} steps for {len(self._plain) + len(self._other)} patterns"
                raise FormatError("the patterns of the adapter's configuration take too long", got, "simplify them")
            matched, steps = pattern.matches(path)
            self._steps += steps
            if matched:
                return value
        return found[1]
