"""Instants as users write them: a generation's number, a time, or how long ago."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from limpet.errors import BadRequest

HINT = "a generation's number (12), a time (2026-01-31T12:00, 12:00:30) or how long ago (90s, 10m, 2h, 1d)"
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhd])", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_CLOCK = re.compile(r"\d\d:\d\d(:\d\d)?", re.ASCII)


def parse(text: str, now: datetime) -> int | datetime:
    """A number, or a time with its zone. What has no zone, and a clock's time (the last one that passed), is meant in
    that of `now`. Raises BadRequest."""
    if _NUMBER.fullmatch(text):
        return int(text)
    try:
        if ago := _AGO.fullmatch(text):
            return now - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        if _CLOCK.fullmatch(text):
            today = datetime.combine(now.date(), datetime.strptime(text + ":00"[: 8 - len(text)], "%H:%M:%S").time())
            moment = today.replace(tzinfo=now.tzinfo)
            return moment if moment <= now else moment - timedelta(days=1)
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=now.tzinfo)
    except (ValueError, OverflowError):
        raise BadRequest(f"{text!r} is neither a generation nor a time", hint=HINT) from None
