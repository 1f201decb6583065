"""Thinning out: of what was made a while ago, one an hour for a day and one a day for a month are kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from datetime import datetime, timedelta
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

HOURS = 24
DAYS = 30


def rungs(made: Iterable[tuple[Key, datetime]], now: datetime) -> set[Key]:
    """Of things with the times at which they were made, in that order: the last one of each hour of the last 24, and of
    each day of the last 30."""
    ages = list(made)
    kept: set[Key] = set()
    for step, span in (("%Y-%m-%d %H", timedelta(hours=HOURS)), ("%Y-%m-%d", timedelta(days=DAYS))):
        kept |= set({when.strftime(step): key for key, when in ages if now - when <= span}.values())
    return kept
