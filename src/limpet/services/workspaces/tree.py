"""Which files of a host directory are its workspace: read once into an `ImportPlan`, which is plain data.

git repository   tracked files as they are in the work tree, untracked ones that are not ignored, and ignored ones that
                 `.limpetinclude` lists. Submodules and repositories nested in the tree come as plain files: their own
                 `.git` stays at home.
other directory  everything; sockets, pipes and devices are skipped and named.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from limpet.errors import BadRequest, FailedPrecondition, NotFound
from limpet.services.workspaces import git
from limpet.services.workspaces.repository import Repository, discover

INCLUDE_FILE = ".limpetinclude"
_GITLINK = b"160000"
_DEEPEST_NESTING = 8  # repositories within repositories


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, symlink or directory; `path` is relative to the top. Times in ns since the epoch, sizes in bytes."""

    path: bytes
    mode: int  # st_mode, with the type
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass
class ImportPlan:
    """What an import would copy from `top`, sorted by path, and how to notice later that the host moved."""

    top: Path
    kind: Literal["git", "directory"]
    untracked: bool
    repository: Repository | None = None
    entries: list[Entry] = field(default_factory=list)
    outside_base: set[bytes] = field(default_factory=set)  # ignored files that .limpetinclude asked for
    missing: list[bytes] = field(default_factory=list)  # tracked, but deleted in the work tree
    links: list[bytes] = field(default_factory=list)  # gitlinks whose files come as plain content
    nested: list[bytes] = field(default_factory=list)  # files of nested repositories
    warnings: list[str] = field(default_factory=list)
    staged: bytes = b""  # the index as `ls-files --stage` prints it

    @property
    def paths(self) -> list[str]:
        """Every path that would be copied, directories left out."""
        return [os.fsdecode(entry.path) for entry in self.entries if not entry.is_directory]

    @property
    def files(self) -> int:
        return sum(1 for entry in self.entries if not entry.is_directory)

    @property
    def bytes(self) -> int:
        """Content to copy; symlinks count the length of their target."""
        return sum(entry.size for entry in self.entries if not entry.is_directory)

    @property
    def fingerprint(self) -> str:
        """Changes when HEAD, the index or any file of the workspace changes. Begins with how it was taken."""
        digest = hashlib.sha256()
        where = self.repository
        digest.update(repr((where.branch, where.head) if where else None).encode() + self.staged)
        for entry in self.entries:
            times = 0 if entry.is_directory else entry.mtime_ns
            digest.update(b"%s\0%o %d %d\0" % (entry.path, entry.mode, 0 if not times else entry.size, times))
        return f"u{int(self.untracked)}:{digest.hexdigest()}"


async def plan_import(host_dir: str | Path, untracked: bool = True) -> ImportPlan:
    """Read which files belong to the workspace at `host_dir` (its whole repository when it is in one); changes nothing.

    Raises NotFound, BadRequest (not a directory, a bare repository), FailedPrecondition (unreadable, dubious owner)."""
    directory = _checked(Path(host_dir))
    repository = await discover(directory)
    if repository is None:
        plan = ImportPlan(directory.resolve(), "directory", untracked)
        await asyncio.to_thread(_read_plain, plan)
    else:
        plan = ImportPlan(repository.top, "git", untracked, repository)
        await _read_repository(plan, repository)
    plan.entries.sort(key=lambda entry: entry.path)
    return plan


def _checked(directory: Path) -> Path:
    try:
        mode = directory.stat().st_mode
    except FileNotFoundError:
        raise NotFound(f"there is no directory {str(directory)!r}", hint="name an existing directory") from None
    except OSError as error:
        raise FailedPrecondition(f"cannot read {str(directory)!r}: {error.strerror}", hint="check its owner") from None
    if not stat.S_ISDIR(mode):
        raise BadRequest(f"{str(directory)!r} is not a directory", hint="name the directory that holds the project")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise FailedPrecondition(f"{str(directory)!r} is not readable", hint="check its owner and mode")
    return directory.absolute()


# ------------------------------------------------------------------ plain directories


def _read_plain(plan: ImportPlan) -> None:
    for path, found in _walk(os.fsencode(plan.top), b""):
        if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode) or stat.S_ISDIR(found.st_mode):
            plan.entries.append(_entry(path, found))
        else:
            plan.warnings.append(f"skipped {_shown(path)}: a {_kind(found.st_mode)}")
        if path.rpartition(b"/")[2] == b".git":
            owner = path.rpartition(b"/")[0]
            plan.warnings.append(f"{_shown(owner)} is a git repository: copied as it is, compared file by file")


