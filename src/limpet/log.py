"""Structured logs, and the operation id that every line, error and guest request of one request shares."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from limpet.names import new_id

_op_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("op_id", default=None)


def current_op() -> str | None:
    """The id of the operation that is running in this context, `op_…`."""
    return _op_id.get()


@contextlib.contextmanager
def operation(op_id: str | None = None) -> Iterator[str]:
    """Run a block under an operation id (a new one unless given)."""
    value = op_id or new_id("op")
    token = _op_id.set(value)
    try:
        yield value
    finally:
        _op_id.reset(token)


def _add_op(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if (op := _op_id.get()) is not None:
        event.setdefault("op_id", op)
    return event


def configure(path: Path, level: str = "info") -> None:
    """Send JSON lines to `path`, rotated at 4 MiB, three old files kept."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=4 << 20, backupCount=3, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("limpet").setLevel(level.upper())
    structlog.configure(
        processors=[
            _add_op,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def get(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one area, for example `get("vmm")`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(f"limpet.{name}")
    return logger
