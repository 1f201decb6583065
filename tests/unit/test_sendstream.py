"""Parsing send streams: real ones as btrfs-progs reads them, hostile ones into a typed error."""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet.vault import commands as say
from limpet.vault.errors import BadStream
from limpet.vault.sendstream import LARGEST_COMMAND, Limits, Parser
from tests.unit import streams_kit as kit
from tests.unit.streams_kit import END, HEADER, SNAPSHOT, SUBVOL, command, full, mkfile, sealed, write


def parse(stream: bytes, piece: int | None = None, limits: Limits | None = None) -> list[say.Command]:
    """Everything that a stream says, fed in pieces of `piece` bytes."""
    parser = Parser(limits)
    piece = piece or len(stream) or 1
    found = [one for at in range(0, len(stream), piece) for one in parser.feed(stream[at : at + piece])]
    parser.finish()
    return found


def refused(stream: bytes, why: str, /, **limits: int) -> None:
    with pytest.raises(BadStream, match=why):
        parse(stream, limits=Limits(**limits))


# --- real streams


@pytest.mark.parametrize(("scenario", "number"), kit.STEPS)
def test_real_streams_say_what_btrfs_progs_reads_in_them(scenario: str, number: int) -> None:
    """D3: command for command, path for path."""
    ours = [as_dumped(one) for one in parse(kit.stream(scenario, number))]
    theirs = [normal(line) for line in kit.dumped(kit.dump(scenario, number))]
    assert ours == theirs


def as_dumped(one: say.Command) -> tuple[object, ...]:
    """A command as `normal` gives what btrfs-progs says of it."""
    match one:
        case say.Subvol(_, uuid, ctransid):
            return "subvol", b"", uuid, ctransid
        case say.Snapshot(_, uuid, ctransid, parent):
            return "snapshot", b"", uuid, ctransid, parent
        case say.Mknod(path, kind, mode, rdev):
            name = {"fifo": "mkfifo", "socket": "mksock"}.get(kind, "mknod")
            return (name, path, mode, rdev) if name == "mknod" else (name, path)
        case say.SetXattr(path, name, value):
            return "set_xattr", path, name, len(value)
        case say.RemoveXattr(path, name):
            return "remove_xattr", path, name
        case say.Write(path, offset, data):
            return "write", path, offset, len(data)
        case say.Clone(path, offset, length, source, source_offset, _):
            return "clone", path, offset, length, source, source_offset
        case say.Utimes(path, mtime_ns):
            return "utimes", path, mtime_ns // 10**9
        case _:
            return type(one).__name__.lower(), *one


def normal(line: tuple[str, bytes, bytes]) -> tuple[object, ...]:
    """A line of a dump, typed."""
    name, path, rest = line
    fields = dict(word.partition(b"=")[::2] for word in rest.split(b" ") if b"=" in word)

    def below_subvolume(text: bytes) -> bytes:
        return kit.unescaped(text).removeprefix(b"./").partition(b"/")[2]

    typed: dict[str, Callable[[], tuple[object, ...]]] = {
        "subvol": lambda: (fields[b"uuid"].decode(), int(fields[b"transid"])),
        "snapshot": lambda: (fields[b"uuid"].decode(), int(fields[b"transid"]), fields[b"parent_uuid"].decode()),
        "mknod": lambda: (int(fields[b"mode"], 8) & 0o7777, int(fields[b"dev"], 16)),
        "rename": lambda: (below_subvolume(rest.removeprefix(b"dest=")),),
        "link": lambda: (kit.unescaped(rest.removeprefix(b"dest=")),),
        "symlink": lambda: (kit.unescaped(rest.removeprefix(b"dest=")),),
        "set_xattr": lambda: (fields[b"name"], int(rest.rpartition(b"len=")[2])),
        "remove_xattr": lambda: (fields[b"name"],),
        "write": lambda: (int(fields[b"offset"]), int(fields[b"len"])),
        "clone": lambda: (
            int(fields[b"offset"]), int(fields[b"len"]), below_subvolume(fields[b"from"]), int(fields[b"clone_offset"])
        ),
        "truncate": lambda: (int(fields[b"size"]),),
        "chmod": lambda: (int(fields[b"mode"], 8),),
        "chown": lambda: (int(fields[b"uid"]), int(fields[b"gid"])),
        "utimes": lambda: (seconds(fields[b"mtime"].decode()),),
    }  # fmt: skip
    return name, path, *typed.get(name, lambda: ())()


