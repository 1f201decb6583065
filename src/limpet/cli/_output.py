"""Data to stdout, everything else to stderr; tables on a terminal and plain columns in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from limpet.errors import BadRequest, LimpetError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from limpet.models import ImageInfo, PruneResult, VerifyResult


class UnknownCommand(BadRequest):
    """The first word is no command."""


def printable(text: str) -> str:
    """`text` with control characters spelled out: names come from guests and must not steer the terminal."""
    return "".join(c if c.isprintable() or 0xDC80 <= ord(c) <= 0xDCFF else f"\\x{ord(c):02x}" for c in text)


def note(text: str) -> None:
    """A line for the person, on stderr."""
    print("\n".join(printable(line) for line in text.split("\n")), file=sys.stderr, flush=True)


def warn(message: str, hint: str | None = None) -> None:
    note(f"warning: {message}")
    if hint:
        note(f"hint: {hint}")


def error(problem: LimpetError, about: str = "") -> None:
    """An error, what to do about it and the operation to search the logs for."""
    note(f"error: {about}{problem.message}")
    if problem.hint:
        note(f"hint: {problem.hint}")
    if problem.op_id:
        note(f"({problem.op_id})")


def data_of(value: BaseModel | Sequence[BaseModel] | dict[str, Any] | Sequence[dict[str, Any]]) -> Any:
    """Models as plain data."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Sequence):
        return [data_of(item) for item in value]
    return value.model_dump()  # not mode="json", which refuses file names that are not UTF-8


def emit(
    value: BaseModel | Sequence[BaseModel] | dict[str, Any] | Sequence[dict[str, Any]], indent: int | None = 2
) -> None:
    """One JSON document on stdout; `indent=None`: on one line, as streams want it."""
    print(json.dumps(data_of(value), indent=indent, default=_default), flush=True)


def _default(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows on stdout: a table on a terminal, aligned columns in a pipe."""
    cells = [[printable("-" if cell is None or cell == "" else str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(headers, cells)
        return
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    for row in [list(headers), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rich_table(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        view.add_column(header, overflow="fold")
    for row in cells:
        view.add_row(*(Text(cell) for cell in row))
    Console().print(view)


def verdict(result: VerifyResult, *, json: bool) -> int:
    """What a verification found: good news and data to stdout, problems to stderr; the exit code."""
    if json:
        emit(result)
    elif result.ok:
        print(f"{result.id}: ok" + (", boots" if result.booted else ""))
    for problem in () if json else result.problems:
        note(f"error: {problem}")
    return 0 if result.ok else 1


def pruned(result: PruneResult, *, json: bool, quiet: bool, dry_run: bool = False) -> int:
    """What was (or with `dry_run` would be) removed; the exit code."""
    if json:
        emit(result)
        return 0
    for item in result.removed:
        print(printable(item))
    if not quiet:
        note(f"{size(result.freed)} {'would be freed' if dry_run else 'freed'}")
    return 0


def image_name(info: ImageInfo) -> str:
    """`NAME`, or `NAME:TAG` unless the tag is what no tag means."""
    return info.name if info.tag == "latest" else f"{info.name}:{info.tag}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """A time span for people, two units at most."""
    whole = int(max(seconds, 0))
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length}{unit}" + (f"{rest}{smaller}" if (rest := whole % length // part) else "")
    return f"{whole}s"


def when(moment: datetime) -> str:
    """A time on this machine's clock, to the second."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def ago(moment: datetime) -> str:
    """How long ago a time was, for people."""
    return f"{duration((datetime.now(UTC) - moment).total_seconds())} ago"
