"""System calls that the standard library lacks, through the C library. ctypes is imported at the first call: that costs
90 ms under emulation."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FALLOC_FL_COLLAPSE_RANGE = 8  # linux/falloc.h


def mount(what: bytes, place: bytes, kind: bytes | None = None, flags: int = 0, options: bytes | None = None) -> None:
    """mount(2). Raises OSError."""
    import ctypes

    _call("mount", what, place, kind, ctypes.c_ulong(flags), options)


def unmount(place: bytes, flags: int = 0) -> None:
    """umount2(2). Raises OSError."""
    _call("umount2", place, flags)


def collapse(fd: int, length: int) -> None:
    """Take the first `length` bytes, whole blocks, out of a file (fallocate(2)), at once for whoever writes to it.
    Raises OSError: ext4 and XFS can do this."""
    import ctypes

    _call("fallocate", fd, _FALLOC_FL_COLLAPSE_RANGE, ctypes.c_int64(0), ctypes.c_int64(length))


def _call(function: str, *arguments: Any) -> None:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), function)
