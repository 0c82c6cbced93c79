"""Families of diffusion transformers, whose layers are told by a table of their modules."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from typing_extensions import override

from .family import Family, Shapes
from .layers import MAIN, NESTED, Layer, flatten

# The rest, shared equally, for `*`: queries as wide as the input, keys and values alike; feed-forward rows last.
DEFAULT_ROWS = {2: ("*", "*"), 3: ("n", "*", "*")}


@dataclass(frozen=True, eq=False)
class TransformerFamily(Family):
    """A family of diffusion transformers, with the table of its modules.

    Attributes:
        width: A module, and the input widths that it may have, where names alone do not tell.
        modules: Original module path -> the diffusers paths that it is, in row order; `*` for the number of the block.
            Those of one name in both (`same` in the table) map to themselves.
        aliases: Further spellings of original modules, such as those that ComfyUI changes; as `modules`.
        rows: How the rows of a fused weight are shared where it is not as usual: `n` for the number of columns.
        swapped: Original modules whose weight, where it has two rows for each column, makes shift and scale: diffusers
            has the halves in the other order.
        proportions: Rows and columns, in proportion, of weights by which an adapter's family is told where others call
            the module alike, and the size of parts that it lacks; by the diffusers path of the module, the original one
            where it is fused.
    """

    width: tuple[str, tuple[int, ...]] = ("", ())
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    swapped: tuple[str, ...] = ()
    proportions: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    @override
    def layers(self, shapes: Shapes) -> list[Layer]:
        layers: list[Layer] = []
        for path, shape in shapes.items():
            if len(shape) < 2:
                continue
            if (fused := self._original_of(path)) and fused[0] not in shapes:
                original, parts = fused
                rows = _offsets([shapes.get(part, shape)[0] for part in parts])[parts.index(path)]
                layers.append(self._layer(path, shape, original, rows if len(parts) > 1 else None))
            else:
                layers += self._cut(path, shape)
        return layers

    @override
    def fits(self, shapes: Shapes) -> bool:
        paths = {module: self._diffusers_of(module) for module in (*self.has, *self.lacks, self.width[0])}
        spelled = {self._diffusers_of(path) for path in shapes if self.aliases and _starred(path) in self.aliases}

        def original(module: str) -> bool:
            return module in shapes or paths[module] in spelled

        def diffusers(module: str) -> bool:
            return all(path in shapes for path in paths[module] or (module,))

        if not (all(map(original, self.has)) or all(map(diffusers, self.has))):
            return False
        if any(original(module) or diffusers(module) for module in self.lacks):
            return False
        module, widths = self.width
        found: tuple[int, ...] = next((shapes[path] for path in (module, *paths[module]) if path in shapes), ())
        return not module or (len(found) > 1 and found[1] in widths)

    @override
    def find(self, component: str, path: str, shape: tuple[int, ...] = ()) -> list[Layer]:
        if component not in MAIN:
            return super().find(component, path, shape)
        if original := self._unflatten(path, self._originals):
            layers = self._cut(original, shape)
            if _starred(original) in self.aliases or original in self.aliases:
                fused = [self._original_of(layer.path) for layer in layers]
                layers = [replace(layer, original=f[0]) for layer, f in zip(layers, fused, strict=True) if f]
            return layers
        if (known := self._unflatten(path, self._diffusers)) and (fused := self._original_of(known)):
            return [self._layer(known, shape, fused[0])]
        nested = NESTED.match(path)
        return self.find(component, path[nested.end() :], shape) if nested else []

    @override
    def as_deep(self, layers: Iterable[Layer]) -> int:
        depths: dict[str, int] = {}
        for path in (layer.path for layer in layers if layer.is_main):
            container, _, rest = path.partition(".")
            number = rest.partition(".")[0]
            if number.isdecimal():
                depths[container] = max(depths.get(container, 0), int(number) + 1)
        left = [
            [v.blocks[container] - depth for container, depth in depths.items() if container in v.blocks]
            for v in self.variants
        ]
        known = [counts for counts in left if counts]
        if not known:
            return 1
        return 2 if any(set(counts) == {0} for counts in known) else int(any(min(counts) >= 0 for counts in known))

    @override
    def is_proportional(self, layers: Sequence[Layer], shape: tuple[int, ...]) -> bool:
        path = layers[0].path if len(layers) == 1 else layers[0].original
        rows, columns = self.proportions.get(_starred(path), (0, 0))
        return len(shape) < 2 or shape[0] * columns == shape[1] * rows

    @override
    def part_rows(self, original: str, parts: Shapes) -> dict[str, tuple[int, int]]:
        paths = self._diffusers_of(original)
        columns = {shape[1] for shape in parts.values() if len(shape) > 1}
        if not parts.keys() <= set(paths) or len(columns) != 1:
            return {}
        rule = self._rule(original, len(paths))
        alike = {parts[path][0] for path, size in zip(paths, rule, strict=True) if size == "*" and path in parts}
        n = columns.pop()
        told = {"n": n, "*": alike.pop() if len(alike) == 1 else 0}
        if not alike and not told["*"] and (known := self.proportions.get(_starred(original))):
            told["*"] = (n * known[0] // known[1] - rule.count("n") * n) // rule.count("*")
        sizes = [parts[path][0] if path in parts else told[size] for path, size in zip(paths, rule, strict=True)]
        return dict(zip(paths, _offsets(sizes), strict=True)) if all(sizes) else {}

    @override
    def spellings(self, layers: Iterable[Layer]) -> dict[str, list[str]]:
        names = dict.fromkeys(layer.name for layer in layers)
        found: dict[str, list[str]] = {}
        for alias, (first, *_) in self.aliases.items():
            for path in (name.partition(".")[2] for name in names):
                if first in (path, _starred(path)):
                    spelling = alias.replace("*", _number(path))
                    parts = [f"{self.component}.{part}" for part in self._diffusers_of(spelling)]
                    if names.keys() >= set(parts):
                        found[spelling] = parts
        return found

    @cached_property
    def _originals(self) -> dict[str, str]:
        return {flatten(pattern): pattern for pattern in (*self.modules, *self.aliases, *map(_starred, self.has))}

    @cached_property
    def _diffusers(self) -> dict[str, str]:
        found = {flatten(path): path for paths in self.modules.values() for path in paths}
        return {flat.removesuffix("_0"): path for flat, path in found.items() if flat.endswith("to_out_0")} | found

    @cached_property
    def _fused(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {path: (pattern, paths) for pattern, paths in self.modules.items() for path in paths}

    def _unflatten(self, path: str, patterns: Mapping[str, str]) -> str:
        """Return the dotted form of a dotted or flattened path whose pattern is known; empty if none is."""
        flat = flatten(path)
        number = re.search(r"_(\d+)(?=_)", flat)
        if number and (pattern := patterns.get(flat[: number.start()] + "_*" + flat[number.end() :])):
            return pattern.replace("*", number.group(1))
        return patterns.get(flat, "")

    def _original_of(self, path: str) -> tuple[str, tuple[str, ...]] | None:
        """Return the original path of a diffusers path, and all diffusers paths that lie in the same weight."""
        starred, number = _starred(path), _number(path)
        found = self._fused.get(starred) or self._fused.get(path)
        if found is None:
            return None
        return found[0].replace("*", number), tuple(part.replace("*", number) for part in found[1])

    def _diffusers_of(self, path: str) -> tuple[str, ...]:
        for pattern in (_starred(path), path):
            if paths := self.modules.get(pattern) or self.aliases.get(pattern):
                return tuple(part.replace("*", _number(path)) for part in paths)
        return ()

    def _layer(self, path: str, shape: tuple[int, ...], original: str, rows: tuple[int, int] | None = None) -> Layer:
        pair = shape[0] == 2 * shape[1] if len(shape) > 1 else not _number(original)
        swapped = pair and not {_starred(original), original}.isdisjoint(self.swapped)
        return Layer(f"{self.component}.{path}", shape, original, rows, swapped)

    def _rule(self, original: str, parts: int) -> tuple[str, ...]:
        return self.rows.get(_starred(original)) or DEFAULT_ROWS.get(parts) or ("n",) * (parts - 1) + ("*",)

    def _cut(self, original: str, shape: tuple[int, ...]) -> list[Layer]:
        """Return the layers of one original weight; without a shape, only their names."""
        paths = self._diffusers_of(original) or (original,)
        if len(paths) == 1 or len(shape) < 2:
            return [self._layer(path, shape if len(paths) == 1 else (), original) for path in paths]
        rule = self._rule(original, len(paths))
        rest = shape[0] - rule.count("n") * shape[1]
        if rest <= 0 or rest % rule.count("*"):
            return [Layer(f"{self.component}.{original}", shape, original)]
        sizes = [shape[1] if size == "n" else rest // rule.count("*") for size in rule]
        return [
            self._layer(path, (size, *shape[1:]), original, rows)
            for path, size, rows in zip(paths, sizes, _offsets(sizes), strict=True)
        ]


def _starred(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path, count=1)


def _number(path: str) -> str:
    found = re.search(r"(?<=\.)\d+(?=\.)", path)
    return found.group() if found else ""


def _offsets(sizes: list[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(sizes))
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
