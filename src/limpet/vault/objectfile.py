"""The one file format of the vault: objects, an index of them, and a manifest that says what the file is for.

    magic | objects, one zstd frame each | index | manifest | trailer

    index     one entry for each object, in the order of (pack, ordinal): these two numbers, where its frame is, how
              long, the frame's CRC-32 and the SHA-256 of what it holds
    manifest  JSON
    trailer   where index and manifest are, their SHA-256, and the *seal*: the SHA-256 of the trailer before it

Nothing lies between these parts, so that every byte is covered: frames by their CRC, their content by its digest, index
and manifest by the trailer, the trailer by the seal. A file is written once, from beginning to end.

An object is addressed as (pack, ordinal): the number of the generation that brought it, and its place there. Compaction
moves objects between files and never gives them another address.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from limpet.durable import NewFile
from limpet.vault.errors import Damaged

MAGIC = b"limpetV1"
MAX_OBJECT = 16 << 20  # bytes; what says that it holds more is no object
_ENTRY = struct.Struct("<IIQII32s")
_TRAILER = struct.Struct("<8sQIQ32s32s")  # magic, where the index begins, its entries, bytes of the manifest, digests
_SEAL = 32
_BUFFER = 1 << 20


class Ref(NamedTuple):
    """The address of an object, and the SHA-256 of what it holds."""

    pack: int
    ordinal: int
    digest: bytes


class Entry(NamedTuple):
    """One line of the index."""

    pack: int
    ordinal: int
    offset: int
    length: int
    crc: int
    digest: bytes


class ObjectWriter:
    """Writes such a file. Objects must come in the order of their addresses."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self._buffer = bytearray(MAGIC)
        self._index = bytearray()
        self._compressor = zstandard.ZstdCompressor(level=1)
        self.size = len(MAGIC)  # bytes so far
        self.count = 0

    def add(self, pack: int, ordinal: int, digest: bytes, raw: bytes) -> None:
        """Compress and append an object."""
        self.append(pack, ordinal, digest, self._compressor.compress(raw))

    def append(self, pack: int, ordinal: int, digest: bytes, frame: bytes) -> None:
        """Append the frame of an object."""
        self._index += _ENTRY.pack(pack, ordinal, self.size, len(frame), zlib.crc32(frame), digest)
        self._put(frame)
        self.count += 1

    def read(self, place: int) -> bytes:
        """What the object holds that was added as number `place` of this file."""
        entry = Entry(*_ENTRY.unpack_from(self._index, place * _ENTRY.size))
        written = self.size - len(self._buffer)
        if entry.offset >= written:
            frame = bytes(self._buffer[entry.offset - written : entry.offset - written + entry.length])
        else:
            frame = self._file.read(entry.offset, entry.length)
        return decompress(frame)

    def finish(self, manifest: bytes) -> str:
        """Write what follows the objects; returns the seal. The caller makes it durable."""
        index = bytes(self._index)
        trailer = _TRAILER.pack(
            MAGIC, self.size, self.count, len(manifest),
            hashlib.sha256(index).digest(), hashlib.sha256(manifest).digest(),
        )  # fmt: skip
        seal = hashlib.sha256(trailer)
        self._put(index + manifest + trailer + seal.digest())
        self._flush()
        return seal.hexdigest()

    def _put(self, data: bytes) -> None:
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        self._file.write(bytes(self._buffer))
        self._buffer.clear()


