"""A machine's memory as two files, so that any number of machines can start from it at once.

    ram     the guest's RAM, every page where it lies; sparse. Mapped copy-on-write by whoever starts from it, so a
            start costs no copy, and its pages are shared in the host's page cache
    state   QEMU's migration stream with the pages of RAM taken out: devices, clocks, CPUs; some 150 KiB

QEMU writes one stream (a migration into a pipe, while the guest runs on: pages that change are sent again); a process
of our own takes it apart. It reads only what it must: everything but the section "ram" is passed on as it is.

The stream (migration/savevm.c, migration/ram.c; the same from QEMU 4.0 on): a header, the sections START, PART … and
END of "ram", each a row of records, then the devices. A record begins with a big-endian u64: an address with flags in
its low bits, followed by the block's name unless it is the last record's (CONTINUE), then a page, or one byte for a
page of only that. EOS ends a section's records; a footer with its number follows.

Run as a program it needs the standard library only: `memory.py STREAM RAM STATE BLOCK`, STREAM a descriptor.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
RAM_BLOCK = "ram"  # the name of the guest's RAM among the machine's memory blocks, from our command line

_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20  # RAM_SAVE_FLAG_*
_FLAGS = PAGE - 1
_LENGTHS = {_PAGE: PAGE, _ZERO: 1}  # bytes of a record's content
_PART, _END, _FOOTER = 0x02, 0x03, 0x7E  # QEMU_VM_SECTION_*
_RAM_SECTION = b"\x03ram" + struct.pack(">II", 0, 4)  # idstr, instance, version
_WINDOW = 2 << 20  # bytes of the stream that are looked at together
_RUN = 256  # pages that are written together; at most IOV_MAX (1024)
_HEAD_LIMIT = 64 << 10  # the section "ram" begins in the first few hundred bytes
_MOST_RAM = 1 << 40  # bytes; more than a sandbox may have


@dataclass(frozen=True)
class MemoryImage:
    """The files of a memory image in a directory. `agent_disk`: the one that the guest has mounted, kept with it."""

    directory: Path

    @property
    def ram(self) -> Path:
        return self.directory / "ram"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def agent_disk(self) -> Path:
        return self.directory / "agent.squashfs"


class StreamError(Exception):
    """The stream is not what QEMU writes, or ends too early."""


class _Reader:
    """The stream with a window on it: `data[at:end]` is what was read and not yet taken. What is taken out of `data`
    as a slice is good until the next `need`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.data = memoryview(bytearray(_WINDOW))
        self.at = self.end = 0
        self.before_move: Callable[[], None] = lambda: None  # called when slices of `data` are about to become bad

    def need(self, count: int) -> None:
        """Have at least `count` bytes (at most `_WINDOW`) in the window."""
        if self.end - self.at >= count:
            return
        self.before_move()
        left = self.end - self.at
        self.data[:left] = bytes(self.data[self.at : self.end])
        self.at, self.end = 0, left
        while self.end < count:
            got = os.readv(self._fd, [self.data[self.end :]])
            if not got:
                raise StreamError("the stream ends too early")
            self.end += got

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def rest(self, target: int) -> None:
        """Everything to the end of the stream goes to `target`."""
        _write(target, self.data[self.at : self.end])
        while piece := os.read(self._fd, _WINDOW):
            _write(target, piece)


