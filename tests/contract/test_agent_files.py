"""Files in the guest, against the real agent: whole, atomic, with everything that belongs to them."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from limpet import errors
from limpet.guest import Agent
from tests.contract.local_guest import LocalGuest


async def _read(agent: Agent, path: Path) -> bytes:
    return b"".join([piece async for piece in agent.read_file(str(path))])


async def _pack(agent: Agent, path: Path, *exclude: str) -> bytes:
    return b"".join([piece async for piece in agent.pack(str(path), exclude=exclude)])


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4096, 1 << 20, (9 << 20) + 17])
def test_a_file_comes_back_as_it_was_written(guest: LocalGuest, size: int, bulk: bool) -> None:
    """GST-8"""
    path, data = guest.files / f"whole-{size}-{bulk}", os.urandom(size)

    async def work(agent: Agent) -> bytes:
        info = await agent.write_file(str(path), data, mode=0o640)
        assert (info.size, info.mode) == (size, 0o640)
        return await _read(agent, path)

    assert guest.do(work, bulk=bulk) == data == path.read_bytes()


def test_a_write_that_is_broken_off_leaves_the_old_file(guest: LocalGuest) -> None:
    """GST-8"""
    path = guest.files / "kept"
    path.write_bytes(b"old")

    async def half() -> AsyncIterator[bytes]:
        yield bytes(1 << 20)
        raise RuntimeError("the client goes away")

    async def work(agent: Agent) -> None:
        with pytest.raises(RuntimeError):
            await agent.write_file(str(path), half())
        await agent.ping()

    guest.do(work)
    assert path.read_bytes() == b"old"

    async def leftovers(agent: Agent) -> list[str]:
        for _ in range(100):
            names = [info.path for info in await agent.list_dir(str(guest.files)) if ".limpet" in info.path]
            if not names:
                break
            await asyncio.sleep(0.02)
        return names

    assert guest.do(leftovers) == []


def test_an_overwritten_file_keeps_its_mode_and_a_link_its_target(guest: LocalGuest) -> None:
    """GST-8"""
    path, link = guest.files / "script", guest.files / "link"
    path.write_text("old")
    path.chmod(0o751)
    link.symlink_to("script")
    guest.do(lambda agent: agent.write_file(str(link), b"new"))
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o7777 == 0o751


def test_names_that_are_not_utf8_survive(guest: LocalGuest) -> None:
    """GST-8"""
    name = os.fsdecode(b"odd-\xff\xfe\n")

    async def work(agent: Agent) -> list[str]:
        await agent.mkdir(str(guest.files / "odd"))
        await agent.write_file(str(guest.files / "odd" / name), b"x")
        return [info.path for info in await agent.list_dir(str(guest.files / "odd"))]

    assert guest.do(work) == [str(guest.files / "odd" / name)]


def test_a_large_directory_is_listed_whole_and_sorted(guest: LocalGuest) -> None:
    """GST-8"""
    directory = guest.files / "many"
    directory.mkdir()
    for number in range(1300):
        (directory / f"{number:05}{'x' * 100}").touch()
    found = guest.do(lambda agent: agent.list_dir(str(directory)))
    assert [info.path for info in found] == sorted(str(path) for path in directory.iterdir())


def test_renaming_making_and_removing(guest: LocalGuest) -> None:
    """GST-8"""
    base = guest.files / "tree"

    async def work(agent: Agent) -> None:
        await agent.mkdir(str(base / "a/b"), parents=True)
        with pytest.raises(errors.AlreadyExists):
            await agent.mkdir(str(base / "a"))
        await agent.write_file(str(base / "a/b/f"), b"x")
        await agent.rename(str(base / "a/b/f"), str(base / "a/g"))
        with pytest.raises(errors.FailedPrecondition):
            await agent.remove(str(base))
        (base / "a/outside").symlink_to("/etc")
        await agent.remove(str(base), recursive=True)
        with pytest.raises(errors.NotFound):
            await agent.stat(str(base))

    guest.do(work)
    assert Path("/etc/passwd").exists()


@pytest.mark.parametrize(
    ("path", "kind"), [("/no/such", errors.NotFound), ("/etc", errors.FailedPrecondition), ("rel", errors.BadRequest)]
)
def test_reading_what_cannot_be_read_says_why(guest: LocalGuest, path: str, kind: type[errors.LimpetError]) -> None:
    """GST-8"""
    with pytest.raises(kind):
        guest.do(lambda agent: agent.read_bytes(path))


def _odd_tree(root: Path) -> None:
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/f").write_bytes(os.urandom(70_000))
    (root / "deep/f").chmod(0o4751)
    os.utime(root / "deep/f", ns=(1, 1234567890123456789))
    (root / "empty").touch()
    (root / "link").symlink_to("deep/f")
    os.link(root / "empty", root / "hard")
    (root / ("n" * 150 + "ü")).write_text("long")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\n")).write_text("odd")
    with (root / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"abc")
        file.truncate(50 << 20)
    os.utime(root / "deep", ns=(1, 1111111111111111111))


def _differences(left: Path, right: Path) -> bytes:
    return subprocess.run(
        ["diff", "-r", "--no-dereference", str(left), str(right)], capture_output=True, check=False
    ).stdout


def _check_odd_tree(source: Path, target: Path) -> None:
    assert _differences(source, target) == b""
    for name in ("deep/f", "deep", "empty"):
        before, after = (source / name).stat(), (target / name).stat()
        assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
        assert before.st_nlink == after.st_nlink
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (target / "hard").stat().st_ino == (target / "empty").stat().st_ino


def test_a_tree_survives_packing_and_unpacking(guest: LocalGuest) -> None:
    """GST-8"""
    source, target = guest.files / "odd-tree", guest.files / "odd-copy"
    _odd_tree(source)
    try:
        os.setxattr(source / "empty", "user.limpet", b"v\0w")
        attributes = True
    except OSError:
        attributes = False

    async def work(agent: Agent) -> None:
        await agent.unpack(str(target), await _pack(agent, source), replace=True)

    guest.do(work)
    _check_odd_tree(source, target)
    if attributes:
        assert os.getxattr(target / "empty", "user.limpet") == b"v\0w"


@pytest.mark.parametrize("form", ["--format=pax", "--format=gnu"])
def test_an_archive_of_gnu_tar_is_understood(guest: LocalGuest, form: str) -> None:
    """GST-8"""
    source, target = guest.files / f"gnu{form}", guest.files / f"out{form}"
    _odd_tree(source)
    sparse = ["--sparse"] if form == "--format=pax" else []
    tar = subprocess.run(["tar", "-C", str(source), form, *sparse, "-cf", "-", "."], capture_output=True, check=True)
    guest.do(lambda agent: agent.unpack(str(target), tar.stdout))
    assert _differences(source, target) == b""


def test_tarfile_reads_what_is_packed_and_exclusions_are_left_out(guest: LocalGuest) -> None:
    """GST-8"""
    source = guest.files / "for-tarfile"
    _odd_tree(source)
    packed = guest.do(lambda agent: _pack(agent, source, "deep/er", "link"))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = archive.getnames()
        assert archive.getmember("sparse").size == 50 << 20 and "hard" in names
        assert "deep/er" not in names and "link" not in names and "deep/f" in names


def _archive(*members: tuple[str, bytes, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            archive.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        _archive(("../out", tarfile.REGTYPE, "")),
        _archive(("a/../../out", tarfile.REGTYPE, "")),
        _archive(("/tmp/limpet-out", tarfile.REGTYPE, "")),
        _archive(("l", tarfile.SYMTYPE, "/tmp"), ("l/limpet-out", tarfile.REGTYPE, "")),
        _archive(("l", tarfile.SYMTYPE, ".."), ("l/out", tarfile.DIRTYPE, "")),
        _archive(("h", tarfile.LNKTYPE, "../kept")),
        _archive(("h", tarfile.LNKTYPE, "/etc/passwd")),
        b"\1" * 2048,
        _archive(("cut", tarfile.REGTYPE, ""))[:700],
        b"",
    ],
)
def test_an_archive_that_is_broken_or_wants_out_is_refused(guest: LocalGuest, data: bytes) -> None:
    """GST-2, GST-8"""
    target = guest.files / "jail"
    with pytest.raises(errors.LimpetError):
        guest.do(lambda agent: agent.unpack(str(target), data))
    assert not (guest.files / "out").exists() and not Path("/tmp/limpet-out").exists()
    guest.do(lambda agent: agent.ping())


def test_a_large_file_moves_in_constant_memory(guest: LocalGuest) -> None:
    """GST-8"""
    path = guest.files / "large"
    with path.open("wb") as file:
        file.truncate(256 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def work(agent: Agent) -> int:
        count = 0
        async for piece in agent.read_file(str(path)):
            count += len(piece)
        return count

    assert guest.do(work) == 256 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    pid = guest.agent_pid()
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 200 << 10
