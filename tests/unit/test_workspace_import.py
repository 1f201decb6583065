"""Importing a host directory: nothing is lost, nothing of the host is changed, no file travels that should not."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, NotFound, Unavailable
from limpet.services import workspaces
from limpet.services.workspaces import check_guest_name, guest_name_for
from limpet.services.workspaces.repository import without_credentials

from .workspace_kit import (
    LocalGuest,
    bring_in,
    git,
    make_dirty,
    make_repository,
    state,
    wait,
    without_git,
)


@pytest.fixture
def guest(tmp_path: Path) -> LocalGuest:
    return LocalGuest(tmp_path / "guest")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "host" / "project")


def ignoring(found: dict[str, tuple[object, ...]], *paths: str) -> dict[str, tuple[object, ...]]:
    return {path: what for path, what in found.items() if path.split("/")[0] not in paths}


def status(directory: Path) -> str:
    return git(directory, "status", "--porcelain=v2", "-z")


def test_clean_repository_arrives_whole_and_its_base_is_head(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    git(host, "tag", "v1")
    git(host, "branch", "other")
    info = bring_in(guest, host)
    assert info.base == git(host, "rev-parse", "HEAD").strip() == info.head
    assert without_git(state(Path(info.guest_dir))) == without_git(state(host))
    assert guest.git(info, "status", "--porcelain") == ""
    refs = ("for-each-ref", "refs/heads", "refs/tags")
    assert guest.git(info, *refs) == git(host, *refs)
    assert guest.git(info, "symbolic-ref", "HEAD").strip() == "refs/heads/main"
    assert guest.git(info, "fsck", "--no-dangling") == ""
    assert info.status == "complete" and info.kind == "git" and info.files == 12


def test_staged_unstaged_and_untracked_work_arrives_as_it_was(guest: LocalGuest, host: Path) -> None:
    """WS-1: the guest's git tells the same story as the host's, and ignored files stay at home."""
    make_dirty(host)
    info = bring_in(guest, host)
    for question in (["status", "--porcelain=v1", "-z", "-uall"], ["diff", "--cached"], ["diff"]):
        assert guest.git(info, *question) == git(host, *question)
    assert without_git(state(Path(info.guest_dir))) == ignoring(state(host), ".git", "noise.log", "build")
    assert info.base != info.head
    assert guest.git(info, "rev-parse", f"{info.base}^").strip() == info.head


def test_the_users_repository_is_byte_for_byte_as_before(guest: LocalGuest, host: Path) -> None:
    """WS-1, WS-3: also with an index whose times are stale and with a lock left behind."""
    make_dirty(host)
    for path in (host / "src").glob("*.py"):
        os.utime(path)
    (host / ".git/index.lock").write_bytes(b"")
    before = state(host, times=True)
    bring_in(guest, host)
    assert state(host, times=True) == before


def test_a_commit_works_in_the_guest_without_any_identity_on_the_host(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    info = bring_in(guest, host)
    guest.git(info, "commit", "--allow-empty", "-qm", "works")


def test_untracked_files_can_stay_at_home(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    make_dirty(host)
    info = bring_in(guest, host, untracked=False)
    assert not (Path(info.guest_dir) / "untracked file").exists()
    assert (Path(info.guest_dir) / "readme").read_text() == (host / "readme").read_text()


def test_a_list_of_paths_is_exactly_what_is_copied(guest: LocalGuest, host: Path) -> None:
    """WS-1: --dry-run"""
    make_dirty(host)
    plan = wait(workspaces.plan_import(host))
    info = bring_in(guest, host)
    inside = Path(info.guest_dir)
    arrived = [str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_symlink() or path.is_file()]
    assert sorted(plan.paths) == sorted(path for path in arrived if not path.startswith(".git/"))
    assert plan.bytes == info.bytes == sum((host / path).lstat().st_size for path in plan.paths)


def test_ignored_files_come_along_when_limpetinclude_lists_them(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    make_dirty(host)
    (host / ".limpetinclude").write_text("*.log\n")
    info = bring_in(guest, host)
    assert (Path(info.guest_dir) / "noise.log").read_text() == "ignored\n"
    assert not (Path(info.guest_dir) / "build").exists()
    changes = wait(workspaces.changes(guest, info))
    assert changes.changes == []


def test_detached_head_stays_detached(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    git(host, "checkout", "-q", "--detach")
    info = bring_in(guest, host)
    assert guest.git(info, "rev-parse", "--abbrev-ref", "HEAD").strip() == "HEAD"
    assert guest.git(info, "status", "--porcelain") == ""


def test_unborn_head_with_only_new_files_works(guest: LocalGuest, tmp_path: Path) -> None:
    """WS-1"""
    host = tmp_path / "fresh"
    host.mkdir()
    git(host, "init", "-q", "-b", "trunk")
    (host / "staged").write_text("s\n")
    git(host, "add", "staged")
    (host / "loose").write_text("l\n")
    info = bring_in(guest, host)
    assert guest.git(info, "status", "--porcelain") == "A  staged\n?? loose\n"
    assert info.head is None and info.base is not None
    assert wait(workspaces.changes(guest, info)).changes == []


def test_empty_repository_and_empty_directory_work(guest: LocalGuest, tmp_path: Path) -> None:
    """WS-1"""
    for name in ("repo", "plain"):
        (tmp_path / name).mkdir()
    git(tmp_path / "repo", "init", "-q")
    for name in ("repo", "plain"):
        info = bring_in(guest, tmp_path / name, name)
        assert wait(workspaces.changes(guest, info)).changes == []


def test_subdirectory_means_its_whole_repository(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    info = bring_in(guest, host / "src")
    assert info.host_dir == str(host)
    assert (Path(info.guest_dir) / "readme").exists()


def test_directory_that_the_repository_ignores_is_a_plain_one(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    (host / "build").mkdir()
    (host / "build" / "x").write_text("x")
    info = bring_in(guest, host / "build")
    assert info.kind == "directory" and info.host_dir == str(host / "build")


def test_linked_worktree_is_imported_with_its_own_head(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1"""
    git(host, "worktree", "add", "-q", "-b", "side", str(tmp_path / "tree"))
    (tmp_path / "tree/readme").write_text("side\n")
    git(tmp_path / "tree", "commit", "-qam", "on the side")
    (tmp_path / "tree/extra").write_text("extra\n")
    info = bring_in(guest, tmp_path / "tree")
    assert guest.git(info, "symbolic-ref", "--short", "HEAD").strip() == "side"
    assert guest.git(info, "status", "--porcelain") == "?? extra\n"
    assert guest.git(info, "log", "-1", "--format=%s").strip() == "on the side"


