"""Root file systems of strangers: what is damaged, endless or no tar at all is refused before anything is unpacked."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from limpet import process
from limpet.errors import BadRequest, InsufficientSpace
from limpet.images import Image, filesystems, find_image, namespace_problem, rootfs, transfer
from limpet.paths import Paths
from tests.unit.images_kit import paths_in, strays

needs_tools = pytest.mark.skipif(
    not process.find("mke2fs") or asyncio.run(namespace_problem()) is not None, reason="cannot make file systems here"
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return paths_in(tmp_path / "home")


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, content


def tar(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format) as archive:
        for member, content in entries:
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


SMALL = (
    entry("./bin", type=tarfile.DIRTYPE, mode=0o755),
    entry("./bin/sh", b"#!", mode=0o4755, uid=7, gid=8),
    entry("./etc", type=tarfile.DIRTYPE, mode=0o755),
    entry("./etc/passwd", b"root:x:0:0::/var/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n"),
    entry("./dev", type=tarfile.DIRTYPE, mode=0o755),
    entry("./dev/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
)


def import_(paths: Paths, file: Path) -> Image:
    return asyncio.run(transfer.import_(paths, file, "small:v1", progress=lambda stage: None))


def refused(paths: Paths, file: Path, content: bytes, what: str) -> None:
    file.write_bytes(content)
    with pytest.raises(BadRequest, match=what) as caught:
        import_(paths, file)
    assert str(file) in caught.value.message or "tar" in caught.value.message
    assert strays(paths) == []
    assert list(paths.images.iterdir()) == []


@needs_tools
@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress],
    ids=["plain", "gz", "bz2", "xz", "zst"],
)  # fmt: skip
def test_tar_becomes_an_image_with_its_owners_and_mount_points(
    paths: Paths, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / "small.tar"
    file.write_bytes(compress(tar(*SMALL)))
    image = import_(paths, file)
    assert find_image(paths, "small:v1") == image
    assert (image.info.user, image.info.home, image.info.source) == ("root", "/var/root", "tar")
    assert image.info.comment == "from small.tar"
    assert filesystems.problem(image.root, "root") is None
    for path, expected in {
        "/bin/sh": "Mode:  04755", "/tmp": "Mode:  01777", "/var/tmp": "Mode:  01777", "/root": "Mode:  0700",
        "/proc": "Type: directory", "/sys": "Type: directory", "/run": "Type: directory", "/home": "Type: directory",
    }.items():  # fmt: skip
        assert expected in debugfs(image.root, f"stat {path}")
    assert "User:     7   Group:     8" in debugfs(image.root, "stat /bin/sh")
    assert "sda" not in debugfs(image.root, "ls /dev")
    assert strays(paths) == []


def debugfs(disk: Path, request: str) -> str:
    command = [process.require("debugfs"), "-R", request, str(disk)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_image_says_who_its_user_is(tmp_path: Path) -> None:
    said = entry("etc/limpet/image.json", b'{"user": "me", "uid": 1000}')
    tmp_path.joinpath("tar").write_bytes(tar(*SMALL, said))
    facts = rootfs.survey(tmp_path / "tar", tmp_path / "plain").facts("")
    assert (facts.user, facts.home) == ("me", "/home/me")


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b'{"user": 3}', b'{"user": ""}', b"\xff"])
def test_image_that_says_nonsense_has_the_user_root(tmp_path: Path, said: bytes) -> None:
    tmp_path.joinpath("tar").write_bytes(tar(entry("etc/limpet/image.json", said)))
    assert rootfs.survey(tmp_path / "tar", tmp_path / "plain").facts("").user == "root"


@needs_tools
def test_links_lead_nowhere_outside(paths: Paths, tmp_path: Path) -> None:
    """Not while it is unpacked, nor when its mount points are made."""
    outside = tmp_path / "outside"
    outside.mkdir()
    link = entry("./way", type=tarfile.SYMTYPE, linkname=str(outside))
    file = tmp_path / "evil.tar"
    file.write_bytes(tar(link, entry("./way/file", b"owned")))
    with contextlib.suppress(BadRequest):  # a link and what lies beyond it: GNU tar may refuse that, or keep it inside
        import_(paths, file)
    assert list(outside.iterdir()) == []
    for name in ("etc", "run", "dev"):
        evil = entry(f"./{name}", type=tarfile.SYMTYPE, linkname=str(outside))
        shutil.rmtree(paths.images / "small", ignore_errors=True)
        refused(paths, file, tar(evil), f"/{name} is a symbolic link")
    for name in ("var", "home", "root", "tmp"):
        file.write_bytes(tar(entry(f"./{name}", type=tarfile.SYMTYPE, linkname=str(outside))))
        shutil.rmtree(paths.images / "small", ignore_errors=True)
        import_(paths, file)
        assert list(outside.iterdir()) == []


def test_what_is_no_tar_is_refused(paths: Paths, tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    whole = tar(*SMALL)
    refused(paths, file, b"", "no tar")
    refused(paths, file, b"PK\3\4" + bytes(2000), "no tar")
    refused(paths, file, os.urandom(3000), "no tar")
    refused(paths, file, bytes(10240), "empty")
    refused(paths, file, whole[:1300], "truncated|damaged")
    refused(paths, file, whole[:1024], "truncated")
    refused(paths, file, gzip.compress(whole)[:150], "damaged|no tar|truncated")
    refused(paths, file, lzma.compress(whole)[:150], "damaged|no tar|truncated")
    refused(paths, file, zstandard.compress(whole)[:150], "damaged|no tar|truncated")
    refused(paths, file, zstandard.compress(whole)[:100] + b"\0" * 100, "damaged|no tar|truncated")
    refused(paths, file, tar(entry("../../etc/passwd", b"x")), "leads out of the tree")


def test_tar_without_a_name_asks_for_one(paths: Paths, tmp_path: Path) -> None:
    tmp_path.joinpath("x.tar").write_bytes(tar(*SMALL))
    with pytest.raises(BadRequest, match="name"):
        asyncio.run(transfer.import_(paths, tmp_path / "x.tar", progress=lambda stage: None))


def test_endless_tar_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootfs, "_memory", lambda: 1 << 20)
    file = tmp_path / "bomb.tar.zst"
    file.write_bytes(zstandard.compress(tar(entry("zeroes", bytes(8 << 20)))))
    with pytest.raises(InsufficientSpace, match=r"bomb\.tar\.zst: unpacked"):
        rootfs.survey(file, tmp_path / "plain")
    assert (tmp_path / "plain").stat().st_size <= 2 << 20


def test_header_of_absurd_size_is_refused(tmp_path: Path) -> None:
    """A pax header is read into memory as a whole."""
    file = tmp_path / "pax.tar"
    file.write_bytes(tar(entry("x", pax_headers={"comment": "x" * (2 << 20)}), format=tarfile.PAX_FORMAT))
    with pytest.raises(BadRequest, match="absurd"):
        rootfs.survey(file, tmp_path / "plain")
