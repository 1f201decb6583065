"""From a request to a running process: fork, become the user, exec; and, when it fails, at which step and why.

The child tells the parent through a pipe that closes itself at a successful exec; else it carries
`stage errno path`. Between fork and exec the child only makes system calls.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from struct import pack

from limpet_agent.faults import Fault
from limpet_agent.signals import native as signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from limpet_agent.users import User

fork_exec: Any = None
if sys.version_info[:2] == (3, 11):  # its arguments change from version to version; the agent disk carries 3.11
    from _posixsubprocess import fork_exec

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIOCSCTTY, TIOCSWINSZ = 0x540E, 0x5414  # asm-generic/ioctls.h; `termios` is a library to load
_TTY_GROUP = 5  # Debian's and the kernel's usual gid of terminals


class Plan:
    """Everything the child needs, computed before the fork."""

    __slots__ = ("argv", "candidates", "cwd", "env", "fallback_cwd", "fds", "tty", "user")

    def __init__(
        self, argv: list[str], env: dict[str, str], cwd: str | None, user: User, tty: bool, fds: tuple[int, int, int]
    ) -> None:
        self.argv, self.env, self.user, self.tty, self.fds = argv, env, user, tty, fds
        self.cwd = cwd if cwd is not None else user.home
        self.fallback_cwd = cwd is None  # a home that is not there is no reason to refuse
        self.candidates = candidates(argv[0], env.get("PATH", PATH))


def environment(user: User, tty: bool, image_env: object, asked: dict[str, str]) -> dict[str, str]:
    """What a login would give, then what the image says, then what was asked for."""
    env = {
        "PATH": PATH, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell,
        "LANG": "C.UTF-8",
    }  # fmt: skip
    if tty:
        env["TERM"] = "xterm-256color"
    if isinstance(image_env, dict):
        env.update({str(key): str(value) for key, value in image_env.items()})
    env.update(asked)
    return env


def candidates(command: str, path: str) -> list[str]:
    """Where to look for a command, as execvp(3) does."""
    if "/" in command:
        return [command]
    return [f"{directory or '.'}/{command}" for directory in path.split(":")]


def fork(plan: Plan, protect: bool) -> tuple[int, int]:
    """Start the child; (its pid, the reading end of its error pipe, non-blocking). Raises OSError."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        if fork_exec is not None and not plan.tty:
            pid = _fork_natively(plan, reader, writer, protect)
        else:
            pid = os.fork()
            if pid == 0:
                _child(plan, writer, protect)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return pid, reader


def _fork_natively(plan: Plan, reader: int, writer: int, protect: bool) -> int:
    """As `_child`, by the C function behind `subprocess`: between fork and exec it runs no Python, which saves the
    copying of a hundred pages, a third of the whole time under emulation. It cannot give a terminal."""
    user = plan.user
    privileged = os.geteuid() == 0
    if not privileged and user.uid != os.geteuid():
        raise PermissionError(errno.EPERM, "the agent is not root")
    if plan.fallback_cwd and not os.path.isdir(plan.cwd):
        plan.cwd = "/"
    plan.env.setdefault("PWD", plan.cwd)
    switch = privileged and [*user.groups, user.uid] != [*os.getgroups(), os.getuid()]
    assert fork_exec is not None
    pid: int = fork_exec(
        [os.fsencode(word) for word in plan.argv], tuple(os.fsencode(one) for one in plan.candidates), False, (writer,),
        plan.cwd, [os.fsencode(f"{name}={value}") for name, value in plan.env.items()],
        plan.fds[0], -1, -1, plan.fds[1], -1, plan.fds[2], reader, writer, True, True, -1,
        user.gid if switch else None, user.groups if switch else None, user.uid if switch else None, -1, None, True,
    )  # fmt: skip
    if protect:
        _expendable(pid)
    return pid


def _child(plan: Plan, writer: int, protect: bool) -> None:
    """Never returns."""
    stage, where = "session", ""
    try:
        os.setsid()
        if plan.tty:
            stage = "terminal"
            fcntl.ioctl(plan.fds[0], TIOCSCTTY, 0)
        stage = "descriptors"
        _place(plan.fds)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # what Python changed
            signal.signal(number, signal.SIG_DFL)
        if protect:
            _expendable(os.getpid())
        os.umask(0o022)
        stage, where = "user", plan.user.name
        _become(plan.user)
        stage, where = "directory", plan.cwd
        _enter(plan)
        stage, where = "exec", plan.argv[0]
        _exec(plan)
    except OSError as error:
        os.write(writer, f"{stage} {error.errno or 0} {where}".encode(errors="surrogateescape")[:4096])
    except BaseException as error:
        os.write(writer, f"{stage} 0 {error}".encode(errors="replace")[:4096])
    finally:
        os._exit(127)


