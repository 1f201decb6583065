"""Apply: a patch out of a sandbox changes the host's directory, all of it or nothing (WS-5).

The patch is hostile. git never applies it to files: it is applied to a *temporary index* over a temporary git directory
(staged.py), where no hook, filter, merge driver or other program of anybody's configuration exists and nothing outside
can be written. What comes out, a list of (path, mode, blob), is checked here; the files are written to a
staging directory and moved in under a journal (install.py). The user's index, refs and objects stay as they are.

    numstat → paths checked → current files into the temporary index → apply --cached, else --3way → list of blobs
    → checked again → checkout-index into staging → files unchanged meanwhile? → install.commit
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from limpet import durable
from limpet.errors import BadRequest, FailedPrecondition, LimpetError, NotFound
from limpet.models import Change
from limpet.services.workspaces import git, install
from limpet.services.workspaces.export import count
from limpet.services.workspaces.repository import discover
from limpet.services.workspaces.staged import StagedGit
from limpet.threads import to_its_end

_GITLINK = "160000"
_FILE_MODES = ("100644", "100755", "120000")
_DOT_GIT = re.compile(r"\.git(~\d+)?|git~\d+")  # also what NTFS calls it for DOS programs
_IGNORABLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u206a-\u206f\ufeff]")  # HFS+ leaves them out
_ERROR = re.compile(r"^error: (?:patch failed: )?(.+?)(?::\d+$|: (.*))", re.MULTILINE)
_OPTIONS = ("--whitespace=nowarn", "-p1")


@dataclass(frozen=True, slots=True)
class _Blob:
    """A file in an index: git's mode and the id of its content."""

    mode: str
    oid: str


_Listing = dict[bytes, _Blob]
_Count = tuple[int | None, int | None]  # lines added and removed; None for a binary file


async def apply(patch: Path, host_dir: str | Path, *, check: bool = False, scratch: Path | None = None) -> list[Change]:
    """Apply the git patch in the file `patch` to the repository or directory at `host_dir`; the changes made, sorted.

    `check` only says what would change. `scratch` (default: the temporary directory) holds git's working files.
    Raises BadRequest (no patch, or one that reaches where it must not), FailedPrecondition (it does not fit: nothing
    was changed), Busy, InsufficientSpace."""
    directory = Path(host_dir)
    if not directory.is_dir():
        raise NotFound(f"there is no directory {str(directory)!r}", hint="name the directory to apply to")
    if patch.stat().st_size == 0:
        return []
    repository = await discover(directory.absolute())
    top = repository.top if repository else directory.resolve()
    made = durable.staging(scratch or Path(tempfile.gettempdir()), "apply")
    try:
        staged = StagedGit(made / "git", top, repository)
        with install.locked(top):
            install.recover(top)
            return await _Application(staged, patch.absolute(), top).run(check)
    finally:
        await asyncio.to_thread(shutil.rmtree, made, True)


def check_path(path: bytes) -> str:
    """The path as str when a patch may touch it; raises BadRequest for one outside the tree or with a `.git` in it."""
    text = os.fsdecode(path)
    parts = text.split("/")
    if not text or path.startswith(b"/") or any(part in ("", ".", "..") for part in parts):
        raise BadRequest(f"the patch reaches outside of the directory: {text!r}", hint="nothing was changed")
    if any(_is_dot_git(part) for part in parts):
        raise BadRequest(f"the patch would change a git directory: {text!r}", hint="nothing was changed")
    if text.startswith(".tmp-"):
        raise BadRequest(f"the patch uses a name that limpet keeps for itself: {text!r}", hint="nothing was changed")
    return text


def _is_dot_git(part: str) -> bool:
    plain = _IGNORABLE.sub("", unicodedata.normalize("NFKC", part)).lower()
    return _DOT_GIT.fullmatch(plain.split(":")[0].rstrip(" .")) is not None


