"""Reading adapter files: the tensors of a file become updates, each of a kind and with its scale."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ..errors import FormatError, LoraxError, NumericsError
from ..files.tensorfile import TensorFile, parse_json
from ..linalg import all_finite
from ..models.base import Base
from ..models.families import families
from ..models.layers import Layer
from .config import Configs, PeftConfig, read_configs
from .diff import VectorLayer
from .keys import EMBEDDING, UNKNOWN_KEY, VECTOR_ROLES, parse, unread_module, why_unknown
from .kinds import kind_of
from .layer import AdapterLayer, times
from .lokr import LokrLayer
from .lora_x import LoraXLayer
from .model import Adapter
from .oft import OftLayer
from .resolve import SpelledUpdate, families_of, names_of, resolve

LORA_X_VERSION = "1"
# component and module path, as a key spells them
Module = tuple[str, str]
# field -> key
Keys = dict[str, str]


def load_adapter(path: str | os.PathLike[str], base: Base | None = None, *, strict: bool = False) -> Adapter:
    """Read an adapter file of any kind that is known, in any naming that is known.

    Args:
        path: A safetensors file. The scale of PEFT's `adapter_model.safetensors` is taken from the
            `adapter_config.json` beside it (see `read_configs`).
        base: The base that it was made for, if at hand: its layers are then known by name even where the base is not
            one of the full-size models.
        strict: Raise at the first update that cannot be used, instead of going on without it.

    Returns:
        The adapter, its tensors in the dtype of the file. What it holds beyond known updates, and every update that is
        broken, is in `unused` with the reason; the layers that lack an update for it are in `unread`.

    Raises:
        FileError: The file is missing or damaged.
        FormatError: It holds no update that can be used; with `strict`, one that cannot be.
        NumericsError: So, because of NaN or Inf.
    """
    file = TensorFile(path)
    modules, namings, unused = _group(file)
    naming = Counter(namings.values()).most_common(1)[0][0] if namings else ""
    if naming == "indexed":
        _check_indexed(file)
    fingerprints = _fingerprints(file) if naming == "lora-x" else {}
    reading = _Reading(file, read_configs(file), fingerprints, strict, unused)
    updates = [u for module, keys in modules.items() for u in reading.updates(module, keys, namings[module])]
    named = families().get(file.metadata.get("base_family", "")) if naming == "lora-x" else None
    resolved = resolve(updates, base, (named,) if named else families_of(updates))
    for spelled, error in resolved.refused:
        reading.refuse(spelled.keys, error)
    if not resolved.layers:
        why = next((f" ({why})" for why in unused.values() if why != UNKNOWN_KEY), "")
        got = f"{file.path} with keys such as {', '.join(list(file.entries)[:2]) or '(none)'}{why}"
        raise reading.first or FormatError("no LoRA and no other adapter in the file", got, "give an adapter file")
    unread: dict[str, str] = {}
    for key, why in unused.items():
        if (module := unread_module(key)) and (found := parse(f"{module}.alpha")):
            names = names_of(found.component, found.path, found.naming, base, resolved.families)
            unread |= dict.fromkeys(names, why)
    for module, keys in modules.items():
        for role in [role for role, key in keys.items() if role != "alpha" and key in unused]:
            parameter = f".{VECTOR_ROLES[role]}" if role in VECTOR_ROLES else ""
            names = names_of(*module, namings[module], base, resolved.families)
            unread |= dict.fromkeys((f"{name}{parameter}" for name in names), unused[keys[role]])
    return Adapter(
        file.path.name,
        resolved.family,
        naming,
        resolved.layers,
        unused,
        file.metadata,
        resolved.origins,
        unread,
        resolved.alternatives,
    )


def _group(file: TensorFile) -> tuple[dict[Module, Keys], dict[Module, str], dict[str, str]]:
    """Sort the keys into updates: for each module its keys by role and its naming, and the rest with a reason."""
    modules: dict[Module, Keys] = {}
    namings: dict[Module, str] = {}
    unused: dict[str, str] = {}
    for key in file.entries:
        parsed = parse(key)
        if file.metadata.get(key) == "<embed>":
            unused[key] = EMBEDDING
        elif parsed is None:
            unused[key] = why_unknown(key)
        elif parsed.role in (parts := modules.setdefault((parsed.component, parsed.path), {})):
            unused[key] = f"a second '{parsed.role}' for the same layer as {parts[parsed.role]}"
        else:
            parts[parsed.role] = key
            namings[parsed.component, parsed.path] = parsed.naming if parsed.role != "delta" else "lora-x"
    return modules, namings, unused


@dataclass(slots=True)
class _Reading:
    """Reads the updates of a file; what cannot be used is left out and said."""

    file: TensorFile
    configs: Configs
    fingerprints: Mapping[str, str]
    strict: bool
    unused: dict[str, str]
    first: LoraxError | None = None

    def updates(self, module: Module, keys: Keys, naming: str) -> Iterator[SpelledUpdate]:
        """Yield the update of the matrix of a module, and those of its parameters of one dimension."""
        config = self.configs.of(module[0], naming)
        parts = _matrix_parts(self.file, keys)
        if parts and (matrix := self._try(parts.values(), partial(self._matrix, module, keys, parts, naming, config))):
            yield matrix
        vectors = keys.keys() & VECTOR_ROLES.keys() | ({"diff"} if _is_vector(self.file, keys) else set())
        if not parts and not vectors:
            self.unused[keys["alpha"]] = "an alpha without an update"
        for role in sorted(vectors):
            if vector := self._try([keys[role]], partial(self._vector, module, keys, role, naming, config)):
                yield vector

    def _try(self, keys: Iterable[str], read: Callable[[], SpelledUpdate]) -> SpelledUpdate | None:
        try:
            return read()
        except LoraxError as error:
            self.refuse(keys, error)
        return None

    def _matrix(self, module: Module, keys: Keys, parts: Keys, naming: str, config: PeftConfig) -> SpelledUpdate:
        shapes = {name: self.file.entries[key].shape for name, key in parts.items()}
        kind = kind_of(shapes)
        kind.check(Layer("", ()), shapes)  # before a number is read
        tensors = {name: self._finite(key) for name, key in parts.items()}
        if "magnitude" in parts.get("dora_scale", ""):  # PEFT's is always per output, whatever its shape
            tensors["dora_scale"] = tensors["dora_scale"].flatten()
        shape = kind.shape_of(shapes)
        component, path = module
        layer = Layer(f"{component}.{path}", shape if len(shape) > 1 else ())  # of outputs alone none can be made
        update = self._scaled(kind.read(layer, tensors), keys, path, config)
        if isinstance(update, LoraXLayer):
            update = replace(update, fingerprint=self.fingerprints.get(parts["delta"].removesuffix(".delta"), ""))
        return SpelledUpdate(component, path, update, shape, naming, tuple(parts.values()))

    def _vector(self, module: Module, keys: Keys, role: str, naming: str, config: PeftConfig) -> SpelledUpdate:
        component, path = module
        key, parameter = keys[role], VECTOR_ROLES.get(role, "weight")
        diff = self._finite(key)
        if role == "lora_bias":  # PEFT scales it as it scales the update
            rank = math.prod(self.file.entries[keys["lora_down"]].shape[:1]) if "lora_down" in keys else 0
            alpha = self._alpha(keys, path, rank, config) if rank else None
            diff = diff if alpha is None or alpha == rank else times(diff, alpha / rank)
        layer = Layer(f"{component}.{path}.{parameter}", (diff.numel(),))
        update = replace(VectorLayer.read(layer, {"diff": diff}), role="diff_b" if role == "lora_bias" else role)
        return SpelledUpdate(component, path, update, layer.shape, naming, (key,), parameter)

    def _scaled(self, update: AdapterLayer, keys: Keys, path: str, config: PeftConfig) -> AdapterLayer:
        """Give a layer its alpha. Without effect, because alpha is 0, it stays, and that is said."""
        if not hasattr(update, "alpha"):
            return update
        alpha = self._alpha(keys, path, update.rank, config)
        if alpha == 0 and "alpha" in keys and not isinstance(update, OftLayer):
            self.unused[keys["alpha"]] = "alpha is 0: the update has no effect, in ComfyUI too"
        if isinstance(update, LokrLayer) and "alpha" not in keys:
            w1, w2 = update.lokr_w1, update.lokr_w2
            if w1 is not None and w2 is not None:
                factor = config.scale_of(path)
                return update if factor == 1 else replace(update, lokr_w1=times(w1, factor))
        return replace(update, alpha=alpha)  # pyright: ignore[reportCallIssue]

    def _alpha(self, keys: Keys, path: str, rank: int, config: PeftConfig) -> float | None:
        if "alpha" not in keys:
            return config.alpha_of(path, rank)
        key = keys["alpha"]
        if math.prod(self.file.entries[key].shape) != 1:
            raise FormatError(
                "alpha is not a number", f"{key} {list(self.file.entries[key].shape)}", "use a sound copy"
            )
        return float(self._finite(key).double())

    def _finite(self, key: str) -> Tensor:
        tensor = self.file.tensor(key)
        if not all_finite(tensor):
            raise NumericsError("an adapter holds NaN or Inf", f"{key} in {self.file.path}", "use a sound copy")
        return tensor

    def refuse(self, keys: Iterable[str], error: LoraxError) -> None:
        """Leave an update out, and say why.

        Raises:
            LoraxError: `strict` is asked for.
        """
        keys = list(keys)
        if self.strict:
            raise type(error)(error.what, f"{keys[0]}: {error.got}", error.fix) from error
        # NaN is the better reason where a file is refused whole.
        if self.first is None or (isinstance(error, NumericsError) and not isinstance(self.first, NumericsError)):
            self.first = error
        self.unused |= dict.fromkeys(keys, f"{error.what}: {error.got}")


def _matrix_parts(file: TensorFile, keys: Keys) -> Keys:
    """Return the keys of a module without its alpha and what is of one dimension."""
    vector = {"diff"} if _is_vector(file, keys) else set[str]()
    return {role: key for role, key in keys.items() if role not in {"alpha", *VECTOR_ROLES} | vector}


def _is_vector(file: TensorFile, keys: Mapping[str, str]) -> bool:
    return "diff" in keys and len(file.entries[keys["diff"]].shape) == 1


def _check_indexed(file: TensorFile) -> None:
    """Refuse indices that count other layers than those whose order is known."""
    known = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
    for component, classes in known.items():
        named = set(re.findall(r"\w+", file.metadata.get(component, "")))
        if named - classes:
            got = f"{file.path} counts {', '.join(sorted(named))}"
            fix = f"convert it with the program that made it; known are {', '.join(sorted(classes))}"
            raise FormatError("an indexed LoRA over layers of unknown order", got, fix)


def _fingerprints(file: TensorFile) -> dict[str, str]:
    version = file.metadata.get("lorax_format_version")
    if version != LORA_X_VERSION:
        fix = f"this version reads {LORA_X_VERSION}: update the package"
        raise FormatError("a LoRA-X file of an unknown format version", f"{file.path}: {version}", fix)
    try:
        return {str(name): str(value) for name, value in parse_json(file.metadata["fingerprints"]).items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise FormatError("a LoRA-X file without fingerprints", str(file.path), "make it again") from error
