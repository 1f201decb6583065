"""What all of the crash suite did in one session, for its last line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class Loss(AssertionError):
    """Something that was promised is not there, or something is there that should not be."""


@dataclass
class Count:
    """`faults`: injected into real processes and files; `states`: worlds and disks that were looked at after one;
    `simulated`: disks after a power loss that the simulator made; `controls`: broken on purpose, and noticed."""

    faults: int = 0
    states: int = 0
    simulated: int = 0
    controls: int = 0
    losses: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"crash suite: {self.faults} faults injected, {self.states} states checked, "
            f"{self.simulated} power losses simulated, {self.controls} controls noticed, {len(self.losses)} losses"
        )


COUNT = Count()


@contextlib.contextmanager
def noticed(complaint: str = "") -> Iterator[None]:
    """A negative control: the block, in which something is broken on purpose, must end with a Loss that says
    `complaint` (a pattern)."""
    known = len(COUNT.losses)
    try:
        yield
    except Loss as loss:
        if not re.search(complaint, str(loss)):
            raise
        del COUNT.losses[known:]
        COUNT.controls += 1
    else:
        raise AssertionError("what was broken on purpose was not noticed")
