"""The SDK: `Client` and `AsyncClient`, the same surface twice. It reaches the daemon over its Unix socket only.

>>> from limpet.client import Client
>>> with Client() as c, c.sandboxes.create(ephemeral=True) as s:
...     s.exec("echo hi").text
'hi\\n'

The asynchronous half (`_async/`) is written by hand; `tools/unasync.py` makes the synchronous one (`_sync/`) from it.
Names are loaded when first used: starting a command must not pay for what it does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpet.client._async.client import AsyncClient
    from limpet.client._async.exec import AsyncExec, AsyncExecHandle
    from limpet.client._async.sandbox import AsyncSandbox
    from limpet.client._results import Chunk, ExecFailed, ExecResult
    from limpet.client._sync.client import Client
    from limpet.client._sync.exec import Exec, ExecHandle
    from limpet.client._sync.sandbox import Sandbox

_HOMES = {
    "AsyncClient": "_async.client", "AsyncExec": "_async.exec", "AsyncExecHandle": "_async.exec",
    "AsyncSandbox": "_async.sandbox", "Client": "_sync.client", "Exec": "_sync.exec", "ExecHandle": "_sync.exec",
    "Sandbox": "_sync.sandbox", "Chunk": "_results", "ExecFailed": "_results", "ExecResult": "_results",
}  # fmt: skip

__all__ = [
    "AsyncClient", "AsyncExec", "AsyncExecHandle", "AsyncSandbox", "Chunk", "Client", "Exec", "ExecFailed",
    "ExecHandle", "ExecResult", "Sandbox",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limpet.client' has no attribute {name!r}")
    return getattr(importlib.import_module(f"limpet.client.{_HOMES[name]}"), name)
