"""The families of base models that are known, from `tables/`, and the names of their layers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..files import toml
from .layers import MAIN, NESTED, Layer, LayerTable, flatten, reads_text
from .unet import UNetConfig, diffusers_to_ldm, ldm_to_diffusers

# kind -> layers, width, inner width of the feed-forward
TEXT_SIZES = {
    "clip_l": (12, 768, 3072),
    "clip_h": (24, 1024, 4096),
    "clip_g": (32, 1280, 5120),
    "t5xxl": (24, 4096, 10240),
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder of a family: where it lies in a checkpoint, and how LoRA files call it.

    Attributes:
        component: Its folder in a diffusers pipeline, such as `text_encoder_2`.
        kind: `clip_l`, `clip_g`, `clip_h` or `t5xxl`, as ComfyUI calls them.
        checkpoint: The prefixes that its keys have in single-file checkpoints.
        kohya: The prefix that its modules have in LoRA files in kohya naming.
        depth: Layers of the full-size model.
        width: Its width.
        inner: Inner width of its feed-forward.
    """

    component: str
    kind: str
    checkpoint: tuple[str, ...]
    kohya: str
    depth: int
    width: int
    inner: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the weight shape of each linear layer by its Hugging Face module path."""
        wide, up, down = (self.width, self.width), (self.inner, self.width), (self.width, self.inner)
        if self.kind == "t5xxl":
            parts = {f"0.SelfAttention.{part}": wide for part in "qkvo"}
            parts |= {"1.DenseReluDense.wi_0": up, "1.DenseReluDense.wi_1": up, "1.DenseReluDense.wo": down}
            layer = "encoder.block.{}.layer."
        else:
            # k, v, q, out is the order in which transformers registers them; the indexed format counts by it.
            parts = {f"self_attn.{part}_proj": wide for part in ("k", "v", "q", "out")}
            parts |= {"mlp.fc1": up, "mlp.fc2": down}
            layer = "text_model.encoder.layers.{}."
        return {layer.format(i) + part: shape for i in range(self.depth) for part, shape in parts.items()}


@dataclass(frozen=True, slots=True)
class Variant:
    """A named member of a family, told by its numbers of blocks, its width and modules that it has."""

    label: str
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])
    width: int = 0
    has: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Family:
    """A family of base models that share their layer names, such as `sd1` or `flux`.

    Attributes:
        name: The name of its table.
        label: What people call it.
        component: `unet` or `transformer`.
        kohya: The naming that kohya's scripts flatten in LoRA files: `original` or `diffusers`.
        has: Modules, in the original naming, that its models have.
        lacks: Modules that they do not have.
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
        variants: Named members.
        text_encoders: Its text encoders.
        unet: For a U-Net, the configuration of the full-size model.
    """

    name: str
    label: str
    component: str
    kohya: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    width: tuple[str, tuple[int, ...]] = ("", ())
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    swapped: tuple[str, ...] = ()
    proportions: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    variants: tuple[Variant, ...] = ()
    text_encoders: tuple[TextEncoder, ...] = ()
    unet: UNetConfig | None = None

    @cached_property
    def table(self) -> LayerTable:
        """The layers of the family's full-size model: those of the text encoders and, for a U-Net, all."""
        shapes = self.unet.parameters() if self.unet else {}
        layers = self.layers({key.removesuffix(".weight"): v for key, v in shapes.items() if key.endswith(".weight")})
        for encoder in self.text_encoders:
            layers += [Layer(f"{encoder.component}.{path}", shape) for path, shape in encoder.shapes().items()]
        return LayerTable(layers)

    def layers(self, shapes: Shapes) -> list[Layer]:
        """Return the linear and convolution layers of a model that denoises, fused weights cut into their parts.

        Args:
            shapes: Weight shape of every module, norms included, by module path, original or diffusers.

        Returns:
            The layers, in the order of `shapes`. A module that fits no rule keeps its own path.
        """
        if self.unet is not None:
            return _unet_layers(shapes)
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

    def vectors(self, sizes: Mapping[str, int], layers: Iterable[Layer]) -> list[Layer]:
        """Return norms and biases as layers of one dimension, `unet.mid_block.resnets.0.norm1.weight`.

        Args:
            sizes: Size of every parameter of one dimension, by its name in the model.
            layers: The layers of the same model, whose blocks the parameters lie in.
        """
        layers = list(layers)
        paths = {layer.path: layer.original for layer in layers}
        halves = {layer.path for layer in layers if layer.swapped}
        originals = {original: path for path, original in paths.items()}
        modules = {key.rpartition(".")[0] for key in sizes}
        if self.unet is not None:
            is_ldm = any(original in modules for original in originals)
            names = ldm_to_diffusers({*modules, *originals}) if is_ldm else diffusers_to_ldm({*modules, *paths})
            originals, paths = (names, {}) if is_ldm else ({}, names)
        blocks = {_block(layer.original): layer.block for layer in layers if layer.block and layer.original}
        found: list[Layer] = []
        for key, size in sizes.items():
            module, _, parameter = key.rpartition(".")
            block = blocks.get(_block(module))
            path = originals.get(module) or (block and block.partition(".")[2] + module.removeprefix(_block(module)))
            original = module if path else paths.get(module, "")
            name, swapped = f"{self.component}.{path or module}.{parameter}", (path or module) in halves
            found.append(Layer(name, (size,), f"{original or module}.{parameter}", swapped=swapped))
        return found

    def as_deep(self, layers: Iterable[Layer]) -> int:
        """Return how well the blocks of some layers go with the members of a family of transformers.

        Returns:
            2 where a member ends with the last of these blocks, 1 where one has them all, 0 where none has.
        """
        depths: dict[str, int] = {}
        for path in (layer.path for layer in layers if layer.is_main and self.unet is None):
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

    def is_proportional(self, layers: Sequence[Layer], shape: tuple[int, ...]) -> bool:
        """Return whether a weight of this shape, that of these layers together, has the proportions of the family's."""
        path = layers[0].path if len(layers) == 1 else layers[0].original
        rows, columns = self.proportions.get(_starred(path), (0, 0))
        return len(shape) < 2 or shape[0] * columns == shape[1] * rows

    def find(self, component: str, path: str, shape: tuple[int, ...] = ()) -> list[Layer]:
        """Return the layers that a module path of an adapter file means, as far as the names tell without a base.

        Args:
            component: A text encoder, or `unet` or `transformer`, which both mean the model that denoises.
            path: Dotted or flattened, original or diffusers.
            shape: Shape of the update, by which a fused one is cut.

        Returns:
            No layer, one, or the parts of a fused weight in row order.
        """
        if component not in MAIN or self.unet is not None:
            return self.table.find(component, path)
        if original := self._unflatten(path, self._originals):
            layers = self._cut(original, shape)
            if _starred(original) in self.aliases or original in self.aliases:
                own = (self._original_of(layer.path) for layer in layers)
                layers = [replace(layer, original=o[0]) for layer, o in zip(layers, own, strict=True) if o]
            return layers
        if (known := self._unflatten(path, self._diffusers)) and (fused := self._original_of(known)):
            return [self._layer(known, shape, fused[0])]
        nested = NESTED.match(path)
        return self.find(component, path[nested.end() :], shape) if nested else []

    def part_rows(self, original: str, parts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Return the rows of all parts of a fused weight, as far as the shapes of some tell.

        Args:
            original: The original path of the weight.
            parts: Shape of the parts that are known, by diffusers path.

        Returns:
            The rows by diffusers path, in their order; none where a size is not told.
        """
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

    def spellings(self, layers: Iterable[Layer]) -> dict[str, list[str]]:
        """Return for each alias in a model with these layers the names of the layers that it means, in row order."""
        names = {layer.name for layer in layers}
        found: dict[str, list[str]] = {}
        for alias, (first, *_) in self.aliases.items():
            for path in (name.partition(".")[2] for name in names):
                if first in (path, _starred(path)):
                    spelling = alias.replace("*", _number(path))
                    parts = [f"{self.component}.{part}" for part in self._diffusers_of(spelling)]
                    if names.issuperset(parts):
                        found[spelling] = parts
        return found

    def variant(self, layers: Iterable[Layer]) -> str:
        """Return the label of the member that has these layers, else that of the family."""
        layers = [layer for layer in layers if layer.is_main]
        names = [layer.path for layer in layers]
        originals = {layer.original for layer in layers}
        widths = {layer.shape[1] for layer in layers if layer.original == self.has[0]} if self.has else set[int]()
        for variant in self.variants:
            counted = {container: _count(names, container) for container in variant.blocks}
            right = counted == dict(variant.blocks) and originals.issuperset(variant.has)
            if right and (not variant.width or variant.width in widths):
                return variant.label
        return self.label

    def fits(self, shapes: Shapes) -> bool:
        """Return whether a model with these modules (in either naming) is of this family."""
        places = {module: self._diffusers_of(module) for module in (*self.has, *self.lacks, self.width[0])}
        spelled = {self._diffusers_of(path) for path in shapes if self.aliases and _starred(path) in self.aliases}

        def original(module: str) -> bool:
            return module in shapes or places[module] in spelled

        def diffusers(module: str) -> bool:
            return all(path in shapes for path in places[module] or (module,))

        if not (all(map(original, self.has)) or all(map(diffusers, self.has))):
            return False
        if any(original(module) or diffusers(module) for module in self.lacks):
            return False
        if self.unet is not None:
            widths = {shape[1] if len(shape) > 1 else 0 for path, shape in shapes.items() if reads_text(path)}
            return bool({"input_blocks.0.0", "conv_in"} & set(shapes)) and widths == {self.unet.context_dim}
        module, widths = self.width
        found: tuple[int, ...] = next((shapes[path] for path in (module, *places[module]) if path in shapes), ())
        return not module or (len(found) > 1 and found[1] in widths)

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


# The rest, shared equally, for `*`: queries as wide as the input, keys and values alike; feed-forward rows last.
DEFAULT_ROWS = {2: ("*", "*"), 3: ("n", "*", "*")}
UNKNOWN = Family("unknown", "an unknown family", "transformer", "original")


@cache
def families() -> Mapping[str, Family]:
    """Return the known families by name, in the order in which they are tried."""
    paths = sorted(Path(__file__).with_name("tables").glob("*.toml"))
    found = {path.stem: _family(path.stem, toml.loads(path.read_text(encoding="utf-8"))) for path in paths}
    # U-Nets first: what fits several, such as an adapter for CLIP-L only, most likely is for one of them.
    return dict(sorted(found.items(), key=lambda item: item[1].unet is None))


def recognise(shapes: Shapes) -> Family | None:
    """Return the family of a model that denoises, told by its modules; None if it is none that is known.

    Args:
        shapes: Weight shape of every module, norms included, by module path, original or diffusers.
    """
    return next((family for family in families().values() if family.fits(shapes)), None)


def _family(name: str, entry: dict[str, Any]) -> Family:
    encoders = (
        TextEncoder(e["component"], e["kind"], tuple(e["checkpoint"]), e["kohya"], *TEXT_SIZES[e["kind"]])
        for e in entry.get("text_encoders", ())
    )
    width, unet = entry.get("width"), dict[str, Any](entry.get("unet", {}))
    unet |= {key: tuple(unet[key]) for key in ("channel_mult", "transformer_depth") if key in unet}
    return Family(
        name,
        entry["label"],
        entry["component"],
        entry["kohya"],
        has=tuple(entry.get("has", ())),
        lacks=tuple(entry.get("lacks", ())),
        width=(width["module"], tuple(width["is"])) if width else ("", ()),
        modules={path: (path,) for path in entry.get("same", ())}
        | {k: (v,) if isinstance(v, str) else tuple(v) for k, v in entry.get("modules", {}).items()},
        aliases={k: (v,) if isinstance(v, str) else tuple(v) for k, v in entry.get("aliases", {}).items()},
        rows={k: tuple(v) for k, v in entry.get("rows", {}).items()},
        swapped=tuple(entry.get("swapped", ())),
        proportions={k: (rows, columns) for k, (rows, columns) in entry.get("proportions", {}).items()},
        variants=tuple(
            Variant(v["label"], v.get("blocks", {}), v.get("width", 0), tuple(v.get("has", ())))
            for v in entry.get("variants", ())
        ),
        text_encoders=tuple(encoders),
        unet=UNetConfig(**unet) if unet else None,
    )


def _unet_layers(shapes: Shapes) -> list[Layer]:
    is_ldm = "input_blocks.0.0" in shapes
    other = ldm_to_diffusers(shapes) if is_ldm else diffusers_to_ldm(shapes)
    layers: list[Layer] = []
    for path, shape in shapes.items():
        if len(shape) in (2, 4):
            name, original = (other.get(path, path), path) if is_ldm else (path, other.get(path, ""))
            layers.append(Layer(f"unet.{name}", shape, original))
    return layers


def _count(names: Iterable[str], container: str) -> int:
    """Return how many numbered blocks there are of a container."""
    numbered = re.compile(rf"(.*\.)?{container}\.\d+(?=\.)")
    return len({found.group() for name in names if (found := numbered.match(name))})


def _starred(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path, count=1)


def _number(path: str) -> str:
    found = re.search(r"(?<=\.)\d+(?=\.)", path)
    return found.group() if found else ""


def _block(path: str) -> str:
    """Return the block of an original path, without a component."""
    return Layer(f"x.{path}", ()).block.partition(".")[2]


def _offsets(sizes: list[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(sizes))
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
