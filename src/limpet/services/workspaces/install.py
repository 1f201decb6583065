"""Putting changed files into the user's directory: all of them or none, also across a crash.

    <top>/.tmp-apply-xxxx/new/    the new content, complete and synced
                          old/    what was there before, moved here file by file
                          journal what is to be done; its removal is the commit point

    1  new/ written, synced     a crash leaves only the staging directory
    2  journal written          from here on a crash is undone by `recover` at the next apply
    3  old files moved to old/, emptied directories removed, new files moved in
    4  journal removed          ← the commit point
    5  staging removed
An error in 3 is undone at once. Files are only ever renamed, so no step needs space on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from limpet import durable
from limpet.errors import Busy, FailedPrecondition, InsufficientSpace, LimpetError

STAGING = "apply"
_PATTERN = f".tmp-{STAGING}-*"


@dataclass(frozen=True, slots=True)
class Step:
    """One file: whether there is an old one to take away and a new one to put there. Paths are relative, as str."""

    path: str
    old: bool
    new: bool


@dataclass(frozen=True)
class Journal:
    """What `commit` does, so that it can be undone: steps, directories it makes, modes of those it may remove."""

    steps: list[Step]
    made: list[str] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def locked(top: Path) -> Iterator[None]:
    """Hold the directory against other applies. Raises Busy."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Busy(f"another apply is at work in {top}", hint="try again when it is done") from None
    finally:
        os.close(fd)


def recover(top: Path) -> None:
    """Undo what an apply that crashed left half done, and sweep its staging directory."""
    for stage in top.glob(_PATTERN):
        with contextlib.suppress(FileNotFoundError):
            known = json.loads((stage / "journal").read_text())
            undo(top, stage, Journal([Step(**step) for step in known["steps"]], known["made"], known["modes"]))
            (stage / "journal").unlink()
        shutil.rmtree(stage, ignore_errors=True)


def stage_in(top: Path) -> Path:
    """A staging directory on the file system of `top`. Raises FailedPrecondition when it is not writable."""
    try:
        stage = durable.staging(top, STAGING)
        (stage / "new").mkdir()
        (stage / "old").mkdir()
    except OSError as error:
        raise _explained(error, top) from None
    return stage


def commit(top: Path, stage: Path, steps: Sequence[Step]) -> None:
    """Do the steps with the new files under `stage`/new. On an error everything is as before and it is raised typed."""
    journal = Journal(list(steps), _to_make(top, steps), _parent_modes(top, steps))
    try:
        for step in steps:
            _dress(top, stage, step)
        durable.sync_tree(stage)
        durable.replace_file(stage / "journal", json.dumps(asdict(journal)).encode())
    except OSError as error:
        raise _explained(error, top) from None
    try:
        _perform(top, stage, steps)
    except BaseException as error:
        undo(top, stage, journal)
        (stage / "journal").unlink()
        raise _explained(error, top) if isinstance(error, OSError) else error from None
    (stage / "journal").unlink()
    durable.sync_directory(stage)


def undo(top: Path, stage: Path, journal: Journal) -> None:
    """Put every old file back and take every new one away; may be run again after a crash in the middle."""
    for step in journal.steps:
        target = top / step.path
        if step.new and os.path.lexists(target) and not os.path.lexists(stage / "new" / step.path):
            target.unlink()
    for made in reversed(journal.made):
        with contextlib.suppress(OSError):
            (top / made).rmdir()
    for step in journal.steps:
        target, old = top / step.path, stage / "old" / step.path
        if step.old and os.path.lexists(old):
            for directory in _make_parents(target):
                mode = journal.modes.get(os.path.relpath(directory, top))
                if mode is not None:
                    directory.chmod(mode)
            old.rename(target)


def _perform(top: Path, stage: Path, steps: Sequence[Step]) -> None:
    touched = {top}
    for step in steps:
        if step.old:
            backup = stage / "old" / step.path
            backup.parent.mkdir(parents=True, exist_ok=True)
            (top / step.path).rename(backup)
    needed = {parent for step in steps if step.new for parent in (top / step.path).parents}
    for step in steps:
        if not step.new:
            _prune((top / step.path).parent, needed | {top})
    for step in steps:
        if step.new:
            target = top / step.path
            _make_parents(target)
            if os.path.lexists(target):
                _make_room(target)
            (stage / "new" / step.path).rename(target)
        touched.add((top / step.path).parent)
    for directory in touched:
        if directory.is_dir():
            durable.sync_directory(directory)


def _dress(top: Path, stage: Path, step: Step) -> None:
    """Give a new file the owner and permissions of the one that it replaces, or such as its directory suggests.

    git decides only about executable; the umask is the daemon's and says nothing about what the user wants."""
    if not step.new:
        return
    path, target = stage / "new" / step.path, top / step.path
    fresh = path.lstat()
    before = target.lstat() if step.old else None
    around = _nearest(target.parent).stat()
    if stat.S_ISREG(fresh.st_mode):
        like = before if before is not None and stat.S_ISREG(before.st_mode) else around
        mode = stat.S_IMODE(like.st_mode) & 0o666
        path.chmod(mode | (mode & 0o444) >> 2 if fresh.st_mode & 0o100 else mode)
    if os.geteuid() == 0:
        owner = before or around
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _make_parents(target: Path) -> list[Path]:
    """Make the missing directories above `target`, with owner and mode of the one that they are in; returns them."""
    missing = []
    directory = target.parent
    while not os.path.lexists(directory):
        missing.append(directory)
        directory = directory.parent
    owner = directory.stat()
    for each in reversed(missing):
        each.mkdir()
        each.chmod(stat.S_IMODE(owner.st_mode) & 0o777)
        if os.geteuid() == 0:
            os.chown(each, owner.st_uid, owner.st_gid)
    return missing


def _make_room(target: Path) -> None:
    """Only a directory without anything in it may stand where a file must go."""
    try:
        target.rmdir()
    except OSError:
        raise FailedPrecondition(
            f"{target} appeared or is a directory with other files in it", hint="move it away and try again"
        ) from None


def _prune(directory: Path, keep: set[Path]) -> None:
    while directory not in keep:
        try:
            directory.rmdir()
        except OSError:
            return
        directory = directory.parent


def _to_make(top: Path, steps: Sequence[Step]) -> list[str]:
    """The directories that the new files need and that are not there, outermost first."""
    missing: dict[str, None] = {}
    for step in steps:
        for parent in reversed(Path(step.path).parents):
            if step.new and not (top / parent).is_dir():
                missing[str(parent)] = None
    return list(missing)


def _parent_modes(top: Path, steps: Sequence[Step]) -> dict[str, int]:
    parents = {parent for step in steps if step.old for parent in Path(step.path).parents}
    return {str(parent): stat.S_IMODE((top / parent).stat().st_mode) for parent in parents if (top / parent).is_dir()}


def _nearest(directory: Path) -> Path:
    while not directory.is_dir():
        directory = directory.parent
    return directory


def _explained(error: OSError, top: Path) -> LimpetError:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return InsufficientSpace(f"no space left to write in {top}; nothing was changed", hint="free some space")
    what = error.filename or top
    return FailedPrecondition(
        f"cannot write {what}: {error.strerror}; nothing was changed", hint="check the owner and mode of the directory"
    )
