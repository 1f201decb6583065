"""`.limpet` files: what goes in comes out, and nothing that is damaged or foreign is ever published (FRZ-4, FRZ-5)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import struct
import tarfile
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, NotFound
from limpet.images import Image, ImageFacts, diskstream, find_image, list_images, portable, transfer, upkeep
from limpet.models import Stage
from limpet.paths import Paths
from tests.unit.images_kit import SIZE, paths_in, publish, root_disk, strays

FACTS = ImageFacts(
    user="user", home="/home/user", spec={"env": {"A": "1"}, "vcpus": 3, "user": None}, workspace={"guest_dir": "/w"},
    parent="sha256:00", comment="ünïcode", source="commit", created_at=datetime(2030, 1, 1, tzinfo=UTC),
)  # fmt: skip
Members = dict[str, bytes]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return paths_in(tmp_path / "home")


@pytest.fixture
def whole(paths: Paths, tmp_path: Path) -> Path:
    """A good file, whose image is gone from this host."""
    publish(paths, "tool", os.urandom(3000), tag="v1", data=os.urandom(2 << 20), facts=FACTS)
    file = tmp_path / "tool.limpet"
    portable.export(find_image(paths, "tool:v1"), file)
    upkeep.remove(paths, "tool:v1", lambda directory: ())
    return file


def import_(paths: Paths, file: Path, name: str | None = None, *, replace: bool = False) -> Image:
    seen: list[Stage] = []
    return asyncio.run(transfer.import_(paths, file, name, replace=replace, progress=seen.append))


def refused(paths: Paths, file: Path, what: str | None = None) -> BadRequest:
    """The file is refused by its name, and nothing is left of it."""
    before = [info.digest for info in list_images(paths)]
    with pytest.raises(BadRequest, match=what) as caught:
        import_(paths, file, "victim")
    assert str(file) in caught.value.message
    assert [info.digest for info in list_images(paths)] == before
    assert strays(paths) == []
    return caught.value


def members(file: Path) -> Members:
    with tarfile.open(file) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def forge(file: Path, content: Members, *, digests: bool = True) -> Path:
    """Write these members, with digests that fit them."""
    if digests:
        found = {name: hashlib.sha256(data).hexdigest() for name, data in content.items() if name != "digests.json"}
        content = {**content, "digests.json": (json.dumps(found, indent=2) + "\n").encode()}
    with file.open("wb") as target:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            target.write(member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        target.write(bytes(1024))
    return file


def edited(content: Members, change: Callable[[dict[str, object]], None]) -> Members:
    manifest = json.loads(content["limpet.json"])
    change(manifest)
    return {**content, "limpet.json": json.dumps(manifest).encode()}


def stream(*records: tuple[int, bytes], end: int = SIZE, extra: bytes = b"") -> bytes:
    raw = b"".join(struct.pack(">QI", offset, len(block)) + block for offset, block in records)
    return zstandard.compress(raw + struct.pack(">QI", end, 0) + extra)


def test_imported_image_is_the_exported_one(paths: Paths, whole: Path) -> None:
    image = import_(paths, whole)
    info = image.info
    assert (info.name, info.tag, info.source) == ("tool", "v1", "import")
    assert (info.spec, info.workspace, info.user, info.home) == (FACTS.spec, FACTS.workspace, "user", "/home/user")
    assert (info.parent, info.comment, info.created_at) == (FACTS.parent, FACTS.comment, FACTS.created_at)
    assert upkeep.verify(paths, "tool:v1") == []
    assert find_image(paths, "tool:v1") == image
    assert info.disk_used < SIZE  # holes stay holes
    assert strays(paths) == []


def test_import_takes_another_name_and_keeps_what_is_there(paths: Paths, whole: Path) -> None:
    import_(paths, whole, "other:mine")
    with pytest.raises(AlreadyExists, match="other:mine"):
        import_(paths, whole, "other:mine")
    assert import_(paths, whole, "other:mine", replace=True).info.tag == "mine"
    with pytest.raises(BadRequest):
        import_(paths, whole, "other@sha256:0000")


def test_export_keeps_a_file_that_is_there_and_leaves_none_when_it_fails(paths: Paths, tmp_path: Path) -> None:
    image = publish(paths, "tool", b"1")
    file = tmp_path / "out" / "tool.limpet"
    with pytest.raises(NotFound):
        portable.export(image, file)
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(AlreadyExists):
        portable.export(image, file)
    image.root.chmod(0o600)
    root_disk(image.root, b"damaged")
    with pytest.raises(FailedPrecondition, match="damaged"):
        portable.export(image, file, replace=True)
    assert [(child.name, child.read_text()) for child in file.parent.iterdir()] == [("tool.limpet", "mine")]


def test_every_truncation_is_refused(paths: Paths, whole: Path) -> None:
    content = whole.read_bytes()
    cuts = [0, 1, 511, 512, 700, 1024, 5000, len(content) // 2, len(content) - 1024, len(content) - 1]
    for cut in cuts:
        whole.write_bytes(content[:cut])
        if cut < 512:  # not even recognised
            refused(paths, whole)
        else:
            refused(paths, whole, "truncated|damaged|end is missing|ends too early")


def test_flipped_bits_are_refused_wherever_they_are(paths: Paths, whole: Path) -> None:
    content = bytearray(whole.read_bytes())
    for position in [*range(0, 1600, 37), *range(1600, len(content), max(1, len(content) // 60)), len(content) - 1100]:
        content[position] ^= 0x10
        whole.write_bytes(content)
        refused(paths, whole)
        content[position] ^= 0x10
    whole.write_bytes(content)
    assert import_(paths, whole).info.name == "tool"


def test_foreign_files_are_named_as_such(paths: Paths, tmp_path: Path) -> None:
    file = tmp_path / "x.limpet"
    for content in (b"", b"\0" * 4096, b"PK\3\4" + bytes(2000), os.urandom(3000), b"QFI\xfb" + bytes(1000)):
        file.write_bytes(content)
        refused(paths, file, "no tar|damaged|truncated|empty")
    with pytest.raises(NotFound):
        import_(paths, tmp_path / "absent", "victim")
    with pytest.raises(NotFound):
        import_(paths, tmp_path, "victim")


def test_newer_format_asks_for_an_update(paths: Paths, whole: Path) -> None:
    forge(whole, edited(members(whole), lambda manifest: manifest.update(format=2, disks="otherwise")))
    assert refused(paths, whole, "format 2, made by a newer limpet").hint == "update limpet"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="1.0"),
        lambda m: m.pop("image"),
        lambda m: m["image"].update(digest="sha256:" + "0" * 64),
        lambda m: m["image"].update(name="../../etc"),
        lambda m: m["image"].update(tag="../current"),
        lambda m: m["image"].update(spec={"kernel": "/etc/shadow"}),
        lambda m: m["image"].update(spec={"vcpus": 10**9}),
        lambda m: m["image"].update(spec={"env": {"A=B": "x"}}),
        lambda m: m["image"].update(created_at="2030-01-01T00:00:00"),
        lambda m: m["image"].update(user="somebody-else"),
        lambda m: m["disks"].pop("root"),
        lambda m: m["disks"].pop("data"),
        lambda m: m["disks"].update({"../x": m["disks"]["root"]}),
        lambda m: m["disks"]["root"].update(size=1 << 60),
        lambda m: m["disks"]["root"].update(size=SIZE + 512),
        lambda m: m["disks"]["root"].update(size=-512),
        lambda m: m["disks"]["root"].update(stored=512),
        lambda m: m["disks"]["root"].update(digest="0" * 64),
        lambda m: m["disks"]["root"].update(digest="x"),
    ],
)
def test_description_that_lies_is_refused(
    paths: Paths, whole: Path, change: Callable[[dict[str, object]], None]
) -> None:
    refused(paths, forge(whole, edited(members(whole), change)))


def test_members_that_are_not_ours_are_refused(paths: Paths, whole: Path, tmp_path: Path) -> None:
    good, file = members(whole), tmp_path / "forged.limpet"
    order = ("limpet.json", "data.zst", "root.zst")
    refused(paths, forge(file, {name: good[name] for name in order}), "root.zst")
    refused(paths, forge(file, {"limpet.json": good["limpet.json"]}), "root.zst")
    refused(paths, forge(file, {**good, "digests.json": b"{}"}, digests=False), "digests")
    refused(paths, forge(file, {"limpet.json": b"[" * 100_000}), "makes no sense")
    refused(paths, forge(file, {"limpet.json": b" " * (2 << 20)}), "too large")
    refused(paths, forge(file, {"limpet.json": b"null"}), "makes no sense")
    forge(file, good)
    file.write_bytes(file.read_bytes() + b"more")
    refused(paths, file, "something follows")


def test_link_instead_of_a_member_is_refused(paths: Paths, whole: Path, tmp_path: Path) -> None:
    good, file = members(whole), tmp_path / "forged.limpet"
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("limpet.json")
        member.size = len(good["limpet.json"])
        tar.addfile(member, io.BytesIO(good["limpet.json"]))
        link = tarfile.TarInfo("root.zst")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    refused(paths, file, "the header of root.zst")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (stream((0, b"x" * 512), (0, b"y" * 512)), "where none can be"),
        (stream((1 << 20, b"x" * 512), (0, b"y" * 512)), "where none can be"),
        (stream((SIZE, b"x" * 512)), "where none can be"),
        (stream((512, b"x" * 512)), "where none can be"),
        (stream((0, b"x" * ((1 << 20) + 1))), "where none can be"),
        (stream(*((n << 20, b"x" * (1 << 20)) for n in range(8))), "where none can be"),  # more than declared
        (stream(end=SIZE + 1), "another size"),
        (stream(extra=b"x"), "more after the end"),
        (zstandard.compress(b""), "too early"),
        (b"", "too early"),
        (b"garbage", "damaged"),
        (zstandard.compress(b"\0" * (64 << 20)), "another size"),
    ],
)
def test_stream_that_does_not_keep_to_what_was_declared_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    with pytest.raises(BadRequest, match=what):
        diskstream.read(io.BytesIO(content), tmp_path / "disk", size=SIZE, limit=2 << 20)


def test_stream_with_a_huge_window_is_refused(tmp_path: Path) -> None:
    """No stranger decides how much memory we take."""
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(os.urandom(1 << 20)) + compressor.flush()
    with pytest.raises(BadRequest, match="damaged"):
        diskstream.read(io.BytesIO(content), tmp_path / "disk", size=SIZE, limit=SIZE)


@given(st.lists(st.tuples(st.integers(0, (6 << 20) - 1), st.binary(min_size=1, max_size=9000)), max_size=8),
       st.integers(1, 6 << 20))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_disk_survives_its_stream(pieces: list[tuple[int, bytes]], size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        disk, copy = Path(directory, "disk"), Path(directory, "copy")
        with disk.open("wb") as file:
            file.truncate(size)
            for offset, content in pieces:
                file.seek(min(offset, size - 1))
                file.write(content[: size - file.tell()])
        target = io.BytesIO()
        digest = diskstream.write(disk, target)
        limit = diskstream.stored(disk)
        assert diskstream.read(io.BytesIO(target.getvalue()), copy, size=size, limit=limit) == digest
        assert copy.read_bytes() == disk.read_bytes()


@given(st.binary(max_size=3000))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_an_image_or_a_bad_request(content: bytes) -> None:
    header = tarfile.TarInfo("limpet.json")
    header.size = len(content)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "file")
        for candidate in (content, header.tobuf() + content):
            file.write_bytes(candidate)
            with pytest.raises(BadRequest):
                portable.unpack(file, Path(directory))
        with pytest.raises(BadRequest):
            diskstream.read(io.BytesIO(zstandard.compress(content)), Path(directory, "disk"), size=SIZE, limit=SIZE)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["format", "image", "disks"]), st.sampled_from(["", "name", "digest", "spec", "root"]), _json)
@settings(max_examples=150, deadline=None)
def test_any_description_is_read_or_refused(key: str, inner: str, value: object) -> None:
    manifest: dict[str, object] = {
        "format": 1,
        "image": {"name": "x", "digest": "d", "size": 1, "disk_used": 1, "created_at": "2030-01-01T00:00:00Z"},
        "disks": {"root": {"size": 512, "digest": "0" * 64, "stored": 0}},
    }
    where = manifest[key]
    if inner and isinstance(where, dict):
        where[inner] = value
    else:
        manifest[key] = value
    with tempfile.TemporaryDirectory() as directory:
        file = forge(Path(directory, "file"), {"limpet.json": json.dumps(manifest).encode()})
        with pytest.raises(BadRequest):
            portable.unpack(file, Path(directory))
