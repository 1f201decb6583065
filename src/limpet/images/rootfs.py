"""A root file system in a tar (.tar, .tar.gz, .tar.bz2, .tar.xz, .tar.zst), of any distribution, as an image.

    survey: decompress, read every header ── tree in a tmpfs of a private namespace ── ext4 (mke2fs -d)

The tar may be anyone's. What it could do to us is bounded in the survey (its size, unpacked; its headers), and GNU tar,
which unpacks it, lets no name and no link lead out of the tree. What it does to its guest is its own affair.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from limpet import process
from limpet.errors import BadRequest, InsufficientSpace, LimpetError
from limpet.images import bootstrap
from limpet.images.debian import MAKE_EXT4, SIZE
from limpet.images.registry import ImageFacts

_LARGEST_READ = 1 << 20  # bytes of one header
_LARGEST_WINDOW = 1 << 27  # bytes, zstd's own default
_INSPECTED = ("etc/limpet/image.json", "etc/passwd")
_LARGEST_INSPECTED = 1 << 18  # bytes
_PER_MEMBER = 8 << 10  # bytes of memory: inode, name, a page that is not full
_SLACK = 64 << 20
_TIMEOUT = 1800.0  # seconds
_NOT_OURS = 3  # exit status of the script

# $1 tar, $2 disk, $3 mount point, $4 bytes. The mount points of a boot must be there, and be directories of the tree.
_TO_EXT4 = f"""
mount -t tmpfs -o "mode=0755,nosuid,nodev,noexec,size=$4" tree "$3"
tar -C "$3" -xpf "$1" --numeric-owner --xattrs --xattrs-include='*' --warning=no-timestamp --anchored \
    --exclude='./dev/*' --exclude='dev/*' --exclude='/dev/*' --exclude='./proc/*' --exclude='proc/*' \
    --exclude='/proc/*' --exclude='./sys/*' --exclude='sys/*' --exclude='/sys/*'
cd "$3"
for name in dev proc sys run etc; do
    [ ! -L "$name" ] || {{ echo "/$name is a symbolic link" >&2; exit {_NOT_OURS}; }}
