"""Several Move LoRA in a row: each adds its patches, and none takes those of the others for the base model."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from ...lorax.adapters import Adapter
from .patch import apply_adapter
from .types import Clip, Model

MOVED = "lorax_moved"  # the name under which a MODEL carries `Moved`


@dataclass(frozen=True)
class Moved:
    """What Move LoRA added to a MODEL, or to the text encoders of a CLIP.

    Attributes:
        updates: The updates; held, so that an identity means one of them.
        before: `patches_uuid` without them.
        after: `patches_uuid` with them, as long as nothing else was added.
    """

    updates: tuple[object, ...]
    before: UUID
    after: UUID


def apply_moved(model: Model, clip: Clip | None, adapter: Adapter, strength: float) -> tuple[Model, Clip | None]:
    """Return copies of MODEL and CLIP with the adapter as patches (`apply_adapter`) that `without_moved` takes off."""
    patched, patched_clip, _ = apply_adapter(model, clip, adapter, strength)
    _note(model, patched)
    if clip is not None and patched_clip is not None:
        _note(clip.patcher, patched_clip.patcher)
    return patched, patched_clip


def without_moved(model: Model, clip: Clip | None) -> tuple[Model, Clip | None]:
    """Return MODEL and CLIP without what `apply_moved` added; what other nodes added stays."""
    if clip is not None:
        plain, clip = _without(clip.patcher), clip.clone()
        clip.patcher = plain
    return _without(model), clip


def _note(before: Model, after: Model) -> None:
    known: Moved | None = before.attachments.get(MOVED)
    count = {key: len(entries) for key, entries in before.patches.items()}
    added = [entry[1] for key, entries in after.patches.items() for entry in entries[count.get(key, 0) :]]
    updates = (*(known.updates if known else ()), *added)
    after.attachments[MOVED] = Moved(updates, _without(before).patches_uuid, after.patches_uuid)


def _without(patcher: Model) -> Model:
    moved: Moved | None = patcher.attachments.get(MOVED)
    if moved is None:
        return patcher
    ours = set(map(id, moved.updates))
    plain = patcher.clone()
    kept = {key: [entry for entry in entries if id(entry[1]) not in ours] for key, entries in patcher.patches.items()}
    plain.patches = {key: entries for key, entries in kept.items() if entries}
    plain.patches_uuid = moved.before if patcher.patches_uuid == moved.after else patcher.patches_uuid
    return plain