class _Application:
    """One patch on its way into one directory."""

    def __init__(self, staged: StagedGit, patch: Path, top: Path) -> None:
        self._staged, self._patch, self._top = staged, patch, top
        self._git = staged.git()
        self._seen: dict[bytes, os.stat_result | None] = {}

    async def run(self, check: bool) -> list[Change]:
        self._staged.create()
        counts = await self._declared()
        if not counts:
            return []
        await self._load(list(counts))
        before = await self._listing()
        await self._apply_to_index()
        after = await self._listing()
        changed = self._changed(before, after, counts)
        if not changed:
            raise _already(self._top)
        if not check:
            await self._write(changed, after)
        return [_change(path, before.get(path), after.get(path), counts[path]) for path in sorted(changed)]

    async def _declared(self) -> dict[bytes, _Count]:
        """The paths that the patch names, checked, with their line counts."""
        done = await self._git("apply", "--numstat", "-z", *_OPTIONS, str(self._patch), check=False)
        if done.returncode != 0:
            reason = _first_line(done.stderr)
            raise BadRequest(f"this is no patch that git understands: {reason}", hint="nothing was changed")
        found: dict[bytes, _Count] = {}
        for record in git.records(done.stdout):
            added, removed, path = record.split(b"\t", 2)
            check_path(path)
            one, two = found.get(path, (0, 0))
            more, less = count(added), count(removed)
            both = more is not None and less is not None and one is not None and two is not None
            found[path] = (one + more, two + less) if both else (None, None)  # type: ignore[operator]
        return found

    async def _load(self, paths: list[bytes]) -> None:
        """Make the temporary index say what the work tree has at these paths now."""
        top = os.fsencode(self._top)
        self._check_parents(paths)
        for path in paths:
            try:
                self._seen[path] = os.lstat(top + b"/" + path)
            except (FileNotFoundError, NotADirectoryError):
                self._seen[path] = None
        there = {path: found for path, found in self._seen.items() if found is not None}
        odd = [path for path, found in there.items() if not _is_file(found) and not stat.S_ISDIR(found.st_mode)]
        if odd:
            raise _conflict([f"{_shown(path)} is no regular file" for path in odd])
        gone = git.joined([path for path in paths if path not in there])
        files = git.joined([path for path, found in there.items() if _is_file(found)])
        await self._git("update-index", "--force-remove", "-z", "--stdin", input=gone)
        await self._git("update-index", "--add", "--replace", "-z", "--stdin", input=files)

    def _check_parents(self, paths: list[bytes]) -> None:
        top = os.fsencode(self._top)
        for parent in {parent for path in paths for parent in _parents(path)}:
            if Path(os.fsdecode(top + b"/" + parent)).is_symlink():
                raise BadRequest(
                    f"the patch reaches through the symbolic link {_shown(parent)!r}", hint="nothing was changed"
                )

    async def _listing(self) -> _Listing:
        done = await self._git("ls-files", "-z", "--stage")
        found: _Listing = {}
        for record in git.records(done.stdout):
            meta, _, path = record.partition(b"\t")
            mode, oid, stage = meta.decode().split(" ")
            found[path] = _Blob(mode, f"{oid} {stage}")
        return found

    async def _apply_to_index(self) -> None:
        done = await self._git("apply", "--cached", *_OPTIONS, str(self._patch), check=False)
        if done.returncode == 0:
            return
        saved = self._staged.path / "index.before"
        if self._staged.index.exists():
            shutil.copy2(self._staged.index, saved)
        merged = await self._git("apply", "--cached", "--3way", *_OPTIONS, str(self._patch), check=False)
        if merged.returncode == 0:
            return
        unmerged = await self._git("ls-files", "-z", "--unmerged", check=False)
        conflicts = {_shown(record.partition(b"\t")[2]) for record in git.records(unmerged.stdout)}
        if saved.exists():
            shutil.copy2(saved, self._staged.index)
        reverse = await self._git("apply", "--cached", "--check", "--reverse", *_OPTIONS, str(self._patch), check=False)
        if reverse.returncode == 0:
            raise _already(self._top)
        if "invalid path" in merged.stderr.decode(errors="replace"):
            raise BadRequest(f"git refuses the patch: {_first_line(merged.stderr)}", hint="nothing was changed")
        raise _conflict(sorted(conflicts or _named(done.stderr) or {_first_line(done.stderr)}))

    def _changed(self, before: _Listing, after: _Listing, counts: dict[bytes, _Count]) -> set[bytes]:
        """The paths that differ: declared by the patch, allowed, a file or symlink before and after."""
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        for path in changed:
            check_path(path)
            if path not in counts:
                raise BadRequest(f"the patch changes {_shown(path)!r} without naming it", hint="nothing was changed")
            for blob in (before.get(path), after.get(path)):
                if blob is not None and blob.mode == _GITLINK:
                    raise BadRequest(
                        f"the patch changes the submodule or nested repository {_shown(path)!r}",
                        hint="its content cannot travel in a patch: remove its .git in the sandbox, or ignore it there",
                    )
                if blob is not None and blob.mode not in _FILE_MODES:
                    raise BadRequest(f"the patch gives {_shown(path)!r} mode {blob.mode}", hint="nothing was changed")
        self._check_parents(list(changed))
        return changed

    async def _write(self, changed: set[bytes], after: _Listing) -> None:
        steps = [
            install.Step(os.fsdecode(path), old=_was_file(self._seen[path]), new=path in after)
            for path in sorted(changed)
        ]
        blocked = [step.path for step in steps if not step.new and not step.old]
        if blocked:
            raise _conflict(blocked)
        stage = install.stage_in(self._top)
        try:
            new = git.joined([path for path in sorted(changed) if path in after])
            await self._git("checkout-index", "-z", "--stdin", f"--prefix={stage}/new/", input=new)
            self._check_unmoved(changed)
            await to_its_end(install.commit, self._top, stage, steps)
        except git.GitFailed as error:
            raise FailedPrecondition(f"{error.message}; nothing was changed", hint=error.hint) from None
        finally:
            if not (stage / "journal").exists():  # else the undo itself failed: `recover` needs it
                await asyncio.to_thread(shutil.rmtree, stage, True)

    def _check_unmoved(self, changed: set[bytes]) -> None:
        """What the index saw must still be there: an edit made since would be lost."""
        for path in changed:
            target = self._top / os.fsdecode(path)
            now = target.lstat() if os.path.lexists(target) else None
            then = self._seen[path]
            if (now is None) != (then is None) or (now and then and _identity(now) != _identity(then)):
                raise FailedPrecondition(f"{_shown(path)} changed meanwhile; nothing was changed", hint="try again")


