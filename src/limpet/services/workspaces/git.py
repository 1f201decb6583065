"""git on the host, run so that nothing which a guest could have written is ever executed.

A `Git` is bound to a git directory and a work tree and reads neither the system's nor the user's configuration, so
there are no filters, hooks, textconv or merge drivers to choose from. Most of our git directories are temporary ones
(staged.py) that only borrow the objects of the user's repository; where the user's own is read, it is by commands
that run no program of its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from limpet import process
from limpet.errors import FailedPrecondition, InsufficientSpace, Internal, LimpetError

TIMEOUT = 600.0  # seconds for one git command on the host

# Nothing runs, nothing waits for the disk (our git directories are scratch), and stat data is taken at its word fully.
_PINS = (
    "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.fsync=none", "core.splitIndex=false",
    "core.untrackedCache=false", "core.safecrlf=false", "core.attributesFile=/dev/null", "core.checkStat=default",
    "core.protectHFS=true", "core.protectNTFS=true", "core.compression=1", "protocol.allow=never", "gc.auto=0",
    "apply.ignoreWhitespace=no", "apply.whitespace=nowarn", "advice.addEmbeddedRepo=false",
)  # fmt: skip

_NO_CONFIG = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ATTR_NOSYSTEM": "1"}
_QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1"}


class GitFailed(LimpetError):
    """A git command that should have worked did not."""

    code, http_status = "internal", 500


@dataclass(frozen=True)
class Git:
    """git with `git_dir` over `work_tree`; `index` replaces the index, `alternates` lend their objects."""

    git_dir: Path
    work_tree: Path
    index: Path | None = None
    alternates: tuple[Path, ...] = ()
    excludes: Path | None = None
    settings: tuple[str, ...] = ()  # more configuration, as key=value

    async def __call__(self, *args: str, input: bytes | None = None, check: bool = True) -> process.Completed:
        """Run `git ARGS` in the work tree. Raises GitFailed (when `check`), FailedPrecondition for unreadable files."""
        pins = [*_PINS, *self.settings, f"core.excludesFile={self.excludes or '/dev/null'}"]
        argv = ["git", *(word for pin in pins for word in ("-c", pin)), *args]
        done = await process.run(
            argv, input=input, cwd=self.work_tree, env=self._env(), timeout=TIMEOUT, check=False
        )  # fmt: skip
        if check and done.returncode != 0:
            raise explained(args[0], done.stderr)
        return done

    def _env(self) -> Mapping[str, str]:
        env = {**_NO_CONFIG, **_QUIET, "GIT_DIR": str(self.git_dir), "GIT_WORK_TREE": str(self.work_tree)}
        env |= {f"GIT_{who}_{key}": value for who in ("AUTHOR", "COMMITTER") for key, value in _IDENTITY.items()}
        if self.index is not None:
            env["GIT_INDEX_FILE"] = str(self.index)
        if self.alternates:
            env["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = ":".join(_quoted(path) for path in self.alternates)
        return env


_IDENTITY = {"NAME": "limpet", "EMAIL": "limpet@localhost"}


async def ask(directory: Path, *args: str) -> process.Completed:
    """git as the user would run it in `directory`: finds the repository and reads the user's configuration."""
    return await process.run(["git", *args], cwd=directory, env=_QUIET, timeout=TIMEOUT, check=False)


def explained(what: str, stderr: bytes) -> LimpetError:
    """The typed error for what git wrote on its standard error."""
    text = stderr.decode(errors="replace").strip()
    first = next((line for line in text.splitlines() if "ermission denied" in line), None)
    if first is not None:
        return FailedPrecondition(
            f"git cannot read part of the directory: {_bare(first)}",
            hint="make it readable, or list it in .gitignore",
        )
    if "dubious ownership" in text:
        return FailedPrecondition(
            "git refuses this repository because it belongs to another user",
            hint="git config --global --add safe.directory '*', or run limpet as the owner",
        )
    if "No space left" in text:
        return InsufficientSpace("no space left for git's temporary files", hint="free some space and try again")
    if "index file corrupt" in text or "bad index" in text or "bad signature" in text:
        return FailedPrecondition("the repository's index is corrupt", hint="git itself says so: try `git status`")
    return GitFailed(f"git {what} failed: {_bare(text[-600:])}" if text else f"git {what} failed")


def lines(output: bytes) -> list[str]:
    """The lines of a short output, paths decoded as the file system does."""
    return output.decode(errors="surrogateescape").splitlines()


def records(output: bytes) -> list[bytes]:
    """The NUL-terminated records of a `-z` output."""
    return output.split(b"\0")[:-1]


def joined(paths: Sequence[bytes]) -> bytes:
    """`paths` as a command reads them with `-z --stdin`."""
    return b"".join(path + b"\0" for path in paths)


def one_line(output: bytes) -> str:
    """The single line that a command printed."""
    text = output.decode("ascii", errors="replace").strip()
    if not text or "\n" in text:
        raise Internal(f"git answered {text[:80]!r} where one word was expected")
    return text


def _bare(text: str) -> str:
    return " ".join(text.replace("fatal: ", "").replace("error: ", "").split())


def _quoted(path: Path) -> str:
    # git(1): an entry may be C-quoted, which is how a path with a colon in it survives.
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
