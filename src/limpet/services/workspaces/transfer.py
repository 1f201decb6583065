"""Import: a host directory becomes `/workspace/<name>` in the guest, by one stream and one rename.

    1  /workspace/.import-<id>/            made; leftovers of former imports removed
    2  …/tree and …/git (plain directory)  the stream is unpacked; meanwhile the host makes the git directory
    3  files compared with the plan again  a file that changed since is an error: nothing half-read gets in
    4  sync
    5  git directory renamed into place    plain directories only; nothing looks at it before step 6
    6  tree renamed into place             ← the commit point
A cut before 6 leaves `.import-<id>` and, when it replaced something, perhaps nothing at the place of the old one: the
caller records `partial` before 1 and `complete` after 6, and the next import sweeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from limpet import durable
from limpet.errors import AlreadyExists, BadRequest, Internal, LimpetError
from limpet.models import WorkspaceInfo
from limpet.names import new_id
from limpet.services.workspaces.guest import Guest
from limpet.services.workspaces.staged import StagedGit
from limpet.services.workspaces.tarstream import Member, changed, chunked, tar
from limpet.services.workspaces.tree import ImportPlan, plan_import
from limpet.threads import to_its_end

ROOT = "/workspace"
Progress = Callable[[int, int], None]  # bytes sent, bytes in all as far as is known

_EXISTS = 17  # exit code of _PREPARE
_TIMEOUT = 120.0  # seconds for one step in the guest

_PREPARE = """set -e
rm -rf "$1"/.import-*
if [ "$4" = 0 ] && { [ -e "$1/$3" ] || [ -L "$1/$3" ]; }; then exit 17; fi
mkdir -p "$1" "$2/tree"
"""
_FINISH = """set -e
sync -f "$2"
if [ -d "$2/git" ]; then
  mkdir -p "$1/.limpet"
  rm -rf "$1/.limpet/$3.git"
  mv -T "$2/git" "$1/.limpet/$3.git"
