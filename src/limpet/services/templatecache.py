"""Templates on the disk: booted, warmed VMs that new sandboxes of the same shape go on from.

    cache/templates/<key>/template.json            what it is of, with the seals of its files
    cache/templates/<key>/ram, state, agent.squashfs   the memory image
    cache/templates/<key>/root.qcow2, data.qcow2   its disks; hard links of them lie among the layers, so that a cache
                                                   that is deleted takes nothing from the sandboxes built on them

The key is a hash of everything that the template depends on: when anything changes, it is not found any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from limpet import durable, log
from limpet.crashpoint import crashpoint
from limpet.digests import Seal
from limpet.errors import FailedPrecondition, LimpetError, NotFound
from limpet.models import TemplateInfo
from limpet.services import manifests
from limpet.services.catalogue import keep, size_of
from limpet.services.machines import MachineFacts
from limpet.vmm import command
from limpet.vmm.layers import Layers
from limpet.vmm.memory import MemoryImage

DISKS = ("root", "data")
_MANIFEST = "template.json"
_log = log.get("templates")


class TemplateManifest(BaseModel):
    """`digest` is the image's, `artifacts` the key of kernel, initramfs and agent disk."""

    format: int = manifests.FORMAT
    key: str
    image: str
    digest: str
    artifacts: str
    machine: MachineFacts
    created_at: datetime
    files: dict[str, Seal]


@dataclass(frozen=True)
class Template:
    directory: Path
    manifest: TemplateManifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def memory(self) -> MemoryImage:
        return MemoryImage(self.directory)

    @property
    def layers(self) -> dict[str, str]:
        """The names of its disks among the layers: by content, because a template that is built anew under the same key
        has other disks, while sandboxes still lie on those of the earlier one."""
        return {disk: f"ly_{self.manifest.files[f'{disk}.qcow2'].digest[:16]}-{disk}" for disk in DISKS}


def key_of(image_digest: str, artifacts: str, machine: MachineFacts) -> str:
    """What a template of these is called. The source of the command line is in it: a machine of another shape cannot
    load the state."""
    shape = Path(command.__file__).read_bytes()
    parts = [image_digest.encode(), artifacts.encode(), machine.model_dump_json().encode(), shape]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class TemplateCache:
    """The templates in one directory; other daemons may share it."""

    def __init__(self, directory: Path, layers: Layers) -> None:
        self._directory, self._layers = directory, layers
        self._trusted: dict[str, tuple[Any, ...]] = {}  # key: the stamps with which all files were found whole

    @property
    def directory(self) -> Path:
        return self._directory

    def all(self) -> list[Template]:
        """Those that can be read, the most recently used first."""
        found: list[Template] = []
        for directory in self._directories():
            with contextlib.suppress(LimpetError):
                found.append(_read(directory))
        return sorted(found, key=lambda template: self.used_at(template), reverse=True)

    def get(self, key: str) -> Template:
        """Raises NotFound, FailedPrecondition when it is damaged."""
        return _read(self._find(key))

    def whole(self, template: Template) -> str | None:
        """What is wrong with it, or None; reads files whose stamps are not known. Blocks."""
        paths = [template.directory / name for name in template.manifest.files]
        if (stamps := _stamps(paths)) is not None and self._trusted.get(template.key) == stamps:
            return None
        for name, seal in template.manifest.files.items():
            if (problem := seal.problem(template.directory / name)) is not None:
                return problem
        self._link(template)
        self._trusted[template.key] = _stamps(paths) or ()
        return None

    def _link(self, template: Template) -> None:
        for disk, layer in template.layers.items():
            if not self._layers.path(layer).exists():
                keep(template.directory / f"{disk}.qcow2", self._layers.path(layer))

    def touch(self, template: Template) -> None:
        """It was used just now."""
        with contextlib.suppress(OSError):
            os.utime(template.directory / _MANIFEST)

    def used_at(self, template: Template) -> datetime:
        try:
            return datetime.fromtimestamp((template.directory / _MANIFEST).stat().st_mtime, UTC)
        except OSError:
            return template.manifest.created_at

    def publish(self, staging: Path, manifest: TemplateManifest) -> Template:
        """Give a finished template its name. Blocks. Another daemon may have been faster: then that one is it."""
        manifests.write(staging, manifest, _MANIFEST)
        target = self._directory / manifest.key
        try:
            durable.publish(staging, target)
        except OSError:
            if not target.is_dir():
                raise
            durable.remove_tree(staging)
        return self.get(manifest.key)

    def remove(self, key: str) -> int:
        """Forget a template; the bytes that its files took. Sandboxes made from it keep what they need."""
        directory = self._find(key)
        freed = size_of(directory)
        crashpoint("template.remove.before")
        durable.remove_tree(directory)
        crashpoint("template.remove.after")
        self._trusted.pop(key, None)
        return freed

    def roots(self) -> Iterator[str]:
        """The layers that templates keep."""
        for template in self.all():
            yield from template.layers.values()

    def trim(self, limit: int) -> list[str]:
        """Remove the least recently used templates until all take at most `limit` bytes; the newest one stays."""
        kept, removed, total = 0, [], 0
        for template in self.all():
            total += size_of(template.directory)
            if kept and total > limit:
                self.remove(template.key)
                removed.append(template.key)
            else:
                kept += 1
        return removed

    def info(self, template: Template, *, current: bool) -> TemplateInfo:
        """A template as users see it."""
        manifest = template.manifest
        return TemplateInfo(
            key=manifest.key, image=manifest.image, digest=manifest.digest, vcpus=manifest.machine.vcpus,
            memory_mib=manifest.machine.memory_mib, network=manifest.machine.network, accel=manifest.machine.accel,
            size=size_of(template.directory), created_at=manifest.created_at, used_at=self.used_at(template),
            current=current,
        )  # fmt: skip

    def _find(self, key: str) -> Path:
        directory = self._directory / key
        if not directory.is_dir() or directory not in self._directories():
            raise NotFound(f"no template {key}", hint="limpet template ls")
        return directory

    def _directories(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        return sorted(child for child in self._directory.iterdir() if not child.name.startswith("."))


def _read(directory: Path) -> Template:
    """Raises FailedPrecondition naming what is damaged, or not what its name says."""
    template = Template(directory, manifests.read(TemplateManifest, directory / _MANIFEST))
    if template.key != directory.name or not template.manifest.files.keys() >= {f"{disk}.qcow2" for disk in DISKS}:
        raise FailedPrecondition(f"{directory} is not the template that it is named after")
    return template


def _stamps(paths: list[Path]) -> tuple[Any, ...] | None:
    try:
        return tuple((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
                     for found in map(os.stat, paths))  # fmt: skip
    except OSError:
        return None
