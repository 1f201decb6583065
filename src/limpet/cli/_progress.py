"""Stages of long operations on stderr: live on a terminal, else one line for each that took its time."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from limpet.cli import _output

if TYPE_CHECKING:
    from limpet.models import Stage

_WORTH_TELLING = 1.0  # seconds


class Progress:
    """Pass it as `on_stage`. Nothing is shown when `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Any = None
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: Stage) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._show(stage)
        elif stage.state != "running" and (stage.state != "done" or (stage.seconds or 0) >= _WORTH_TELLING):
            _output.note(_line(stage))

    def _show(self, stage: Stage) -> None:
        if self._live is None:
            self._live = _rich_progress()
            self._live.start()
        if stage.name not in self._tasks:
            self._tasks[stage.name] = self._live.add_task(stage.name, total=None, detail="")
        task, detail = self._tasks[stage.name], _output.printable(stage.detail or "")
        self._live.update(task, detail=detail, visible=stage.state != "done")
        if stage.fraction is not None:
            self._live.update(task, total=1.0, completed=stage.fraction)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _line(stage: Stage) -> str:
    words = [f"{stage.name}: {stage.state}"]
    if stage.seconds is not None:
        words.append(f"in {stage.seconds:.1f} s")
    if stage.detail:
        words.append(f"({stage.detail})")
    return " ".join(words)


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
