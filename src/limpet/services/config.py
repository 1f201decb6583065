"""The configuration: a few settings with defaults, in the store, in force as soon as they are set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limpet.errors import BadRequest, NotFound, nearest
from limpet.models import Setting
from limpet.store import Store

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MOST_POOLED = 50
_MOST_DAYS = 3650.0


@dataclass(frozen=True)
class _Key:
    default: str
    help: str
    check: Callable[[str], object]


def _pool_size(text: str) -> int | None:
    """None: adaptive. Raises ValueError."""
    if text == "auto":
        return None
    size = int(text)
    if not 0 <= size <= _MOST_POOLED:
        raise ValueError(f"0 to {_MOST_POOLED}, or auto")
    return size


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("on or off")
    return text == "on"


def _size(text: str) -> int:
    number, unit = text.rstrip("kmgtKMGT"), text[len(text.rstrip("kmgtKMGT")) :].lower()
    if not math.isfinite(size := float(number) * _UNITS[unit]) or size < 0:
        raise ValueError("a number of bytes, such as 8G")
    return int(size)


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days <= _MOST_DAYS:
        raise ValueError(f"0 to {_MOST_DAYS:g} days")
    return days


_KEYS = {
    "pool.size": _Key("0", "warm VMs kept ready for `create`: a number, or auto (as many as were wanted lately)",
                      _pool_size),
    "sync.auto": _Key("on", "bring what sandboxes write to the host at once: on; off: at `limpet sync` and `stop`",
                      _switch),
    "template.auto": _Key("on", "build a template in the background when a create finds none: on or off", _switch),
    "template.cache": _Key("8G", "bytes that templates may take of the disk; the least recently used go first", _size),
    "trash.days": _Key("7", "days for which a removed sandbox can be brought back; 0: `rm` deletes at once", _days),
}  # fmt: skip


class Config:
    """Settings by key. `changed` is called after every change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.changed: Callable[[], None] = lambda: None

    async def list(self) -> Sequence[Setting]:
        return [self._setting(key) for key in _KEYS]

    async def set(self, key: str, value: str | None) -> Setting:
        """Change a setting (None: back to its default). Raises NotFound, BadRequest."""
        if key not in _KEYS:
            raise NotFound(f"no setting {key!r}", hint=nearest(key, _KEYS) or f"there are: {', '.join(_KEYS)}")
        if value is not None:
            try:
                _KEYS[key].check(value)
            except (ValueError, KeyError):
                raise BadRequest(f"{value!r} is no value of {key}", hint=_KEYS[key].help) from None
        self._store.save_setting(key, value)
        self.changed()
        return self._setting(key)

    def _setting(self, key: str) -> Setting:
        return Setting(key=key, value=self._value(key), default=_KEYS[key].default, help=_KEYS[key].help)

    def _value(self, key: str) -> str:
        return self._store.settings().get(key, _KEYS[key].default)

    @property
    def pool_size(self) -> int | None:
        """How many pooled VMs are wanted; None: adaptive."""
        return _pool_size(self._value("pool.size"))

    @property
    def sync_auto(self) -> bool:
        """Whether sandboxes are synced by themselves."""
        return _switch(self._value("sync.auto"))

    @property
    def template_auto(self) -> bool:
        """Whether a template is built when one is missed."""
        return _switch(self._value("template.auto"))

    @property
    def template_bytes(self) -> int:
        """How much of the disk templates may take."""
        return _size(self._value("template.cache"))

    @property
    def trash_days(self) -> float:
        """How long the trash keeps what was removed."""
        return _days(self._value("trash.days"))
