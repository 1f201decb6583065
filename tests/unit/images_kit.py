"""Images without a machine: small disks that begin with the superblocks which a real one would have."""

from __future__ import annotations

import struct
from pathlib import Path

from limpet.images import ImageFacts, registry
from limpet.paths import Paths

SIZE = 8 << 20


def paths_in(home: Path) -> Paths:
    paths = Paths(home / "data", home / "cache", home / "run")
    paths.images.mkdir(parents=True)
    return paths


def root_disk(path: Path, content: bytes = b"") -> None:
    """A sparse disk with a clean ext4 superblock, and `content` in its middle."""
    superblock = bytearray(1024)
    struct.pack_into("<HH", superblock, 0x38, 0xEF53, 1)
    _disk(path, {1024: bytes(superblock), SIZE // 2 + 100: content})


def data_disk(path: Path, content: bytes = b"") -> None:
    """The same with the superblock of Btrfs."""
    superblock = bytearray(4096)
    superblock[0x40:0x48] = b"_BHRfS_M"
    _disk(path, {0x10000: bytes(superblock), SIZE - len(content): content})


def publish(
    paths: Paths, name: str, content: bytes, *, tag: str = "latest", data: bytes | None = None,
    facts: ImageFacts | None = None,
) -> registry.Image:  # fmt: skip
    """An image whose root disk holds `content`, and whose data disk holds `data` where that is given."""
    with registry.staging(paths, name) as work:
        root_disk(work / "root.raw", content)
        if data is not None:
            data_disk(work / "data.raw", data)
        return registry.publish(paths, name, work, facts or ImageFacts(), tag=tag)


def strays(paths: Paths) -> list[Path]:
    """What work in progress left behind."""
    return list(paths.data.parent.rglob(".tmp-*"))


def _disk(path: Path, pieces: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, content in pieces.items():
            file.seek(offset)
            file.write(content)
