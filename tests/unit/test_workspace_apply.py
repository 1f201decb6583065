"""Applying a patch to the host's directory: everything or nothing, never outside, never running anything."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet import durable
from limpet.errors import BadRequest, Busy, FailedPrecondition, InsufficientSpace, NotFound
from limpet.models import Change
from limpet.services import workspaces
from limpet.services.workspaces import install
from limpet.services.workspaces.applying import check_path

from .workspace_kit import (
    LocalGuest,
    bring_in,
    git,
    listed,
    make_dirty,
    make_repository,
    state,
    take_out,
    wait,
    without_git,
)


@pytest.fixture
def guest(tmp_path: Path) -> LocalGuest:
    return LocalGuest(tmp_path / "guest")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "host" / "project")


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    return tmp_path / "the.patch"


def apply(patch: Path, directory: Path, *, check: bool = False) -> list[Change]:
    return wait(workspaces.apply(patch, directory, check=check))


def patch_from(
    guest: LocalGuest, host: Path, patch: Path, edit: Callable[[Path], object], name: str = "work"
) -> list[Change]:
    """Import `host`, edit the copy, export into `patch`."""
    info = bring_in(guest, host, name)
    edit(Path(info.guest_dir))
    return take_out(guest, info, patch)


def tree(directory: Path, *ignored: str) -> dict[str, tuple[object, ...]]:
    return {path: what for path, what in without_git(state(directory)).items() if path not in ignored}


IGNORED = ("noise.log", "build", "build/out")


def test_round_trip_brings_every_kind_of_change(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5, WS-2: modes, symlinks, binary files, odd names, deletions; the user's index and refs are untouched."""
    changes = patch_from(guest, host, patch, make_dirty)
    changes.sort(key=lambda change: os.fsencode(change.path))
    repository = {path: what for path, what in state(host).items() if path.split("/")[0] == ".git"}
    applied = apply(patch, host)
    assert applied == changes
    assert tree(host) == tree(Path(guest.root) / "work", *IGNORED)
    assert {path: what for path, what in state(host).items() if path.split("/")[0] == ".git"} == repository


