"""Restoring to a directory of the host: everything or nothing, and nothing that a guest could do harm with."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet.errors import BadRequest, FailedPrecondition, InsufficientSpace, NotFound
from limpet.vault import Damaged, Tree, Vault
from limpet.vault.restoring import pack, restore, restore_all
from limpet_agent.tarread import unpack
from tests.unit import streams_kit as kit
from tests.unit import vault_kit
from tests.unit.streams_kit import command, full, mkdir, mkfile, write

Facts = dict[bytes, dict[str, Any]]


def expected(facts: Facts, below: bytes = b"") -> Facts:
    """What a host is given of a guest's tree."""
    found = {}
    for path, known in facts.items():
        if path == below or path.startswith(below + b"/" if below else b""):
            format_ = stat.S_IFMT(known["mode"])
            if format_ in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK):
                continue
            mode = known["mode"] if stat.S_ISLNK(format_) else format_ | known["mode"] & 0o1777
            kept = {n: v for n, v in known["xattrs"].items() if n.startswith("user.")}
            place = path[len(below) :].lstrip(b"/")
            found[place] = known | {"mode": mode, "uid": os.geteuid(), "gid": os.getegid(), "xattrs": kept}
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root looks into closed directories")
@pytest.mark.parametrize("scenario", kit.SCENARIOS)
def test_a_restored_tree_is_what_the_guest_had(scenario: str, tmp_path: Path) -> None:
    """D3, VM-3: bytes, modes, times, links, symlinks, holes, odd names; but for what a host must not be given."""
    for number in range(kit.steps(scenario)):
        tree = vault_kit.scenario(tmp_path / str(number), scenario, number)
        to = tmp_path / f"restored-{number}"
        done = restore(tree, b"", to)
        ours = vault_kit.on_disk(to)
        assert vault_kit.grouped(ours) == vault_kit.grouped(expected(kit.tree(scenario, number)))
        assert done.files == sum(not stat.S_ISDIR(known["mode"]) for known in ours.values())
        assert done.bytes == tree.totals()[1]


def test_what_a_host_must_not_be_given_is_left_out_and_counted(tmp_path: Path) -> None:
    """D3: devices, sockets, set-id bits, trusted attributes, owners."""
    tree = vault_kit.scenario(tmp_path, "kinds", 0)
    done = restore(tree, b"", tmp_path / "to")
    assert done.left_out == {"devices": 2, "sockets": 1, "set-id bits": 1, "attributes": 2, "owners": 1}
    assert not (tmp_path / "to/null").exists()
    assert (tmp_path / "to/suid").stat().st_mode & 0o7777 == 0o755


def test_a_directory_or_a_single_file_can_be_restored(tmp_path: Path) -> None:
    """D3: a directory's content, a file under its own name."""
    tree = vault_kit.scenario(tmp_path, "moves", 0)
    restore(tree, b"a/x", tmp_path / "directory")
    assert vault_kit.on_disk(tmp_path / "directory") == expected(kit.tree("moves", 0), b"a/x")
    done = restore(tree, b"a/x/0", tmp_path / "file")
    assert (tmp_path / "file/0").read_text() == "ax0\n"
    assert done == (1, 4, {})
    restore(vault_kit.scenario(tmp_path / "k", "kinds", 0), b"d/outside", tmp_path / "link")
    assert os.readlink(tmp_path / "link/outside") == "/etc/passwd"


