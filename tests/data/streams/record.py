"""Record the send streams of this directory. As root, on a mounted Btrfs: `python record.py /mnt/scratch`.

Each scenario is one subvolume that changes in steps. A step is stored as NAME-K.stream.zst (what `btrfs send` sent,
from the step before if there is one), NAME-K.dump.zst (what `btrfs receive --dump` says of it, in UTC) and
NAME-K.tree.json.zst (what the file system then holds, read through it, not through limpet). Those called guest61… are
the same steps in a sandbox, sent by its kernel (6.1) through limpet_agent/btrfs.py; the others come from Linux 6.18.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

HERE = Path(__file__).parent
Step = Callable[[], None]  # works in the current directory


def main(scratch: Path) -> None:
    for name, steps in {
        "kinds": [kinds, kinds_changed, kinds_replaced],
        "moves": [moves, moves_crossed, moves_inverted],
        "data": [data, data_changed, data_cloned, data_punched],
        **{f"random{seed}": list(random_steps(seed, 5)) for seed in range(4)},
    }.items():
        record(scratch, name, steps)


def record(scratch: Path, name: str, steps: list[Step]) -> None:
    volume = scratch / name
    btrfs("subvolume", "create", volume)
    parent: Path | None = None
    for number, step in enumerate(steps):
        os.chdir(volume)
        step()
        snapshot = scratch / f"{name}-{number}"
        btrfs("subvolume", "snapshot", "-r", volume, snapshot)
        stream = btrfs("send", "-q", *(("-p", parent) if parent else ()), snapshot)
        for kind, content in {
            "stream": stream,
            "dump": btrfs("receive", "--dump", given=stream),
            "tree.json": json.dumps(dict(listing(os.fsencode(snapshot)))).encode(),
        }.items():
            (HERE / f"{name}-{number}.{kind}.zst").write_bytes(zstandard.compress(content, 19))
        parent = snapshot


def btrfs(*arguments: str | Path, given: bytes | None = None) -> bytes:
    return subprocess.run(
        ["btrfs", *arguments], input=given, stdout=subprocess.PIPE, check=True, env={**os.environ, "TZ": "UTC"}
    ).stdout


def listing(root: bytes) -> Iterator[tuple[str, dict[str, object]]]:
    """Every path below `root` (latin-1: bytes one to one) and what there is to know of it."""
    groups: dict[int, int] = {}
    for path in [root, *sorted(walk(root))]:
        found = os.lstat(path)
        facts: dict[str, object] = {
            "mode": found.st_mode, "uid": found.st_uid, "gid": found.st_gid, "mtime_ns": found.st_mtime_ns,
            "xattrs": {n: os.getxattr(path, n, follow_symlinks=False).decode("latin-1")
                       for n in sorted(os.listxattr(path, follow_symlinks=False))},
        }  # fmt: skip
        if stat.S_ISREG(found.st_mode):
            facts |= {"size": found.st_size, "sha256": digest(path)}
            if found.st_nlink > 1:
                facts["group"] = groups.setdefault(found.st_ino, len(groups) + 1)
        elif stat.S_ISLNK(found.st_mode):
            facts["target"] = os.readlink(path).decode("latin-1")
        elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            facts["rdev"] = found.st_rdev
        yield path[len(root) + 1 :].decode("latin-1"), facts


def walk(root: bytes) -> Iterator[bytes]:
    for entry in os.scandir(root):
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)


def digest(path: bytes) -> str:
    """SHA-256 of size and non-zero 4 KiB pages: sparse terabytes take no time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        found.update(size.to_bytes(8, "big"))
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // 4096 * 4096
            except OSError:
                break
            page = os.pread(file.fileno(), 4096, at)
            if page.strip(b"\0"):
                found.update(at.to_bytes(8, "big") + page)
            at += 4096
    return found.hexdigest()


# --- scenarios


def text(path: bytes | str, content: bytes | str, at: int | None = None) -> None:
    with open(path, "r+b" if at is not None else "wb") as file:
        file.seek(at or 0)
        file.write(content.encode() if isinstance(content, str) else content)