def _place(fds: tuple[int, int, int]) -> None:
    """Make `fds` 0, 1 and 2. They are above 2 already: the supervisor holds those open."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target, inheritable=True)


def _expendable(pid: int) -> None:
    """Undo the protection from the OOM killer that the agent has and its children inherit."""
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"0")
        os.close(fd)
    except OSError:
        pass


def _become(user: User) -> None:
    if os.geteuid() == 0:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    elif user.uid != os.geteuid():
        raise PermissionError(errno.EPERM, "not root")


def _enter(plan: Plan) -> None:
    try:
        os.chdir(plan.cwd)
    except OSError:
        if not plan.fallback_cwd:
            raise
        os.chdir("/")
    plan.env.setdefault("PWD", os.getcwd() if plan.fallback_cwd else plan.cwd)


def _exec(plan: Plan) -> None:
    refused: OSError | None = None
    for candidate in plan.candidates:
        try:
            os.execve(candidate, plan.argv, plan.env)
        except FileNotFoundError:
            if os.path.lexists(candidate) and len(plan.candidates) == 1:
                raise OSError(errno.ELIBBAD, "interpreter") from None
        except NotADirectoryError:
            continue
        except OSError as error:
            refused = error
    raise refused or FileNotFoundError(errno.ENOENT, "command")


def explain(report: bytes, plan: Plan) -> Fault:
    """The fault that the child's report means."""
    if report.startswith(b"OSError:"):  # by fork_exec: "OSError:<errno in hex>:" + ("noexec" when it was before exec)
        _, number, when = report.decode().split(":", 2)
        stage = "directory" if when else "exec"
        report = f"{stage} {int(number, 16)} {plan.cwd}".encode(errors="surrogateescape")
        name = plan.argv[0]
        if stage == "exec" and int(number, 16) == errno.ENOENT and "/" in name and os.path.lexists(name):
            report = b"exec %d" % errno.ELIBBAD
    stage, _, rest = report.decode(errors="surrogateescape").partition(" ")
    number, _, where = rest.partition(" ")
    code = int(number) if number.isdigit() else 0
    reason = os.strerror(code).lower() if code else where
    if stage == "exec":
        return _explain_exec(code, reason, plan)
    if stage == "directory":
        if code == errno.ENOENT:
            return Fault("not_found", f"no such directory '{where}' in the guest")
        return Fault("failed_precondition", f"cannot enter '{where}' as {plan.user.name}: {reason}")
    if stage == "user":
        return Fault("failed_precondition", f"cannot become user '{where}': {reason}")
    return Fault("internal", f"cannot start the command ({stage}): {reason}")


def _explain_exec(code: int, reason: str, plan: Plan) -> Fault:
    name = plan.argv[0]
    if code == errno.ENOENT:
        hint = None if "/" in name else "is it installed in the sandbox? PATH is " + plan.env.get("PATH", PATH)
        return Fault("not_found", f"command '{name}' not found in the guest", hint)
    if code == errno.EACCES:
        return Fault("failed_precondition", f"'{name}' is not executable by {plan.user.name}", "see its mode: ls -l")
    if code == errno.ELIBBAD:
        return Fault("failed_precondition", f"'{name}' names an interpreter that does not exist in the guest")
    if code == errno.ENOEXEC:
        return Fault("failed_precondition", f"'{name}' is not an executable file: no known format and no #! line")
    if code == errno.E2BIG:
        return Fault("bad_request", "the arguments and environment are too long")
    return Fault("failed_precondition", f"cannot execute '{name}': {reason}")


def open_terminal(user: User, rows: int, cols: int) -> tuple[int, int]:
    """A new pseudo-terminal of that size which belongs to the user: (our end, the command's end)."""
    ours, theirs = os.openpty()
    resize(ours, rows, cols)
    if os.geteuid() == 0:
        os.fchown(theirs, user.uid, _TTY_GROUP)
        os.fchmod(theirs, 0o620)
    os.set_blocking(ours, False)
    return ours, theirs


def resize(terminal: int, rows: int, cols: int) -> None:
    """Tell the terminal, and through it the command, its size."""
    fcntl.ioctl(terminal, TIOCSWINSZ, pack("HHHH", rows, cols, 0, 0))