def test_a_target_that_will_not_do_is_refused_untouched(tmp_path: Path) -> None:
    """D7: nothing is ever overwritten; the error says what to do."""
    tree = vault_kit.tree_of(tmp_path, full(mkfile(b"a")))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    file = tmp_path / "file"
    file.write_text("file")
    for to, why in ((taken, "not empty"), (file, "no directory"), (tmp_path / "no/parent", "no directory")):
        with pytest.raises(BadRequest, match=why) as caught:
            restore(tree, b"", to)
        assert caught.value.hint
    assert [path.name for path in taken.iterdir()] == ["mine"]
    with pytest.raises(NotFound, match="no 'missing'"):
        restore(tree, b"missing", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_an_empty_directory_is_filled_also_through_a_symlink(tmp_path: Path) -> None:
    """D3."""
    tree = vault_kit.tree_of(tmp_path, full(mkfile(b"a")))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    restore(tree, b"", tmp_path / "link")
    assert (tmp_path / "real/a").is_file()
    assert (tmp_path / "link").is_symlink()


def test_symlinks_lead_nothing_out(tmp_path: Path) -> None:
    """D3: a link is made last, and never followed; those that lead out are kept as they are."""
    outside = tmp_path / "outside"
    outside.mkdir()
    raw = os.fsencode(outside)
    tree = vault_kit.tree_of(
        tmp_path, full(command("symlink", path=b"a", link=raw), mkdir(b"b"), mkfile(b"b/a"), write(b"b/a", 0, b"x"),
                       command("symlink", path=b"b/up", link=b"../../outside"))
    )  # fmt: skip
    restore(tree, b"", tmp_path / "to")
    assert list(outside.iterdir()) == []
    assert os.readlink(tmp_path / "to/a") == str(outside)


def test_holes_stay_holes(tmp_path: Path) -> None:
    """D3: a sparse terabyte takes as much room as its data."""
    restore(vault_kit.scenario(tmp_path, "data", 0), b"sparse", tmp_path / "to")
    found = (tmp_path / "to/sparse").stat()
    assert found.st_size == 1 << 40
    assert found.st_blocks * 512 < 2 << 20


def test_a_file_that_the_host_cannot_hold_does_not_stop_the_others(tmp_path: Path) -> None:
    """D3: a sparse file of 2^62 bytes is left out, and counted."""
    tree = vault_kit.tree_of(
        tmp_path,
        full(
            mkfile(b"a"),
            command("truncate", path=b"a", size=1 << 62),
            mkfile(b"b"),
            command("link", path=b"c", link=b"a"),
        ),
    )
    done = restore(tree, b"", tmp_path / "to")
    assert os.listdir(tmp_path / "to") == ["b"]
    assert done.left_out == {"files too large for this file system": 2}


def test_a_tree_2000_directories_deep_is_restored(tmp_path: Path) -> None:
    """D3."""
    deep = [b"/".join([b"d"] * depth) for depth in range(1, 2001)]
    tree = vault_kit.tree_of(tmp_path, full(*map(mkdir, deep), mkfile(deep[-1] + b"/f")))
    to = tmp_path / "to"
    restore(tree, b"", to)
    fd = os.open(to, os.O_RDONLY)
    assert os.stat(deep[-1] + b"/f", dir_fd=fd).st_size == 0
    for path in [deep[-1] + b"/f"]:
        os.unlink(path, dir_fd=fd)
    for path in reversed(deep):  # what pytest's own clean-up cannot
        os.rmdir(path, dir_fd=fd)
    os.close(fd)


def test_volumes_are_restored_into_one_another(tmp_path: Path) -> None:
    """PAY-2: each where it was mounted; what is around keeps its times."""
    around = vault_kit.tree_of(
        tmp_path / "around",
        full(mkdir(b"user"), mkdir(b"user/data"), command("chmod", path=b"user", mode=0o555),
             command("utimes", path=b"user", mtime=b"\1" + b"\0" * 11)),
    )  # fmt: skip
    inner = vault_kit.tree_of(tmp_path / "inner", full(mkfile(b"a"), write(b"a", 0, b"12345")))
    told: list[tuple[int, int]] = []
    parts = [(around, b"", b"home"), (inner, b"", b"home/user/data"), (inner, b"", b"deep/er")]
    done = restore_all(parts, tmp_path / "to", progress=lambda files, size: told.append((files, size)))
    assert (tmp_path / "to/home/user/data/a").read_text() == "12345"
    assert (tmp_path / "to/deep/er/a").is_file()
    assert (tmp_path / "to/home/user").stat().st_mtime == 1
    assert done == (2, 10, {})
    assert told == [(0, 0), (1, 5), (2, 10)]


def test_a_volume_whose_place_is_taken_is_left_out(tmp_path: Path) -> None:
    """D3: a guest's symlink leads no other volume out, and its files are not mixed with another's."""
    outside = tmp_path / "outside"
    outside.mkdir()
    around = vault_kit.tree_of(
        tmp_path,
        full(command("symlink", path=b"s", link=os.fsencode(outside)), mkfile(b"f"), mkdir(b"d"), mkfile(b"d/x")),
    )
    inner = vault_kit.tree_of(tmp_path / "inner", full(mkfile(b"a")))
    parts = [(around, b"", b""), *((inner, b"", place) for place in (b"s", b"s/below", b"f", b"f/below", b"d"))]
    assert restore_all(parts, tmp_path / "to").left_out == {"volumes whose place is taken": 5}
    assert list(outside.iterdir()) == []
    assert sorted(os.listdir(tmp_path / "to/d")) == ["x"]


def damage(vault: Path) -> Callable[[int], None]:
    """Flips one bit of the newest generation's file."""
    file = sorted((vault / "vault/gens").iterdir())[-1]

    def flip(at: int) -> None:
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.chmod(0o600)
        file.write_bytes(content)

    return flip


def test_damage_is_named_and_nothing_of_it_is_shown(tmp_path: Path) -> None:
    """D6: a flipped bit anywhere in what is restored fails it as a whole, or the content is right."""
    noise = os.urandom(3000)
    stream = full(mkfile(b"a"), write(b"a", 0, b"first"), mkdir(b"d"), mkfile(b"d/b"), write(b"d/b", 0, noise))
    vault_kit.tree_of(tmp_path, stream)
    size = sorted((tmp_path / "vault/gens").iterdir())[-1].stat().st_size
    flip, failed = damage(tmp_path), 0
    for at in range(0, size, 31):
        flip(at)
        to = tmp_path / f"to{at}"
        try:
            head = Vault.open(tmp_path / "vault").head
            if head is None:
                raise FailedPrecondition("no head")
            restore(head.tree("home"), b"", to)
        except FailedPrecondition:
            failed += 1
            assert not to.exists()
        else:
            assert (to / "d/b").read_bytes() == noise
        flip(at)
    assert failed > size // 31 // 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".limpet")] == []


class Failing(Tree):
    """A tree whose content fails in the middle."""

    def __init__(self, tree: Tree, error: Exception) -> None:
        super().__init__(tree._objects, tree.root)
        self._error = error

    def extents(self, node: Any) -> Iterator[tuple[int, int]]:
        if node.size == 5:
            raise self._error
        return super().extents(node)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InsufficientSpace),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"x"), FailedPrecondition),
        (Damaged("object 3 of gens/000001 is not what was written"), Damaged),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_restore_that_fails_leaves_nothing(error: Exception, told: type[BaseException], tmp_path: Path) -> None:
    """D5: however deep it was, and although it had closed directories."""
    deep = [b"/".join([b"d"] * depth) for depth in range(1, 1200)]
    stream = full(mkdir(b"c"), command("chmod", path=b"c", mode=0), *map(mkdir, deep), mkfile(deep[-1] + b"/z"),
                  write(deep[-1] + b"/z", 0, b"12345"))  # fmt: skip
    tree = vault_kit.tree_of(tmp_path, stream)
    with pytest.raises(told):
        restore(Failing(tree, error), b"", tmp_path / "to")
    assert os.listdir(tmp_path) == ["vault"]


