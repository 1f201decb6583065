"""Publishing a payload: whole generations in one step, edits of the host never lost, crashes in every gap."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, Unimplemented
from limpet.services.payloads import publishing, replaced
from limpet.services.payloads.locking import locked
from limpet.services.payloads.marker import NAME
from limpet.services.payloads.publishing import Drifted, HeldBack
from limpet.services.payloads.scanning import scan
from limpet.services.payloads.state import Published
from limpet.vault import Editor, Node
from tests.unit.payload_kit import VOLUME, Reader, World, both, files, unlink, write

CONTENT = {"a": b"a one", "b": b"b one", "deep/er/c": b"c one"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, CONTENT)


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without RENAME_EXCHANGE."""

    def refuse(a: Path, b: Path) -> None:
        raise Unimplemented(f"the file system of {a} cannot exchange two names")

    monkeypatch.setattr(durable, "exchange", refuse)


def test_the_directory_becomes_the_generation_and_the_marker_keeps_its_lock(world: World) -> None:
    """PAY-2, PAY-4."""
    first = world.generation()
    assert not world.publish(first)  # it is that already
    inode = (world.host / "b").stat().st_ino
    second = world.generation(write("a", b"a two", mode=0o640))
    assert world.publish(second, first)
    assert files(world.host) == {**CONTENT, "a": b"a two"}
    made = (world.host / "a").stat()
    assert (stat.S_IMODE(made.st_mode), made.st_mtime_ns) == (0o640, 1_700_000_000_123_456_789)
    assert (world.host / "b").stat().st_ino == inode  # not written again
    assert locked(world.host)
    assert world.state.published is not None and world.state.published.generation == 2


def test_a_reader_by_path_sees_whole_generations_only(world: World) -> None:
    """PAY-2: two files that always change together are never seen apart."""
    before = world.generation(both(write("a", b"0"), write("b", b"0")))
    world.publish(before)
    reader = Reader(world.host / "a", world.host / "b")
    reader.start()
    for number in range(1, 15):
        after = world.generation(both(write("a", b"%d" % number), write("b", b"%d" % number)))
        world.publish(after, before)
        before = after
    found = reader.end()
    assert len(found) > 1
    assert all(a == b for a, b in found)


def test_without_what_was_published_last_only_equal_files_are_taken_over(world: World) -> None:
    """PAY-2: after a restart, or when that generation is gone; same size and time is not enough."""
    before = (world.host / "b").stat()
    changed = world.generation(write("b", b"B ONE", mtime_ns=before.st_mtime_ns))
    inode = (world.host / "a").stat().st_ino
    assert world.publish(changed, None)
    assert (world.host / "b").read_bytes() == b"B ONE"
    assert (world.host / "a").stat().st_ino == inode


def test_links_holes_and_empty_directories_are_published_and_dangerous_things_left_out(world: World) -> None:
    """PAY-2: names in any bytes; set-id bits, devices, sockets and pipes of a guest never reach the host."""

    def change(editor: Editor) -> None:
        editor.put(b"odd\xff\n", Node("file", 0o644), [b"odd"])
        editor.link(b"second", b"odd\xff\n")
        editor.put(b"link", Node("symlink", target=b"/etc/passwd"))
        editor.put(b"empty", Node("dir", 0o555))
        editor.put(b"suid", Node("file", 0o6755), [b"#!/bin/sh"])
        editor.put(b"device", Node("char", 0o666, rdev=os.makedev(1, 3)))
        editor.put(b"pipe", Node("fifo", 0o666))
        editor.put(b".limpet-payload", Node("file", 0o644), [b"forged"])
        editor.put(b"sparse", Node("file", 0o644))
        editor.truncate(b"sparse", 64 << 20)

    world.publish(world.generation(change))
    odd = os.stat(os.fsencode(world.host) + b"/odd\xff\n")
    assert odd.st_nlink == 2 and odd.st_ino == (world.host / "second").stat().st_ino
    assert os.readlink(world.host / "link") == "/etc/passwd"
    assert stat.S_IMODE((world.host / "empty").stat().st_mode) == 0o755  # can always be listed by its owner
    assert stat.S_IMODE((world.host / "suid").stat().st_mode) == 0o755
    assert not (world.host / "device").exists() and not (world.host / "pipe").exists()
    assert (world.host / "sparse").stat().st_blocks < 100 and (world.host / "sparse").stat().st_size == 64 << 20
    assert b"forged" not in (world.host / NAME).read_bytes()