fi
if [ -e "$1/$3" ] || [ -L "$1/$3" ]; then mv -T "$1/$3" "$2/old"; fi
mv -T "$2/tree" "$1/$3"
sync -f "$1"
rm -rf "$2"
"""


async def import_tree(
    guest: Guest,
    plan: ImportPlan,
    guest_name: str,
    *,
    user: str = "user",
    replace: bool = False,
    progress: Progress | None = None,
    scratch: Path | None = None,
    root: str = ROOT,
) -> WorkspaceInfo:
    """Copy what `plan` lists to `<root>/<guest_name>`, owned by `user`, with a git directory to compare it with.

    `scratch` (default: the system's temporary directory) holds packs meanwhile. Raises AlreadyExists unless `replace`,
    FailedPrecondition when a file changes meanwhile, InsufficientSpace, Unavailable."""
    check_guest_name(guest_name)
    staging = f"{root}/.import-{new_id('imp')}"
    await _step(guest, _PREPARE, [root, staging, guest_name, str(int(replace))], user)
    made = durable.staging(scratch or Path(tempfile.gettempdir()), "import")
    try:
        staged = StagedGit(made / "git", plan.top, plan.repository)
        base = await _send(guest, plan, staged, staging, user, progress)
        await asyncio.to_thread(_verify_unchanged, plan)
        await _step(guest, _FINISH, [root, staging, guest_name], user)
    except LimpetError:
        with contextlib.suppress(LimpetError):
            await guest.run(["rm", "-rf", staging], user=user, timeout=_TIMEOUT)
        raise
    finally:
        await asyncio.to_thread(shutil.rmtree, made, True)
    return WorkspaceInfo(
        host_dir=os.fsdecode(plan.top), guest_dir=f"{root}/{guest_name}", status="complete", kind=plan.kind, base=base,
        head=plan.repository.head if plan.repository else None, fingerprint=plan.fingerprint,
        imported_at=datetime.now(UTC), files=plan.files, bytes=plan.bytes,
    )  # fmt: skip


async def drift(info: WorkspaceInfo) -> str | None:
    """How the host directory differs from what was imported, in words; None when it does not (WS-6)."""
    try:
        now = await plan_import(info.host_dir, not (info.fingerprint or "").startswith("u0"))
    except LimpetError as error:
        return f"the host directory cannot be read any more: {error.message}"
    head = now.repository.head if now.repository else None
    if now.kind != info.kind:
        return "the host directory became a git repository" if now.kind == "git" else "it is no git repository any more"
    if head != info.head:
        return f"HEAD moved on the host: {(info.head or 'none')[:12]} → {(head or 'none')[:12]}"
    if now.fingerprint != info.fingerprint:
        return "files changed on the host since the import"
    return None


def check_guest_name(name: str) -> None:
    """Raise BadRequest unless `name` can be the workspace's directory: one visible, printable component."""
    good = name.isprintable() and not name.startswith((".", "-")) and not set(name) & set('/"\\')
    if not name or not good or len(name.encode()) > 200:
        raise BadRequest(f"{name!r} cannot be a workspace's name", hint="use letters, digits, '.', '_' and '-'")


def guest_name_for(top: Path) -> str:
    """The name in the guest for a host directory: its own, with what may not be in one replaced by '-'."""
    name = "".join(char if char.isprintable() and char not in '/"\\' else "-" for char in top.name)
    return name.lstrip(".-").encode()[:200].decode(errors="ignore") or "project"


def git_directory(info: WorkspaceInfo) -> str:
    """Where the guest keeps the git directory of a workspace."""
    place = PurePosixPath(info.guest_dir)
    return f"{place}/.git" if info.kind == "git" else f"{place.parent}/.limpet/{place.name}.git"


async def _send(
    guest: Guest, plan: ImportPlan, staged: StagedGit, staging: str, user: str, progress: Progress | None
) -> str:
    """Stream files, then the git directory, which is made while the files travel. Returns the base commit."""
    making = asyncio.create_task(_make_git(plan, staged))
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        async for chunk in chunked(tar(_tree_members(plan))):
            if making.done():
                making.result()  # its error need not wait for the last file
            yield chunk
            sent += len(chunk)
            if progress is not None:
                progress(min(sent, plan.bytes), plan.bytes)
        await making
        prefix = b"tree/.git" if plan.kind == "git" else b"git"
        async for chunk in chunked(tar(_git_members(staged, prefix), end=True)):
            yield chunk

    try:
        await guest.unpack(staging, chunks(), user=user)
        return await making
    finally:
        making.cancel()
        with contextlib.suppress(asyncio.CancelledError, LimpetError, OSError):
            await making


async def _make_git(plan: ImportPlan, staged: StagedGit) -> str:
    await to_its_end(staged.create)
    await staged.refresh_index()
    # A plain directory's index is the snapshot: the guest has no other idea of what is tracked.
    index = staged.index if plan.kind == "directory" else staged.path.with_name("snapshot")
    base = await staged.snapshot(plan, index)
    await staged.write_refs(base)
    staged.write_notes(plan)
    await staged.pack_loose()
    return base


async def _step(guest: Guest, script: str, args: list[str], user: str) -> None:
    done = await guest.run(["sh", "-c", script, "limpet-import", *args], user=user, cwd="/", timeout=_TIMEOUT)
    if done.exit_code == _EXISTS:
        raise AlreadyExists(
            f"{args[0]}/{args[2]} exists in the sandbox already", hint="import it again with replace, or remove it"
        )
    if done.exit_code != 0:
        reason = done.stderr.decode(errors="replace").strip()[-300:]
        raise Internal(f"the guest could not store the workspace: {reason or f'status {done.exit_code}'}")


def _tree_members(plan: ImportPlan) -> Iterator[Member]:
    """The workspace's files, each directory before what is in it."""
    top = os.fsencode(plan.top)
    known = {b""}
    for entry in plan.entries:
        for parent in _parents(entry.path):
            if parent not in known:
                known.add(parent)
                yield Member(b"tree/" + parent, top + b"/" + parent)
        if entry.is_directory:
            known.add(entry.path)
        yield Member(b"tree/" + entry.path, top + b"/" + entry.path, entry)


def _parents(path: bytes) -> Iterator[bytes]:
    position = path.find(b"/")
    while position != -1:
        yield path[:position]
        position = path.find(b"/", position + 1)


def _git_members(staged: StagedGit, prefix: bytes) -> Iterator[Member]:
    """The git directory, with the modes that git gives, whatever our umask is."""
    yield Member(prefix, os.fsencode(staged.path), mode=0o755)
    for path in sorted(staged.path.rglob("*")):
        name = prefix + b"/" + os.fsencode(path.relative_to(staged.path))
        yield Member(name, os.fsencode(path), mode=0o755 if path.is_dir() else 0o644)
    for path in staged.borrowed_packs():
        yield Member(prefix + b"/objects/pack/" + os.fsencode(path.name), os.fsencode(path), mode=0o444)


def _verify_unchanged(plan: ImportPlan) -> None:
    """The commit and the files were read at different moments: only when nothing moved are they the same."""
    top = os.fsencode(plan.top)
    for entry in plan.entries:
        try:
            found = os.lstat(top + b"/" + entry.path)
        except OSError:
            raise changed(entry.path) from None
        seen = (found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if not entry.is_directory and seen != (entry.mode, entry.size, entry.mtime_ns, entry.ctime_ns):
            raise changed(entry.path)
