"""Telling how far a long piece of work is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from limpet.images.bootstrap import Report
from limpet.models import Stage

Progress = Callable[[Stage], None]


@contextlib.contextmanager
def stage(name: str, progress: Progress) -> Iterator[Report]:
    """Tell the beginning, the progress and the end of a step."""
    started = time.monotonic()
    progress(Stage(name=name, state="running", fraction=0.0))
    try:
        yield lambda fraction, detail: progress(
            Stage(name=name, state="running", fraction=fraction, detail=detail, seconds=time.monotonic() - started)
        )
    except BaseException as error:
        progress(Stage(name=name, state="failed", detail=str(error), seconds=time.monotonic() - started))
        raise
    progress(Stage(name=name, state="done", fraction=1.0, seconds=time.monotonic() - started))
