"""Which of the checkpoints that `--every-exec` makes are kept: the newest ones all, older ones thinned out.

the newest 20 · of the last day one an hour · of the last 30 days one a day
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from limpet.models import CheckpointInfo

NEWEST = 20
HOURS = 24
DAYS = 30


def superfluous(checkpoints: Sequence[CheckpointInfo], now: datetime) -> list[CheckpointInfo]:
    """Of checkpoints in the order of their making, those that the ladder does not keep."""
    kept: set[str] = {checkpoint.id for checkpoint in checkpoints[-NEWEST:]}
    for step, count, unit in (("%Y-%m-%d %H", HOURS, timedelta(hours=1)), ("%Y-%m-%d", DAYS, timedelta(days=1))):
        slots: dict[str, str] = {}
        for checkpoint in checkpoints:
            if now - checkpoint.created_at <= count * unit:
                slots[checkpoint.created_at.strftime(step)] = checkpoint.id  # the last of each slot
        kept |= set(slots.values())
    return [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept]
