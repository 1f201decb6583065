"""Taking QEMU's migration stream apart: what comes out of good streams, and that bad ones are refused (FRZ-6)."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet.vmm import memory
from limpet.vmm.memory import PAGE, StreamError, split

PAGES = 64  # of the guest's RAM
HEADER = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", 6) + b"microv"  # configuration section
DEVICES = b"\x04" + struct.pack(">I", 9) + b"\x05timer" + bytes(range(256)) + b"\x00"  # never looked into
ZERO, SIZES, WHOLE, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20  # RAM_SAVE_FLAG_*, migration/ram.c
FOOTER = b"\x7e" + struct.pack(">I", 2)
DEADLINE = settings(deadline=None, max_examples=80)


@dataclass(frozen=True)
class Record:
    """One page as QEMU sends it: its number, and 4096 bytes or one that fills it."""

    number: int
    content: bytes
    block: str = "ram"


@dataclass
class Stream:
    """The writer's side, as small as it can be: rounds of records, each a section of its own."""

    rounds: Sequence[Sequence[Record]]
    pages: int = PAGES
    blocks: dict[str, int] = field(default_factory=lambda: {"ram": PAGES * PAGE, "microvm.bios": 16 * PAGE})

    def head(self) -> bytes:
        sizes = b"".join(
            bytes([len(name)]) + name.encode() + struct.pack(">Q", size) for name, size in self.blocks.items()
        )
        start = b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, 4)
        return HEADER + start + struct.pack(">Q", sum(self.blocks.values()) | SIZES) + sizes + self.end()

    def end(self) -> bytes:
        return struct.pack(">Q", EOS) + FOOTER

    def sections(self) -> Iterator[tuple[bytes, list[bytes], bytes]]:
        current = ""
        for index, records in enumerate(self.rounds):
            kind = b"\x03" if index == len(self.rounds) - 1 else b"\x02"
            written = []
            for record in records:
                named = record.block != current
                written.append(self.record(record, named=named))
                current = record.block
            yield kind + struct.pack(">I", 2), written, self.end()

    def record(self, record: Record, *, named: bool) -> bytes:
        flags = (WHOLE if len(record.content) == PAGE else ZERO) | (0 if named else CONTINUE)
        name = bytes([len(record.block)]) + record.block.encode() if named else b""
        return struct.pack(">Q", record.number * PAGE | flags) + name + record.content

    def whole(self) -> bytes:
        body = b"".join(begin + b"".join(records) + end for begin, records, end in self.sections())
        return self.head() + body + DEVICES

    def ram(self) -> bytes:
        """What the guest's RAM must be afterwards: the last that was sent of every page."""
        content = bytearray(self.pages * PAGE)
        for record in (record for records in self.rounds for record in records if record.block == "ram"):
            content[record.number * PAGE : (record.number + 1) * PAGE] = (record.content * PAGE)[:PAGE]
        return bytes(content)


def page(seed: int) -> bytes:
    return struct.pack(">Q", seed * 0x9E3779B97F4A7C15 % 2**64) * (PAGE // 8)


def fed(content: bytes, tmp_path: Path, *, piece: int = 1 << 20) -> tuple[bytes, bytes]:
    """RAM and state out of a stream that comes through a pipe, `piece` bytes at a time."""
    source, sink = os.pipe()

    def feed() -> None:
        try:
            with open(sink, "wb", buffering=0) as pipe:
                for start in range(0, len(content), piece):
                    pipe.write(content[start : start + piece])
        except BrokenPipeError:
            pass  # the reader has had enough

    feeder = threading.Thread(target=feed)
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("ram", "state")]
    feeder.start()
    try:
        split(source, files[0], files[1])
    finally:
        for fd in (source, *files):
            os.close(fd)
        feeder.join(10)
    return (tmp_path / "ram").read_bytes(), (tmp_path / "state").read_bytes()