def test_what_a_crash_left_is_removed_by_the_next_restore_beside_it(tmp_path: Path) -> None:
    """D5."""
    tree = vault_kit.tree_of(tmp_path, full(mkfile(b"a")))
    stray = tmp_path / ".limpet-restore-x1"
    (stray / "a/b").mkdir(parents=True)
    (stray / "a/b/c").write_text("c")
    restore(tree, b"", tmp_path / "to")
    assert not stray.exists()


def test_the_clean_up_follows_no_symlink(tmp_path: Path) -> None:
    """D5: and leaves what another restore has locked."""
    tree = vault_kit.tree_of(tmp_path, full(mkfile(b"a")))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    trap, busy = tmp_path / ".limpet-restore-trap", tmp_path / ".limpet-restore-busy"
    trap.mkdir()
    (trap / "d").symlink_to(precious)
    (tmp_path / ".limpet-restore-link").symlink_to(precious)
    busy.mkdir()
    held = os.open(busy, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    restore(tree, b"", tmp_path / "to")
    os.close(held)
    assert (precious / "file").read_text() == "mine"
    assert (trap.exists(), busy.exists()) == (False, True)


def test_progress_is_told(tmp_path: Path) -> None:
    """D3: files and bytes so far."""
    tree = vault_kit.tree_of(tmp_path, full(*(mkfile(b"%d" % number) for number in range(1200))))
    told: list[tuple[int, int]] = []
    restore(tree, b"", tmp_path / "to", progress=lambda files, size: told.append((files, size)))
    assert told == [(500, 0), (1000, 0), (1200, 0)]


# --- as a tar


@pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices are given by root")
@pytest.mark.parametrize("scenario", kit.SCENARIOS)
def test_an_agent_unpacks_what_the_guest_had(scenario: str, tmp_path: Path) -> None:
    """D7: owners, set-id bits, devices and attributes too: it goes back into a guest. Sockets cannot."""
    last = kit.steps(scenario) - 1
    for number in (0, last):
        tree = vault_kit.scenario(tmp_path / str(number), scenario, number)
        to = tmp_path / f"to{number}"
        to.mkdir()
        pieces = pack(tree)
        unpack(lambda: next(pieces, None), str(to), None)  # noqa: B023
        theirs = {path: known for path, known in kit.tree(scenario, number).items() if not stat.S_ISSOCK(known["mode"])}
        assert vault_kit.grouped(vault_kit.on_disk(to)) == vault_kit.grouped(theirs)


def test_other_programs_read_it(tmp_path: Path) -> None:
    """D3: GNU tar lists it, Python's tarfile reads files, holes and long names in it."""
    tree = vault_kit.scenario(tmp_path, "data", 1)
    raw = b"".join(pack(tree, b""))
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        names = set(archive.getnames())
        sparse = archive.getmember("./sparse")
        assert sparse.size == (1 << 33) + 3
        grown = archive.extractfile("./grown")
        assert grown is not None
        assert grown.read(5) == b"grown"
    assert names == {".", *(f"./{os.fsdecode(path)}" for path in kit.tree("data", 1) if path)}
    listed = subprocess.run(["tar", "-t"], input=raw, capture_output=True, check=True).stdout
    assert {line.rstrip("/") for line in listed.decode().split()} == names


def test_a_part_is_packed_under_its_own_name(tmp_path: Path) -> None:
    """D7."""
    tree = vault_kit.scenario(tmp_path, "moves", 0)
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(tree, b"a/x/0")))) as archive:
        assert archive.getnames() == ["0"]
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(tree, b"a/x")))) as archive:
        assert archive.getnames() == [".", "./0", "./1", "./2", "./3"]
    with pytest.raises(NotFound):
        list(pack(tree, b"none"))
