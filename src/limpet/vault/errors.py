"""What can be wrong with a vault or with what a guest sends to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from limpet.errors import BadRequest, FailedPrecondition

T = TypeVar("T")


class BadStream(BadRequest):
    """A guest's stream that is malformed, or that does not fit the tree it claims to change."""


class Damaged(FailedPrecondition):
    """Something in the vault is not what was written. The message names the file and the object."""


def unless_damaged(look: Callable[[], T]) -> T | None:
    """What `look` finds in an earlier generation, which is only there to save space: nothing where that is damaged."""
    try:
        return look()
    except Damaged:
        return None