ODD = [b"space here", b"new\nline", b"back\\slash", b"\xff\xfe\x80", b"-rf", b"...", b"tab\there", "käse☃".encode(),
       b"\x01\x1b[31m", b"n" * 255, b"*", b"#", b"'\"$`"]  # fmt: skip


def kinds() -> None:
    text("empty", "")
    text("small", "hello\n")
    os.makedirs("d/e/f")
    text("d/e/f/deep", "deep\n")
    os.symlink("small", "to-small")
    os.symlink("/etc/passwd", "d/outside")
    os.symlink("../../../../../../tmp", "d/up")
    os.symlink("x" * 4000, "long-target")
    os.mkfifo("fifo", 0o640)
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod("disk", stat.S_IFBLK | 0o600, os.makedev(259, 1048575))
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    server.close()
    text("owned", "mine\n")
    os.chown("owned", 1000, 1001)
    os.chmod("owned", 0o640)
    text("suid", "#!\n")
    os.chmod("suid", 0o6755)
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    os.mkdir("closed")
    text("closed/in", "in\n")
    os.chmod("closed", 0)
    text("attributed", "a\n")
    os.setxattr("attributed", "user.note", b"\x00\xff\nvalue")
    os.setxattr("attributed", "user.empty", b"")
    os.setxattr("attributed", "user.big", bytes(range(256)) * 12)
    os.setxattr("attributed", "trusted.t", b"t")
    os.setxattr("d", "user.dir", b"of a directory")
    os.setxattr("suid", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    text("one", "linked\n")
    os.link("one", "two")
    os.link("one", "d/three")
    os.mkdir("odd")
    for name in ODD:
        text(b"odd/" + name, name)
    os.makedirs(b"odd/d\xe9j\xe0\nvu/" + b"m" * 255)
    path = "/".join(["deep" * 20] * 30)
    os.makedirs(path)
    text(f"{path}/bottom", "bottom\n")
    text("old", "before 1970\n")
    os.utime("old", ns=(-(10**18) - 1, -(10**18) - 1))
    text("far", "after 2100\n")
    os.utime("far", ns=(5 * 10**18 + 7, 5 * 10**18 + 7))


def kinds_changed() -> None:
    os.chmod("small", 0o600)
    os.chown("owned", 0, 0)
    os.setxattr("attributed", "user.note", b"other")
    os.removexattr("attributed", "user.empty")
    os.removexattr("d", "user.dir")
    os.unlink("two")
    os.link("d/three", "four")
    os.link("small", "small-too")
    text("one", "linked and changed\n")
    os.utime("old", ns=(1, 1_000_000_001))
    os.unlink("to-small")
    os.symlink("empty", "to-small")
    os.mkfifo("d/fifo")
    os.chmod("sticky", 0o3770)
    for name in ODD[:4]:
        os.unlink(b"odd/" + name)
    os.rename(b"odd/" + ODD[4], b"odd/" + ODD[0])


def kinds_replaced() -> None:
    os.unlink("small")
    os.mkdir("small")
    text("small/inside", "a directory now\n")
    shutil.rmtree("d")
    text("d", "a file now\n")
    os.unlink("fifo")
    os.symlink("d", "fifo")
    os.unlink("null")
    text("null", "not a device\n")
    shutil.rmtree("deep" * 20)
    shutil.rmtree(b"odd")


def moves() -> None:
    for a in "abc":
        for b in "xyz":
            os.makedirs(f"{a}/{b}")
            for number in range(4):
                text(f"{a}/{b}/{number}", f"{a}{b}{number}\n")
    text("first", "1\n")
    text("second", "2\n")


def moves_crossed() -> None:
    os.rename("first", "t")
    os.rename("second", "first")
    os.rename("t", "second")
    os.rename("a", "t")
    os.rename("b", "a")
    os.rename("t", "b")
    os.rename("c/x", "c/t")
    os.rename("c/y", "c/x")
    os.rename("c/t", "c/y")
    os.rename("a/z", "b/z/from-a")
    os.mkdir("new")
    os.rename("c/z", "new/z")
    os.rename("new/z/1", "top")
    os.rename("b/x/0", "b/x/1")
    os.link("b/y/2", "new/link")


def moves_inverted() -> None:
    os.rename("b/z/from-a", "t")  # what was below is above now
    os.rename("b", "t/b")
    os.rename("t", "b")
    os.rename("c", "a/c")
    shutil.rmtree("new")
    os.mkdir("c")
    os.rename("a/c/x", "c/x")
    os.rename("a", "c/a")
    shutil.rmtree("c/x")
    text("c/x", "a file where a directory was\n")


def data() -> None:
    noise = random.Random(1)
    text("big", bytes(noise.randrange(256) for _ in range(3000)) * 250)
    text("round", b"0123456789abcdef" * 65536)
    text("tail", b"x" * 131073)
    text("sparse", "begin")
    text("sparse", "middle", 1 << 33)
    text("sparse", "end", (1 << 40) - 3)
    text("hole", "")
    os.truncate("hole", 1 << 41)
    os.sync()


def data_changed() -> None:
    text("big", b"changed" * 10, 333_333)
    text("round", b"Z", 65536 * 8 - 1)
    with open("tail", "ab") as file:
        file.write(b"appended" * 3000)
    os.truncate("sparse", (1 << 33) + 3)
    text("sparse", "later", 1 << 32)
    os.truncate("hole", 12345)
    text("hole", "not only", 12000)
    text("grown", "grown")
    os.truncate("grown", 1 << 30)
    os.sync()


def reflink(source: str, target: str) -> None:
    subprocess.run(["cp", "--reflink=always", source, target], check=True)


def data_cloned() -> None:
    reflink("big", "big-clone")
    reflink("round", "round-clone")
    text("round-clone", b"own", 300_000)
    text("fresh", b"fresh data " * 50_000)
    os.sync()
    reflink("fresh", "fresh-clone")
    with open("big", "r+b") as a, open("round", "rb") as b:
        ficlone_range(a.fileno(), b.fileno(), 262144, 131072, 131072 + 4096)
        ficlone_range(a.fileno(), a.fileno(), 0, 8192, 589824)
    os.sync()


def data_punched() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open("round", "r+b") as file:
        assert libc.fallocate(file.fileno(), 3, ctypes.c_long(131072), ctypes.c_long(262144)) == 0
        assert libc.fallocate(file.fileno(), 3, ctypes.c_long(700_001), ctypes.c_long(9_999)) == 0
    os.truncate("big", 100_001)
    os.truncate("big", 400_000)
    os.unlink("big-clone")
    with open("tail", "r+b") as file:
        assert libc.fallocate(file.fileno(), 1, ctypes.c_long(0), ctypes.c_long(1 << 20)) == 0
    os.sync()


def ficlone_range(target: int, source: int, source_offset: int, length: int, target_offset: int) -> None:
    fcntl.ioctl(target, 0x4020940D, struct.pack("=qQQQ", source, source_offset, length, target_offset))


def random_steps(seed: int, count: int) -> Iterator[Step]:
    """Steps of forty random operations each, names taken from a small set so that they meet each other."""
    chance = random.Random(seed)

    def some(kind: str) -> str:
        fits = {"any": os.path.lexists, "dir": os.path.isdir, "file": os.path.isfile}[kind]
        return chance.choice([os.fsdecode(path)[2:] for path in walk(b".") if fits(path)] or ["."])

    def fresh() -> str:
        return os.path.join(some("dir"), chance.choice("abcdefgh"))

    def remove() -> None:
        shutil.rmtree(some("dir")) if chance.random() < 0.2 else os.unlink(some("file"))

    operations: list[Step] = [
        *[lambda: text(fresh(), chance.randbytes(3) * chance.randrange(1, 30_000))] * 2,
        *[lambda: os.mkdir(fresh())] * 2,
        *[lambda: os.rename(some("any"), fresh())] * 2,
        lambda: os.link(some("file"), fresh()),
        remove,
        lambda: text(some("file"), chance.randbytes(5), chance.randrange(100_000)),
        lambda: os.chmod(some("any"), chance.choice([0o644, 0o755, 0o600])),
        lambda: os.truncate(some("file"), chance.randrange(100_000)),
        lambda: os.setxattr(some("any"), f"user.{chance.randrange(3)}", chance.randbytes(4)),
    ]

    def step() -> None:
        for _ in range(40):
            with contextlib.suppress(OSError):
                chance.choice(operations)()
        os.sync()

    return iter([step] * count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
