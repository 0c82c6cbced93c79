"""One round: for one style and one seed, train every adapter, move it every way, and measure what it does.

A round is a file in results/: `{"style", "seed", "rows": [...], "groups": [...], "seconds"}`.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lorax import Adapter, LoraxError, TransferOptions, save_adapter, transfer_adapter
from lorax.compare.matching import match_bases
from lorax.compare.similarity import score_layers
from lorax.linalg import decompose
from lorax.models.base import module_base
from lorax.transfer.methods import project

from . import CACHE, FIRST, MODELS, RESULTS, ideas
from .applied import Deltas, changed, dense
from .bases import base
from .data import load
from .model import generate, held_out_loss
from .scorer import plain, scorer
from .sheets import save_sheet
from .tuning import KINDS, tune

PAIRS = ("near", "fine-tune", "pruned", "narrow")
CEILINGS = ("lora-x", "lora-16")
PROMPTS, PICTURES = 24, 64
# On the first models all; on others what decides.
ADAPTERS = tuple(KINDS) if MODELS is FIRST else CEILINGS


@dataclass(frozen=True, slots=True)
class Way:
    """A way to move an adapter.

    Attributes:
        name: What it is called in the tables.
        options: Of `transfer_adapter`; or the name of an idea of ours.
        draws: Whether pictures are drawn too, or only the held-out loss is measured.
        strength: What the result is multiplied with.
    """

    name: str
    options: Mapping[str, Any] | str
    draws: bool = True
    strength: float = 1.0


def product(name: str, draws: bool = True, **options: Any) -> Way:
    return Way(name, {"rank": MODELS.rank, "threshold": -1e9} | options, draws)


# Rules that give each layer its own rank, of its weight.
RULES: dict[str, Callable[[Tensor], int]] = {
    **{f"{share:.0%} of the size": partial(ideas.of_share, share=share) for share in (0.25, 0.5)},
    **{f"{share:.0%} of the energy": partial(ideas.of_energy, share=share) for share in (0.5, 0.9, 0.99)},
}
COPY, PROJECT, ORTHOGONAL = (product(method, method=method) for method in ("copy", "project", "orthogonal"))
SAME = [
    COPY,
    PROJECT,
    ORTHOGONAL,
    *(replace(COPY, name=f"copy, strength {s:g}", draws=False, strength=s) for s in (0.25, 0.5, 0.75, 1.25)),
    *(replace(ORTHOGONAL, name=f"orthogonal, strength {s:g}", draws=False, strength=s) for s in (0.5, 0.75)),
]
COMMON = [
    *SAME,
    product("subspace-null", method="subspace-null"),
    *(product(f"project, rank {rank}", False, method="project", rank=rank) for rank in (6, 12, 48, 96)),
    *(product(f"copy, threshold {t:g}", False, method="copy", threshold=t) for t in (0.0, 0.9)),
    product("index", False, method="index"),
    *(Way(f"project, {rule}", rule, False) for rule in RULES),
    *(
        Way(idea, idea, False)
        for idea in ("soft", "blended", "effect kept", "copy rescaled", "project rescaled", "weighted", "streams")
    ),
]
PUBLISHED = [product(f"{m}, argmax", False, method=m, matching="argmax") for m in ("copy", "project")]
RESIZED = [
    product("index", method="index"),
    product("align", method="align"),
    product("subspace-null", False, method="subspace-null"),
    *(Way(idea, idea) for idea in ("streams", "streams rescaled")),
]
TWICE = Way("projected first", "projected first")
SHORT = [COPY, PROJECT, replace(ORTHOGONAL, draws=False), product("subspace-null", False, method="subspace-null")]
DORA = [product("copy, direction", method="copy"), product("project, dense", method="project", dora="dense")]


def ceiling_of(kind: str) -> str:
    """Return the kind that was trained on the targets, and stands as what is best for this one."""
    return "lora-x" if kind.startswith("lora-x") else "lora-16"


def ways(kind: str, pair: str) -> list[Way]:
    """Return how an adapter of a kind is moved to a target."""
    if pair == "narrow":
        return RESIZED if kind in CEILINGS else []
    if pair == "near" or MODELS is not FIRST:
        return SAME if kind in CEILINGS else []
    if kind.startswith("dora"):
        return DORA
    if kind not in CEILINGS:
        return SHORT
    return COMMON + (PUBLISHED if pair == "pruned" else []) + ([TWICE] if kind == "lora-16" else [])


class Pair:
    """Source and one target, with what is known of both."""

    def __init__(self, name: str) -> None:
        self.name, self.models = name, (base("source"), base(name))
        self.source, self.target = module_base(self.models[0], "source"), module_base(self.models[1], name)
        self.assignment = match_bases(self.source, self.target)
        self.maps = ideas.streams(self.source, self.target, self.assignment)
        layers = [layer for layer in self.target.layers.values() if layer.is_attention]
        self.fed = {layer.name: fed for layer in layers if (fed := self.assignment.source_of(layer.name))}
        self.scores = {}
        for name, fed in self.fed.items():
            layers = self.source.layers[fed], self.target.layers[name]
            left, right = score_layers(self.source, self.target, *([layer] for layer in layers))
            self.scores[name] = left[0, 0], right[0, 0]

    def move(self, way: Way, adapter: Adapter, deltas: Deltas) -> tuple[dict[str, Tensor], float]:
        """Return the updates on the target, and the share of their norm that arrived."""
        if isinstance(way.options, str):
            moved = {name: self._idea(way.options, name, deltas[fed]) for name, fed in self.fed.items()}
        else:
            result, _ = transfer_adapter(adapter, self.source, self.target, TransferOptions(**way.options))
            moved = dense(result, self.target)
        moved = {name: way.strength * delta for name, delta in moved.items()}
        return moved, _norm(moved) / _norm(deltas)

    def _idea(self, idea: str, name: str, dW: Tensor) -> Tensor:
        W_s, W_t = self.source.weight(self.fed[name]), self.target.weight(name)
        if idea == "projected first":
            return _projected(_projected(dW, W_s), W_t)
        if idea in RULES:
            return _projected(dW, W_t, RULES[idea](W_t))
        if idea in ("streams", "streams rescaled"):
            moved = ideas.streamed(dW, self.maps[name])
            return ideas.rescaled(moved, dW, W_s, W_t) if idea.endswith("rescaled") else moved
        if idea == "blended":
            return ideas.blended(dW, _projected(dW, W_t), self.scores[name])
        if idea.endswith(" rescaled"):
            moved = dW if idea.startswith("copy") else _projected(dW, W_t)
            return ideas.rescaled(moved, dW, W_s, W_t)
        return {"soft": ideas.soft, "effect kept": ideas.effect_kept, "weighted": ideas.weighted}[idea](dW, W_s, W_t)


def _projected(dW: Tensor, W: Tensor, rank: int = MODELS.rank) -> Tensor:
    B, A = project(dW, torch.eye(dW.shape[1]), decompose(W, rank))
    return B @ A


def _norm(deltas: Deltas) -> float:
    return math.hypot(*(float(delta.norm()) for delta in deltas.values()))


@cache
def pair_of(name: str) -> Pair:
    """Return it, made once."""
    return Pair(name)


class Round:
    """What is measured for one style and one seed."""

    def __init__(self, style: str, seed: int) -> None:
        self.style, self.seed, self.rows = style, seed, list[dict[str, Any]]()
        data = load()
        measured = data.split("measure")
        self.held_out = data.pictures[style][measured[:PICTURES]], data.tokens[measured[:PICTURES]]
        twice = measured[:PROMPTS].repeat(2)
        self.tokens, self.sentences = data.tokens[twice], data.sentences[twice]
        self.references: dict[tuple[str, str], Tensor] = {}
        self.sheets: dict[str, dict[str, Tensor]] = {}

    def measure(self, model: UNet2DConditionModel, row: dict[str, Any], *, draws: bool = True) -> Tensor | None:
        """Add a row with the measures of a model; return its pictures."""
        row["loss"] = round(held_out_loss(model, *self.held_out), 6)
        pictures = None
        if draws:
            pictures = generate([model], self.tokens, seed=self.seed)
            reference = self.references.get((row["on"], ceiling_of(row["kind"])))
            row |= plain(scorer().measure(pictures, self.sentences, self.style, reference))
        self.rows.append(row)
        if pictures is not None and row["kind"] in ("lora-x", ""):
            self.sheets.setdefault(row["on"], {})[row["way"]] = pictures
        return pictures

    def run(self) -> dict[str, Any]:
        """Train, move and measure all."""
        adapters = {kind: tune(base("source"), kind, self.style, self.seed) for kind in ADAPTERS}
        source = module_base(base("source"))
        if self.seed == 0:
            for kind in CEILINGS:
                save_adapter(adapters[kind], CACHE / f"{kind}-{self.style}.safetensors")
        deltas = {kind: dense(adapter, source) for kind, adapter in adapters.items()}
        for kind in ADAPTERS:
            with changed(base("source"), deltas[kind], source) as model:
                self.measure(model, {"on": "source", "kind": kind, "way": "trained"})
        self.measure(base("source"), {"on": "source", "kind": "", "way": "no adapter"})
        for name in PAIRS:
            pair = pair_of(name)
            self._ceilings(pair)
            self.measure(pair.models[1], {"on": name, "kind": "", "way": "no adapter"})
            for kind in ADAPTERS:
                for way in ways(kind, name):
                    self._moved(pair, kind, way, adapters[kind], deltas[kind])
        return {
            "style": self.style,
            "seed": self.seed,
            "rows": self.rows,
            "groups": self._groups(deltas) if self.seed < 2 and MODELS is FIRST else [],
        }

    def sheet(self, pair: str) -> dict[str, Tensor]:
        """Return the rows of a contact sheet, the LoRA-X adapter's, name -> pictures."""
        found = {"source": self.sheets["source"]["no adapter"], "source + adapter": self.sheets["source"]["trained"]}
        found["target"] = self.sheets[pair]["no adapter"]
        moved = {way: p for way, p in self.sheets[pair].items() if way not in ("no adapter", "trained")}
        found |= {f"target + {way}": pictures for way, pictures in moved.items()}
        return found | {"target + trained on it": self.sheets[pair]["trained"]}

    def _ceilings(self, pair: Pair) -> None:
        for kind in CEILINGS:
            trained = tune(pair.models[1], kind, self.style, self.seed)
            with changed(pair.models[1], dense(trained, pair.target), pair.target) as model:
                row = {"on": pair.name, "kind": kind, "way": "trained"}
                pictures = self.measure(model, row)
                assert pictures is not None
                self.references[pair.name, kind] = pictures

    def _moved(self, pair: Pair, kind: str, way: Way, adapter: Adapter, deltas: Deltas) -> None:
        row = {"on": pair.name, "kind": kind, "way": way.name}
        try:
            moved, share = pair.move(way, adapter, deltas)
        except LoraxError as error:
            self.rows.append(row | {"error": str(error)})
            return
        with changed(pair.models[1], moved, pair.target) as model:
            self.measure(model, row | {"layers": len(moved), "retained": round(share, 5)}, draws=way.draws)

    def _groups(self, deltas: Mapping[str, Deltas]) -> list[dict[str, Any]]:
        """Measure what the update of one group of layers does alone: on the source, and moved."""
        found: list[dict[str, Any]] = []
        for name in ("fine-tune", "pruned"):
            pair = pair_of(name)
            groups: dict[str, list[str]] = {}
            for target in pair.fed:
                groups.setdefault(group_of(target), []).append(target)
            plain_loss = [held_out_loss(model, *self.held_out) for model in pair.models]
            for kind in CEILINGS:
                for group, targets in groups.items():
                    at_home = {pair.fed[target]: deltas[kind][pair.fed[target]] for target in targets}
                    with changed(pair.models[0], at_home, pair.source) as model:
                        gain = plain_loss[0] - held_out_loss(model, *self.held_out)
                    for method in ("copy", "project"):
                        moved = {t: deltas[kind][pair.fed[t]] for t in targets}
                        if method == "project":
                            moved = {t: _projected(dW, pair.target.weight(t)) for t, dW in moved.items()}
                        with changed(pair.models[1], moved, pair.target) as model:
                            there = plain_loss[1] - held_out_loss(model, *self.held_out)
                        scores = [pair.scores[target] for target in targets]
                        found.append(
                            {
                                "on": name,
                                "kind": kind,
                                "way": method,
                                "group": group,
                                "gain_on_source": round(gain, 6),
                                "gain": round(there, 6),
                                "similarity": _mean(min(s.phi for s in sides) for sides in scores),
                                "corrected": _mean(min(s.corrected for s in sides) for sides in scores),
                                "retained": round(_norm(moved) / _norm(at_home), 5),
                            }
                        )
        return found


