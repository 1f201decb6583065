"""JSON without importing `json`: that pulls in `re`, 150 ms of boot time under emulation.

The C scanner and encoder behind `json` do the work; where they are missing, `json` itself does.
"""

from __future__ import annotations

from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Context:
    """The attributes that `_json.make_scanner` reads from a JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}


def _default(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is not JSON")


try:
    import _json  # type: ignore[import-not-found,unused-ignore]

    _context: Any = _Context()
    _scan: Any = _json.make_scanner(_context)
    _make: Any = _json.make_encoder(
        None, _default, _json.encode_basestring_ascii, None, ": ", ", ", False, False, False
    )
except (ImportError, AttributeError, TypeError):  # another Python: pay the price
    import json

    _scan = vars(json.JSONDecoder())["scan_once"]

    def _make(value: object, _level: int) -> tuple[str, ...]:
        return (json.dumps(value),)


def dumps(value: dict[str, Any]) -> bytes:
    """JSON as ASCII bytes; lone surrogates (bytes that were not UTF-8) become escapes and survive the trip."""
    return "".join(_make(value, 0)).encode("ascii")


def loads(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises Fault(bad_request) for anything else."""
    try:
        text = data.decode().strip()
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError, SystemError):  # the last: its error class is not imported
        raise Fault("bad_request", "the message is not JSON") from None
    if end != len(text) or not isinstance(value, dict):
        raise Fault("bad_request", "the message is not one JSON object")
    return value
