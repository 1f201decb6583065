"""Run steps of real code with the recorder on, then open every disk that a power loss within the last one may leave.

    prove(workload, check)      check(directory, acked, begun)

`check` opens the directory with the real code and raises when it is not exactly what it was after `acked` or `begun`
steps (the same number when no step was under way: what was acknowledged is there). Earlier steps are cut off in the
workloads that end with them.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limpet import durable
from limpet.durable import Op
from tests.crash.counting import COUNT, Loss
from tests.crash.simulator import Disk, State

Check = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class Workload:
    """`setup` fills an empty directory, durably; each step changes it. `omit`: what the disk is not told of, kinds of
    effects that a broken program would leave out."""

    setup: Callable[[Path], object]
    steps: tuple[tuple[str, Callable[[Path], object]], ...]
    omit: Collection[str] = ()

    def __str__(self) -> str:
        return " → ".join(name for name, _ in self.steps) or "nothing"


@dataclass
class Proof:
    """What was looked at. `learned`: what the steps did behind the recorder's back."""

    states: int
    learned: list[str]


def prove(
    workload: Workload, check: Check, *, limit: int = 64, seed: int = 0,
    recover: Callable[[Path], object] | None = None, again: float = 0.0,
) -> Proof:  # fmt: skip
    """Raises Loss with the state that is illegal. `recover`: what a start does to what it finds; for one in 1/`again`
    states it is cut off, too."""
    choice = random.Random(seed)
    with _scratch() as scratch:
        disk, ops, begin = _run(workload, scratch / "run")
        last, tried = len(workload.steps), 0
        for state in _crashes(disk, ops, begin, limit, choice):
            acked = last if state.after == len(ops) else last - 1
            _demand(workload, state, check, scratch / "state", acked, last)
            tried += 1
            if recover is not None and choice.random() < again:
                for second in _cut_off(recover, state, scratch / "cut", choice):
                    _demand(workload, second, check, scratch / "state", acked, last)
                    tried += 1
    COUNT.simulated += tried
    return Proof(tried, disk.learned)


def _run(workload: Workload, directory: Path) -> tuple[Disk, list[Op], int]:
    """The disk as it was before, all effects, and how many came before the last step."""
    directory.mkdir()
    workload.setup(directory)
    disk = Disk(directory)
    begin = 0
    with durable.recording() as ops:
        for _, step in workload.steps:
            begin = len(ops)
            step(directory)
    left_out = sum(op.kind in workload.omit for op in ops[:begin])
    return disk, [op for op in ops if op.kind not in workload.omit], begin - left_out


def _crashes(disk: Disk, ops: list[Op], begin: int, limit: int, choice: random.Random) -> Iterator[State]:
    """Every state after a crash within the last step, and right after it, each once."""
    seen: set[object] = set()
    for count in range(len(ops) + 1):
        if count:
            disk.apply(ops[count - 1])
        if count >= begin:
            for state in disk.states(count, limit, choice):
                if (key := (state.key, count == len(ops))) not in seen:
                    seen.add(key)
                    yield state


def _cut_off(recover: Callable[[Path], object], state: State, directory: Path, choice: random.Random) -> list[State]:
    """Some of the states that a crash within the recovery from a state may leave."""
    state.materialize(directory)
    disk = Disk(directory)
    with durable.recording() as ops:
        recover(directory)
    shutil.rmtree(directory)
    return list(_crashes(disk, ops, 0, 4, choice))


def _demand(workload: Workload, state: State, check: Check, directory: Path, acked: int, begun: int) -> None:
    state.materialize(directory)
    try:
        check(directory, acked, begun)
    except Exception as error:
        COUNT.losses.append(complaint := f"{workload}; {state}: {error!r}")
        raise Loss(complaint) from error
    finally:
        shutil.rmtree(directory)


@contextmanager
def _scratch() -> Iterator[Path]:
    """In memory where that is possible: what a disk would do is simulated."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="limpet-prove-", dir=memory if memory.is_dir() else None))
    try:
        yield made
    finally:
        shutil.rmtree(made)