def _walk(top: bytes, below: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    try:
        with os.scandir(top + b"/" + below if below else top) as found:
            children = sorted(found, key=lambda child: child.name)
    except PermissionError:
        raise _unreadable(below) from None
    for child in children:
        path = below + b"/" + child.name if below else child.name
        status = child.stat(follow_symlinks=False)
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(top, path)


# ------------------------------------------------------------------ git repositories


async def _read_repository(plan: ImportPlan, repository: Repository) -> None:
    tool = repository.git()
    staged = await tool("ls-files", "-z", "-t", "--stage")
    plan.staged = staged.stdout
    tracked, links = _parse_stage(staged.stdout)
    others = await _untracked(tool, "--exclude-standard") if plan.untracked else []
    included = await _included(plan.top, tool)
    files = {path for path in others if not path.endswith(b"/")}
    plan.outside_base = {path for path in included if path not in files and not path.endswith(b"/")}
    nested = [path.rstrip(b"/") for path in others if path.endswith(b"/")]
    for link in links:
        if not await _read_nested(plan, link, is_link=True, depth=1):
            _keep_empty(plan, link)
    for path in nested:
        await _read_nested(plan, path, is_link=False, depth=1)
    for entry in _present(plan, tracked, files | plan.outside_base | set(plan.nested)):
        plan.entries.append(entry)


async def _read_nested(plan: ImportPlan, link: bytes, *, is_link: bool, depth: int) -> bool:
    """Take the files of the repository at `link` as plain content; False when there is none."""
    directory = plan.top / os.fsdecode(link)
    if not os.path.lexists(directory / ".git"):
        return False
    repository = await discover(directory)
    if repository is None or repository.top.resolve() != directory.resolve() or depth > _DEEPEST_NESTING:
        plan.warnings.append(f"skipped {_shown(link)}: its repository cannot be read")
        return False
    plan.warnings.append(f"{_shown(link)} is a repository of its own: its files come along, its history stays")
    if is_link:
        plan.links.append(link)
    tool = repository.git()
    staged = await tool("ls-files", "-z", "-t", "--stage")
    plan.staged += staged.stdout
    tracked, links = _parse_stage(staged.stdout)
    others = await _untracked(tool, "--exclude-standard") if plan.untracked else []
    plain = {path for path in others if not path.endswith(b"/")} | {path for path, _ in tracked}
    plan.nested += sorted(link + b"/" + path for path in plain)
    for below in [*links, *(path.rstrip(b"/") for path in others if path.endswith(b"/"))]:
        await _read_nested(plan, link + b"/" + below, is_link=False, depth=depth + 1)
    return True


def _keep_empty(plan: ImportPlan, link: bytes) -> None:
    """A submodule that was never fetched is an empty directory; without it git would say that it was deleted."""
    found = _lstat(os.fsencode(plan.top), link)
    if found is not None and stat.S_ISDIR(found.st_mode):
        plan.entries.append(_entry(link, found))
    else:
        plan.missing.append(link)


def _parse_stage(output: bytes) -> tuple[list[tuple[bytes, bool]], list[bytes]]:
    """`ls-files -t --stage -z`: (path, left out by a sparse checkout) of each file once, and the gitlinks."""
    tracked: dict[bytes, bool] = {}
    links = []
    for record in git.records(output):
        meta, _, path = record.partition(b"\t")
        tag, mode = meta.split(b" ")[:2]
        if mode == _GITLINK:
            links.append(path)
        else:
            tracked[path] = tag == b"S"
    return list(tracked.items()), links


async def _untracked(tool: git.Git, *options: str) -> list[bytes]:
    done = await tool("ls-files", "-z", "--others", *options)
    if b"could not open directory" in done.stderr:
        raise git.explained("ls-files", done.stderr)
    return git.records(done.stdout)


async def _included(top: Path, tool: git.Git) -> list[bytes]:
    listed = top / INCLUDE_FILE
    if not listed.is_file():
        return []
    return await _untracked(tool, "--ignored", f"--exclude-from={listed}")


def _present(plan: ImportPlan, tracked: list[tuple[bytes, bool]], others: set[bytes]) -> Iterator[Entry]:
    """The files of these names that are in the work tree now; tracked ones that are not go to `missing`."""
    top = os.fsencode(plan.top)
    real_directories: dict[bytes, bool] = {b"": True}
    sparse = dict(tracked)
    for path in [*sparse, *(others - sparse.keys())]:
        found = _lstat(top, path) if _under_real_directories(top, path, real_directories) else None
        if found is not None and (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            yield _entry(path, found)
        elif path in sparse and not sparse[path]:
            plan.missing.append(path)
        elif found is not None and not stat.S_ISDIR(found.st_mode):
            plan.warnings.append(f"skipped {_shown(path)}: a {_kind(found.st_mode)}")


def _under_real_directories(top: bytes, path: bytes, known: dict[bytes, bool]) -> bool:
    """Whether every parent of `path` is a directory, not a symlink to one: git tracks nothing behind a symlink."""
    parent = path.rpartition(b"/")[0]
    if parent not in known:
        found = _lstat(top, parent) if _under_real_directories(top, parent, known) else None
        known[parent] = found is not None and stat.S_ISDIR(found.st_mode)
    return known[parent]


def _lstat(top: bytes, path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(top + b"/" + path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise _unreadable(path) from None


def _entry(path: bytes, found: os.stat_result) -> Entry:
    return Entry(path, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _unreadable(path: bytes) -> FailedPrecondition:
    return FailedPrecondition(
        f"permission denied: cannot read {_shown(path) or 'the directory'}",
        hint="make it readable, or list it in .gitignore",
    )


def _kind(mode: int) -> str:
    return "socket" if stat.S_ISSOCK(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
