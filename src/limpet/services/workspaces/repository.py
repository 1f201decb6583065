"""What limpet takes from the user's repository besides files: where it is, HEAD, refs, and harmless configuration.

Everything here only reads. Configuration is an allow list: identity, line endings, remotes without credentials. Hooks,
filters, aliases, credential helpers and includes stay at home.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from limpet.errors import BadRequest, FailedPrecondition
from limpet.services.workspaces import git

_KEPT = {
    "core.autocrlf", "core.eol", "core.filemode", "core.ignorecase", "core.symlinks", "core.precomposeunicode",
    "user.name", "user.email", "init.defaultbranch", "extensions.objectformat", "extensions.partialclone",
}  # fmt: skip
_KEPT_PATTERN = re.compile(
    r"(remote\..+\.(url|pushurl|fetch|promisor|partialclonefilter)|branch\..+\.(remote|merge|rebase))", re.DOTALL
)
_FALLBACKS = {"user.name": "limpet", "user.email": "limpet@localhost"}  # so that `git commit` works in the sandbox
_LOCAL_REFS = (b"refs/bisect/", b"refs/worktree/", b"refs/rewritten/", b"refs/limpet/")


@dataclass(frozen=True)
class Ref:
    """One ref: the object it names, or the ref it points at."""

    name: bytes
    object: str
    symref: bytes


@dataclass(frozen=True)
class Repository:
    """A repository with a work tree, as it is now. `branch` is None when HEAD is detached, `head` when it is unborn."""

    top: Path
    git_dir: Path
    common_dir: Path
    branch: str | None
    head: str | None
    config: tuple[tuple[str, str], ...]
    excludes: Path | None

    @property
    def index(self) -> Path:
        return self.git_dir / "index"

    @property
    def objects(self) -> tuple[Path, ...]:
        """The object directories, alternates included (gitrepository-layout(5), objects/info/alternates)."""
        return tuple(_object_directories(self.common_dir / "objects"))

    def git(self) -> git.Git:
        """git over the user's own git directory: for commands that only read and run nothing."""
        return git.Git(self.git_dir, self.top, excludes=self.excludes)

    async def refs(self) -> list[Ref]:
        """Branches, tags, remote branches, notes, the stash; not what belongs to one work tree."""
        done = await self.git()("for-each-ref", "--format=%(objectname)%00%(symref)%00%(refname)")
        found = [Ref(name, oid.decode(), symref) for oid, symref, name in map(_ref_fields, done.stdout.splitlines())]
        return [ref for ref in found if not ref.name.startswith(_LOCAL_REFS)]


async def discover(directory: Path) -> Repository | None:
    """The repository that `directory` is in; None when there is none or it ignores the directory.

    Raises BadRequest for a bare repository, FailedPrecondition when git refuses the repository (its owner)."""
    done = await git.ask(
        directory, "rev-parse", "--path-format=absolute", "--show-toplevel", "--absolute-git-dir", "--git-common-dir"
    )
    if done.returncode != 0:
        _refuse_unless_plain(directory, done.stderr)
        return None
    found = [Path(line) for line in git.lines(done.stdout)]
    if len(found) != 3:
        raise BadRequest(f"the path of the repository at {str(directory)!r} has a line break in it", hint="rename it")
    top, git_dir, common_dir = found
    if directory.resolve() != top.resolve() and await _ignored(top, directory):
        return None
    config = await _read_config(top)
    branch = await git.ask(top, "symbolic-ref", "-q", "HEAD")
    head = await git.ask(top, "rev-parse", "-q", "--verify", "HEAD^{commit}")
    return Repository(
        top=top, git_dir=git_dir, common_dir=common_dir,
        branch=git.lines(branch.stdout)[0] if branch.returncode == 0 else None,
        head=git.one_line(head.stdout) if head.returncode == 0 else None,
        config=_kept(config), excludes=_excludes_file(config),
    )  # fmt: skip


def without_credentials(url: str) -> str:
    """A remote's URL without password or token: `https://user:secret@host/x` becomes `https://host/x`."""
    if "://" not in url:
        return url  # scp style or a path: has no place for a password
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    user, at, host = parts.netloc.rpartition("@")
    if parts.scheme in ("ssh", "git+ssh", "ssh+git"):
        host = user.partition(":")[0] + at + host
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _refuse_unless_plain(directory: Path, stderr: bytes) -> None:
    text = stderr.decode(errors="replace")
    if "not a git repository" in text and "dubious" not in text:
        return
    if "must be run in a work tree" in text:
        raise BadRequest(f"{directory} is a bare git repository or a .git directory", hint="name its work tree")
    raise git.explained("rev-parse", stderr)


async def _ignored(top: Path, directory: Path) -> bool:
    done = await git.ask(top, "check-ignore", "-q", "--", str(directory.resolve()))
    return done.returncode == 0


async def _read_config(top: Path) -> list[tuple[str, str]]:
    done = await git.ask(top, "config", "--list", "-z")
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip()
        raise FailedPrecondition(f"git cannot read its configuration: {reason}", hint="git config --list")
    pairs = (record.decode(errors="surrogateescape").partition("\n") for record in git.records(done.stdout))
    return [(key, value if newline else "true") for key, newline, value in pairs]


def _kept(config: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    kept: dict[str, list[str]] = {key: [value] for key, value in _FALLBACKS.items()}
    for key, value in config:
        if key in _KEPT:
            kept[key] = [value]
        elif _KEPT_PATTERN.fullmatch(key):
            kept.setdefault(key, []).append(without_credentials(value) if key.endswith("url") else value)
    return tuple((key, value) for key, values in kept.items() for value in values)


def _excludes_file(config: list[tuple[str, str]]) -> Path | None:
    named = dict(config).get("core.excludesfile")
    default = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "git" / "ignore"
    path = Path(named).expanduser() if named else default
    return path if path.is_file() else None


def _ref_fields(line: bytes) -> tuple[bytes, bytes, bytes]:
    oid, symref, name = line.split(b"\0", 2)
    return oid, symref, name


def _object_directories(first: Path, depth: int = 5) -> list[Path]:
    found = [first]
    listed = first / "info" / "alternates"
    if depth and listed.is_file():
        for line in listed.read_text(errors="surrogateescape").splitlines():
            path = Path(line) if line.startswith("/") else first / line
            if line and not line.startswith("#") and path.is_dir():
                found += [each for each in _object_directories(path, depth - 1) if each not in found]
    return found