def test_round_trip_over_uncommitted_work(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5: the host's own uncommitted work, imported and unchanged since, is kept and built upon."""
    make_dirty(host)
    index = (host / ".git/index").read_bytes()

    def edit(inside: Path) -> None:
        (inside / "readme").write_text("sandbox\n" + (inside / "readme").read_text())
        (inside / "untracked file").write_text("both\n")
        (inside / "src/m1.py").unlink()

    patch_from(guest, host, patch, edit)
    apply(patch, host)
    assert tree(host, *IGNORED) == tree(Path(guest.root) / "work")
    assert (host / ".git/index").read_bytes() == index


def test_plain_directory_round_trip(guest: LocalGuest, tmp_path: Path, patch: Path) -> None:
    """WS-5: also when the directory lies inside a repository that ignores it (git apply would skip silently)."""
    outer = make_repository(tmp_path / "outer")
    for plain in (tmp_path / "plain", outer / "build"):
        plain.mkdir()
        (plain / "a").write_text("a\n")
        (plain / "sub").mkdir()
        (plain / "sub/b").write_bytes(b"\0b")

        def edit(inside: Path) -> None:
            (inside / "a").write_text("changed\n")
            (inside / "sub/b").unlink()
            (inside / "new").symlink_to("a")

        patch_from(guest, plain, patch, edit, plain.name)
        assert listed(apply(patch, plain)) == {"a": "M", "sub/b": "D", "new": "A"}
        assert (plain / "a").read_text() == "changed\n"
        assert not (plain / "sub").exists()
        assert (plain / "new").is_symlink()
        assert not (plain / ".git").exists()


def test_apply_in_a_subdirectory_means_the_repository(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5"""
    patch_from(guest, host, patch, lambda inside: (inside / "readme").write_text("x\n"))
    apply(patch, host / "src")
    assert (host / "readme").read_text() == "x\n"


def test_check_changes_nothing(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5"""
    patch_from(guest, host, patch, make_dirty)
    before = state(host, times=True)
    assert len(apply(patch, host, check=True)) == 8
    assert state(host, times=True) == before


def test_empty_patch_applies_nothing(host: Path, patch: Path) -> None:
    """WS-5"""
    patch.write_bytes(b"")
    assert apply(patch, host) == []


def test_applied_twice_says_so(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5"""
    patch_from(guest, host, patch, make_dirty)
    apply(patch, host)
    before = state(host, times=True)
    with pytest.raises(FailedPrecondition, match="already"):
        apply(patch, host)
    assert state(host, times=True) == before


def test_host_that_moved_elsewhere_is_merged(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5: 3-way, against the host's files as they are, committed or not."""
    text = [f"line {number}\n" for number in range(40)]
    (host / "long").write_text("".join(text))
    git(host, "add", "-A")
    git(host, "commit", "-qm", "long")
    theirs = [*text[:20], "guest\n", *text[20:]]
    ours = ["host\n", *text[:16], "host near\n", *text[16:]]
    patch_from(guest, host, patch, lambda inside: (inside / "long").write_text("".join(theirs)))
    (host / "long").write_text("".join(ours))
    apply(patch, host)
    assert (host / "long").read_text() == "".join([*ours[:22], "guest\n", *ours[22:]])
    assert not list(host.glob(".tmp-*"))


def test_conflict_changes_nothing_and_names_the_files(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5: also the files that would have fitted stay as they are."""

    def edit(inside: Path) -> None:
        (inside / "readme").write_text("guest\n")
        (inside / "src/m0.py").write_text("guest\n")
        (inside / "fresh").write_text("guest\n")

    patch_from(guest, host, patch, edit)
    (host / "readme").write_text("host\n")
    (host / "fresh").write_text("host\n")
    before = state(host, times=True)
    with pytest.raises(FailedPrecondition) as caught:
        apply(patch, host)
    assert "readme" in caught.value.message and "fresh" in caught.value.message
    assert "m0" not in caught.value.message
    assert caught.value.hint
    assert state(host, times=True) == before


def test_file_in_the_way_that_git_ignores_is_not_overwritten(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5"""

    def edit(inside: Path) -> None:
        (inside / "x.log").write_text("guest\n")
        git(inside, "add", "-f", "x.log")

    patch_from(guest, host, patch, edit)
    (host / "x.log").write_text("precious\n")
    with pytest.raises(FailedPrecondition):
        apply(patch, host)
    assert (host / "x.log").read_text() == "precious\n"


def test_file_becomes_directory_and_directory_becomes_file(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5"""

    def edit(inside: Path) -> None:
        (inside / "readme").unlink()
        (inside / "readme").mkdir()
        (inside / "readme/page").write_text("p\n")
        for path in (inside / "src").iterdir():
            path.unlink()
        (inside / "src").rmdir()
        (inside / "src").symlink_to("readme")

    patch_from(guest, host, patch, edit)
    apply(patch, host)
    assert tree(host) == tree(Path(guest.root) / "work")


def test_directory_with_other_files_in_it_is_not_replaced(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5: what git does not know of is kept, and everything is as before."""

    def edit(inside: Path) -> None:
        for path in (inside / "src").iterdir():
            path.unlink()
        (inside / "src").rmdir()
        (inside / "src").write_text("a file now\n")

    patch_from(guest, host, patch, edit)
    (host / "src").chmod(0o750)
    (host / "src/precious.log").write_text("precious\n")
    before = state(host, times=True)
    with pytest.raises(FailedPrecondition, match="src"):
        apply(patch, host)
    assert state(host, times=True) == before


def test_permissions_of_a_changed_file_are_kept(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5: git knows only "executable"; a private file must not become readable for everybody."""
    (host / "readme").chmod(0o600)

    def edit(inside: Path) -> None:
        (inside / "readme").write_text("x\n")
        (inside / "run.sh").chmod(0o644)

    patch_from(guest, host, patch, edit)
    apply(patch, host)
    assert (host / "readme").stat().st_mode & 0o777 == 0o600
    assert (host / "run.sh").stat().st_mode & 0o777 == 0o644


def test_new_files_have_the_permissions_of_the_place_whatever_the_daemons_umask_is(
    guest: LocalGuest, host: Path, patch: Path
) -> None:
    """WS-5"""

    def edit(inside: Path) -> None:
        (inside / "src/new/deep").mkdir(parents=True)
        (inside / "src/new/deep/file").write_text("x\n")
        (inside / "tool").write_text("x\n")
        (inside / "tool").chmod(0o755)

    (host / "src").chmod(0o775)
    host.chmod(0o755)
    before = os.umask(0o077)
    try:
        patch_from(guest, host, patch, edit)
        apply(patch, host)
    finally:
        os.umask(before)
    modes = {name: (host / name).stat().st_mode & 0o777 for name in ("src/new", "src/new/deep/file", "tool")}
    assert modes == {"src/new": 0o775, "src/new/deep/file": 0o664, "tool": 0o755}
    inside = Path(guest.root) / "work/.git"
    assert [path.stat().st_mode & 0o777 for path in (inside, inside / "config")] == [0o755, 0o644]


def test_line_endings_of_the_host_are_kept(guest: LocalGuest, tmp_path: Path, patch: Path) -> None:
    """WS-5"""
    host = tmp_path / "crlf"
    host.mkdir()
    git(host, "init", "-q")
    git(host, "config", "core.autocrlf", "true")
    (host / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    git(host, "add", "-A")
    git(host, "commit", "-qm", "crlf")
    patch_from(guest, host, patch, lambda inside: (inside / "a.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n"))
    apply(patch, host)
    assert (host / "a.txt").read_bytes() == b"one\r\ntwo\r\nthree\r\n"
    assert git(host, "diff", "--stat").count("\n") == 2


def test_nothing_that_the_host_has_configured_is_run(
    guest: LocalGuest, host: Path, tmp_path: Path, patch: Path
) -> None:
    """WS-5: the guest chooses attributes, the host's config has programs for them; none may run."""
    trap = tmp_path / "trap"
    run = f"touch {trap}; cat"
    for key in ("filter.f.clean", "filter.f.smudge", "filter.f.process", "diff.f.textconv", "diff.f.command",
                "merge.f.driver", "core.fsmonitor", "diff.external", "merge.default"):  # fmt: skip
        git(host, "config", key, "f" if key == "merge.default" else run)
    git(host, "config", "filter.f.required", "true")
    for hook in ("post-index-change", "applypatch-msg", "pre-applypatch", "post-checkout"):
        (host / ".git/hooks").mkdir(exist_ok=True)
        (host / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {trap}\n")
        (host / ".git/hooks" / hook).chmod(0o755)

    def edit(inside: Path) -> None:
        (inside / ".gitattributes").write_text("* filter=f diff=f merge=f\n")
        (inside / "readme").write_text("one\ntwo\nthree\nguest\n")

    patch_from(guest, host, patch, edit)
    (host / ".gitattributes").write_text("* filter=f diff=f merge=f\n")
    (host / "readme").write_text("host\none\ntwo\nthree\n")
    trap.unlink(missing_ok=True)
    apply(patch, host)
    assert (host / "readme").read_text() == "host\none\ntwo\nthree\nguest\n"
    assert not trap.exists()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "", "a/", ".git/config", "sub/.git/hooks/x", ".GIT/config",
        ".git /x", ".git./x", ".git::$INDEX_ALLOCATION/x", "git~1/x", ".g\u200cit/x", "a/.git", ".tmp-apply-x/journal",
    ],
)  # fmt: skip
def test_paths_outside_or_in_a_git_directory_are_refused(path: str) -> None:
    """WS-5"""
    with pytest.raises(BadRequest):
        check_path(os.fsencode(path))


@pytest.mark.parametrize(
    "path", [b"a", b".gitignore", b".gitattributes", b"git/x", b".github/w", b"caf\xe9", b"n\nl", b"-f"]
)
def test_ordinary_paths_are_allowed(path: bytes) -> None:
    """WS-5"""
    assert os.fsencode(check_path(path)) == path


def new_file(path: str, content: str = "evil", mode: str = "100644") -> str:
    return (
        f"diff --git a/{path} b/{path}\nnew file mode {mode}\nindex {'0' * 40}..{'1' * 40}\n"
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{content}\n"
    )


ATTACKS = {
    "parent": new_file("../escaped"),
    "deep parent": new_file("src/../../escaped"),
    "absolute": new_file("/tmp/limpet-escaped"),
    "hook": new_file(".git/hooks/post-checkout", mode="100755"),
    "config": new_file(".GIT/config"),
    "nested": new_file("src/.git/config"),
    "submodule": f"diff --git a/s b/s\nnew file mode 160000\nindex {'0' * 40}..{'1' * 40}\n--- /dev/null\n+++ b/s\n"
    f"@@ -0,0 +1 @@\n+Subproject commit {'1' * 40}\n",
    "link and through it": new_file("dir", "/tmp", "120000") + new_file("dir/limpet-escaped"),
    "through a link of the host": new_file("out/limpet-escaped"),
    "rename out": "diff --git a/readme b/../readme\nsimilarity index 100%\nrename from readme\nrename to ../readme\n",
    "hidden rename": "diff --git a/readme b/stolen\nsimilarity index 100%\nrename from readme\nrename to stolen\n",
    "cut": new_file("fine")[:-8],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_patch_changes_nothing(host: Path, patch: Path, attack: str) -> None:
    """WS-5"""
    (host / "out").symlink_to(host.parent)
    (host / "readme").write_text("the user's unsaved work\n")
    patch.write_text(new_file("innocent") + ATTACKS[attack])
    before = state(host.parent, times=True)
    with pytest.raises((BadRequest, FailedPrecondition)):
        apply(patch, host)
    assert state(host.parent, times=True) == before
    assert not Path("/tmp/limpet-escaped").exists()


@pytest.mark.parametrize("content", [b"From x\nSubject: y\n\nnothing\n", b"\0\1\2", b"\n", b"diff --git a/x b/x\n"])
def test_what_is_no_patch_is_refused(host: Path, patch: Path, content: bytes) -> None:
    """WS-5"""
    patch.write_bytes(content)
    with pytest.raises(BadRequest):
        apply(patch, host)


def test_absolute_name_in_an_old_style_patch_stays_inside(host: Path, patch: Path) -> None:
    """WS-5: git strips the first component, as `patch -p1` does."""
    patch.write_text("--- /dev/null\n+++ /tmp/limpet-escaped\n@@ -0,0 +1 @@\n+evil\n")
    assert listed(apply(patch, host)) == {"tmp/limpet-escaped": "A"}
    assert not Path("/tmp/limpet-escaped").exists()


def test_error_in_the_middle_puts_everything_back(
    guest: LocalGuest, host: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WS-5: the disk says no while files are moved in."""
    patch_from(guest, host, patch, make_dirty)
    (host / "src").chmod(0o750)
    before = state(host, times=True)
    real, moved = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InsufficientSpace, match="nothing was changed"):
        apply(patch, host)
    monkeypatch.undo()
    assert len(moved) > 12
    assert state(host, times=True) == before


@pytest.mark.parametrize("after", [0, 1, 5, 6, 7, 10, 12])
def test_crash_in_the_middle_is_undone_by_the_next_apply(
    guest: LocalGuest, host: Path, patch: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """WS-5: at whichever rename the process dies."""
    patch_from(guest, host, patch, make_dirty)
    before = state(host, times=True)
    pid = os.fork()
    if pid == 0:
        real, moved = Path.rename, []

        def dying(self: Path, target: Path) -> Path:
            moved.append(target)
            if len(moved) > after:
                os._exit(9)
            return real(self, target)

        monkeypatch.setattr(Path, "rename", dying)
        apply(patch, host)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert list(host.glob(".tmp-apply-*"))
    with install.locked(host):
        install.recover(host)
    assert state(host, times=True) == before
    apply(patch, host)
    assert tree(host) == tree(Path(guest.root) / "work", *IGNORED)


def test_file_edited_between_check_and_write_is_kept(
    guest: LocalGuest, host: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WS-5"""
    patch_from(guest, host, patch, lambda inside: (inside / "readme").write_text("guest\n"))
    real = install.stage_in

    def edits(top: Path) -> Path:
        (host / "readme").write_text("saved just now\n")
        return real(top)

    monkeypatch.setattr(install, "stage_in", edits)
    with pytest.raises(FailedPrecondition, match="changed meanwhile"):
        apply(patch, host)
    assert (host / "readme").read_text() == "saved just now\n"
    assert not list(host.glob(".tmp-*"))


def test_second_apply_at_the_same_time_is_told_to_wait(host: Path, patch: Path) -> None:
    """WS-5"""
    patch.write_text(new_file("fine"))
    with install.locked(host), pytest.raises(Busy):
        apply(patch, host)


def test_unwritable_directory_is_said(host: Path, patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WS-5"""
    patch.write_text(new_file("fine"))

    def denied(directory: Path, name: str) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    if os.geteuid() == 0:  # root may write anywhere
        real = durable.staging
        monkeypatch.setattr(durable, "staging", lambda d, n: denied(d, n) if d == host else real(d, n))
    else:
        host.chmod(0o555)
    with pytest.raises(FailedPrecondition, match="cannot write"):
        apply(patch, host)
    host.chmod(0o755)
    assert not (host / "fine").exists()


def test_directory_that_is_not_there_is_said(tmp_path: Path, patch: Path) -> None:
    """WS-5"""
    patch.write_text(new_file("fine"))
    with pytest.raises(NotFound):
        apply(patch, tmp_path / "absent")


def test_apply_works_while_the_host_is_in_a_merge(guest: LocalGuest, host: Path, patch: Path) -> None:
    """WS-5: unmerged files elsewhere in the user's index do not matter."""
    patch_from(guest, host, patch, lambda inside: (inside / "src/m4.py").write_text("guest\n"))
    oid = git(host, "rev-parse", "HEAD:readme").strip()
    stages = "".join(f"100644 {oid} {stage}\tsrc/m2.py\n" for stage in (1, 2, 3))
    git(host, "update-index", "--index-info", input=(f"0 {'0' * 40}\tsrc/m2.py\n" + stages).encode())
    apply(patch, host)
    assert (host / "src/m4.py").read_text() == "guest\n"


def test_unborn_head_round_trip(guest: LocalGuest, tmp_path: Path, patch: Path) -> None:
    """WS-5"""
    host = tmp_path / "fresh"
    host.mkdir()
    git(host, "init", "-q")
    (host / "a").write_text("a\n")
    patch_from(guest, host, patch, lambda inside: (inside / "a").write_text("b\n"))
    apply(patch, host)
    assert (host / "a").read_text() == "b\n"