def group_of(name: str) -> str:
    """Return the part of the model that a layer belongs to: `down_blocks.0 attn1`."""
    parts = name.split(".")
    place = ".".join(parts[1:3]) if parts[1] != "mid_block" else "mid_block"
    return f"{place} {'attn1' if '.attn1.' in name else 'attn2'}"


def _mean(values: Iterable[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return round(sum(found) / len(found), 5) if found else math.nan


def cost(repeats: int = 3) -> dict[str, float]:
    """Return the seconds of drawing 4 pictures with the target alone, and with the source beside it at each step."""
    tokens = load().tokens[:4]
    target, source = base("pruned"), base("source")
    found = {"target alone": [target], "source beside it": [target, source]}
    seconds: dict[str, float] = {}
    for name, models in found.items():
        times: list[float] = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            generate(models, tokens)
            times.append(time.perf_counter() - start)
        seconds[name] = round(min(times[1:]), 3)
    return seconds


def run_round(style: str, seed: int) -> None:
    """Measure, and write results/<style>-<seed>.json; a round that lies there is not done again."""
    path = RESULTS / f"{style}-{seed}.json"
    if path.exists():
        return
    start = time.perf_counter()
    own = Round(style, seed)
    found: dict[str, Any] = {**own.run(), "seconds": round(time.perf_counter() - start)}
    RESULTS.mkdir(exist_ok=True)
    if seed == 0:
        for pair in PAIRS:
            save_sheet(RESULTS / f"{style}-{pair}.jpg", own.sheet(pair))
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path.name}: {len(found['rows'])} rows in {found['seconds']} s", flush=True)
