"""The checkpoints on this host: found on the disk, published by one rename, removed as a whole.

checkpoints/<ck_id>/checkpoint.json   see manifests.py
checkpoints/<ck_id>/ram, state        the memory, when it was taken along
checkpoints/<ck_id>/agent.squashfs    the agent disk that it has mounted (a hard link where possible)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from limpet import durable, log
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, FailedPrecondition, LimpetError, NotFound, nearest
from limpet.models import CheckpointInfo
from limpet.services import manifests
from limpet.services.manifests import Manifest, Seals
from limpet.vmm.layers import Layers, copy, occupied

_MANIFEST = "checkpoint.json"
_SHORTEST = 4  # characters of an id's beginning, behind `ck_`
_log = log.get("checkpoints")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    directory: Path
    manifest: Manifest

    @property
    def info(self) -> CheckpointInfo:
        return self.manifest.info


class Catalogue:
    """All checkpoints, by id. Read once; the daemon is the only one that changes them."""

    def __init__(self, directory: Path, layers: Layers) -> None:
        self._directory, self._layers = directory, layers
        self._known: dict[str, Checkpoint] = {}
        self.damaged: dict[str, str] = {}  # id: what is wrong with its manifest
        self.seals = Seals()

    def load(self) -> None:
        """Read the directory. A checkpoint whose manifest is damaged is kept, named and never used."""
        self._known.clear()
        self.damaged.clear()
        for directory in sorted(self._directory.glob("ck_*")) if self._directory.is_dir() else ():
            try:
                self._known[directory.name] = _read(directory)
            except LimpetError as error:
                self.damaged[directory.name] = error.message
                _log.error("damaged checkpoint", checkpoint=directory.name, reason=error.message)
        self.seals.learn(self._layers, (known.manifest for known in self._known.values()))

    def all(self) -> list[Checkpoint]:
        """The oldest first."""
        return sorted(self._known.values(), key=lambda known: known.info.id)

    def of(self, sandbox_id: str) -> list[Checkpoint]:
        """Those of one sandbox, the oldest first."""
        return [known for known in self.all() if known.info.sandbox_id == sandbox_id]

    def roots(self) -> Iterator[str]:
        """The layers that checkpoints need. Of a damaged one nothing is known: see garbage.py."""
        for known in self._known.values():
            yield from known.manifest.layer_ids().values()

    def find(self, reference: str, sandbox_id: str | None = None) -> Checkpoint:
        """By id, the beginning of one, or (within one sandbox) a label, of which the newest counts. Raises NotFound,
        BadRequest when several begin so, FailedPrecondition for a damaged one."""
        if reference in self.damaged:
            raise BadRequest(f"{self.damaged[reference]}", hint=f"limpet checkpoint rm {reference}")
        candidates = self.all() if sandbox_id is None else self.of(sandbox_id)
        labelled = [known for known in candidates if sandbox_id and known.info.label == reference]
        begin = reference if reference.startswith("ck_") else f"ck_{reference}"
        matching = [known for known in candidates if known.info.id.startswith(begin)]
        exact = [known for known in matching if known.info.id == begin]
        if exact or labelled:
            return (exact or labelled)[-1]
        if len(matching) > 1:
            ids = ", ".join(known.info.id for known in matching[:5])
            raise BadRequest(
                f"{reference!r} is the beginning of {len(matching)} checkpoints", hint=f"for example {ids}"
            )
        if not matching or len(begin) < len("ck_") + _SHORTEST:
            names = [known.info.label or known.info.id for known in candidates]
            raise NotFound(f"no checkpoint {reference!r}", hint=nearest(reference, names) or "limpet checkpoint ls")
        return matching[0]

    def publish(self, staging: Path, manifest: Manifest) -> Checkpoint:
        """Give a finished checkpoint its name: the rename is the commit point. Blocks while the disk writes."""
        manifests.write(staging, manifest, _MANIFEST)
        target = self._directory / manifest.info.id
        crashpoint("checkpoint.publish.before")
        durable.publish(staging, target)
        crashpoint("checkpoint.publish.after")
        published = self._known[manifest.info.id] = Checkpoint(target, manifest)
        return published

    def forget(self, checkpoint_id: str) -> int:
        """Remove a checkpoint and its memory; the bytes that this freed. Its layers are collected when nothing else
        needs them."""
        directory = self._directory / checkpoint_id
        freed = size_of(directory)
        crashpoint("checkpoint.remove.before")
        durable.remove_tree(directory)
        crashpoint("checkpoint.remove.after")
        self._known.pop(checkpoint_id, None)
        self.damaged.pop(checkpoint_id, None)
        return freed


def _read(directory: Path) -> Checkpoint:
    """Raises FailedPrecondition naming what is damaged."""
    manifest = manifests.read(Manifest, directory / _MANIFEST)
    if manifest.info.id != directory.name:
        raise FailedPrecondition(f"{directory} holds another checkpoint: {manifest.info.id}")
    return Checkpoint(directory, manifest)


def keep(source: Path, target: Path) -> None:
    """Have a file under a second name, whatever becomes of the first: a hard link, a copy across file systems.
    Raises AlreadyExists, and what `copy` raises."""
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)


def size_of(directory: Path) -> int:
    """Bytes that the files of a directory occupy."""
    with contextlib.suppress(FileNotFoundError):
        return sum(occupied(file) for file in directory.iterdir())
    return 0
