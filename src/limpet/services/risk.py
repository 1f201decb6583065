r"""What only a sandbox has: commits, stashes, changed and untracked files that are not on the host (VM-17).

The guest is asked once, by a script that looks at its repositories:

    repo <directory>\0 commit <id>\0 … stash <id>\0 …    not in its remotes, not of the import
    XY <path>\0 …                                        `git status --porcelain -z`
    blob <id> <path>\0 …                                 the content of the files that were named

Everything in the answer is hostile input: it is bounded, and only compared and counted. Of the imported repository the
host is asked too: a commit, a stash or a file that it has is not at risk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from limpet import process
from limpet.errors import FailedPrecondition, LimpetError
from limpet.models import RiskReport, State
from limpet.services.host import Host
from limpet.services.workspaces import git_directory
from limpet.store import SandboxRecord

_ASK_S = 10.0
_NO_GIT = 3  # exit code of _SCRIPT
_ANSWER_BYTES = 4 << 20
_LISTED = 1000  # paths in a report
_COMPARED_BYTES = 8 << 20  # a larger file of the host is not read: it counts as different
_ID = re.compile(rb"[0-9a-f]{40}")
_STATUS = re.compile(rb"[ MADRCUT?!]{2} ")

# $1 the imported work tree (or empty), $2 its git directory. Reads only, and takes nothing of the user's configuration.
_SCRIPT = r"""
export LC_ALL=C.UTF-8 GIT_OPTIONAL_LOCKS=0 GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_TERMINAL_PROMPT=0
quiet() { git -c safe.directory='*' -c core.fsmonitor=false -c core.untrackedCache=false -c core.quotePath=false "$@"; }
look() {
  printf 'repo %s\0' "$1"
  base=$(quiet rev-parse -q --verify refs/limpet/base)
  quiet rev-list --max-count=1001 --branches --tags HEAD ${base:+^$base} --not --remotes 2>/dev/null |
    while read -r id; do printf 'commit %s\0' "$id"; done
  quiet stash list --format=%H 2>/dev/null | head -n 1001 | while read -r id; do printf 'stash %s\0' "$id"; done
  quiet status --porcelain=v1 -z --no-renames --untracked-files=all 2>/dev/null | head -z -n 1001 | tell
}
tell() {
  paths=()
  while IFS= read -r -d '' line; do
    printf '%s\0' "$line"
    path=${line:3}
    case $path in *$'\n'*) ;; *) [ ! -f "$path" ] || [ -L "$path" ] || paths+=("$path");; esac
  done
  [ ${#paths[@]} = 0 ] || printf '%s\n' "${paths[@]}" | quiet hash-object --no-filters --stdin-paths 2>/dev/null |
    for path in "${paths[@]}"; do IFS= read -r id && printf 'blob %s %s\0' "$id" "$path"; done
}
command -v git >/dev/null || exit 3
if [ -n "$1" ] && cd -- "$1" 2>/dev/null; then (export GIT_DIR="$2" GIT_WORK_TREE="$1"; look "$1"); fi
find /workspace "$HOME" -xdev -maxdepth 4 -name .git -print0 2>/dev/null | head -z -n 32 |
  while IFS= read -r -d '' found; do
    top=${found%/.git}
    [ "$top" = "$1" ] || { cd -- "$top" 2>/dev/null && look "$top"; }
  done
"""


@dataclass
class _Repository:
    """What one repository of the guest has."""

    top: bytes
    commits: list[bytes] = field(default_factory=list)
    stashes: list[bytes] = field(default_factory=list)
    changed: list[bytes] = field(default_factory=list)
    untracked: list[bytes] = field(default_factory=list)
    blobs: dict[bytes, bytes] = field(default_factory=dict)  # path: id of its content


async def report(host: Host, record: SandboxRecord) -> RiskReport:
    """Of a running sandbox what its guest says; of another only which generation the host has."""
    found = await host.vaults.find(record.id)
    generation = found.vault.head.number if found is not None and found.vault.head is not None else None
    empty = RiskReport(sandbox=record.name, known=False, generation=generation)
    if host.live.get(record.id) is None or record.state is not State.RUNNING:
        return empty.model_copy(update={"reason": f"it is {record.state.value}: nobody can look"})
    try:
        repositories = parse(await _ask(host, record))
        if record.workspace is not None:
            await _leave_out(repositories, record.workspace.guest_dir, Path(record.workspace.host_dir))
    except LimpetError as error:
        return empty.model_copy(update={"reason": error.message})
    return empty.model_copy(
        update={
            "known": True,
            "commits": sum(len(one.commits) for one in repositories),
            "stashes": sum(len(one.stashes) for one in repositories),
            "changed": _paths(one.top + b"/" + path for one in repositories for path in one.changed),
            "untracked": _paths(one.top + b"/" + path for one in repositories for path in one.untracked),
        }
    )


def _paths(paths: Iterable[bytes]) -> list[str]:
    return [os.fsdecode(path) for path in itertools.islice(paths, _LISTED)]


async def _ask(host: Host, record: SandboxRecord) -> bytes:
    info = record.workspace
    given = [info.guest_dir, git_directory(info)] if info is not None and info.status == "complete" else ["", ""]
    async with host.live.guest(record.id, record.name) as agent:
        done = await agent.run(
            ["bash", "-c", _SCRIPT, "limpet-risk", *given],
            user=record.spec.user, cwd="/", timeout=_ASK_S, limit=_ANSWER_BYTES,
        )  # fmt: skip
    if done.exit_code == _NO_GIT:
        raise FailedPrecondition("there is no git in it")
    return done.stdout


def parse(answer: bytes) -> list[_Repository]:
    """The script's answer; what makes no sense in it is passed over."""
    found: list[_Repository] = []
    for line in answer.split(b"\0")[:-1]:
        word, _, rest = line.partition(b" ")
        if word == b"repo":
            found.append(_Repository(rest))
        elif found:
            _take(found[-1], line, word, rest)
    return found


def _take(repository: _Repository, line: bytes, word: bytes, rest: bytes) -> None:
    oid, _, path = rest.partition(b" ")
    if word == b"commit" and _ID.fullmatch(rest):
        repository.commits.append(rest)
    elif word == b"stash" and _ID.fullmatch(rest):
        repository.stashes.append(rest)
    elif word == b"blob" and _ID.fullmatch(oid):
        repository.blobs[path] = oid
    elif _STATUS.match(line):
        (repository.untracked if line.startswith(b"??") else repository.changed).append(line[3:])


async def _leave_out(repositories: list[_Repository], guest_dir: str, host_dir: Path) -> None:
    """Of the imported repository, what the host has as well."""
    for one in repositories:
        if one.top == os.fsencode(guest_dir):
            known = await _known_objects(host_dir, [*one.commits, *one.stashes])
            one.commits = [oid for oid in one.commits if oid not in known]
            one.stashes = [oid for oid in one.stashes if oid not in known]
            one.changed = [path for path in one.changed if not await _same(host_dir, path, one.blobs.get(path))]
            one.untracked = [path for path in one.untracked if not await _same(host_dir, path, one.blobs.get(path))]


async def _known_objects(host_dir: Path, ids: list[bytes]) -> set[bytes]:
    """Those that the host's repository has; none when it has no repository."""
    if not ids or not host_dir.is_dir():
        return set()
    done = await process.run(
        ["git", "cat-file", "--batch-check=%(objectname) %(objecttype)"], input=b"\n".join(ids) + b"\n", cwd=host_dir,
        env={"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1"}, timeout=_ASK_S, check=False,
    )  # fmt: skip
    return {line.split(b" ")[0] for line in done.stdout.splitlines() if line.endswith(b" commit")}


async def _same(host_dir: Path, path: bytes, blob: bytes | None) -> bool:
    """Whether the host has the same file, or has none where the guest has none either."""
    return await asyncio.to_thread(_blob_of, host_dir, path) == blob


def _blob_of(host_dir: Path, path: bytes) -> bytes | None:
    """The id that git gives the content of a regular file below a directory; None when there is no such file. No part
    of the path may be a symbolic link: the guest chose it."""
    if not {b"", b".", b".."}.isdisjoint(path.split(b"/")):
        return b"elsewhere"
    try:
        file = _open_below(host_dir, path)
    except FileNotFoundError:
        return None
    except OSError:
        return b"unreadable"
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _COMPARED_BYTES:
            return b"not compared"
        with open(file, "rb", closefd=False) as opened:
            content = opened.read(_COMPARED_BYTES)
    finally:
        os.close(file)
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest().encode()


def _open_below(directory: Path, path: bytes) -> int:
    """Open a file for reading without following a symbolic link. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    *parents, name = path.split(b"/")
    with contextlib.ExitStack() as stack:
        here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, here)
        for part in parents:
            here = os.open(part, flags | os.O_DIRECTORY, dir_fd=here)
            stack.callback(os.close, here)
        return os.open(name, flags, dir_fd=here)
