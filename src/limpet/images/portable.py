"""An image in one file, to carry to another host: `.limpet`, a tar (GNU) of these members, in this order:

    limpet.json     format, image (name, tag and all that `models.ImageInfo` has), disks: size, digest, stored of each
    root.zst        the root disk, see `diskstream`
    data.zst        the data disk, where it is not blank
    digests.json    SHA-256 of each member before it

The reader expects a file from a stranger. It reads exactly these members by itself: no path in the file is ever used,
nothing is larger than declared, nothing is given to a tool, and nothing is published unless all digests are right.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, InsufficientSpace, NotFound
from limpet.images import diskstream, filesystems, registry
from limpet.images.registry import DISKS, SPEC_KEYS, Image, ImageFacts, Reference
from limpet.models import CreateRequest, ImageInfo

FORMAT = 1
SUFFIX = ".limpet"

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)  # of a tar
_LARGEST_DOCUMENT = 1 << 20  # bytes
_LARGEST_DISK = 1 << 44  # bytes: as much as ext4 takes
_SLACK = 64 << 20  # bytes
_USUAL_RATIO = 4  # to which a disk is compressed, at best

Advance = Callable[[float], None]  # told the fraction that is done
T = TypeVar("T")


class _Disk(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=_BLOCK, le=_LARGEST_DISK, multiple_of=_BLOCK)
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    stored: int = Field(ge=0)


class _Manifest(BaseModel):
    format: Literal[1]
    image: ImageInfo
    disks: dict[str, _Disk]


def export(image: Image, file: Path, *, replace: bool = False, advance: Advance | None = None) -> None:
    """Write an image to `file`, durably. Raises NotFound (its directory), AlreadyExists when `file` exists and is not
    to be replaced, FailedPrecondition when the image is damaged, InsufficientSpace; `file` is as it was then."""
    if not file.parent.is_dir():
        raise NotFound(f"there is no directory {file.parent}")
    if file.is_dir() or (file.exists() and not replace):
        raise AlreadyExists(f"{file} exists already", hint="give another name, or --replace")
    try:
        work = durable.staging(file.parent, "export")
    except OSError as error:
        raise FailedPrecondition(f"cannot write to {file.parent}: {error.strerror}") from None
    try:
        durable.require_space(work.parent, image.info.disk_used // _USUAL_RATIO, f"the export of {image.info.name}")
        with (work / "image").open("xb") as target:
            _write(image, target, advance or _silent)
        crashpoint("image.export.before")
        durable.publish(work / "image", file)
        crashpoint("image.export.after")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InsufficientSpace(f"no space left to write {file}", hint="free some space and try again") from None
    finally:
        durable.remove_tree(work)


@dataclass(frozen=True)
class Unpacked:
    """What a `.limpet` file says of its image, whose disks have been unpacked. `digest` is the image's."""

    reference: Reference
    facts: ImageFacts
    digest: str


def is_portable(file: Path) -> bool:
    """Whether a file looks like a `.limpet` file. Raises NotFound."""
    with _open(file) as source:
        return source.read(100).split(b"\0")[0] == b"limpet.json"


def reference(file: Path) -> Reference:
    """What the image in a `.limpet` file was called. Raises as `unpack` does."""
    return _named(file, lambda reader: reader.reference())


def unpack(file: Path, work: Path, *, advance: Advance | None = None) -> Unpacked:
    """Read a `.limpet` file into the directory `work`: root.raw and perhaps data.raw. Raises BadRequest naming the
    file and what is wrong with it, NotFound, InsufficientSpace."""
    return _named(file, lambda reader: reader.read(work), advance)


def _named(file: Path, read: Callable[[_Reader], T], advance: Advance | None = None) -> T:
    try:
        with _open(file) as source:
            return read(_Reader(source, file.stat().st_size, advance or _silent))
    except BadRequest as error:
        raise BadRequest(f"{file}: {error.message}", hint=error.hint) from None


def _open(file: Path) -> BinaryIO:
    try:
        if not file.is_file():
            raise NotFound(f"there is no file {file}")
        return file.open("rb")
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}") from None


def _write(image: Image, target: BinaryIO, advance: Advance) -> None:
    seals = registry.disk_seals(image.directory)
    files = {disk: image.directory / f"{disk}.raw" for disk in DISKS if disk in seals}
    disks = {disk: {**seals[disk], "stored": diskstream.stored(path)} for disk, path in files.items()}
    manifest = {"format": FORMAT, "image": image.info.model_dump(mode="json"), "disks": disks}
    digests = {"limpet.json": _write_document(target, "limpet.json", json.dumps(manifest, indent=2) + "\n")}
    whole, done = sum(path.stat().st_blocks for path in files.values()), 0
    for disk, path in files.items():
        counter = _Hashing(target)
        start = target.tell()
        target.write(bytes(_BLOCK))  # the header, when the size is known
        if diskstream.write(path, counter) != seals[disk]["digest"]:
            raise FailedPrecondition(f"{path} is damaged: its content has changed", hint="limpet image verify")
        end = target.tell()
        target.write(bytes(-counter.count % _BLOCK))
        target.seek(start)
        target.write(_header(f"{disk}.zst", counter.count))
        target.seek(0, io.SEEK_END)
        assert end == start + _BLOCK + counter.count
        digests[f"{disk}.zst"] = counter.hash.hexdigest()
        done += path.stat().st_blocks
        advance(done / max(1, whole))
    _write_document(target, "digests.json", _canonical(digests))
    target.write(_END)


class _Hashing:
    """Writes through, counts and digests."""

    def __init__(self, target: BinaryIO) -> None:
        self._target, self.count, self.hash = target, 0, hashlib.sha256()

    def write(self, data: bytes, /) -> int:
        self.hash.update(data)
        self.count += len(data)
        return self._target.write(data)