def test_objects_borrowed_from_another_repository_come_along(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1: alternates, packed and loose objects."""
    git(host, "gc", "-q")
    git(tmp_path, "clone", "-q", "--shared", str(host), "borrower")
    (tmp_path / "borrower/own").write_text("own\n")
    git(tmp_path / "borrower", "add", "-A")
    git(tmp_path / "borrower", "commit", "-qm", "own")
    info = bring_in(guest, tmp_path / "borrower")
    assert guest.git(info, "fsck", "--no-dangling") == ""
    assert guest.git(info, "rev-list", "--count", "HEAD").strip() == "2"
    assert not (Path(info.guest_dir) / ".git/objects/info/alternates").exists()


def test_shallow_clone_stays_a_working_shallow_clone(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1"""
    git(host, "commit", "-q", "--allow-empty", "-m", "second")
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{host}", "shallow")
    info = bring_in(guest, tmp_path / "shallow")
    assert guest.git(info, "rev-parse", "--is-shallow-repository").strip() == "true"
    assert guest.git(info, "log", "--format=%s").strip() == "second"


def test_stash_and_merge_state_come_along(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    git(host, "config", "user.name", "A")
    git(host, "config", "user.email", "a@b")
    (host / "readme").write_text("stashed\n")
    git(host, "stash", "-q")
    git(host, "checkout", "-qb", "a")
    (host / "src/m2.py").write_text("a\n")
    git(host, "commit", "-qam", "a")
    git(host, "checkout", "-q", "main")
    (host / "src/m2.py").write_text("b\n")
    git(host, "commit", "-qam", "b")
    subprocess.run(["git", "merge", "-q", "a"], cwd=host, capture_output=True, check=False)
    info = bring_in(guest, host)
    assert guest.git(info, "stash", "list").count("\n") == 1
    assert guest.git(info, "status", "--porcelain") == "UU src/m2.py\n"
    assert (Path(info.guest_dir) / ".git/MERGE_HEAD").exists()
    assert wait(workspaces.changes(guest, info)).changes == []


def test_submodule_comes_as_plain_files_and_its_edits_are_seen(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1"""
    library = make_repository(tmp_path / "library")
    git(host, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(library), "lib")
    git(host, "commit", "-qm", "with library")
    (host / "lib/tracked.log").write_text("tracked although ignored\n")
    git(host / "lib", "add", "-f", "tracked.log")
    plan = wait(workspaces.plan_import(host))
    assert any("lib is a repository of its own" in warning for warning in plan.warnings)
    info = bring_in(guest, host)
    assert (Path(info.guest_dir) / "lib/readme").read_text() == "one\ntwo\nthree\n"
    assert wait(workspaces.changes(guest, info)).changes == []
    (Path(info.guest_dir) / "lib/readme").write_text("edited\n")
    (Path(info.guest_dir) / "lib/fresh").write_text("fresh\n")
    found = {change.path: change.status for change in wait(workspaces.changes(guest, info)).changes}
    assert found == {"lib/readme": "M", "lib/fresh": "A"}


def test_submodule_that_was_never_fetched_stays_empty(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1"""
    library = make_repository(tmp_path / "library")
    git(host, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(library), "lib")
    git(host, "commit", "-qm", "with library")
    git(tmp_path, "clone", "-q", str(host), "clone")
    info = bring_in(guest, tmp_path / "clone")
    assert wait(workspaces.changes(guest, info)).changes == []
    assert guest.git(info, "status", "--porcelain") == ""


def test_repository_nested_in_the_tree_comes_as_plain_files(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    make_repository(host / "nested")
    info = bring_in(guest, host)
    assert (Path(info.guest_dir) / "nested/readme").exists()
    assert not (Path(info.guest_dir) / "nested/.git").exists()
    assert wait(workspaces.changes(guest, info)).changes == []


def test_file_replaced_by_directory_and_directory_by_symlink(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    (host / "readme").unlink()
    (host / "readme").mkdir()
    (host / "readme/inside").write_text("in\n")
    (host / "src").rename(host / "sources")
    (host / "src").symlink_to("sources")
    info = bring_in(guest, host)
    assert (Path(info.guest_dir) / "src").is_symlink()
    assert without_git(state(Path(info.guest_dir))) == without_git(state(host))
    assert wait(workspaces.changes(guest, info)).changes == []


def test_line_ending_settings_travel_so_that_nothing_looks_changed(guest: LocalGuest, tmp_path: Path) -> None:
    """WS-1"""
    host = tmp_path / "crlf"
    host.mkdir()
    git(host, "init", "-q")
    git(host, "config", "core.autocrlf", "true")
    (host / ".gitattributes").write_bytes(b"*.sh eol=lf\r\n")
    (host / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    (host / "b.sh").write_bytes(b"one\ntwo\n")
    git(host, "add", "-A")
    git(host, "commit", "-qm", "crlf")
    (host / "a.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")
    info = bring_in(guest, host)
    assert (Path(info.guest_dir) / "a.txt").read_bytes() == b"one\r\ntwo\r\nthree\r\n"
    assert guest.git(info, "diff", "--stat").count("\n") == 2
    assert wait(workspaces.changes(guest, info)).changes == []


def test_filters_hooks_and_credentials_stay_at_home(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1: a filter of the host neither runs during import nor travels."""
    trap = tmp_path / "trap"
    git(host, "config", "filter.evil.clean", f"touch {trap}; cat")
    git(host, "config", "filter.evil.required", "true")
    git(host, "config", "core.fsmonitor", f"touch {trap}")
    git(host, "remote", "add", "origin", "https://me:secret@example.org/x.git")
    (host / ".gitattributes").write_text("* filter=evil\n")
    (host / ".git/hooks").mkdir(exist_ok=True)
    (host / ".git/hooks/post-index-change").write_text(f"#!/bin/sh\ntouch {trap}\n")
    (host / ".git/hooks/post-index-change").chmod(0o755)
    (host / "readme").write_text("changed\n")
    trap.unlink(missing_ok=True)
    info = bring_in(guest, host)
    assert not trap.exists()
    config = guest.git(info, "config", "--local", "--list")
    assert "evil" not in config and "secret" not in config and "fsmonitor" not in config
    assert guest.git(info, "remote", "get-url", "origin").strip() == "https://example.org/x.git"
    assert not (Path(info.guest_dir) / ".git/hooks").exists()


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://u:p@h/x", "https://h/x"),
        ("https://token@h:8443/x?key=1", "https://h:8443/x"),
        ("ssh://git:p@h/x", "ssh://git@h/x"),
        ("ssh://h/x", "ssh://h/x"),
        ("git@h:x/y.git", "git@h:x/y.git"),
        ("/some/path", "/some/path"),
    ],
)
def test_remote_urls_lose_passwords_and_tokens(url: str, clean: str) -> None:
    """WS-1"""
    assert without_credentials(url) == clean


def test_the_users_global_ignore_rules_hold_in_the_guest(
    guest: LocalGuest, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WS-1"""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg/git").mkdir(parents=True)
    (tmp_path / "xdg/git/ignore").write_text("*.swp\n")
    (host / "a.swp").write_text("editor\n")
    info = bring_in(guest, host)
    assert not (Path(info.guest_dir) / "a.swp").exists()
    (Path(info.guest_dir) / "b.swp").write_text("editor\n")
    assert wait(workspaces.changes(guest, info)).changes == []


def test_plain_directory_comes_whole_with_its_git_directory_hidden(guest: LocalGuest, tmp_path: Path) -> None:
    """WS-1: sockets and pipes are skipped and named."""
    plain = tmp_path / "plain"
    (plain / "empty").mkdir(parents=True)
    (plain / "sub").mkdir()
    (plain / "sub/file").write_text("x\n")
    (plain / ".gitignore").write_text("*.o\n")
    (plain / "kept.o").write_text("everything is copied\n")
    (plain / "link").symlink_to("/nowhere")
    (plain / os.fsdecode(b"\xff\n")).write_text("odd\n")
    before = state(plain, times=True)
    os.mkfifo(plain / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(plain / "sock"))
    plan = wait(workspaces.plan_import(plain))
    assert sorted(plan.warnings) == ["skipped pipe: a pipe", "skipped sock: a socket"]
    info = bring_in(guest, plain)
    (plain / "pipe").unlink()
    (plain / "sock").unlink()
    assert info.kind == "directory"
    assert state(Path(info.guest_dir)) == state(plain)
    assert state(plain, times=True) == before
    assert Path(workspaces.git_directory(info)).is_dir()
    assert wait(workspaces.changes(guest, info)).changes == []
    (Path(info.guest_dir) / "kept.o").write_text("changed\n")
    (Path(info.guest_dir) / "made.o").write_text("ignored\n")
    (Path(info.guest_dir) / "sub/file").unlink()
    found = {change.path: change.status for change in wait(workspaces.changes(guest, info)).changes}
    assert found == {"kept.o": "M", "sub/file": "D"}


def test_existing_workspace_is_replaced_only_when_asked(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    bring_in(guest, host)
    with pytest.raises(AlreadyExists):
        bring_in(guest, host)
    (host / "readme").write_text("second\n")
    info = bring_in(guest, host, replace=True)
    assert (Path(info.guest_dir) / "readme").read_text() == "second\n"
    assert sorted(path.name for path in Path(guest.root).iterdir()) == ["work"]


class CutGuest(LocalGuest):
    """A guest that is lost in the middle of the stream."""

    async def unpack(self, path: str, chunks: AsyncIterator[bytes], *, user: str | None = None) -> None:
        async for _chunk in chunks:
            raise Unavailable("the guest went away")

    async def run(self, argv: object, **options: object) -> object:  # type: ignore[override]
        if argv[0] == "rm":  # type: ignore[index]
            raise Unavailable("the guest went away")
        return await super().run(argv, **options)  # type: ignore[arg-type]


def test_import_that_is_cut_off_is_never_taken_for_a_workspace(tmp_path: Path, host: Path) -> None:
    """VM-12: only the staging directory is left, and the next import sweeps it."""
    with pytest.raises(Unavailable):
        bring_in(CutGuest(tmp_path / "cut"), host, scratch=tmp_path)
    root = tmp_path / "cut/workspace"
    assert all(path.name.startswith(".import-") for path in root.iterdir())
    (tmp_path / "cut/home").rmdir()
    guest = LocalGuest(tmp_path / "cut")
    bring_in(guest, host)
    assert sorted(path.name for path in root.iterdir()) == ["work"]
    assert not list(tmp_path.glob(".tmp-*"))


class WritingGuest(LocalGuest):
    """While it unpacks, somebody edits a file on the host."""

    victim: Path

    async def unpack(self, path: str, chunks: AsyncIterator[bytes], *, user: str | None = None) -> None:
        await super().unpack(path, chunks, user=user)
        self.victim.write_text("edited meanwhile\n")


def test_file_that_changes_during_the_import_is_an_error_not_a_mixture(tmp_path: Path, host: Path) -> None:
    """WS-1, VM-12"""
    guest = WritingGuest(tmp_path / "writing")
    guest.victim = host / "readme"
    with pytest.raises(FailedPrecondition, match="readme changed"):
        bring_in(guest, host)
    assert list(Path(guest.root).iterdir()) == []


def test_drift_is_seen_when_head_or_files_move_and_not_otherwise(guest: LocalGuest, host: Path) -> None:
    """WS-6"""
    make_dirty(host)
    info = bring_in(guest, host)
    assert wait(workspaces.drift(info)) is None
    git(host, "status")
    (host / "noise.log").write_text("ignored files do not count\n")
    assert wait(workspaces.drift(info)) is None
    (host / "another").write_text("new\n")
    assert wait(workspaces.drift(info)) == "files changed on the host since the import"
    (host / "another").unlink()
    git(host, "commit", "-qm", "moved on")
    assert "HEAD moved" in (wait(workspaces.drift(info)) or "")
    assert "cannot be read" in (wait(workspaces.drift(info.model_copy(update={"host_dir": "/no/where"}))) or "")


def test_what_cannot_be_imported_is_refused_in_clear_words(guest: LocalGuest, tmp_path: Path, host: Path) -> None:
    """WS-1"""
    with pytest.raises(NotFound):
        wait(workspaces.plan_import(tmp_path / "absent"))
    with pytest.raises(BadRequest, match="not a directory"):
        wait(workspaces.plan_import(host / "readme"))
    with pytest.raises(BadRequest, match="bare"):
        wait(workspaces.plan_import(host / ".git"))
    for name in ("", ".", "..", ".hidden", "a/b", "a\nb", "-rf", 'a"b'):
        with pytest.raises(BadRequest):
            bring_in(guest, host, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("project", "project"), (".dot", "dot"), ('a"b\\c\nd', "a-b-c-d"), ("é" * 150, "é" * 100), ("...", "project")],
)
def test_every_directory_has_a_name_in_the_guest(name: str, expected: str) -> None:
    """WS-1"""
    given = guest_name_for(Path("/somewhere") / name)
    assert given == expected
    check_guest_name(given)
    check_guest_name(guest_name_for(Path(os.fsdecode(b"/x/\xff\xfe"))))


def test_repository_of_another_owner_gets_a_hint(host: Path) -> None:
    """WS-1"""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in [host, *host.rglob("*")]:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    with pytest.raises(FailedPrecondition, match="another user") as caught:
        wait(workspaces.plan_import(host))
    assert "safe.directory" in (caught.value.hint or "")


def test_unreadable_file_is_named(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (host / "secret").write_text("s\n")
    (host / "secret").chmod(0)
    with pytest.raises(FailedPrecondition, match="secret"):
        bring_in(guest, host)


def test_split_index_and_sparse_checkout_survive(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-1"""
    git(host, "update-index", "--split-index")
    (host / "readme").write_text("changed\n")
    git(host, "add", "readme")
    info = bring_in(guest, host, "split")
    assert guest.git(info, "status", "--porcelain") == "M  readme\n"
    git(tmp_path, "clone", "-q", str(host), "sparse")
    git(tmp_path / "sparse", "sparse-checkout", "set", "--no-cone", "/readme")
    info = bring_in(guest, tmp_path / "sparse", "sparse")
    assert wait(workspaces.changes(guest, info)).changes == []


def test_progress_ends_at_the_size_of_the_tree(guest: LocalGuest, host: Path) -> None:
    """WS-1"""
    seen: list[tuple[int, int]] = []
    info = bring_in(guest, host, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (info.bytes, info.bytes)


def test_imports_of_different_repositories_run_at_once(guest: LocalGuest, tmp_path: Path) -> None:
    """WS-1: nothing is kept between two imports. (Two into one sandbox are kept apart by the workspace lock.)"""
    hosts = [make_repository(tmp_path / f"h{number}") for number in range(3)]
    guests = [LocalGuest(tmp_path / f"g{number}") for number in range(3)]

    async def both() -> list[str | None]:
        plans = await asyncio.gather(*(workspaces.plan_import(host) for host in hosts))
        pairs = zip(guests, plans, strict=True)
        infos = await asyncio.gather(*(workspaces.import_tree(one, plan, "w", root=one.root) for one, plan in pairs))
        return [info.base for info in infos]

    assert wait(both()) == [git(host, "rev-parse", "HEAD").strip() for host in hosts]
