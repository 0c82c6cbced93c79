"""The families of base models that are known, from `tables/`."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..files import toml
from .family import Family, Shapes, TextEncoder, Variant
from .transformerfamily import TransformerFamily
from .unet import UNetConfig
from .unetfamily import UNetFamily

# kind -> layers, width, inner width of the feed-forward
TEXT_SIZES = {
    "clip_l": (12, 768, 3072),
    "clip_h": (24, 1024, 4096),
    "clip_g": (32, 1280, 5120),
    "t5xxl": (24, 4096, 10240),
}
UNKNOWN = TransformerFamily("unknown", "an unknown family", "transformer", "original")


@cache
def families() -> Mapping[str, Family]:
    """Return the known families by name, in the order in which they are tried."""
    paths = sorted(Path(__file__).with_name("tables").glob("*.toml"))
    found = {path.stem: _family(path.stem, toml.loads(path.read_text(encoding="utf-8"))) for path in paths}
    # U-Nets first: what fits several, such as an adapter for CLIP-L only, most likely is for one of them.
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1], UNetFamily)))


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
    variants = (
        Variant(v["label"], v.get("blocks", {}), v.get("width", 0), tuple(v.get("has", ())))
        for v in entry.get("variants", ())
    )
    shared: dict[str, Any] = {
        "name": name,
        **{key: entry[key] for key in ("label", "component", "kohya")},
        **{key: tuple(entry.get(key, ())) for key in ("has", "lacks")},
        "variants": tuple(variants),
        "text_encoders": tuple(encoders),
    }
    if unet := dict[str, Any](entry.get("unet", {})):
        unet |= {key: tuple(unet[key]) for key in ("channel_mult", "transformer_depth")}
        return UNetFamily(**shared, unet=UNetConfig(**unet))
    width = entry.get("width")
    return TransformerFamily(
        **shared,
        width=(width["module"], tuple(width["is"])) if width else ("", ()),
        modules={path: (path,) for path in entry.get("same", ())} | _paths(entry.get("modules", {})),
        aliases=_paths(entry.get("aliases", {})),
        rows=_paths(entry.get("rows", {})),
        swapped=tuple(entry.get("swapped", ())),
        proportions={k: (rows, columns) for k, (rows, columns) in entry.get("proportions", {}).items()},
    )


def _paths(entries: Mapping[str, str | list[str]]) -> dict[str, tuple[str, ...]]:
    """Return the one path, or the several, that each key of a table stands for."""
    return {key: (paths,) if isinstance(paths, str) else tuple(paths) for key, paths in entries.items()}
