"""A disk as a stream: what is not zero in it, block by block, compressed.

    zstd frame of:  offset u64, length u32, `length` bytes      MiB-aligned blocks in ascending order (see `digests`)
                    …
                    size u64, 0 u32                             the end: the disk's size

Numbers are big-endian. The reader takes streams from strangers: it never holds more than a block and zstd's window in
memory and writes no more than was declared.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import zstandard

from limpet.digests import BLOCK, Digest, blocks, extents
from limpet.errors import BadRequest

_HEADER = struct.Struct(">QI")
_LEVEL = 3
_LARGEST_WINDOW = 1 << 23  # bytes; level 3 takes 2 MiB
_PAGE = 4096  # bytes; whole pages of zeroes are left out of the file


class Source(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class Target(Protocol):
    def write(self, data: bytes, /) -> int: ...


def stored(path: Path) -> int:
    """The most bytes of blocks that a disk's stream can hold; known without reading the disk."""
    with path.open("rb") as file:
        return sum(end - start for start, end in extents(file.fileno()))


def write(path: Path, target: Target) -> str:
    """Append the stream of a disk to `target`; returns the disk's digest (`digests.file_digest`)."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, threads=-1, write_checksum=True)
    with path.open("rb") as disk, compressor.stream_writer(cast(BinaryIO, target), closefd=False) as out:
        size = os.fstat(disk.fileno()).st_size
        digest = Digest(size)
        for offset, block in blocks(disk):
            digest.add(offset, block)
            out.write(_HEADER.pack(offset, len(block)) + block)
        out.write(_HEADER.pack(size, 0))
    return digest.hexdigest()


def read(source: Source, path: Path, *, size: int, limit: int) -> str:
    """Write the disk of a stream to the new file `path`; returns its digest. `size` is the disk's, `limit` the most
    bytes of blocks, both as declared. Raises BadRequest for a stream that is damaged or does not keep to them."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    digest, after = Digest(size), 0
    with path.open("xb") as file, decompressor.stream_reader(cast(BinaryIO, source), closefd=False) as stream:
        os.ftruncate(file.fileno(), size)
        while True:
            offset, length = _HEADER.unpack(_exactly(stream, _HEADER.size))
            if length == 0:
                break
            if offset < after or offset % BLOCK or length > BLOCK or offset + length > size or length > limit:
                raise BadRequest("a block lies where none can be")
            block = _exactly(stream, length)
            digest.add(offset, block)
            _write_pages(file.fileno(), offset, block)
            after, limit = offset + length, limit - length
        if offset != size:
            raise BadRequest("the disk has another size than declared")
        if stream.read(1):
            raise BadRequest("there is more after the end of the disk")
    return digest.hexdigest()


def _exactly(stream: zstandard.ZstdDecompressionReader, count: int) -> bytes:
    content = bytearray()
    try:
        while len(content) < count:
            if not (piece := stream.read(count - len(content))):
                raise BadRequest("the stream of a disk ends too early")
            content += piece
    except zstandard.ZstdError as error:
        raise BadRequest(f"the stream of a disk is damaged ({error})") from None
    return bytes(content)


def _write_pages(fd: int, offset: int, block: bytes) -> None:
    """Write a block but for its pages of zeroes: runs of others at once."""
    start = None
    for position in range(0, len(block) + _PAGE, _PAGE):
        page = block[position : position + _PAGE]
        if page and page.count(0) != len(page):
            start = position if start is None else start
        elif start is not None:
            _write_all(fd, block[start:position], offset + start)
            start = None


def _write_all(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
