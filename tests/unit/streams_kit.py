"""Real send streams (tests/data/streams), and send streams made by hand."""

from __future__ import annotations

import functools
import json
import re
import struct
from pathlib import Path
from typing import Any

import zstandard
from google_crc32c import extend

CORPUS = Path(__file__).parent.parent / "data" / "streams"
SCENARIOS = sorted({path.name.rsplit("-", 1)[0] for path in CORPUS.glob("*-0.stream.zst")})


@functools.cache
def steps(scenario: str) -> int:
    """How many streams it has."""
    return len(list(CORPUS.glob(f"{scenario}-*.stream.zst")))


STEPS = [(scenario, number) for scenario in SCENARIOS for number in range(steps(scenario))]


@functools.cache
def stream(scenario: str, number: int) -> bytes:
    """What `btrfs send` sent."""
    return _unpacked(f"{scenario}-{number}.stream.zst")


def dump(scenario: str, number: int) -> bytes:
    """What `btrfs receive --dump` says of it, in UTC."""
    return _unpacked(f"{scenario}-{number}.dump.zst")


def tree(scenario: str, number: int) -> dict[bytes, dict[str, Any]]:
    """What Btrfs then held: path → facts (see record.py)."""
    facts: dict[str, dict[str, Any]] = json.loads(_unpacked(f"{scenario}-{number}.tree.json.zst"))
    return {path.encode("latin-1"): known for path, known in facts.items()}


def _unpacked(name: str) -> bytes:
    return zstandard.decompress((CORPUS / name).read_bytes())


# --- by hand

UUID, PARENT = b"\x11" * 16, b"\x22" * 16
UUID_TEXT, PARENT_TEXT = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
HEADER = b"btrfs-stream\0" + struct.pack("<I", 1)
_NUMBERS = [
    "subvol", "snapshot", "mkfile", "mkdir", "mknod", "mkfifo", "mksock", "symlink", "rename", "link", "unlink",
    "rmdir", "set_xattr", "remove_xattr", "write", "clone", "truncate", "chmod", "chown", "utimes", "end",
    "update_extent",
]  # fmt: skip
_ATTRIBUTES = {
    "uuid": 1, "ctransid": 2, "ino": 3, "size": 4, "mode": 5, "uid": 6, "gid": 7, "rdev": 8, "ctime": 9, "mtime": 10,
    "atime": 11, "otime": 12, "name": 13, "value": 14, "path": 15, "to": 16, "link": 17, "offset": 18, "data": 19,
    "clone_uuid": 20, "clone_ctransid": 21, "clone_path": 22, "clone_offset": 23, "length": 24,
}  # fmt: skip


def command(name: str | int, /, *pairs: tuple[str | int, bytes | int], **attributes: bytes | int) -> bytes:
    """One command; numbers become u64. `pairs` may say what a dictionary cannot: twice, or unknown."""
    payload = b""
    for key, value in (*pairs, *attributes.items()):
        raw = struct.pack("<Q", value) if isinstance(value, int) else value
        payload += struct.pack("<HH", _ATTRIBUTES[key] if isinstance(key, str) else key, len(raw)) + raw
    return sealed(_NUMBERS.index(name) + 1 if isinstance(name, str) else name, payload)


def sealed(number: int, payload: bytes) -> bytes:
    """A payload with its header and checksum."""
    head = struct.pack("<IHI", len(payload), number, 0)
    crc = extend(extend(0xFFFFFFFF, head), payload) ^ 0xFFFFFFFF
    return struct.pack("<IHI", len(payload), number, crc) + payload


def resealed(raw: bytes) -> bytes:
    """A stream whose commands may have been tampered with, with checksums that are right again."""
    at, out = len(HEADER), raw[: len(HEADER)]
    while at + 10 <= len(raw):
        length, number, _ = struct.unpack_from("<IHI", raw, at)
        if at + 10 + length > len(raw):
            break
        out += sealed(number, raw[at + 10 : at + 10 + length])
        at += 10 + length
    return out + raw[at:]


SUBVOL = command("subvol", path=b"v", uuid=UUID, ctransid=7)
SNAPSHOT = command("snapshot", path=b"v", uuid=UUID, ctransid=9, clone_uuid=PARENT, clone_ctransid=7)
END = command("end")


def full(*commands: bytes) -> bytes:
    """A stream that makes a tree from nothing."""
    return b"".join([HEADER, SUBVOL, *commands, END])


def incremental(*commands: bytes) -> bytes:
    """A stream that changes the tree PARENT."""
    return b"".join([HEADER, SNAPSHOT, *commands, END])


def mkfile(path: bytes) -> bytes:
    return command("mkfile", path=path, ino=257)


def mkdir(path: bytes) -> bytes:
    return command("mkdir", path=path, ino=257)


def write(path: bytes, offset: int, data: bytes) -> bytes:
    return command("write", path=path, offset=offset, data=data)


# --- what btrfs-progs says

_ESCAPES = {b"\\a": b"\a", b"\\b": b"\b", b"\\e": b"\x1b", b"\\f": b"\f", b"\\n": b"\n", b"\\r": b"\r", b"\\t": b"\t",
            b"\\v": b"\v", b"\\ ": b" ", b"\\\\": b"\\"}  # fmt: skip
_LINE = re.compile(rb"(\w+) +((?:[^ \\]|\\.)+)(?: +(.*))?", re.DOTALL)


def dumped(text: bytes) -> list[tuple[str, bytes, bytes]]:
    """The lines of a dump: (command, path, the rest as it stands); the first component of paths, the subvolume's name,
    is cut off."""
    found = []
    for line in text.rstrip(b"\n").split(b"\n"):
        match = _LINE.fullmatch(line)
        assert match, line
        path = unescaped(match[2]).removeprefix(b"./").partition(b"/")[2]
        found.append((match[1].decode(), path, (match[3] or b"").strip()))
    return found


def unescaped(text: bytes) -> bytes:
    return re.sub(
        rb"\\([0-7]{3}|.)",
        lambda m: bytes([int(m[1], 8)]) if len(m[1]) == 3 else _ESCAPES[m[0]],
        text,
        flags=re.DOTALL,
    )
