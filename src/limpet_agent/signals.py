"""Signals by name; the `signal` module would import `enum`."""

from __future__ import annotations

from limpet_agent.faults import Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as native
else:
    import _signal as native

__all__ = ["NUMBERS", "native", "number_of"]

NUMBERS = {
    name[3:]: value for name, value in vars(native).items()
    if name.startswith("SIG") and not name.startswith("SIG_") and isinstance(value, int)
}  # fmt: skip


def number_of(value: object) -> int:
    """The number of "INT", "SIGINT", "2" or 2. Raises Fault(bad_request)."""
    if isinstance(value, int) and 0 < value < 65:
        return value
    if isinstance(value, str):
        if value.isdigit() and 0 < int(value) < 65:
            return int(value)
        name = value.upper().removeprefix("SIG")
        if name in NUMBERS:
            return int(NUMBERS[name])
    raise Fault("bad_request", f"{value!r} is not a signal", "for example INT, TERM, KILL or 9")
