"""Whatever is done to a sandbox in whatever order, and whoever is killed in between, it is what a model of it says (D1,
D3, D5, D7, D8)."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from limpet.client import Sandbox
from limpet.models import State
from tests.crash.counting import COUNT, Loss
from tests.crash.world import SHAPE, TOKEN, World, until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200 if os.environ.get("LIMPET_TEST_CRASH") == "all" else 240)]

EXAMPLES, STEPS = (6, 40) if os.environ.get("LIMPET_TEST_CRASH") == "all" else (1, 14)
_MEMORY = "/dev/shm/token"


class Life(RuleBasedStateMachine):
    """One sandbox and its model: what is on its disk and in its memory, its checkpoints, its generations."""

    world: ClassVar[World]
    made: ClassVar[int] = 0

    @initialize()
    def create(self) -> None:
        Life.made += 1
        self.name = f"life{Life.made}"
        self.box: Sandbox = self.world.client.sandboxes.create(self.name, **SHAPE)
        self.running, self.trashed = True, False
        self.written = 0
        self.disk, self.memory = "none", "none"
        self.checkpoints: dict[str, tuple[str, str]] = {}
        self.undone: str | None = None  # the checkpoint that `undo` goes back to, where that is beyond doubt
        self.generations: dict[int, str] = {}
        self.write()

    def teardown(self) -> None:
        if self.trashed:
            self.world.client.trash.empty(self.name)
        else:
            self.box.remove(force=True, purge=True)

    def _running(self) -> bool:
        return self.running and not self.trashed

    def _there(self) -> bool:
        return not self.trashed

    # ── what its user does ───────────────────────────────────────────────────────────────────────────────────────

    @precondition(_running)
    @rule()
    def write(self) -> None:
        self.written += 1
        self.disk = self.memory = f"{self.name}-{self.written}"
        self.box.exec(f"echo {self.disk} > {TOKEN}; echo {self.disk} > {_MEMORY}; sync").check()

    @precondition(_running)
    @rule()
    def checkpoint(self) -> None:
        self.undone = self.box.checkpoint().id
        self.checkpoints[self.undone] = self.disk, self.memory

    @precondition(lambda self: self._running() and self.undone is not None)
    @rule()
    def undo(self) -> None:
        self.box.undo()
        self._went_back(self.undone)

    @precondition(lambda self: self._there() and self.checkpoints)
    @rule(choice=st.randoms(use_true_random=False))
    def restore_checkpoint(self, choice: object) -> None:
        chosen = choice.choice(sorted(self.checkpoints))  # type: ignore[attr-defined]
        self.box.restore(chosen, force=True)
        self.running = self.box.refresh().state == State.RUNNING
        self._went_back(chosen)

    def _went_back(self, chosen: str | None) -> None:
        assert chosen is not None
        self.disk, memory = self.checkpoints[chosen]
        self.memory, self.undone = memory if self.running else "none", None

    @precondition(_running)
    @rule()
    def sync(self) -> None:
        generation = self.box.sync().generation
        assert generation is not None
        self.generations[generation] = self.disk

    @precondition(_running)
    @rule()
    def stop(self) -> None:
        self.box.stop()
        self.running, self.memory = False, "none"

    @precondition(lambda self: self._there() and not self.running)
    @rule()
    def start(self) -> None:
        self.box.wake()
        self.running = True

    @precondition(_there)
    @rule()
    def remove(self) -> None:
        self.box.remove(force=True)
        self.running, self.trashed, self.memory = False, True, "none"

    @precondition(lambda self: self.trashed)
    @rule()
    def undelete(self) -> None:
        self.box = self.world.client.trash.undelete(self.name)
        self.trashed = False

    # ── what happens to it ───────────────────────────────────────────────────────────────────────────────────────

    @precondition(_running)
    @rule()
    def kill_machine(self) -> None:
        pid = self.box.refresh().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.box.refresh().state in (State.ERROR, State.STOPPED), 10, "nobody noticed that the VM died")
        self.running, self.memory = False, "none"
        COUNT.faults += 1

    @rule()
    def kill_daemon(self) -> None:
        self.world.kill_daemon()
        self.world.recover()
        COUNT.faults += 1

    # ── what must be true ────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def is_what_the_model_says(self) -> None:
        COUNT.states += 1
        names = {sandbox.name for sandbox in self.world.client.sandboxes.list()}
        self._demand((self.name in names) == (not self.trashed), f"there are {names}")
        if self._running():
            said = self.box.exec(f"cat {TOKEN}; cat {_MEMORY} 2>/dev/null || echo none").check().text.split()
            self._demand(said == [self.disk, self.memory], f"{said}, not {[self.disk, self.memory]}")
        vault = self.world.client.vaults.of(self.name)
        for generation, content in list(self.generations.items())[-2:]:
            found = vault.read(TOKEN, at=generation)
            self._demand(found == f"{content}\n".encode(), f"generation {generation} has {found!r}, not {content!r}")

    @precondition(lambda self: self.generations)
    @rule()
    def restore_from_the_vault(self) -> None:
        """Whatever became of the sandbox."""
        target = self.world.home / "restored"
        for generation, content in self.generations.items():
            shutil.rmtree(target, ignore_errors=True)
            self.world.client.vaults.of(self.name).restore(TOKEN, at=generation, to=target)
            found = (target / Path(TOKEN).name).read_text()
            self._demand(found == f"{content}\n", f"restored from generation {generation}: {found!r}, not {content!r}")

    def _demand(self, condition: bool, complaint: str) -> None:
        if not condition:
            COUNT.losses.append(complaint)
            raise Loss(complaint)


def test_a_sandbox_is_what_a_model_of_it_says(world: World) -> None:
    """D1, D3, D5, D7, D8: the same steps each time."""
    Life.world = world
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
