r"""Export: the guest's work as a list of changes and one binary patch, without touching anything in the guest (WS-3).

One command in the guest does it all, as the workspace's user: the index is copied with its time, `git add -A` writes
into the copy and into a temporary object directory, `git diff-index` compares it with the base. Its output is

    limpet-export 1 ok <base>\n | limpet-export 1 error <what>\n<text>
    warn <text>\n …
    diff\n
    raw records, numstat records (both -z), NUL, patch     what `diff-index -z --raw --numstat --patch` prints
    \nlimpet-export-end <status>\n                       the status in 3 digits: the last bytes, always

Everything in it is hostile input: lengths are bounded, ids and paths are checked by whoever uses them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from limpet.errors import BadRequest, FailedPrecondition, InsufficientSpace, Internal, LimpetError, NotFound
from limpet.models import Change, Changes, WorkspaceInfo
from limpet.services.workspaces.guest import Guest
from limpet.services.workspaces.staged import EXTRA, LINKS
from limpet.services.workspaces.transfer import git_directory

MAX_PATCH = 1 << 30  # bytes; more than this is no patch that anybody reads
TIMEOUT = 300.0  # seconds in the guest

_MAX_HEAD = 64 << 20  # bytes of list before the patch
_END = b"\nlimpet-export-end "
_END_SIZE = len(_END) + 4
_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RAW = re.compile(rb":(\d{6}) (\d{6}) [0-9a-f]{40,64} [0-9a-f]{40,64} ([A-Z])\d*")

# $1 work tree, $2 git directory, $3 base. No settings of the guest's repository may change what the diff looks like.
_SCRIPT = rf"""
fail() {{ printf 'limpet-export 1 error %s\n' "$1"; [ -z "$t" ] || head -c 2000 "$t/err" 2>/dev/null; exit 0; }}
t=
trap '[ -z "$t" ] || rm -rf "$t"' EXIT
trap 'exit 1' HUP INT TERM PIPE
unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_COMMON_DIR GIT_NAMESPACE
unset GIT_EXTERNAL_DIFF GIT_DIFF_OPTS GIT_CONFIG_COUNT
unset GIT_LITERAL_PATHSPECS GIT_GLOB_PATHSPECS GIT_NOGLOB_PATHSPECS GIT_ICASE_PATHSPECS
cd -- "$1" 2>/dev/null || fail no-tree
[ -d "$2" ] || fail no-git
for old in "${{TMPDIR:-/tmp}}"/limpet-export.*; do  # of exports that were killed
  [ ! -d "$old" ] || [ -d "/proc/${{old##*.}}" ] || rm -rf "$old"
done
mkdir -m 700 "${{TMPDIR:-/tmp}}/limpet-export.$$" "${{TMPDIR:-/tmp}}/limpet-export.$$/objects" || fail no-space
t=${{TMPDIR:-/tmp}}/limpet-export.$$
export LC_ALL=C.UTF-8 GIT_DIR="$2" GIT_WORK_TREE="$1" GIT_OPTIONAL_LOCKS=0
base=$(git rev-parse -q --verify "$3^{{commit}}" 2>"$t/err") || fail no-base
[ ! -f "$2/index" ] || cp -p "$2/index" "$t/index" 2>"$t/err" || fail no-space
export GIT_INDEX_FILE="$t/index" GIT_OBJECT_DIRECTORY="$t/objects" GIT_ALTERNATE_OBJECT_DIRECTORIES="\"$2/objects\""
quiet() {{ git -c core.fsync=none -c core.fsmonitor=false -c core.hooksPath=/dev/null -c core.untrackedCache=false \
  -c core.splitIndex=false -c core.safecrlf=false -c core.looseCompression=1 -c advice.addEmbeddedRepo=false \
  -c diff.suppressBlankEmpty=false -c diff.orderFile= -c diff.ignoreSubmodules=none -c gc.auto=0 "$@"; }}
if [ -s "$2/{LINKS}" ]; then
  quiet update-index --force-remove -z --stdin <"$2/{LINKS}" 2>"$t/err" || fail add
fi
if [ -s "$2/{EXTRA}" ]; then
  quiet update-index --add --remove --replace -z --stdin <"$2/{EXTRA}" 2>/dev/null || :  # `add` finds the rest