def _write_document(target: BinaryIO, name: str, text: str) -> str:
    content = text.encode()
    target.write(_header(name, len(content)) + content + bytes(-len(content) % _BLOCK))
    return hashlib.sha256(content).hexdigest()


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def _canonical(digests: dict[str, str]) -> str:
    return json.dumps(digests, indent=2) + "\n"


class _Reader:
    """One pass over a `.limpet` file."""

    def __init__(self, source: BinaryIO, size: int, advance: Advance) -> None:
        self._source, self._size, self._advance = source, size, advance
        self._digests: dict[str, str] = {}

    def reference(self) -> Reference:
        return _unpacked(self._manifest(self._document("limpet.json"))).reference

    def read(self, work: Path) -> Unpacked:
        manifest = self._manifest(self._document("limpet.json"))
        result = _unpacked(manifest)  # refuse what is wrong with it before its disks are read
        durable.require_space(work.parent, sum(disk.stored for disk in manifest.disks.values()) + _SLACK, "the image")
        for disk in DISKS:
            if (declared := manifest.disks.get(disk)) is not None:
                self._disk(disk, declared, work / f"{disk}.raw")
        expected = _canonical(self._digests).encode()
        if self._document("digests.json") != expected:
            raise _damaged("its digests do not fit its content")
        if self._source.read(len(_END) + 1) != _END:
            raise _damaged("its end is missing, or something follows it")
        return result

    def _manifest(self, content: bytes) -> _Manifest:
        try:
            document = json.loads(content)
            number = document["format"]
            if isinstance(number, int) and number > FORMAT:
                raise BadRequest(
                    f"it is of format {number}, made by a newer limpet; this one reads {FORMAT}", hint="update limpet"
                )
            manifest = _Manifest.model_validate(document)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise _damaged(f"limpet.json makes no sense ({why})") from None
        if "root" not in manifest.disks or not set(manifest.disks) <= set(DISKS):
            raise _damaged(f"its disks are {', '.join(manifest.disks)}")
        if manifest.image.created_at.tzinfo is None:
            raise _damaged("its time has no zone")
        return manifest

    def _disk(self, disk: str, declared: _Disk, path: Path) -> None:
        member = _Member(self._source, self._member(f"{disk}.zst", _LARGEST_DISK), self._tell)
        if diskstream.read(member, path, size=declared.size, limit=declared.stored) != declared.digest:
            raise _damaged(f"the {disk} disk is not what its digest says")
        self._digests[f"{disk}.zst"] = member.finish()
        if (wrong := filesystems.problem(path, disk)) is not None:
            raise BadRequest(f"the {disk} disk is no limpet disk: {wrong}")

    def _document(self, name: str) -> bytes:
        member = _Member(self._source, self._member(name, _LARGEST_DOCUMENT), self._tell)
        content = member.read()
        self._digests[name] = member.finish()
        return content

    def _member(self, name: str, limit: int) -> int:
        """Read a header and return the size of its member, which must be called `name`."""
        raw = _exactly(self._source, _BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise (_foreign() if name == "limpet.json" else _damaged(f"no {name} follows")) from None
        if header.name != name:
            raise _foreign() if name == "limpet.json" else _damaged(f"there is no {name} where it should be")
        if header.size > limit:
            raise _damaged(f"{name} is too large")
        if header.size < 0 or raw != _header(name, header.size):  # a header of ours is nothing but name and size
            raise _damaged(f"the header of {name} is not what it should be")
        if header.size > self._size - self._source.tell():
            raise _damaged("it is truncated")
        return header.size

    def _tell(self) -> None:
        self._advance(min(1.0, self._source.tell() / max(1, self._size)))


class _Member:
    """The content of one member; `finish` reads what is left of it and gives its digest."""

    def __init__(self, source: BinaryIO, size: int, told: Callable[[], None]) -> None:
        self._source, self._left, self._padding, self._told = source, size, -size % _BLOCK, told
        self._hash = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        count = self._left if size < 0 else min(size, self._left)
        content = _exactly(self._source, count)
        self._left -= count
        self._hash.update(content)
        self._told()
        return content

    def finish(self) -> str:
        while self._left:
            self.read(1 << 20)
        if _exactly(self._source, self._padding).strip(b"\0"):
            raise _damaged("there is something between its members")
        return self._hash.hexdigest()


def _unpacked(manifest: _Manifest) -> Unpacked:
    info = manifest.image
    if unknown := set(info.spec) - SPEC_KEYS:
        raise BadRequest(f"its spec has unknown settings: {', '.join(sorted(unknown))}", hint="update limpet")
    try:
        CreateRequest.model_validate(info.spec)
    except ValidationError as error:
        raise _damaged(f"its spec makes no sense ({error.errors()[0]['msg']})") from None
    reference = Reference.parse(f"{info.name}:{info.tag}")
    facts = ImageFacts(
        user=info.user, home=info.home, spec=info.spec, workspace=info.workspace, parent=info.parent,
        comment=info.comment, source="import", created_at=info.created_at,
    )  # fmt: skip
    return Unpacked(reference, facts, info.digest)


def _exactly(source: BinaryIO, count: int) -> bytes:
    content = source.read(count)
    if len(content) != count:
        raise _damaged("it is truncated")
    return content


def _damaged(why: str) -> BadRequest:
    return BadRequest(why, hint="copy or export it again")


def _foreign() -> BadRequest:
    return BadRequest("it is not a .limpet file", hint="`limpet image export NAME FILE` makes one")


def _silent(_fraction: float) -> None:
    pass