class _Ram:
    """The file `ram`: runs of pages are gathered and written with one call."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._written = bytearray(size // PAGE)  # a page of zeroes need not be written where none ever was
        self._run: list[memoryview] = []
        self._start = self.next = 0  # `next`: the address that goes on with the run
        os.ftruncate(fd, size)

    def page(self, address: int, content: memoryview) -> None:
        if address >= self._size:
            raise StreamError(f"a page at {address:#x}, beyond the memory")
        self._written[address // PAGE] = 1
        if address != self.next or not 0 < len(self._run) < _RUN:
            self.flush()
            self._start = address
        self._run.append(content)
        self.next = address + PAGE

    def fill(self, address: int, byte: int) -> None:
        if address >= self._size:
            raise StreamError(f"a page at {address:#x}, beyond the memory")
        if byte or self._written[address // PAGE]:
            self.page(address, memoryview(bytes([byte]) * PAGE))

    def flush(self) -> None:
        if self._run:
            if os.pwritev(self._fd, self._run, self._start) != len(self._run) * PAGE:
                raise OSError("a short write")
            self._run = []


def split(stream: int, ram: int, state: int, block: str = RAM_BLOCK) -> None:
    """Take the migration stream on the descriptor `stream` apart into the files `ram` and `state`.
    Raises StreamError, OSError."""
    reader = _Reader(stream)
    section, size = _head(reader, state, block)
    pages = _Ram(ram, size)
    reader.before_move = pages.flush
    records = _Records(reader, state, pages, block.encode())
    while True:
        kind = reader.take(1)
        number = reader.take(4)
        if number != section or kind[0] not in (_PART, _END):
            raise StreamError("a section that is not RAM amid RAM")
        _write(state, kind + number)
        records.section()
        if kind[0] == _END:
            break
    pages.flush()
    reader.rest(state)


def _head(reader: _Reader, state: int, block: str) -> tuple[bytes, int]:
    """Pass on the header and RAM's START section; its number, and how much RAM there is."""
    while (found := bytes(reader.data[: reader.end]).find(_RAM_SECTION)) < 0:
        if reader.end >= _HEAD_LIMIT:
            raise StreamError("no section named ram")
        reader.need(reader.end + 1)
    _write(state, reader.take(found - reader.at + len(_RAM_SECTION)))
    section = bytes(reader.data[found - 4 : found])
    sizes: dict[bytes, int] = {}
    (total,) = struct.unpack(">Q", head := reader.take(8))
    if not total & _MEM_SIZE:
        raise StreamError("the section ram does not begin with its sizes")
    _write(state, head)
    left = total & ~_FLAGS
    while left > 0:
        name, told = _name(reader)
        size = reader.take(8)
        (sizes[name],) = struct.unpack(">Q", size)
        if not 0 < sizes[name] <= min(left, _MOST_RAM) or sizes[name] % PAGE:
            raise StreamError(f"a block of memory of {sizes[name]} bytes")
        left -= sizes[name]
        _write(state, told + size)
    if block.encode() not in sizes:
        raise StreamError(f"no block of memory named {block}")
    _write(state, _end_of_section(reader, reader.take(8)))
    return section, sizes[block.encode()]


class _Records:
    """The rows of records: pages of `block` go to `ram`, those of other blocks (firmware) to `state`."""

    def __init__(self, reader: _Reader, state: int, ram: _Ram, block: bytes) -> None:
        self._reader, self._state, self._ram, self._block = reader, state, ram, block
        self._current = b""  # CONTINUE goes on with this block, also from one section to the next

    def section(self) -> None:
        """One section's records, up to its footer."""
        reader = self._reader
        while True:
            self._plain()
            word = reader.take(8)
            (number,) = struct.unpack(">Q", word)
            flags, told = number & _FLAGS, b""
            if flags == _EOS:
                _write(self._state, _end_of_section(reader, word))
                return
            if not flags & _CONTINUE:
                self._current, told = _name(reader)
            length = _LENGTHS.get(flags & ~_CONTINUE, 0)
            if not length:
                raise StreamError(f"a record of an unknown kind ({flags:#x})")
            reader.need(length)
            content = reader.data[reader.at : reader.at + length]
            reader.at += length
            if self._current != self._block:
                _write(self._state, word + told + content)
            elif length == PAGE:
                self._ram.page(number & ~_FLAGS, content)
            else:
                self._ram.fill(number & ~_FLAGS, content[0])

    def _plain(self) -> None:
        """The fast path: whole records in the window that go on with our block, which nearly all do."""
        if self._current != self._block:
            return
        reader, ram, unpack = self._reader, self._ram, struct.Struct(">Q").unpack_from
        data, at, last = reader.data, reader.at, reader.end - PAGE - 8
        while at <= last:
            (word,) = unpack(data, at)
            flags = word & _FLAGS
            if flags == _PAGE | _CONTINUE:
                ram.page(word & ~_FLAGS, data[at + 8 : at + 8 + PAGE])
                at += 8 + PAGE
            elif flags == _ZERO | _CONTINUE:
                ram.fill(word & ~_FLAGS, data[at + 8])
                at += 9
            else:
                break
        reader.at = at


def _end_of_section(reader: _Reader, mark: bytes) -> bytes:
    """The mark EOS and the footer behind it."""
    footer = reader.take(5)
    if mark != struct.pack(">Q", _EOS) or footer[0] != _FOOTER:
        raise StreamError("a section without an end")
    return mark + footer


def _name(reader: _Reader) -> tuple[bytes, bytes]:
    """A block's name, and the bytes that told it."""
    length = reader.take(1)
    name = reader.take(length[0])
    return name, length + name


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def main(words: list[str]) -> int:
    """`memory.py STREAM RAM STATE BLOCK`; the exit status tells how it went, standard error why."""
    stream, ram, state, block = int(words[0]), int(words[1]), int(words[2]), words[3]
    try:
        split(stream, ram, state, block)
    except (StreamError, OSError) as error:
        print(f"limpet-memory: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
