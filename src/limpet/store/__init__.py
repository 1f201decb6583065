"""The durable half of the state: what every sandbox is, events and operations, in SQLite. `Store` is the door."""

from limpet.store._backup import back_up
from limpet.store._records import SandboxChanges, SandboxRecord
from limpet.store._store import Store

__all__ = ["SandboxChanges", "SandboxRecord", "Store", "back_up"]
