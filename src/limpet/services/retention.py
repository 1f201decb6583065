"""Which of the checkpoints that `--every-exec` makes are kept: the newest ones all, older ones thinned out.

the newest 20 · of the last day one an hour · of the last 30 days one a day
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from limpet.ladder import rungs
from limpet.models import CheckpointInfo

NEWEST = 20


def superfluous(checkpoints: Sequence[CheckpointInfo], now: datetime) -> list[CheckpointInfo]:
    """Of checkpoints in the order of their making, those that the ladder does not keep."""
    kept = {checkpoint.id for checkpoint in checkpoints[-NEWEST:]}
    kept |= rungs(((checkpoint.id, checkpoint.created_at) for checkpoint in checkpoints), now)
    return [checkpoint for checkpoint in checkpoints if checkpoint.id not in kept]