records = st.builds(
    Record,
    st.integers(0, PAGES - 1),
    st.one_of(st.just(b"\0"), st.just(b"\xff"), st.integers(0, 999).map(page)),
)
firmware = st.builds(Record, st.integers(0, 15), st.integers(0, 9).map(page), st.just("microvm.bios"))
streams = st.builds(Stream, st.lists(st.lists(st.one_of(records, firmware), max_size=30), min_size=1, max_size=4))


@DEADLINE
@given(streams, st.sampled_from([7, 4096, 4097, 1 << 20]), st.sampled_from([2 * PAGE, 3 * PAGE + 11, memory._WINDOW]))
def test_every_page_ends_as_it_was_sent_last(
    tmp_path_factory: pytest.TempPathFactory, sent: Stream, piece: int, window: int
) -> None:
    """FRZ-6: pages that change while they are copied are sent again, also as zeroes; however the pipe cuts it, and
    wherever the reader's window ends."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "_WINDOW", window)
        ram, _ = fed(sent.whole(), tmp_path_factory.mktemp("split"), piece=piece)
    assert ram == sent.ram()


@DEADLINE
@given(streams, st.sampled_from([2 * PAGE, memory._WINDOW]))
def test_the_state_is_the_stream_without_the_pages_of_ram(
    tmp_path_factory: pytest.TempPathFactory, sent: Stream, window: int
) -> None:
    """What QEMU reads at a start: all sections, all blocks but RAM, the devices to the last byte."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "_WINDOW", window)
        _, state = fed(sent.whole(), tmp_path_factory.mktemp("split"))
    expected = sent.head()
    for round_, (begin, written, end) in zip(sent.rounds, sent.sections(), strict=True):
        kept = [told for record, told in zip(round_, written, strict=True) if record.block != "ram"]
        expected += begin + b"".join(kept) + end
    assert state == expected + DEVICES


def test_memory_that_was_never_written_takes_no_disk(tmp_path: Path) -> None:
    """FRZ-6, "RAM file sparse": a page of zeroes is a hole, wherever none was before."""
    large = {"ram": 1 << 30}
    zeroes = [Record(number, b"\0") for number in range(0, (1 << 30) // PAGE, 64)]
    sent = Stream([zeroes, [Record(5, page(1))]], blocks=large)
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("ram", "state")]
    with open(tmp_path / "stream", "wb+") as stream:
        stream.write(sent.whole())
        stream.seek(0)
        split(stream.fileno(), files[0], files[1])
    status = (tmp_path / "ram").stat()
    assert status.st_size == 1 << 30 and status.st_blocks * 512 <= 4 * PAGE


def test_a_page_that_became_zero_again_is_zero(tmp_path: Path) -> None:
    """The hole must not hide what an earlier round wrote there."""
    ram, _ = fed(Stream([[Record(3, page(1))], [Record(3, b"\0")]]).whole(), tmp_path)
    assert ram == bytes(PAGES * PAGE)


@DEADLINE
@given(streams, st.data())
def test_a_stream_that_ends_amid_ram_is_refused(
    tmp_path_factory: pytest.TempPathFactory, sent: Stream, data: st.DataObject
) -> None:
    """FRZ-6: QEMU was killed while it wrote."""
    whole = sent.whole()
    cut = data.draw(st.integers(0, len(whole) - len(DEVICES) - 1))
    with pytest.raises(StreamError):
        fed(whole[:cut], tmp_path_factory.mktemp("split"))


@DEADLINE
@given(streams, st.data())
def test_a_flipped_bit_is_refused_or_harmless_but_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, sent: Stream, data: st.DataObject
) -> None:
    """FRZ-6: whatever the stream says, only StreamError comes out, and RAM keeps its size."""
    whole = bytearray(sent.whole())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        ram, _ = fed(bytes(whole), tmp_path_factory.mktemp("split"))
    except StreamError:
        return
    except OSError as error:  # of a size that no file can have
        assert "large" in str(error)
        return
    assert len(ram) % PAGE == 0


