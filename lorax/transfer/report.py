"""Reports: one row for every layer, and the JSON that other programs read (`report.schema.json`)."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..compare.matching import Assignment
from ..compare.scores import Array, Score
from ..compare.similarity import Similarity
from ..errors import OptionError
from ..models.layers import Layer
from ..options import Choice
from .methods import METHODS
from .notes import Code, Note

SCHEMA_VERSION = 2
SIMILARITY_VERSION = 1
# Pairs that are written as JSON, 360 bytes each in memory. All pairs of SDXL's attention layers are 80,000.
MOST_JSON = 2**20
# Below this share of the update's norm the user sees little of the adapter. The ICLR 2025 paper (table 2) loses 10 to
# 28 % of its score with updates that keep about a quarter; one half is where we start to warn.
WEAK = 0.5
# From here on the effect is called full. Ours: no published figure.
STRONG = 0.8
# Half precision rounds the norm of an update by no more than this.
NORM_ROUNDING = 1e-3
# Beyond this, what is left of an update is no longer the same update, only louder (users go to 4.5 in public threads).
MOST_STRENGTH = 4.0


class Outcome(Choice):
    """What became of one layer of an adapter."""

    TRANSFERRED = "transferred"
    KEPT = "kept unchanged"
    BELOW_THRESHOLD = "below threshold"
    NO_SOURCE_LAYER = "not in source"
    NO_TARGET_LAYER = "not in target"
    SHAPE_MISMATCH = "shape mismatch"
    TWICE = "place taken"
    UNREAD = "not readable"


ARRIVED = (Outcome.TRANSFERRED, Outcome.KEPT)


class Grade(Choice):
    """How much of the effect to expect, by the norm that arrives of what should."""

    STRONG = "strong"
    FAIR = "fair"
    WEAK = "weak"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


def lower(*sides: Score | None) -> float:
    """Return the lower corrected similarity of the sides that have one; NaN where none has."""
    return min((s.corrected for s in sides if s is not None and not math.isnan(s.corrected)), default=math.nan)


def block_and_role(layer: Layer) -> tuple[str, str]:
    """Return the two parts of the name of a layer; of one without a block the component, and the path in it."""
    block = layer.block or layer.component
    return block, layer.name.removeprefix(block + ".")


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: where it came from and went to, how similar the two are, and how much of the update arrived.

    Attributes:
        source: Layer name in the adapter and its source base.
        target: Layer name in the target; empty where there is none.
        outcome: What became of it.
        method: The method that was used; empty where nothing was done.
        rank: The rank of the subspaces that were used; 0 where none were.
        left: Similarity of the two layers on the output side; None where it was not computed.
        right: The same on the input side.
        source_norm: `||delta_weight||_F` before; NaN where it needs a weight that is not there.
        target_norm: `||delta_weight||_F` after; NaN so.
        notes: What else to know.
    """

    source: str
    target: str
    outcome: Outcome
    method: str = ""
    rank: int = 0
    left: Score | None = None
    right: Score | None = None
    source_norm: float = math.nan
    target_norm: float = 0.0
    notes: tuple[Note, ...] = ()

    @property
    def note(self) -> str:
        """What else to know, in words."""
        return "; ".join(map(str, self.notes))

    @property
    def corrected(self) -> float:
        """The lower of the two corrected similarities: an update passes both sides. NaN where there is none."""
        return lower(self.left, self.right)

    @property
    def retained_norm(self) -> float:
        """`||delta_weight after||_F / ||delta_weight before||_F`; NaN for an update of zero or of unknown norm."""
        return self.target_norm / self.source_norm if self.source_norm else math.nan

    @property
    def wanted_norm(self) -> float:
        """`source_norm`, less what the method left out because the target does it already."""
        method = METHODS.get(self.method)
        left_out = method and method.leaves_out and self.outcome is Outcome.TRANSFERRED and not self.rank
        return self.target_norm if left_out else self.source_norm

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data, NaN as None."""
        block, role = block_and_role(Layer(self.source, ()))
        return {
            "source": self.source,
            "block": block,
            "role": role,
            "target": self.target,
            "outcome": str(self.outcome),
            "method": self.method,
            "rank": self.rank,
            "left": _score(self.left),
            "right": _score(self.right),
            "corrected": _number(self.corrected),
            "retained_norm": _number(self.retained_norm),
            "source_norm": _number(self.source_norm),
            "target_norm": _number(self.target_norm),
            "notes": [note.to_json() for note in self.notes],
        }


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a transfer did: a row for every layer of the adapter, and what the file held beyond its layers.

    A layer of the file is one that the file has an update for, read or not. A tensor that is no update of a layer, such
    as a textual-inversion vector, or has no name that is known, is in `unused` only. A layer that feeds several of the
    target has several rows, and counts once.
    """

    adapter: str
    source: str
    target: str
    method: str
    rank: int
    threshold: float
    assignment: Assignment
    rows: list[Row] = field(default_factory=list[Row])
    unused: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many rows had each outcome."""
        return Counter(row.outcome for row in self.rows)

    @property
    def methods(self) -> Counter[str]:
        """How many rows were moved by each method."""
        return Counter(str(row.method) for row in self.rows if row.outcome is Outcome.TRANSFERRED)

    @property
    def layers(self) -> int:
        """How many layers the file has updates for."""
        return len({row.source for row in self.rows})

    @property
    def missing(self) -> list[Row]:
        """A row for each layer of the file that did not arrive, or not with all of its updates."""
        arrived = {row.source for row in self.rows if row.outcome in ARRIVED}
        in_part = Outcome.UNREAD, Outcome.TWICE
        lost = [row for row in self.rows if row.source not in arrived or row.outcome in in_part]
        return list({row.source: row for row in lost}.values())

    @property
    def arrived(self) -> int:
        """How many layers of the file arrived: transferred or kept unchanged."""
        return self.layers - len(self.missing)

    @property
    def retained_norm(self) -> float:
        """`||all updates after||_F / ||all updates before||_F`, over every row; what did not arrive counts as lost.

        Rows of unknown norm are left out; NaN where no other has an update that is not zero.
        """
        return self._share([row.source_norm for row in self._known])

    @property
    def suggested_strength(self) -> float | None:
        """The strength that gives the update its former norm, less what `orthogonal` left out; at most MOST_STRENGTH.

        It is 1 where all of that arrived. None where layers are missing: whether more of the others makes up for them
        was not measured.
        """
        kept = self._kept
        if self.missing:
            return None
        return min(1 / kept, MOST_STRENGTH) if 0 < kept < 1 else 1.0

    @property
    def grade(self) -> Grade:
        """How much of the effect to expect; unknown where the norm of a layer that did not arrive is."""
        kept = self._kept
        if any(row.outcome not in ARRIVED and math.isnan(row.source_norm) for row in self.rows):
            return Grade.UNKNOWN
        if not kept > 0:
            return Grade.NOTHING
        return Grade.WEAK if kept < WEAK else Grade.FAIR if kept < STRONG else Grade.STRONG

    @property
    def left_out(self) -> bool:
        """Whether some of the norm is not there because the target does it already, and not because it was lost."""
        return self.retained_norm < self._kept * (1 - NORM_ROUNDING)

    @property
    def _known(self) -> list[Row]:
        return [row for row in self.rows if not math.isnan(row.source_norm)]

    @property
    def _kept(self) -> float:
        """As `retained_norm`, of what should arrive."""
        return self._share([row.wanted_norm for row in self._known])

    def _share(self, norms: list[float]) -> float:
        before = math.hypot(*norms)
        return math.hypot(*(row.target_norm for row in self._known)) / before if before else math.nan

    @property
    def summary(self) -> str:
        """The verdict in words: layers that arrived, norm that was kept, the strength to use and why."""
        head, unknown = f"{self.arrived} of {self.layers} layers arrived", len(self.rows) - len(self._known)
        retained, strength = self.retained_norm, self.suggested_strength
        if not math.isfinite(retained):
            return f"{head}; {f'the norm of {unknown} is not known' if unknown else 'the update is zero'}"
        head += f", {retained:.0%} of the update's norm kept"
        if unknown:
            head += f" ({unknown} of unknown norm not counted)"
        if strength is None:
            return f"{head}; no strength is suggested, as layers are missing"
        reason = "all of it arrived"
        if f"{strength:.2f}" != "1.00":
            reason = "to make up for what was lost"
        elif self.left_out:
            reason = "what the target does already is left out"
        return f"{head}; suggested strength {strength:.2f} ({reason})"

    @property
    def warnings(self) -> list[Note]:
        """What the user should know and do; empty when all is well."""
        found: list[Note] = []
        if self._kept < WEAK:
            percent, strength = round(self.retained_norm * 100), self.suggested_strength
            if strength:
                values = {"percent": percent, "advice": Note(self._advice), "strength": round(strength, 1)}
                found.append(Note(Code.WEAK_OR_STRENGTH, values))
            else:
                found.append(Note.of(Code.WEAK, percent=percent, advice=Note(self._advice)))
        if missing := self.missing:
            counts = Counter(str(row.outcome) for row in missing)
            outcomes = dict(counts.most_common())
            found.append(Note.of(Code.MISSING, missing=len(missing), layers=self.layers, outcomes=outcomes))
        resized = sum(note.code is Code.BOTH_RESIZED for row in self.rows for note in row.notes)
        if resized:
            found.append(Note.of(Code.MANY_RESIZED, count=resized))
        if self.unused:
            first, why = next(iter(self.unused.items()))
            found.append(Note.of(Code.UNUSED, count=len(self.unused), first=first, why=why))
        return found

    @property
    def _advice(self) -> Code:
        """What to try first, by where most of the update was lost: by whole layers or by the method."""
        lost = {outcome: 0.0 for outcome in Outcome}
        for row in self._known:
            lost[row.outcome] += row.wanted_norm**2 - row.target_norm**2
        most = max(lost, key=lambda outcome: lost[outcome])
        if most is Outcome.BELOW_THRESHOLD:
            return Code.TRY_THRESHOLD
        return Code.TRY_METHOD if most is Outcome.TRANSFERRED else Code.TRY_TARGET

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, valid by `report.schema.json`."""
        return {
            "schema": "lorax-transfer",
            "schema_version": SCHEMA_VERSION,
            "adapter": self.adapter,
            "source": self.source,
            "target": self.target,
            "method": self.method,
            "rank": self.rank,
            "threshold": self.threshold,
            "assignment": self.assignment.to_json(),
            "layers": self.layers,
            "arrived": self.arrived,
            "outcomes": {str(outcome): count for outcome, count in self.outcomes.items()},
            "retained_norm": _number(self.retained_norm),
            "left_out": self.left_out,
            "grade": str(self.grade),
            "suggested_strength": self.suggested_strength,
            "most_strength": MOST_STRENGTH,
            "summary": self.summary,
            "warnings": [warning.to_json() for warning in self.warnings],
            "rows": [row.to_json() for row in self.rows],
            "unused": self.unused,
        }


