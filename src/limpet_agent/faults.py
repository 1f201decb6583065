"""What an operation answers when it cannot do what was asked: a code of the host's error tree, a message, a hint."""

from __future__ import annotations

import errno

_BY_ERRNO = {
    errno.ENOENT: "not_found", errno.ENOTDIR: "failed_precondition", errno.EEXIST: "already_exists",
    errno.EISDIR: "failed_precondition", errno.ENOTEMPTY: "failed_precondition", errno.EACCES: "failed_precondition",
    errno.EPERM: "failed_precondition", errno.ENOSPC: "insufficient_space", errno.EDQUOT: "insufficient_space",
    errno.ENAMETOOLONG: "bad_request", errno.EINVAL: "bad_request", errno.ELOOP: "bad_request", errno.EBUSY: "busy",
    errno.EROFS: "failed_precondition", errno.ETXTBSY: "busy", errno.ECONNREFUSED: "unavailable",
    errno.EXDEV: "bad_request", errno.ETIMEDOUT: "deadline", errno.EFBIG: "insufficient_space",
}  # fmt: skip


class Fault(Exception):
    """A failure that the host is told about; `code` is one of limpet.errors.BY_CODE."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint

    def to_dict(self) -> dict[str, object]:
        """The payload of a RESET."""
        told: dict[str, object] = {"code": self.code, "message": self.message[:4096]}
        if self.hint:
            told["hint"] = self.hint[:4096]
        return told


class Gone(Exception):
    """The stream was reset or the host went away: stop working for it, tell nobody."""


def from_os(error: OSError, what: str | None = None) -> Fault:
    """The fault that an OSError means; `what` names the path or thing when the error does not."""
    name = what if what is not None else error.filename
    if isinstance(name, bytes):
        name = name.decode(errors="surrogateescape")
    reason = (error.strerror or str(error)).lower()
    return Fault(_BY_ERRNO.get(error.errno or 0, "internal"), f"{name}: {reason}" if name else reason)
