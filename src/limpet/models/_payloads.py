"""Payloads: host directories that a guest directory is kept in step with. Their state is in `_durability`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from limpet.models._base import Model, Request


class Payload(Model):
    """A host directory kept in step with a guest directory. `interval`: the least seconds between two publications."""

    id: str  # pl_…
    host_dir: str  # absolute, resolved
    guest_dir: str  # absolute
    interval: Annotated[float, Field(gt=0, le=3600)] = 1.0


class PayloadRequest(Request):
    """POST …/payloads, and in a CreateRequest."""

    host_dir: str
    guest_dir: str
    interval: Annotated[float, Field(gt=0, le=3600)] = 1.0
