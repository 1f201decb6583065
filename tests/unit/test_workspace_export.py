"""Exporting the guest's work: everything is in the patch, and the guest's repository is exactly as before."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limpet.errors import BadRequest, FailedPrecondition, Internal, LimpetError, NotFound
from limpet.models import WorkspaceInfo
from limpet.services import workspaces
from limpet.services.workspaces.export import parse_list

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
def info(guest: LocalGuest, host: Path) -> WorkspaceInfo:
    return bring_in(guest, host)


def test_commits_staged_unstaged_and_untracked_work_is_all_in_the_patch(
    guest: LocalGuest, host: Path, info: WorkspaceInfo, tmp_path: Path
) -> None:
    """WS-2: the patch, applied by git itself to the host's repository, gives the guest's tree."""
    inside = Path(info.guest_dir)
    (inside / "src/m3.py").write_text("committed\n")
    guest.git(info, "commit", "-qam", "in the sandbox")
    make_dirty(inside)
    changes = take_out(guest, info, tmp_path / "patch")
    assert listed(changes) == {
        "src/m3.py": "M", "readme": "M", "src/m0.py": "D", "run.sh": "M", "blob.bin": "M", "link": "M",
        "new\nline": "M", "untracked file": "A", "src/deep/er/\xfc": "A",
    }  # fmt: skip
    git(host, "apply", str(tmp_path / "patch"))
    ignored = ("noise.log", "build", "build/out")
    want = {path: what for path, what in without_git(state(inside)).items() if path not in ignored}
    assert without_git(state(host)) == want


def test_export_of_nothing_is_an_empty_patch(guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path) -> None:
    """WS-2"""
    assert take_out(guest, info, tmp_path / "patch") == []
    assert (tmp_path / "patch").read_bytes() == b""


def test_imported_uncommitted_work_is_no_change_of_the_sandbox(guest: LocalGuest, host: Path, tmp_path: Path) -> None:
    """WS-2: the default base is the imported state, not HEAD."""
    make_dirty(host)
    info = bring_in(guest, host)
    assert take_out(guest, info, tmp_path / "patch") == []
    (Path(info.guest_dir) / "readme").write_text("more\n")
    assert listed(take_out(guest, info, tmp_path / "patch")) == {"readme": "M"}
    assert "untracked file" in listed(take_out(guest, info, tmp_path / "patch", base="HEAD"))


def test_list_counts_lines_and_knows_binary_files(guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path) -> None:
    """WS-2"""
    inside = Path(info.guest_dir)
    (inside / "readme").write_text("one\ntwo\nfour\nfive\n")
    (inside / "blob.bin").write_bytes(b"\0")
    (inside / os.fsdecode(b"caf\xe9")).write_text("changed\n")
    found = {change.path: change for change in take_out(guest, info, tmp_path / "patch")}
    assert (found["readme"].added, found["readme"].removed) == (2, 1)
    assert (found["blob.bin"].added, found["blob.bin"].removed) == (None, None)
    assert found[os.fsdecode(b"caf\xe9")].status == "M"
    changes = wait(workspaces.changes(guest, info))
    assert changes.patch_bytes == (tmp_path / "patch").stat().st_size
    assert changes.base == info.base


def test_other_base_is_used_and_named(guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path) -> None:
    """WS-2"""
    inside = Path(info.guest_dir)
    (inside / "readme").write_text("a\n")
    guest.git(info, "commit", "-qam", "one")
    (inside / "readme").write_text("b\n")
    found = wait(workspaces.changes(guest, info, "main"))
    assert found.base == guest.git(info, "rev-parse", "main").strip()
    assert found.changes[0].removed == 1
    with pytest.raises(NotFound):
        wait(workspaces.changes(guest, info, "nosuch"))
    for bad in ("--output=/tmp/x", "a b\n", "main..other", "x" * 300):
        with pytest.raises(BadRequest):
            wait(workspaces.changes(guest, info, bad))


def test_guests_repository_is_byte_for_byte_as_before(guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path) -> None:
    """WS-3: index, work tree, refs and objects; also with a stale index.lock and a read-only object store."""
    inside = Path(info.guest_dir)
    make_dirty(inside)
    os.utime(inside / "src/m2.py")
    (inside / ".git/index.lock").write_bytes(b"")
    before = state(inside, times=True)
    assert take_out(guest, info, tmp_path / "patch")
    assert state(inside, times=True) == before
    assert not list((tmp_path / "guest").glob("limpet-export.*"))


def test_split_index_of_the_guest_is_left_alone(guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path) -> None:
    """WS-3"""
    inside = Path(info.guest_dir)
    guest.git(info, "update-index", "--split-index")
    (inside / "readme").write_text("x\n")
    before = state(inside)
    assert listed(take_out(guest, info, tmp_path / "patch")) == {"readme": "M"}
    assert state(inside) == before


def test_edit_in_the_same_second_with_the_same_size_is_seen(
    guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path
) -> None:
    """WS-2: "racy git": the copied index keeps its time, so git looks at the content."""
    inside = Path(info.guest_dir)
    (inside / "readme").write_text("aaaa\n")
    guest.git(info, "add", "readme")
    moment = (inside / ".git/index").stat().st_mtime_ns
    (inside / "readme").write_text("bbbb\n")
    os.utime(inside / "readme", ns=(moment, moment))
    take_out(guest, info, tmp_path / "patch")
    assert b"+bbbb" in (tmp_path / "patch").read_bytes()


def test_settings_of_the_guest_do_not_change_the_patch(
    guest: LocalGuest, host: Path, info: WorkspaceInfo, tmp_path: Path
) -> None:
    """WS-3: diff options are pinned; programs that the guest configured for diffs do not run."""
    inside = Path(info.guest_dir)
    (inside / "readme").write_text("one\n\nthree\n")
    (inside / "src/m4.py").rename(inside / "src/moved.py")
    take_out(guest, info, tmp_path / "plain")
    trap = tmp_path / "trap"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {trap}\necho lies\n")
    script.chmod(0o755)
    for key, value in {
        "diff.external": str(script), "diff.noprefix": "true", "diff.mnemonicPrefix": "true", "diff.renames": "copies",
        "diff.context": "0", "diff.interHunkContext": "9", "diff.suppressBlankEmpty": "true", "diff.relative": "true",
        "diff.orderFile": str(script), "diff.x.textconv": str(script), "diff.x.command": str(script),
        "diff.submodule": "log", "diff.srcPrefix": "q/", "core.quotePath": "false", "core.pager": str(script),
        "core.hooksPath": str(tmp_path), "core.abbrev": "5", "diff.wsErrorHighlight": "all",
        "color.ui": "always", "diff.algorithm": "patience",
        "core.fsmonitor": str(script), "core.splitIndex": "true", "color.diff": "always", "diff.colorMoved": "zebra",
    }.items():  # fmt: skip
        guest.git(info, "config", key, value)
    (inside / ".git/info/attributes").write_text("*.py diff=x\nreadme diff=x\n")
    take_out(guest, info, tmp_path / "pinned")
    assert (tmp_path / "pinned").read_bytes() == (tmp_path / "plain").read_bytes()
    assert not trap.exists()
    git(host, "apply", "--check", str(tmp_path / "pinned"))


def test_broken_filter_of_the_guest_is_an_error_not_a_hole(
    guest: LocalGuest, info: WorkspaceInfo, tmp_path: Path
) -> None:
    """WS-2"""
    guest.git(info, "config", "filter.bad.clean", "false")
    guest.git(info, "config", "filter.bad.required", "true")
    (Path(info.guest_dir) / ".gitattributes").write_text("*.py filter=bad\n")
    (Path(info.guest_dir) / "src/m0.py").write_text("changed\n")
    with pytest.raises(FailedPrecondition):
        take_out(guest, info, tmp_path / "patch")


def test_empty_repository_in_the_workspace_does_not_stop_the_export(guest: LocalGuest, info: WorkspaceInfo) -> None:
    """WS-2"""
    inside = Path(info.guest_dir)
    (inside / "scratch").mkdir()
    git(inside / "scratch", "init", "-q")
    (inside / "scratch/file").write_text("x\n")
    (inside / "readme").write_text("changed\n")
    found = wait(workspaces.changes(guest, info))
    assert listed(found.changes) == {"readme": "M"}
    assert any("scratch" in warning for warning in found.warnings)


def test_merge_in_progress_in_the_guest_is_exported_as_it_lies_there(guest: LocalGuest, info: WorkspaceInfo) -> None:
    """WS-2"""
    inside = Path(info.guest_dir)
    guest.git(info, "checkout", "-qb", "a")
    (inside / "readme").write_text("a\n")
    guest.git(info, "commit", "-qam", "a")
    guest.git(info, "checkout", "-q", "main")
    (inside / "readme").write_text("b\n")
    guest.git(info, "commit", "-qam", "b")
    wait(guest.run(["git", "merge", "a"], cwd=str(inside)))
    assert "<<<<<<<" in (inside / "readme").read_text()
    assert listed(wait(workspaces.changes(guest, info)).changes) == {"readme": "M"}


def test_workspace_that_is_gone_or_broken_is_said(guest: LocalGuest, info: WorkspaceInfo) -> None:
    """WS-2"""
    inside = Path(info.guest_dir)
    with pytest.raises(FailedPrecondition, match="not imported completely"):
        wait(workspaces.changes(guest, info.model_copy(update={"status": "partial"})))
    (inside / ".git/index").write_bytes(b"garbage")
    with pytest.raises(FailedPrecondition):
        wait(workspaces.changes(guest, info))
    (inside / ".git").rename(inside / "hidden")
    with pytest.raises(FailedPrecondition, match="git directory is gone"):
        wait(workspaces.changes(guest, info))
    inside.rename(inside.with_name("away"))
    with pytest.raises(NotFound):
        wait(workspaces.changes(guest, info))


def test_patch_over_the_limit_is_refused(guest: LocalGuest, info: WorkspaceInfo) -> None:
    """WS-2"""
    (Path(info.guest_dir) / "big").write_bytes(os.urandom(300_000))

    async def drain() -> None:
        found = await workspaces.patch(guest, info, max_bytes=100_000)
        async for _chunk in found.chunks:
            pass

    with pytest.raises(FailedPrecondition, match="larger than"):
        wait(drain())


class LyingGuest(LocalGuest):
    """Answers an export with whatever it likes."""

    answer = b""

    async def stream(
        self, argv: Sequence[str], *, user: str | None = None, cwd: str | None = None,
        env: Mapping[str, str] | None = None, timeout: float = 60.0,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        yield self.answer


ID = b"a" * 40
OPENING = b"limpet-export 1 ok " + ID + b"\ndiff\n"
RAW = b":100644 100644 " + ID + b" " + ID + b" M\0"


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\n", b"hello\n", b"limpet-export 1 ok\n", b"limpet-export 1 ok zz\ndiff\n",
        b"limpet-export 1 error \xff\nx",
        OPENING, OPENING + b"\nlimpet-export-end 000", OPENING + RAW + b"f", OPENING + RAW + b"f\0", b"x" * 100_000,
        OPENING + RAW + b"f\0001\t1\tother\0\0", OPENING + b":nonsense\0\0",
        OPENING + RAW + b"f\0" + b"9" * 99 + b"\t1\tf\0\0",
        OPENING + RAW + b"f\0001\t1\tf\0\0diff --git", OPENING + RAW + b"f\0001\t1\tf\0\0diff\nlimpet-export-end 128\n",
    ],
)  # fmt: skip
def test_answer_that_makes_no_sense_is_a_typed_error(tmp_path: Path, answer: bytes) -> None:
    """GST-2, WS-2: the guest is hostile."""
    guest = LyingGuest(tmp_path)
    guest.answer = answer
    info = WorkspaceInfo(host_dir="/h", guest_dir="/g", status="complete", kind="git", base="b" * 40)
    with pytest.raises(LimpetError):
        wait(workspaces.changes(guest, info))


@given(st.binary())
def test_any_list_parses_or_is_refused(listed: bytes) -> None:
    """GST-2"""
    try:
        parse_list(listed)
    except Internal:
        pass