def seconds(text: str) -> int:
    return int((datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z") - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_a_stream_in_pieces_of_any_size_says_the_same(piece: int) -> None:
    """D3."""
    stream = kit.stream("moves", 1)
    assert parse(stream, piece) == parse(stream)


def test_a_stream_cut_off_anywhere_is_refused() -> None:
    """D6: never mistaken for a whole one."""
    stream = kit.stream("moves", 2)
    for end in range(len(stream)):
        with pytest.raises(BadStream):
            parse(stream[:end])


def test_a_flipped_bit_anywhere_is_refused() -> None:
    """D6: after the header every byte is under a checksum."""
    stream = kit.stream("moves", 2)
    for at in range(len(stream)):
        damaged = bytearray(stream)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(BadStream):
            parse(bytes(damaged))


# --- hostile streams


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(noise: bytes, with_header: bool) -> None:
    """D6: with a typed error, whatever they are."""
    with pytest.raises(BadStream):
        parse(HEADER * with_header + noise)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_tampered_stream_is_parsed_or_refused_with_a_typed_error(data: st.DataObject) -> None:
    """D6: also when its checksums are right: nothing else comes out, and what comes out is inside of its bounds."""
    stream = bytearray(kit.stream(*data.draw(st.sampled_from(kit.STEPS)))[:20_000])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(len(HEADER), len(stream) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                stream[at] = data.draw(st.integers(0, 255))
            case 1:
                del stream[at : at + data.draw(st.integers(1, 40))]
            case 2:
                stream[at:at] = data.draw(st.binary(max_size=40))
    try:
        found = parse(kit.resealed(bytes(stream)))
    except BadStream:
        return
    for one in found:
        assert all(part not in (b"", b".", b"..") for part in one.path.split(b"/")) or one.path == b""


HUGE = (1 << 63) - 1
HOSTILE = {
    "nothing": (b"", "in the middle"),
    "another magic": (b"btrfs-strEam\0\1\0\0\0", "no send stream"),
    "version 2": (b"btrfs-stream\0\2\0\0\0" + SUBVOL, "version 2"),
    "no subvolume": (HEADER + mkfile(b"a") + END, "does not begin"),
    "only an end": (HEADER + END, "does not begin"),
    "two subvolumes": (full(SUBVOL), "second beginning"),
    "a snapshot after a subvolume": (full(SNAPSHOT), "second beginning"),
    "more after the end": (full() + mkfile(b"a"), "after its end"),
    "a byte after the end": (full() + b"\0", "after its end"),
    "a second stream after the end": (full() + full(), "after its end"),
    "no end": (full()[: -len(END)], "in the middle"),
    "an unknown command": (full(sealed(23, b"")), "unknown command"),
    "command 0": (full(sealed(0, b"")), "unknown command"),
    "a gigantic command": (HEADER + struct.pack("<IHI", 0xFFFFFFFF, 15, 0), "a command of"),
    "a command over 64 KiB": (HEADER + struct.pack("<IHI", LARGEST_COMMAND - 9, 15, 0), "a command of"),
    "a cut-off attribute": (full(sealed(3, b"\x0f\0\1")), "cut-off"),
    "an attribute longer than its command": (full(sealed(3, b"\x0f\0\x09\0a")), "attribute 15 of 9"),
    "an unknown attribute": (full(command("mkfile", (99, b"x"), path=b"a")), "unknown attribute"),
    "an attribute twice": (full(command("mkfile", ("path", b"a"), ("path", b"b"))), "twice"),
    "an attribute missing": (full(command("rename", path=b"a")), "without attribute 16"),
    "a number of 4 bytes": (full(command("truncate", path=b"a", size=b"\0" * 4)), "of 4 bytes"),
    "a uuid of 15 bytes": (HEADER + command("subvol", path=b"v", uuid=b"u" * 15, ctransid=1), "of 15 bytes"),
    "a time of 8 bytes": (full(command("utimes", path=b"a", mtime=b"\0" * 8)), "of 8 bytes"),
    "an ignored number of 4 bytes": (full(command("mkfile", path=b"a", ino=b"\0" * 4)), "of 4 bytes"),
    "a second of 2^32 ns": (full(command("utimes", path=b"a", mtime=b"\0" * 8 + b"\xff" * 4)), "nanoseconds"),
    "a write at 2^63": (full(write(b"a", 1 << 63, b"x")), "offset or size"),
    "a write across 2^63": (full(write(b"a", HUGE, b"xx")), "2 bytes at offset"),
    "a truncation to 2^64": (full(command("truncate", path=b"a", size=(1 << 64) - 1)), "offset or size"),
    "a mode of 32 bits": (full(command("chmod", path=b"a", mode=1 << 31)), "the mode"),
    "the owner -1": (full(command("chown", path=b"a", uid=0xFFFFFFFF, gid=0)), "the owner"),
    "an owner of 33 bits": (full(command("chown", path=b"a", uid=0, gid=1 << 32)), "the owner"),
    "a device that is a file": (full(command("mknod", path=b"a", mode=0o100644, rdev=0)), "no device's"),
    "a device of 33 bits": (full(command("mkfifo", path=b"a", mode=0o644, rdev=1 << 32)), "the device"),
    "an empty target": (full(command("symlink", path=b"a", link=b"")), "a target"),
    "a target of 4096 bytes": (full(command("symlink", path=b"a", link=b"t" * 4096)), "a target"),
    "a target with NUL": (full(command("symlink", path=b"a", link=b"a\0b")), "a target"),
    "an attribute without a name": (full(command("set_xattr", path=b"a", name=b"", value=b"")), "a name"),
    "a clone across 2^63": (
        full(command("clone", path=b"a", offset=0, length=HUGE, clone_path=b"b", clone_offset=1, clone_uuid=b"u" * 16)),
        "bytes at offset",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_stream_is_refused(case: str) -> None:
    """D6: the error says what is wrong."""
    refused(*HOSTILE[case])


ESCAPES = [
    b"..", b"../a", b"a/..", b"a/../b", b"a/b/../../..", b"/", b"/etc/passwd", b"//", b"a//b", b"a/", b".", b"./a",
    b"a/./b", b"a\0b", b"\0", b"a" * 256, b"b/" + b"a" * 256, b"/".join([b"d" * 240] * 17) + b"/" + b"x" * 8192,
    b"/".join([b"d"] * 2049), b"",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES, ids=range(len(ESCAPES)))
def test_a_path_that_no_entry_can_have_is_refused_wherever_it_stands(path: bytes) -> None:
    """D6: escaping, absolute, empty, too long: as the path, as the target of a rename, link or clone."""
    for one in (
        command("mkfile", path=path, ino=1),
        command("rename", path=path, to=b"b"),
        command("rename", path=b"b", to=path),
        command("link", path=b"b", link=path),
        command("unlink", path=path),
        command("write", path=path, offset=0, data=b""),
        command("clone", path=b"b", offset=0, length=1, clone_path=path, clone_offset=0, clone_uuid=b"u" * 16),
    ):
        refused(full(one), "a path that no entry can have")


@pytest.mark.parametrize("path", [b"...", b"..a", b"a..", b".a/b.", b"n" * 255, b"\n", b"a\n", b"\xff", b" ", b"-"])
def test_odd_names_are_names(path: bytes) -> None:
    """D3: any bytes but '/' and NUL."""
    assert parse(full(mkfile(path), mkfile(b"d/" + path)))[1:] == [say.Mkfile(path), say.Mkfile(b"d/" + path)]


def test_the_root_can_be_dressed_but_not_made_or_removed() -> None:
    """D3: Btrfs names it by an empty path."""
    assert parse(full(command("chmod", path=b"", mode=0o755)))[1:] == [say.Chmod(b"", 0o755)]
    refused(full(command("rmdir", path=b"")), "a path")


def test_a_sparse_size_of_2_62_is_a_size() -> None:
    """D3: that it takes no room is the vault's business."""
    assert parse(full(command("truncate", path=b"a", size=1 << 62)))[1:] == [say.Truncate(b"a", 1 << 62)]


@pytest.mark.parametrize(("second", "ns"), [(-1, -(10**9) + 5), (1 << 62, (1 << 63) - 1), (-(1 << 62), -(1 << 63))])
def test_times_before_1970_and_after_2262_are_kept_as_near_as_they_fit(second: int, ns: int) -> None:
    """D3."""
    raw = struct.pack("<qI", second, 5)
    assert parse(full(command("utimes", path=b"a", mtime=raw)))[1:] == [say.Utimes(b"a", ns)]


def test_limits_end_a_stream_that_asks_for_too_much() -> None:
    """D6, PAY-2: a guest cannot take the host's memory or disk."""
    files = [mkfile(b"%d" % number) for number in range(20)]
    refused(full(*files), "more than 19 new names", entries=19)
    assert len(parse(full(*files), limits=Limits(entries=20))) == 21
    refused(full(*[write(b"a", at, b"x") for at in range(5)]), "more than 4 pieces", writes=4)
    refused(full(command("set_xattr", path=b"a", name=b"user.n", value=b"v" * 100)), "extended attr", attributes=99)
    refused(full(command("symlink", path=b"a", link=b"t" * 100)), "symlink targets", attributes=99)
    refused(full(*files), "more than 300 bytes", stream=300)
    clone = command("clone", path=b"a", offset=0, length=1 << 40, clone_path=b"b", clone_offset=0, clone_uuid=b"u" * 16)
    refused(full(clone, clone), "cloned")
    assert kit.UUID_TEXT in str(parse(full())[0])


def test_an_endless_stream_ends_at_its_limit() -> None:
    """D6: without being held."""
    parser = Parser(Limits(stream=1 << 20))
    parser.feed(HEADER + SUBVOL)
    piece = command("chmod", path=b"a" * 200, mode=0o644) * 100
    with pytest.raises(BadStream, match="too much"):
        for _ in range(1000):
            parser.feed(piece)