done
for name in dev proc sys run etc var home workspace; do [ -e "$name" ] || [ -L "$name" ] || mkdir -m 0755 "$name"; done
[ -e root ] || [ -L root ] || mkdir -m 0700 root
[ -L var ] || [ -e var/tmp ] || [ -L var/tmp ] || mkdir -m 1777 var/tmp
[ -e tmp ] || [ -L tmp ] || mkdir -m 1777 tmp
cd /
{MAKE_EXT4}"""

_DAMAGE = (
    tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, ValueError,
    OverflowError, RecursionError,
)  # fmt: skip


@dataclass
class Tree:
    """What a survey found. `archive` is a tar that is not compressed; `size` is what it takes in memory, in bytes."""

    archive: Path
    size: int = 0
    members: int = 0
    inspected: dict[str, bytes] = field(default_factory=dict)

    def facts(self, comment: str) -> ImageFacts:
        """Commands run as root unless /etc/limpet/image.json says otherwise."""
        user, home = "root", self._home("root")
        try:
            said = json.loads(self.inspected.get(_INSPECTED[0], b"{}"))
            if isinstance(said, dict) and isinstance(said.get("user"), str) and said["user"]:
                user = said["user"]
                home = said["home"] if isinstance(said.get("home"), str) else self._home(user)
        except ValueError:
            pass
        return ImageFacts(user=user, home=home, comment=comment, source="tar")

    def _home(self, user: str) -> str:
        for line in self.inspected.get(_INSPECTED[1], b"").decode(errors="replace").splitlines():
            fields = line.split(":")
            if len(fields) >= 7 and fields[0] == user and fields[5].startswith("/"):
                return fields[5]
        return "/root" if user == "root" else "/"


def survey(file: Path, plain: Path, *, advance: Callable[[float], None] | None = None) -> Tree:
    """Read a tar to its end and say what is in it; a compressed one is written to `plain` without the compression.
    Raises BadRequest naming the file and what is wrong with it, InsufficientSpace when it is too large for us."""
    limit = min(SIZE, _memory())
    with file.open("rb") as raw:
        stream = _decompressed(raw)
        copy = plain.open("xb") if stream is not raw else None
        try:
            reader = _Forward(stream, copy, limit, _teller(raw, advance))
            tree = Tree(plain if copy else file)
            _read(reader, tree)
            tree.size = reader.tell() + tree.members * _PER_MEMBER + _SLACK
        except LimpetError as error:
            error.message = f"{file}: {error.message}"
            error.args = (error.message,)
            raise
        except _DAMAGE as error:
            what = (
                "it is no tar of a root file system, and no .limpet file"
                if not tree.members
                else "it is truncated or damaged"
            )
            raise BadRequest(f"{file}: {what} ({error})") from None
        finally:
            if copy is not None:
                copy.close()
    return tree


async def write(tree: Tree, work: Path) -> None:
    """Write the file system root.raw into `work`; owners, modes, capabilities and xattrs are kept. Raises BadRequest
    when the tar cannot be unpacked or is no root file system."""
    mount_point = work / "tree"
    mount_point.mkdir()
    arguments = (str(tree.archive), str(work / "root.raw"), str(mount_point), str(tree.size))
    try:
        await process.run(bootstrap.in_namespace(_TO_EXT4, *arguments), timeout=_TIMEOUT)
    except process.CommandFailed as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()[-4:] or ["no reason given"]
        raise BadRequest(f"the tar cannot become an image: {'; '.join(lines)}") from None
    mount_point.rmdir()
    if tree.archive.parent == work:
        tree.archive.unlink()


class _Forward:
    """A stream as a file that is read once, in order, and copied: what tarfile needs. It skips by reading."""

    def __init__(self, stream: IO[bytes], copy: IO[bytes] | None, limit: int, told: Callable[[], None]) -> None:
        self._stream, self._copy, self._limit, self._told = stream, copy, limit, told
        self._position, self.ended = 0, False

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise BadRequest("it has a header of absurd size")
        content = b""
        while len(content) < size and (piece := self._stream.read(size - len(content))):
            content += piece
        self.ended = len(content) < size
        self._position += len(content)
        if self._position > self._limit:
            raise InsufficientSpace(
                f"unpacked it is larger than {self._limit >> 20} MiB", hint="that is what fits in memory, or in a disk"
            )
        if self._copy is not None:
            self._copy.write(content)
        self._told()
        return content

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a header points back")
        while self._position < position and not self.ended:
            self.read(min(_LARGEST_READ, position - self._position))

    def drain(self) -> None:
        while not self.ended:
            self.read(_LARGEST_READ)


def _read(reader: _Forward, tree: Tree) -> None:
    with tarfile.TarFile(fileobj=reader, mode="r", errorlevel=1) as tar:  # type: ignore[arg-type]
        while (member := tar.next()) is not None:
            tree.members += 1
            tar.members = []  # type: ignore[attr-defined]  # or it would remember all of them
            name = os.path.normpath(member.name).lstrip("/")
            if ".." in member.name.split("/"):
                raise BadRequest(f"the name {member.name!r} leads out of the tree")
            if name in _INSPECTED and member.isreg() and member.size <= _LARGEST_INSPECTED:
                content = tar.extractfile(member)
                tree.inspected[name] = content.read() if content is not None else b""
        if reader.ended:
            raise BadRequest("it is truncated")
    if not tree.members:
        raise BadRequest("it is an empty tar")
    reader.drain()


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(6)
    raw.seek(0)
    stream: Any = raw
    if magic.startswith(b"\x1f\x8b"):
        stream = gzip.GzipFile(fileobj=raw)
    elif magic.startswith(b"BZh"):
        stream = bz2.BZ2File(raw)
    elif magic == b"\xfd7zXZ\0":
        stream = lzma.open(raw)  # noqa: SIM115 (it ends with `raw`)
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        stream = decompressor.stream_reader(raw, read_across_frames=True, closefd=False)
    found: IO[bytes] = stream
    return found


def _teller(raw: IO[bytes], advance: Callable[[float], None] | None) -> Callable[[], None]:
    size = max(1, os.fstat(raw.fileno()).st_size)
    return lambda: advance(raw.tell() / size) if advance is not None else None


def _memory() -> int:
    """Bytes of memory that can be had, swap included: the tree is unpacked in a tmpfs."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    values = {words[0]: int(words[1]) << 10 for words in lines if len(words) > 2}
    return values.get("MemAvailable:", 0) + values.get("SwapFree:", 0)