fi
quiet add -A --ignore-errors . 2>"$t/err"; added=$?
if [ -s "$t/err" ]; then
  while IFS= read -r line; do case $line in
    *"does not have a commit checked out"*) printf '%s\n' "$line" >>"$t/warn";;
    *ermission\ denied*) fail unreadable;;
    *"No space left"*) fail no-space;;
    warning:*|hint:*) printf '%s\n' "$line" >>"$t/warn";;
    *) [ "$added" = 0 ] || fail add;;
  esac; done <"$t/err"
fi
[ "$added" = 0 ] || [ -s "$t/warn" ] || fail add
printf 'limpet-export 1 ok %s\n' "$base"
[ ! -s "$t/warn" ] || head -n 50 "$t/warn" | sed 's/^/warn /'
printf 'diff\n'
quiet diff-index --cached -z --raw --numstat --patch --binary --full-index --abbrev=64 --no-renames --no-color \
  --no-ext-diff --no-textconv --no-relative --unified=3 --inter-hunk-context=0 --diff-algorithm=myers \
  --src-prefix=a/ --dst-prefix=b/ --ignore-submodules=none --submodule=short --no-function-context "$base" --
printf '\nlimpet-export-end %03d\n' $?
"""

_REASONS: dict[str, tuple[type[LimpetError], str, str]] = {
    "no-tree": (NotFound, "the workspace is not there any more in the sandbox", "import it again"),
    "no-git": (FailedPrecondition, "the workspace's git directory is gone in the sandbox", "import it again"),
    "no-base": (NotFound, "the base is no commit in the sandbox's repository", "name a commit, branch or tag of it"),
    "no-space": (InsufficientSpace, "the sandbox's disk is full", "remove something in the sandbox and try again"),
    "unreadable": (
        FailedPrecondition, "the workspace has files that its user may not read",
        "in the sandbox: sudo chown -R $USER .",
    ),
    "add": (FailedPrecondition, "git in the sandbox could not read the workspace", "see `git status` there"),
}  # fmt: skip


@dataclass(frozen=True)
class Patch:
    """A patch on its way: what it is against, what it changes, and its bytes. `chunks` must be closed when given up."""

    base: str
    changes: list[Change]
    warnings: list[str]
    chunks: AsyncIterator[bytes]


async def patch(
    guest: Guest,
    info: WorkspaceInfo,
    base: str | None = None,
    *,
    user: str | None = None,
    max_bytes: int = MAX_PATCH,
    timeout: float = TIMEOUT,
) -> Patch:
    """What changed in the guest since `base` (a revision there; default: the imported state), WS-2.

    Raises BadRequest (a malformed base), NotFound (no such base), FailedPrecondition (nothing imported, unreadable
    files, more than `max_bytes`), Unavailable."""
    if info.status != "complete" or info.base is None:
        raise FailedPrecondition("the workspace was not imported completely", hint="import it again")
    revision = check_revision(base or info.base)
    argv = ["sh", "-c", _SCRIPT, "limpet-export", info.guest_dir, git_directory(info), revision]
    reader = _Reader(guest.stream(argv, user=user, cwd="/", timeout=timeout), max_bytes)
    try:
        return await reader.open()
    except BaseException:
        await reader.close()
        raise


async def changes(
    guest: Guest, info: WorkspaceInfo, base: str | None = None, *, user: str | None = None, timeout: float = TIMEOUT
) -> Changes:
    """The list of changed files and the size of their patch. Raises as `patch` does."""
    found = await patch(guest, info, base, user=user, timeout=timeout)
    size = 0
    async for chunk in found.chunks:
        size += len(chunk)
    return Changes(base=found.base, changes=found.changes, patch_bytes=size, warnings=found.warnings)


def check_revision(text: str) -> str:
    """`text` itself when it can be handed to git as a revision; raises BadRequest otherwise."""
    if not text or text.startswith("-") or len(text) > 256 or not text.isprintable() or ".." in text:
        raise BadRequest(f"{text[:80]!r} is not a revision", hint="name a commit, branch or tag of the sandbox")
    return text


class _Reader:
    """Takes the stream apart. The last bytes are held back until the stream ends: they say whether it is whole."""

    def __init__(self, source: AsyncIterator[bytes], max_bytes: int) -> None:
        self._source = source
        self._held = b""
        self._max = max_bytes
        self._ended = False

    async def open(self) -> Patch:
        status = (await self._line()).split(" ")
        if status[:2] != ["limpet-export", "1"] or len(status) != 4:
            raise _strange(" ".join(status))
        if status[2] == "error":
            raise await self._refusal(status[3])
        warnings = []
        while (line := await self._line()) != "diff":
            warnings.append(line.removeprefix("warn "))
        base = status[3]
        if not _ID.fullmatch(base):
            raise _strange(base)
        found = parse_list(await self._list())
        return Patch(base, found, warnings, self._patch())

    async def close(self) -> None:
        if closing := getattr(self._source, "aclose", None):
            with contextlib.suppress(LimpetError):
                await closing()

    async def _more(self) -> bool:
        async for chunk in self._source:
            self._held += chunk
            return True
        self._ended = True
        return False

    async def _line(self) -> str:
        while b"\n" not in self._held:
            if len(self._held) > 1 << 16 or not await self._more():
                raise _strange(self._held[:80].decode(errors="replace"))
        line, _, self._held = self._held.partition(b"\n")
        return line.decode(errors="replace")

    async def _refusal(self, reason: str) -> LimpetError:
        while len(self._held) < 4096 and await self._more():
            pass
        kind, message, hint = _REASONS.get(reason, (Internal, "the export failed there", "see `limpet logs`"))
        text = " ".join(self._held[:500].decode(errors="replace").split())
        return kind(f"{message}: {text}" if text else message, hint=hint)

    async def _list(self) -> bytes:
        """The raw and numstat records; what follows their empty record is the patch."""
        await self._fill(1)
        if not self._held.startswith(b":"):
            return b""  # nothing changed
        position = 0
        while (end := self._held.find(b"\0\0", position)) == -1:
            position = max(0, len(self._held) - 1)
            if len(self._held) > _MAX_HEAD:
                raise FailedPrecondition("far too many files changed", hint="add generated files to .gitignore")
            if not await self._more():
                raise _cut()
        listed, self._held = self._held[: end + 1], self._held[end + 2 :]
        return listed

    async def _fill(self, size: int) -> None:
        while len(self._held) < size and await self._more():
            pass

    async def _patch(self) -> AsyncIterator[bytes]:
        sent = 0
        try:
            while not self._ended:
                ready, self._held = self._held[:-_END_SIZE], self._held[-_END_SIZE:]
                sent += len(ready)
                if sent > self._max:
                    raise FailedPrecondition(
                        f"the patch is larger than {self._max >> 20} MiB", hint="copy the files with `limpet cp`"
                    )
                if ready:
                    yield ready
                await self._more()
            if len(self._held) > _END_SIZE:
                yield self._held[:-_END_SIZE]
            self._check_end(self._held[-_END_SIZE:])
        finally:
            await self.close()

    def _check_end(self, end: bytes) -> None:
        if not end.startswith(_END):
            raise _cut()
        if end[len(_END) :] != b"000\n":
            raise FailedPrecondition(
                "git in the sandbox failed while it made the patch", hint="see `git status` and `git fsck` there"
            )


def parse_list(listed: bytes) -> list[Change]:
    """The changes in the -z output of `diff-index --raw --numstat --no-renames` (git-diff-index(1), "raw output")."""
    words = listed.split(b"\0")
    if words.pop() != b"":
        raise _strange("an unfinished list")
    found: dict[bytes, Change] = {}
    position = 0
    while position < len(words) and words[position].startswith(b":"):
        match = _RAW.fullmatch(words[position])
        if match is None or position + 1 >= len(words):
            raise _strange(repr(words[position][:80]))
        path = words[position + 1]
        found[path] = Change(status=match[3].decode(), path=path.decode(errors="surrogateescape"))
        position += 2
    for word in words[position:]:
        fields = word.split(b"\t", 2)
        if len(fields) != 3 or fields[2] not in found:
            raise _strange(repr(word[:80]))
        change = found[fields[2]]
        change.added, change.removed = count(fields[0]), count(fields[1])
    return list(found.values())


def count(field: bytes) -> int | None:
    """A number of `--numstat`; None for a binary file."""
    if field == b"-":
        return None
    if not field.isdigit() or len(field) > 12:
        raise _strange(repr(field[:20]))
    return int(field)


def _strange(what: str) -> Internal:
    return Internal(f"the sandbox's answer to an export makes no sense: {what[:120]}")


def _cut() -> FailedPrecondition:
    return FailedPrecondition("the export was cut off in the sandbox", hint="is its disk or memory full? try again")