def test_sockets_and_pipes_of_the_host_stay_where_they_are(tmp_path: Path) -> None:
    """PAY-6: what was never seeded was never deleted by the guest either."""
    world = World(tmp_path, CONTENT)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(world.host / "deep" / "sock"))
    server.close()
    os.mkfifo(world.host / "fifo")
    world.publisher.last = scan(world.host)
    world.publisher.save(published=Published.of(world.publisher.last))
    world.publish(world.generation(write("a", b"two")))
    assert (world.host / "deep" / "sock").is_socket() and (world.host / "fifo").is_fifo()


# ── edits on the host ────────────────────────────────────────────────────────────────────────────────────────────────


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" edited")


EDITS: dict[str, Callable[[Path], object]] = {
    "changed": lambda host: append(host / "b"),
    "made": lambda host: (host / "deep" / "mine").write_bytes(b"mine"),
    "removed": lambda host: (host / "b").unlink(),
    "renamed": lambda host: (host / "b").rename(host / "bb"),
    "chmod": lambda host: (host / "b").chmod(0o600),
    "replaced": lambda host: (host / "new").write_bytes(b"b one") and (host / "new").rename(host / "b"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_directory_is_not_published_over(world: World, edit: str) -> None:
    """PAY-6."""
    first = world.generation()
    world.publish(first)
    EDITS[edit](world.host)
    before = files(world.host)
    with pytest.raises(Drifted, match="edited on the host"):
        world.publish(world.generation(write("a", b"two")), first)
    assert files(world.host) == before
    assert world.beside == []


WINDOWS = [
    "payload.publish.build.before", "payload.publish.build.after", "payload.publish.intent.before",
    "payload.publish.exchange.before",
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_any_window_is_kept_and_told(
    world: World, edit: str, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-6: from the first look to the exchange."""
    first = world.generation()
    world.publish(first)
    at(monkeypatch, window, lambda: EDITS[edit](world.host))
    with pytest.raises(Drifted):
        world.publish(world.generation(write("a", b"two")), first)
    monkeypatch.undo()
    assert (world.host / "a").read_bytes() == b"a one"
    assert files(world.host) != CONTENT or edit in ("chmod", "replaced")
    assert locked(world.host)
    with pytest.raises(Drifted):
        world.publisher.look()
    assert world.beside == []


def test_a_write_through_a_descriptor_after_the_exchange_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-6: a program that had a file open when the tree was replaced loses nothing."""
    first = world.generation()
    world.publish(first)
    with (world.host / "a").open("ab", buffering=0) as file:
        world.publish(world.generation(write("a", b"two")), first)
        file.write(b" late")
    assert (world.host / "a").read_bytes() == b"two"
    monkeypatch.setattr(replaced, "KEEP_S", 0.0)
    [kept] = world.publisher.tend()
    assert (kept / "a").read_bytes() == b"a one late"
    assert not (kept / NAME).exists()


def test_a_pipe_of_the_host_never_gets_out_through_a_link_of_the_guest(tmp_path: Path) -> None:
    """PAY-2: the directory that it was in is a symlink to somewhere else now."""
    outside = tmp_path / "outside"
    outside.mkdir()
    world = World(tmp_path / "world", {"a": b"a", "run/one": b"1"})
    os.mkfifo(world.host / "run" / "pipe")
    world.publisher.last = scan(world.host)
    world.publisher.save(published=Published.of(world.publisher.last))
    first = world.generation()
    world.publish(first)

    def lead_out(editor: Editor) -> None:
        editor.unlink(b"run/one")
        editor.rmdir(b"run")
        editor.symlink(b"run", os.fsencode(outside))

    assert world.publish(world.generation(lead_out), first)
    assert list(outside.iterdir()) == []


def test_what_cannot_be_read_or_has_no_end_is_written_anew_without_being_compared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-2, PAY-8: a mode of the guest without read permission, a file of nearly nothing but holes."""

    def grow(editor: Editor) -> None:
        editor.truncate(b"b", 1 << 40)

    first = world.generation(both(write("a", b"secret", mode=0o000), grow))
    world.publish(first)
    real = os.open

    def refuse(path: bytes, *args: int, **options: int) -> int:
        if os.path.basename(path) == b"a" and os.path.isabs(path):
            raise PermissionError(13, "Permission denied")  # as an ordinary user
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    began = time.monotonic()
    assert world.publish(world.generation(write("new", b"")), None)
    assert time.monotonic() - began < 10
    monkeypatch.undo()
    assert (world.host / "a").read_bytes() == b"secret" and (world.host / "b").stat().st_size == 1 << 40


def test_confirming_for_the_guest_publishes_and_keeps_the_edits_beside(world: World) -> None:
    """PAY-6: both versions are kept."""
    first = world.generation()
    world.publish(first)
    append(world.host / "b")
    assert world.publish(world.generation(write("a", b"two")), first, confirmed=True)
    assert files(world.host) == {**CONTENT, "a": b"two"}
    [saved] = world.beside
    assert saved.startswith("host.saved-")
    assert (world.host.parent / saved / "b").read_bytes() == b"b one edited"
    assert not (world.host.parent / saved / NAME).exists()


# ── the marker ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_edits_of_a_directory_with_a_long_name_can_be_kept_beside_it(tmp_path: Path) -> None:
    """PAY-6."""
    directory, tree = tmp_path / ("ä" * 127), tmp_path / "tree"
    directory.mkdir()
    (tree / "sub").mkdir(parents=True)
    for _ in range(2):
        (tree / "sub").mkdir(parents=True, exist_ok=True)
        assert (replaced.keep_aside(tree, directory) / "sub").is_dir()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_missing_or_other_marker_is_a_failure_and_nothing_is_touched(world: World) -> None:
    """PAY-4: compared by value."""
    first = world.generation()
    second = world.generation(write("a", b"two"))
    own = (world.host / NAME).read_bytes()
    (world.host / NAME).unlink()
    with pytest.raises(FailedPrecondition, match="no marker"):
        world.publish(second, first)
    (world.host / NAME).write_bytes(own.replace(world.lock.marker.nonce.encode(), b"0" * 32))
    with pytest.raises(FailedPrecondition, match="its marker is of sandbox box"):
        world.publish(second, first)
    with pytest.raises(FailedPrecondition, match="its marker is of sandbox box"):
        world.publish(second, first, confirmed=True)
    assert files(world.host) == CONTENT


def test_another_directory_under_the_name_is_never_replaced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-4, PAY-6: also when it gets there in the last instant."""
    first = world.generation()
    world.publish(first)
    mine = world.host.parent / "mine"

    def swap() -> None:
        world.host.rename(mine)
        world.host.mkdir()
        (world.host / "precious").write_bytes(b"precious")

    at(monkeypatch, "payload.publish.exchange.before", swap)
    with pytest.raises((Drifted, FailedPrecondition)):
        world.publish(world.generation(write("a", b"two")), first)
    assert files(world.host) == {"precious": b"precious"}
    assert files(mine) == CONTENT


# ── deletions ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many(tmp_path: Path) -> World:
    content = {f"sub/{number}": b"%d" % number for number in range(30)}
    return World(tmp_path, {**content, **{f"other/{number}": b"" for number in range(100)}})


def test_a_mass_deletion_is_held_back_until_it_is_confirmed(many: World) -> None:
    """PAY-5."""
    first = many.generation()
    many.publish(first)
    some = many.generation(unlink("sub", range(15)))
    assert many.publish(some, first)  # half is not more than half
    most = many.generation(unlink("sub", range(15, 24)))
    assert many.publish(most, some)  # 15 files were no more than 20
    assert len(files(many.host)) == 106
    refused = many.generation(unlink("other", range(60)))
    with pytest.raises(HeldBack, match="60 of the 100 files in other"):
        many.publish(refused, most)
    assert len(files(many.host)) == 106
    assert many.publish(refused, most, confirmed=True)
    assert len(files(many.host)) == 46


def test_a_moved_directory_is_no_deletion(many: World) -> None:
    """PAY-5."""
    first = many.generation()
    many.publish(first)
    assert many.publish(many.generation(lambda editor: editor.rename(b"sub", b"moved")), first)
    assert len(files(many.host)) == 130


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """The daemon ends here: nothing of what would follow is done."""


def at(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """Do something when a crash point is passed, once."""
    armed = [name]

    def passed(point: str) -> None:
        if point in armed:
            armed.remove(point)
            action()
        crashpoint(point)

    monkeypatch.setattr(publishing, "crashpoint", passed)


def die() -> None:
    raise Killed


EXCHANGING = [
    "payload.publish.build.before", "payload.publish.build.after", "payload.publish.intent.before",
    "payload.publish.exchange.before", "payload.publish.exchange.after", "payload.publish.state.before",
    "payload.publish.state.after",
]  # fmt: skip


def crash_and_recover(world: World, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.generation()
    world.publish(first)
    second = world.generation(write("a", b"two"))
    at(monkeypatch, point, die)
    with monkeypatch.context() as killed:
        killed.setattr(publishing, "remove", lambda path: None)  # nobody cleans up after a kill
        with pytest.raises(Killed):
            world.publish(second, first)
    monkeypatch.setattr(publishing, "crashpoint", crashpoint)
    world.restarted().recover()
    assert files(world.host) in (CONTENT, {**CONTENT, "a": b"two"})
    world.publisher.look()  # no drift is seen in what a crash left
    assert locked(world.host)
    known = world.publisher.state.published
    base = {1: first, 2: second}[known.generation] if known is not None and known.generation else None
    world.publish(second, base)
    assert files(world.host) == {**CONTENT, "a": b"two"}
    assert [name for name in world.beside if ".old-" not in name] == []
    for tree in world.publisher.replaced:
        tree.expire()
    assert world.publisher.tend() == []
    assert world.beside == []


@pytest.mark.parametrize("point", EXCHANGING)
def test_a_crash_leaves_one_generation_or_the_other(world: World, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-2, D5: before and after every effect of a publication."""
    crash_and_recover(world, point, monkeypatch)


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("point", [*EXCHANGING, "payload.publish.aside.after"])
def test_a_crash_between_two_renames_is_made_good(world: World, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-2: the fallback."""
    crash_and_recover(world, point, monkeypatch)


def test_an_edit_before_a_crash_right_after_the_exchange_is_found_by_the_next_daemon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-6."""
    first = world.generation()
    world.publish(first)

    def edit_and_exchange(a: Path, b: Path) -> None:
        append(world.host / "b")
        real(a, b)

    real = durable.exchange
    at(monkeypatch, "payload.publish.exchange.after", die)
    with monkeypatch.context() as edited:
        edited.setattr(durable, "exchange", edit_and_exchange)
        with pytest.raises(Killed):
            world.publish(world.generation(write("a", b"two")), first)
    world.restarted().recover()
    assert files(world.host) == {**CONTENT, "b": b"b one edited"}
    with pytest.raises(Drifted):
        world.publisher.look()


# ── other file systems, readers, leftovers ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A real file system with little room."""
    image, place = tmp_path / "small.img", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=False).returncode == 0
    if not made or subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_the_publication_and_leaves_the_directory(small: Path) -> None:
    """PAY-8: nothing half, nothing left beside, and it works again when there is room."""
    world = World(small / "a", CONTENT)
    first = world.generation()
    world.publish(first)
    second = world.generation(write("a", os.urandom(6 << 20)))
    filler = small / "filler"
    with pytest.raises(Exception, match="space"), filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * (1 << 16))
        except OSError:
            file.truncate(file.tell() - (2 << 20))
        world.publish(second, first)
    assert files(world.host) == CONTENT and world.beside == []
    filler.unlink()
    assert world.publish(second, first)
    world.lock.close()


def test_a_replaced_tree_stays_for_a_reader_that_stands_in_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAY-2: `cd HOSTDIR && cp -r .` copies one generation."""
    monkeypatch.setattr(replaced, "KEEP_S", 0.0)
    first = world.generation()
    world.publish(first)
    with subprocess.Popen(["sleep", "60"], cwd=world.host) as reader:
        time.sleep(0.1)
        world.publish(world.generation(write("a", b"two")), first)
        assert world.publisher.tend() == []
        assert (Path(f"/proc/{reader.pid}/cwd") / "a").read_bytes() == b"a one"
        reader.kill()
    assert world.publisher.tend() == []
    assert world.beside == []


def test_nothing_is_written_when_a_generation_changed_only_elsewhere(world: World) -> None:
    """PAY-2: an unchanged volume costs a look."""
    first = world.generation()
    world.publish(first)
    inode = world.host.stat().st_ino
    with durable.recording() as done:
        assert not world.publish(world.generation(), first)
    assert world.host.stat().st_ino == inode
    assert [op.kind for op in done if op.path.is_relative_to(world.host)] == []
    assert world.vault.head is not None and world.vault.head.volumes[VOLUME]
