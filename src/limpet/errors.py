"""The error tree. Every failure that a user can meet is one of these; nothing else crosses the API.

    LimpetError                 code                  when
    ├── BadRequest              bad_request           the input is wrong; nothing was tried
    ├── NotFound                not_found             no such sandbox, image, path, key …
    ├── AlreadyExists           already_exists        the name is taken
    ├── FailedPrecondition      failed_precondition   the thing is in a state that forbids this
    ├── Busy                    busy                  somebody else holds it just now; try again
    ├── Unavailable             unavailable           a tool, the daemon or the guest cannot be reached
    ├── DeadlineExceeded        deadline              a bounded wait ran out
    ├── Unimplemented           unimplemented         this build or guest cannot do that
    ├── InsufficientSpace       insufficient_space    no room on the disk
    └── Internal                internal              a bug in limpet

An error says what was wrong (`message`), what to do (`hint`) and which request it belongs to (`op_id`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimpetError(Exception):
    """Base of the tree. `message` is one sentence without a full stop; `hint` is what the user can do about it."""

    code = "internal"
    http_status = 500

    def __init__(self, message: str, *, hint: str | None = None, op_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.op_id = op_id

    def to_dict(self) -> dict[str, str | None]:
        """The wire form: `{code, message, hint, op_id}`."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "op_id": self.op_id}

    def __str__(self) -> str:
        return self.message


class BadRequest(LimpetError):
    code, http_status = "bad_request", 400


class NotFound(LimpetError):
    code, http_status = "not_found", 404


class AlreadyExists(LimpetError):
    code, http_status = "already_exists", 409


class FailedPrecondition(LimpetError):
    code, http_status = "failed_precondition", 412


class Busy(LimpetError):
    code, http_status = "busy", 423


class Unavailable(LimpetError):
    code, http_status = "unavailable", 503


class DeadlineExceeded(LimpetError):
    code, http_status = "deadline", 504


class Unimplemented(LimpetError):
    code, http_status = "unimplemented", 501


class InsufficientSpace(LimpetError):
    code, http_status = "insufficient_space", 507


class Internal(LimpetError):
    code, http_status = "internal", 500


BY_CODE: dict[str, type[LimpetError]] = {
    cls.code: cls
    for cls in (
        BadRequest, NotFound, AlreadyExists, FailedPrecondition, Busy, Unavailable,
        DeadlineExceeded, Unimplemented, InsufficientSpace, Internal,
    )
}  # fmt: skip


def from_dict(data: dict[str, object]) -> LimpetError:
    """The error that `to_dict` described; an unknown code becomes `Internal`. Tolerates missing keys."""

    def text(key: str) -> str | None:
        value = data.get(key)
        return value if isinstance(value, str) else None

    cls = BY_CODE.get(text("code") or "", Internal)
    return cls(text("message") or "unknown error", hint=text("hint"), op_id=text("op_id"))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """`did you mean 'x'?` for the known word closest to `word`, or None when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean '{matches[0]}'?" if matches else None