def _change(path: bytes, before: _Blob | None, after: _Blob | None, counts: _Count) -> Change:
    if before is None or after is None:
        status = "A" if before is None else "D"
    else:
        status = "M" if before.mode[:3] == after.mode[:3] else "T"
    return Change(status=status, path=os.fsdecode(path), added=counts[0], removed=counts[1])


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _is_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)


def _was_file(found: os.stat_result | None) -> bool:
    return found is not None and _is_file(found)


def _parents(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:depth]) for depth in range(1, len(parts))]


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")


def _first_line(stderr: bytes) -> str:
    text = stderr.decode(errors="replace").strip()
    return text.splitlines()[0].removeprefix("error: ").removeprefix("fatal: ")[:300] if text else "no reason given"


def _named(stderr: bytes) -> set[str]:
    return {match[1] for match in _ERROR.finditer(stderr.decode(errors="replace"))}


def _already(top: Path) -> LimpetError:
    return FailedPrecondition(f"these changes are already in {top}", hint="nothing was changed; `git diff` shows them")


def _conflict(what: list[str]) -> LimpetError:
    listed = ", ".join(what[:20]) + (f" and {len(what) - 20} more" if len(what) > 20 else "")
    return FailedPrecondition(
        f"the patch does not fit; nothing was changed. Conflicts: {listed}",
        hint="commit or undo your own changes there, or take the patch from `limpet export` and merge it by hand",
    )
