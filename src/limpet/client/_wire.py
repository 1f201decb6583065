"""How requests are spelled and how failures are understood: shared by both clients, cheap to import."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from limpet.errors import (
    BadRequest,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    LimpetError,
    Unavailable,
    from_dict,
)
from limpet.names import new_id
from limpet.version import PROTOCOL

Params = Mapping[str, "str | int | float | bool | None"]

CONNECT_TIMEOUT = 5.0  # seconds: the daemon is on this machine
TIMEOUT = 120.0  # seconds without a byte after which a request is given up
STREAM_SILENCE = 60.0  # seconds after which a followed stream is asked for anew
CHUNK = 1 << 20  # bytes of a body that are held at once


def path_of(*parts: str) -> str:
    """`/v1/a/b` with every part escaped, so that no name can change the route. Raises BadRequest for an empty one."""
    if not all(parts):
        raise BadRequest("a name is empty")
    return "/v1/" + "/".join(quote(part, safe="", errors="surrogateescape") for part in parts)


def target(path: str, params: Params | None = None) -> str:
    """`path` with its query; None leaves a parameter out, bytes that are not UTF-8 travel as they are."""
    given = {key: _text(value) for key, value in (params or {}).items() if value is not None and value is not False}
    return path + ("?" + urlencode(given, errors="surrogateescape") if given else "")


def _text(value: str | int | float | bool | None) -> str:
    return "1" if value is True else str(value)


def headers() -> dict[str, str]:
    """The headers of a new request: protocol version and a fresh operation id."""
    return {"Limpet-Protocol": str(PROTOCOL), "Limpet-Op-Id": new_id("op")}


def dump(body: Mapping[str, Any]) -> bytes:
    """A request body; what is None is left to the server's default."""
    return json.dumps({key: value for key, value in body.items() if value is not None}).encode()


def exec_request(command: str | Sequence[str], options: Mapping[str, Any]) -> str:
    """An ExecRequest as JSON. A string is a line for `sh`; a sequence is an argument vector."""
    argv = ["sh", "-c", command] if isinstance(command, str) else [os.fspath(word) for word in command]
    return dump({"argv": argv, **options}).decode()


def failure(status: int, body: bytes, answer: Mapping[str, str], op_id: str | None = None) -> LimpetError:
    """The error that an answer with this status carries, however little it says."""
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    if not isinstance(data, dict) or "code" not in data:
        text = body[:200].decode(errors="replace").strip()
        data = {
            "message": f"the daemon answered {status}" + (f": {text}" if text else ""),
            "hint": "limpet daemon logs",
        }
    error = from_dict(data)
    error.op_id = error.op_id or answer.get("limpet-op-id") or op_id
    if answer.get("limpet-protocol", str(PROTOCOL)) != str(PROTOCOL):
        return other_version(error)
    return error


def other_version(error: LimpetError) -> LimpetError:
    """A daemon of another version answered."""
    hint = "limpet daemon stop (sandboxes keep running; the next command starts this version's daemon)"
    return FailedPrecondition(error.message, hint=hint, op_id=error.op_id)


def unreachable(error: Exception, op_id: str | None, socket: Path) -> LimpetError:
    """What a broken connection means to the user."""
    reason = str(error) or type(error).__name__
    return Unavailable(f"cannot reach the daemon at {socket}: {reason}", hint="limpet daemon logs", op_id=op_id)


def too_slow(seconds: float, op_id: str | None) -> LimpetError:
    """The daemon took too long to answer."""
    return DeadlineExceeded(f"no answer from the daemon within {seconds:g} s", hint="limpet daemon logs", op_id=op_id)


def garbled(what: str, op_id: str | None = None) -> LimpetError:
    """The daemon broke the protocol."""
    return Internal(f"the daemon sent {what}", hint="limpet daemon logs", op_id=op_id)
