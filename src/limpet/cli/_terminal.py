"""The local terminal: raw mode that is always left again, and its size."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Every key goes to us as it is, Ctrl-C too. What was before is restored however the block is left."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def size() -> tuple[int, int]:
    """Rows and columns of the terminal, (24, 80) where there is none."""
    for fd in (1, 0, 2):
        with contextlib.suppress(OSError):
            found = os.get_terminal_size(fd)
            if found.lines and found.columns:
                return found.lines, found.columns
    return 24, 80


def is_open(fd: int) -> bool:
    """Whether there is such a descriptor at all (`<&-` closes it)."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def print_bytes(text: bytes) -> None:
    """To standard output, behind what was printed, with a line end."""
    sys.stdout.flush()
    write_all(1, text if text.endswith(b"\n") or not text else text + b"\n")


def write_all(fd: int, data: bytes) -> None:
    """All of it, also to a descriptor that somebody made non-blocking. Raises BrokenPipeError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            import select

            select.select([], [fd], [])
