"""What is written beside every memory image and checkpoint: what it is of, and the seals of all its files.

A manifest carries a digest of itself. Whatever is missing, truncated, changed or of another machine is named and
refused before anything is started from it (FRZ-6); a file whose stamp is as it was sealed need not be read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from limpet.digests import Seal
from limpet.errors import FailedPrecondition
from limpet.models import CheckpointInfo
from limpet.services.machines import MachineFacts
from limpet.vmm.layers import Layers

M = TypeVar("M", bound=BaseModel)
FORMAT = 1


class LayerSeal(BaseModel):
    """One layer of a disk."""

    id: str
    seal: Seal


class Manifest(BaseModel):
    """`disks`: of each disk the layers down to the image, the top one first; `image`: what the lowest lies on, relative
    to the directory of layers. `files`: those beside the manifest."""

    format: int = FORMAT
    info: CheckpointInfo
    disks: dict[str, list[LayerSeal]]
    image: dict[str, str | None]
    machine: MachineFacts | None = None  # None: no memory
    files: dict[str, Seal] = {}

    def layer_ids(self) -> dict[str, str]:
        """The top layer of each disk."""
        return {name: chain[0].id for name, chain in self.disks.items()}

    def problems(self, directory: Path, store: Layers, *, disk_only: bool = False, thorough: bool = False) -> list[str]:
        """What is wrong with its files and layers (`disk_only`: with its layers), each named; empty when all is as it
        was written. Reads only what has another stamp than when it was sealed, or everything (`thorough`)."""
        pairs = [(directory / name, seal) for name, seal in self.files.items() if not disk_only]
        pairs += [(store.path(layer.id), layer.seal) for chain in self.disks.values() for layer in chain]
        found = [seal.problem(path, thorough=thorough) for path, seal in pairs]
        found += [None if path is None else _missing(store, path) for path in self.image.values()]
        return [problem for problem in found if problem]


def write(directory: Path, manifest: BaseModel, name: str) -> None:
    """Write a manifest, with its own digest, into a directory that is not yet published."""
    content = manifest.model_dump(mode="json")
    document = {"digest": _digest(content), "manifest": content}
    (directory / name).write_text(json.dumps(document, indent=1, ensure_ascii=True) + "\n")


def read(model: type[M], path: Path) -> M:
    """A manifest as it was written. Raises FailedPrecondition naming the file when it is not."""
    try:
        document = json.loads(path.read_bytes())
        if document["digest"] != _digest(document["manifest"]):
            raise ValueError("its digest is another")
        if document["manifest"].get("format") != FORMAT:
            raise ValueError(f"it has format {document['manifest'].get('format')}, this limpet knows {FORMAT}")
        return model.model_validate(document["manifest"])
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise FailedPrecondition(f"{path} is damaged or foreign: {str(error).splitlines()[0]}") from None


def chains(store: Layers, disks: dict[str, str], seals: Seals) -> tuple[dict[str, list[LayerSeal]], dict[str, Any]]:
    """Every disk's layers with their seals, and what the lowest ones lie on. Reads what was not sealed before."""
    found: dict[str, list[LayerSeal]] = {}
    images: dict[str, str | None] = {}
    for name, top in disks.items():
        files = store.chain(top)
        below = [file for file in files if file.suffix == ".raw"]
        images[name] = os.path.relpath(below[0], store.path(top).parent) if below else None
        found[name] = [LayerSeal(id=file.stem, seal=seals.of(file)) for file in files if file not in below]
    return found, images


class Seals:
    """Seals of layers that are known already: a layer is immutable once it is in a checkpoint."""

    def __init__(self) -> None:
        self._known: dict[Path, Seal] = {}

    def of(self, path: Path) -> Seal:
        """The seal of a file. What is known of it stays true: a layer that was damaged since is not sealed as it is
        now, so that whoever verifies finds the damage."""
        known = self._known.get(path)
        if known is None or known.problem(path) is None:
            known = self._known[path] = Seal.of(path, known.digest if known else None)
        return known

    def learn(self, store: Layers, manifests: Iterable[Manifest]) -> None:
        """Take over what manifests say."""
        for manifest in manifests:
            for chain in manifest.disks.values():
                for layer in chain:
                    self._known.setdefault(store.path(layer.id), layer.seal)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _missing(store: Layers, relative: str) -> str | None:
    path = store.path("x").parent / relative
    return None if path.is_file() else f"the image {path} is missing"