@DEADLINE
@given(st.binary(max_size=4096))
def test_a_foreign_stream_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    """FRZ-6: it has no section of RAM."""
    with pytest.raises(StreamError):
        fed(noise, tmp_path_factory.mktemp("split"))


BAD = {
    "no section of RAM": (b"QEVM" + bytes(128 << 10), "no section named ram"),
    "no block of that name": (Stream([[]], blocks={"other": PAGE}).whole(), "no block of memory named ram"),
    "a block of no size": (Stream([[]], blocks={"x": 0, "ram": PAGE}).whole(), "a block of memory of 0 bytes"),
    "half a page": (Stream([[]], blocks={"ram": PAGE + 512, "x": PAGE - 512}).whole(), "memory of 4608 bytes"),
    "more memory than there is": (Stream([[]], blocks={"ram": 1 << 52}).whole(), "a block of memory of"),
    "a page beyond it": (Stream([[Record(PAGES, page(1))]]).whole(), "beyond the memory"),
    "zeroes beyond it": (Stream([[Record(1 << 40, b"\0")]]).whole(), "beyond the memory"),
    "a compressed page": (Stream([[Record(0, page(1))]]).whole().replace(
        struct.pack(">Q", WHOLE), struct.pack(">Q", 0x40)), "a record of an unknown kind"),
    "a device amid RAM": (Stream([[], []]).whole().replace(b"\x02\0\0\0\x02", b"\x04\0\0\0\x02"), "not RAM amid RAM"),
    "another section's part": (Stream([[], []]).whole().replace(b"\x02\0\0\0\x02", b"\x02\0\0\0\x03"), "not RAM"),
    "a section without footer": (Stream([[]]).whole().replace(FOOTER, b"\x7f\0\0\0\x02"), "without an end"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_kind_of_damage_is_refused_and_named(tmp_path: Path, name: str) -> None:
    """FRZ-6"""
    content, said = BAD[name]
    with pytest.raises(StreamError, match=said):
        fed(content, tmp_path)


def test_any_stream_is_taken_apart_in_little_memory(tmp_path: Path) -> None:
    """FRZ-8: 300 MiB of pages and of firmware in an address space that could not hold a tenth of them."""
    limit = 96 << 20
    source, sink = os.pipe()
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("ram", "state")]
    program = [sys.executable, "-ISE", memory.__file__, str(source), *map(str, files), "ram"]
    count = (200 << 20) // PAGE
    sent = Stream([[]], blocks={"ram": count * PAGE, "rom": count * PAGE})
    splitting = subprocess.Popen(
        program, pass_fds=[source, *files], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    os.close(source)
    with open(sink, "wb") as pipe:
        pipe.write(sent.head() + b"\x03" + struct.pack(">I", 2))
        for block, total in (("ram", count), ("rom", count // 2)):
            for number in range(total):
                pipe.write(sent.record(Record(number, page(number), block), named=number == 0))
        pipe.write(sent.end() + DEVICES)
    assert splitting.wait(60) == 0, splitting.communicate()
    assert splitting.stderr is not None
    splitting.stderr.close()
    with open(tmp_path / "ram", "rb") as ram:
        assert all(ram.read(PAGE) == page(number) for number in range(count)) and not ram.read()
    assert (tmp_path / "state").stat().st_size > 100 << 20


def test_the_program_says_what_is_wrong_and_fails(tmp_path: Path) -> None:
    """What `capture` shows to the user."""
    (tmp_path / "stream").write_bytes(Stream([[Record(0, page(1))]]).whole()[:300])
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("stream", "ram", "state")]
    argv = [sys.executable, "-ISE", memory.__file__, *map(str, fds), "ram"]
    done = subprocess.run(argv, pass_fds=fds, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (1, "limpet-memory: the stream ends too early\n")
