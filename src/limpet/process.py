"""The only place that spawns host processes, and the only one that decides whether one is alive.

Children get no standard input, an English locale and only the descriptors that they are handed.
A process is known by (pid, start time): a reused pid never matches.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from limpet.errors import DeadlineExceeded, LimpetError, Unavailable

# Debian keeps mke2fs, mkfs.btrfs and friends where an ordinary user's PATH does not look.
_SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

_PACKAGES = {  # which Debian package brings a tool that is missing
    "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs", "mkfs.btrfs": "btrfs-progs", "mksquashfs": "squashfs-tools", "git": "git",
    "passt": "passt", "newuidmap": "uidmap", "newgidmap": "uidmap", "depmod": "kmod", "lz4": "lz4",
    "unshare": "util-linux",
}  # fmt: skip


class CommandFailed(LimpetError):
    """A host command ended with a non-zero status. `returncode`, `stdout` and `stderr` are kept."""

    code, http_status = "internal", 500

    def __init__(self, argv: Sequence[str], returncode: int, stdout: bytes, stderr: bytes) -> None:
        tail = stderr.decode(errors="replace").strip()[-2000:]
        super().__init__(f"{Path(argv[0]).name} failed with status {returncode}" + (f": {tail}" if tail else ""))
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


Child = subprocess.Popen[bytes]  # what `spawn_detached` gives
_disowned: list[Child] = []


@dataclass(frozen=True)
class Completed:
    """How a command ended: its status (negative: killed by that signal) and what it wrote."""

    returncode: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class ProcessRef:
    """A process that cannot be confused with a later one of the same pid. `started` is in clock ticks since boot."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether exactly this process still runs (a zombie does not)."""
        return start_time(self.pid) == self.started

    def send(self, signum: int) -> bool:
        """Signal exactly this process; False when it is gone. Race-free: a pidfd is checked before it is used."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(fd, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat (proc(5)), in clock ticks; None when there is no such live process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def reference(pid: int) -> ProcessRef | None:
    """A reference to the live process `pid`, or None."""
    started = start_time(pid)
    return None if started is None else ProcessRef(pid, started)


def find(tool: str) -> str | None:
    """The path of a host tool, also in the sbin directories; None when it is not installed."""
    return shutil.which(tool, path=_SEARCH)


def require(tool: str) -> str:
    """The path of a host tool; raises Unavailable naming the Debian package when it is missing."""
    if path := find(tool):
        return path
    raise Unavailable(f"{tool} is not installed", hint=f"sudo apt-get install {package(tool)}")


def package(tool: str) -> str:
    """The Debian package that brings a host tool."""
    return _PACKAGES.get(tool, tool)


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    # A daemon started from a git hook inherits GIT_DIR and friends; our git commands must not follow them.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return {**inherited, "PATH": _SEARCH, "LC_ALL": "C.UTF-8", **(extra or {})}


async def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    check: bool = True,
    stdout: int | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a command to its end and return what it wrote. `timeout` is in seconds; `stdout` may be a descriptor to
    write to instead of being collected; `pass_fds` are inherited. Raises CommandFailed (when `check`),
    DeadlineExceeded, Unavailable."""
    process = await asyncio.create_subprocess_exec(
        require(argv[0]), *argv[1:], cwd=cwd, env=_environment(env), start_new_session=True,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE if stdout is None else stdout, stderr=subprocess.PIPE, pass_fds=pass_fds,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate(input)
    except TimeoutError:
        raise DeadlineExceeded(f"{Path(argv[0]).name} did not finish within {timeout:g} s") from None
    finally:
        await _reap(process)
    assert process.returncode is not None
    if check and process.returncode != 0:
        raise CommandFailed(argv, process.returncode, out or b"", err)
    return Completed(process.returncode, out or b"", err)


def run_sync(
    argv: Sequence[str],
    *,
    input: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    check: bool = True,
) -> Completed:
    """`run` for threads and for set-up code that has no event loop."""
    try:
        done = subprocess.run(
            [require(argv[0]), *argv[1:]], input=input, stdin=subprocess.DEVNULL if input is None else None, cwd=cwd,
            env=_environment(env), timeout=timeout, capture_output=True, start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{Path(argv[0]).name} did not finish within {timeout:g} s") from None
    if check and done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stdout, done.stderr)
    return Completed(done.returncode, done.stdout, done.stderr)


@contextlib.asynccontextmanager
async def piped(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A helper process with all three standard streams as pipes; killed and reaped when the block is left."""
    process = await asyncio.create_subprocess_exec(
        require(argv[0]), *argv[1:], cwd=cwd, env=_environment(env), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, limit=1 << 20,
    )  # fmt: skip
    try:
        yield process
    finally:
        await _reap(process)


def spawn_detached(
    argv: Sequence[str],
    *,
    log: Path,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Child:
    """Start a process that outlives us: own session, stdin and stdout on /dev/null, stderr appended to `log` (0600).
    Only `pass_fds` are inherited. The caller reaps it while it lives."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            [require(argv[0]), *argv[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=fd,
            start_new_session=True, pass_fds=tuple(pass_fds), cwd=cwd, env=_environment(env),
        )  # fmt: skip
    finally:
        os.close(fd)


def disown(child: Child) -> None:
    """Forget a detached child that runs on. It stays known here only to be reaped when a later one is disowned."""
    _disowned[:] = [known for known in [*_disowned, child] if known.poll() is None]


@atexit.register
def _leave_running() -> None:
    for child in _disowned:
        if child.poll() is None:
            child.returncode = 0  # meant to outlive us: Popen must not warn of it


async def _reap(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