def check_json(kinds: Iterable[tuple[Sequence[Layer], Sequence[Layer]]]) -> None:
    """Refuse to write more pairs of layers as JSON than fit into the memory.

    Raises:
        OptionError: All pairs of the layers of each kind are too many.
    """
    pairs = sum(len(sources) * len(targets) for sources, targets in kinds)
    if pairs > MOST_JSON:
        raise OptionError("too many pairs for JSON", f"{pairs}, at most {MOST_JSON}", "take the page or the picture")


def similarity_json(similarity: Similarity) -> dict[str, Any]:
    """Return a similarity as plain data, valid by `report.schema.json`: for each kind the matrices of all pairs.

    Raises:
        OptionError: There are too many pairs for that.
    """
    check_json((kind.sources, kind.targets) for kind in similarity.kinds)

    def matrix(values: Array) -> list[list[float | None]]:
        return [[_number(value) for value in line] for line in values.tolist()]

    return {
        "schema": "lorax-similarity",
        "schema_version": SIMILARITY_VERSION,
        "source": similarity.source,
        "target": similarity.target,
        "rank": similarity.rank,
        "kinds": [
            {
                "kind": kind.kind,
                "sources": [layer.name for layer in kind.sources],
                "targets": [layer.name for layer in kind.targets],
                **{
                    side: {value: matrix(getattr(scores, value)) for value in ("phi", "chance", "corrected")}
                    for side, scores in (("left", kind.left), ("right", kind.right))
                },
            }
            for kind in similarity.kinds
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _score(score: Score | None) -> dict[str, float | None] | None:
    if score is None:
        return None
    return {**{key: _number(value) for key, value in asdict(score).items()}, "corrected": _number(score.corrected)}