class ObjectFile:
    """Reads such a file: the trailer at once, the rest when asked. Threads may share one. Raises Damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.size = os.fstat(self._fd).st_size
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        trailer = self._at(max(0, self.size - _TRAILER.size - _SEAL), _TRAILER.size + _SEAL, "trailer")
        covered, seal = trailer[:-_SEAL], trailer[-_SEAL:]
        if hashlib.sha256(covered).digest() != seal:
            raise Damaged(f"{path} is damaged: its trailer has changed")
        self.seal = seal.hex()
        magic, self._index_at, self.count, self._manifest_size, self._index_digest, self._manifest_digest = (
            _TRAILER.unpack(covered)
        )
        if magic != MAGIC or self._manifest_at + self._manifest_size + len(trailer) != self.size:
            raise Damaged(f"{path} is damaged: its parts do not add up to its {self.size} bytes")

    def __del__(self) -> None:  # the last thread that reads it ends it
        if self._fd >= 0:
            os.close(self._fd)

    @property
    def _manifest_at(self) -> int:
        return int(self._index_at + self.count * _ENTRY.size)

    def manifest(self) -> bytes:
        """The verified manifest."""
        found = self._at(self._manifest_at, self._manifest_size, "manifest")
        if hashlib.sha256(found).digest() != self._manifest_digest:
            raise Damaged(f"{self.path} is damaged: its manifest has changed")
        return found

    def index(self) -> Iterator[Entry]:
        """All entries of the verified index."""
        found = self._at(self._index_at, self.count * _ENTRY.size, "index")
        if hashlib.sha256(found).digest() != self._index_digest:
            raise Damaged(f"{self.path} is damaged: its index has changed")
        return map(Entry._make, _ENTRY.iter_unpack(found))

    def read(self, ref: Ref) -> bytes:
        """What an object holds, verified."""
        entry = self._find(ref.pack, ref.ordinal)
        if entry is None:
            raise Damaged(f"{self.path} is damaged: object {ref.pack}.{ref.ordinal} is not in it")
        raw = decompress(self._at(entry.offset, entry.length, f"object {ref.pack}.{ref.ordinal}"))
        if hashlib.sha256(raw).digest() != ref.digest:
            raise Damaged(f"{self.path} is damaged: object {ref.pack}.{ref.ordinal} is not what was written")
        return raw

    def frame(self, entry: Entry) -> bytes:
        """The frame of an object, verified by its CRC."""
        found = self._at(entry.offset, entry.length, name := f"object {entry.pack}.{entry.ordinal}")
        if zlib.crc32(found) != entry.crc:
            raise Damaged(f"{self.path} is damaged: {name} has changed")
        return found

    def verify(self) -> Iterator[tuple[Entry, str | None]]:
        """Read every byte: yields each object with what is wrong with it, None when nothing is. Raises Damaged when the
        file as a whole is wrong."""
        if self._at(0, len(MAGIC), "head") != MAGIC:
            raise Damaged(f"{self.path} is damaged: it does not begin as it should")
        self.manifest()
        position = len(MAGIC)
        for entry in self.index():
            problem = None
            try:
                if entry.offset != position:
                    raise Damaged(f"{self.path} is damaged: there is something between its objects")
                if hashlib.sha256(decompress(self.frame(entry))).digest() != entry.digest:
                    raise Damaged(f"{self.path} is damaged: object {entry.pack}.{entry.ordinal} has changed")
            except Damaged as error:
                problem = error.message
            position = entry.offset + entry.length
            yield entry, problem
        if position != self._index_at:
            raise Damaged(f"{self.path} is damaged: there is something behind its objects")

    def _find(self, pack: int, ordinal: int) -> Entry | None:
        """Look an address up without reading all of the index. No object is further behind than its ordinal in a file
        of one generation, where it is also the place unless objects were left out."""
        low, high, place = 0, self.count, ordinal
        while low < high:
            place = place if low <= place < high else (low + high) // 2
            entry = Entry._make(_ENTRY.unpack(self._at(self._index_at + place * _ENTRY.size, _ENTRY.size, "index")))
            if (entry.pack, entry.ordinal) == (pack, ordinal):
                return entry
            low, high = (place + 1, high) if (entry.pack, entry.ordinal) < (pack, ordinal) else (low, place)
            place = -1
        return None

    def _at(self, offset: int, length: int, what: str) -> bytes:
        try:
            found = os.pread(self._fd, length, offset) if offset + length <= self.size else b""
        except OSError as error:
            raise Damaged(f"{self.path} is damaged: its {what} cannot be read: {error.strerror}") from error
        if len(found) != length:
            raise Damaged(f"{self.path} is damaged: its {what} is cut off")
        return found


def decompress(frame: bytes) -> bytes:
    """What a frame holds; the caller knows its digest. Something else, or nothing, when it is damaged."""
    try:
        if zstandard.frame_content_size(frame) > MAX_OBJECT:
            return b""
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError:
        return b""
