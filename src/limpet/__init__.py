"""limpet: persistent microVM sandboxes for coding agents.

>>> from limpet import Client
>>> with Client() as c, c.sandboxes.create(image="base", ephemeral=True) as s:
...     print(s.exec(["echo", "hi"]).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limpet.version import PROTOCOL, __version__

if TYPE_CHECKING:
    from limpet.client import AsyncClient, Client

__all__ = ["PROTOCOL", "AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the SDK on first use: the daemon and `limpet --help` do without it."""
    if name in ("Client", "AsyncClient"):
        from limpet import client

        return getattr(client, name)
    raise AttributeError(f"module 'limpet' has no attribute {name!r}")
