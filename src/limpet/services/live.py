"""The VMs that run now: their machine, the channel into their guest, and what hangs on it.

This is the "what is true now" half of the state (VM-9). It is rebuilt from the live system at every daemon start and
mirrored to `handles.json`; what a sandbox is *meant* to be lives in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from limpet import durable, log
from limpet.crashpoint import crashpoint
from limpet.errors import DeadlineExceeded, FailedPrecondition, InsufficientSpace, LimpetError, Unavailable
from limpet.guest import Agent, Channel
from limpet.paths import SandboxPaths
from limpet.vmm.death import Death, explain_death
from limpet.vmm.machine import Machine

REACH_TIMEOUT = 5.0  # seconds to reach the agent of a running VM (VM-2)
_PATIENCE = 15.0  # seconds that commands and files wait for it: an agent that died is back within a few
_RETRY = 0.1

T = TypeVar("T")
_log = log.get("live")


@dataclass(frozen=True)
class Stall:
    """Why a machine stands still that nobody paused (see diskfull.py). `full`: it goes on when there is space."""

    message: str
    full: bool

    def error(self) -> LimpetError:
        kind = InsufficientSpace if self.full else FailedPrecondition
        return kind(self.message, hint="free some space" if self.full else "limpet resume NAME tries again")


class LiveVM:
    """One running VM. `agent()` gives a connected agent and reconnects when the channel was lost."""

    def __init__(self, sandbox_id: str, machine: Machine, files: SandboxPaths) -> None:
        self.sandbox_id = sandbox_id
        self.machine = machine
        self.files = files
        self.started = time.monotonic()
        self.ended_by_us = False  # a stop or kill is under way: the watcher need not explain the death
        self.watcher: asyncio.Task[None] | None = None
        self.exit_status: int | None = None
        self.stall: Stall | None = None  # while its machine stands still because of its disk
        self.stalled = asyncio.Event()  # the same as an event
        self.disk_watch: asyncio.Task[None] | None = None
        self._busy = 0
        self._idle_since = time.monotonic()
        self._clock: asyncio.Task[None] | None = None
        self._agent: Agent | None = None
        self._connecting = asyncio.Lock()

    async def agent(self, timeout: float = REACH_TIMEOUT) -> Agent:
        """A connected agent. Raises Unavailable when the guest does not answer within `timeout` seconds, and at once
        what is wrong when its machine stands still."""
        if self.stall is not None:
            raise self.stall.error()
        if self._agent is not None and not self._agent.channel.closed.is_set():
            return self._agent
        try:
            async with asyncio.timeout(timeout), self._connecting:
                return await self._connect(timeout)
        except TimeoutError:
            raise Unavailable(
                f"the guest's agent did not answer within {timeout:g} s",
                hint="see `limpet logs NAME`; `limpet restart --force NAME` boots it again",
            ) from None

    async def _connect(self, timeout: float) -> Agent:
        if self._agent is not None:
            if not self._agent.channel.closed.is_set():
                return self._agent
            await self._agent.channel.close()
            self._agent = None
        while True:
            try:  # at least twice: the first greeting may get lost in what an earlier daemon was cut off in
                channel = await Channel.connect(
                    self.files.channel, intake=self.files.intake, timeout=timeout, attempt=timeout / 2
                )
                self._agent = Agent(channel)
                return self._agent
            except (OSError, LimpetError) as error:
                if not self.machine.alive():
                    raise Unavailable("the VM is not running any more", hint="limpet start NAME") from error
                await asyncio.sleep(_RETRY)

    async def hang_up(self) -> None:
        """Close the channel: whoever needs the guest next connects anew."""
        if self._agent is not None:
            await self._agent.channel.close()

    def stands_still(self, stall: Stall) -> None:
        """Its machine has stopped at a write that failed."""
        self.stall = stall
        self.stalled.set()

    def goes_on(self) -> None:
        """Its machine runs, or is paused by whoever wanted it so."""
        self.stall = None
        self.stalled.clear()

    async def run(self) -> None:
        """Let the vCPUs run; what a disk could not take is tried again. Raises when QEMU cannot be asked."""
        crashpoint("resume.cont.before")
        await self.machine.qmp("cont", timeout=30)
        crashpoint("resume.cont.after")

    async def unless_stalled(self, question: Coroutine[Any, Any, T]) -> T:
        """What the guest answers; raises what is wrong as soon as its machine stands still: it would never answer."""
        asked, stalled = asyncio.ensure_future(question), asyncio.ensure_future(self.stalled.wait())
        try:
            await asyncio.wait((asked, stalled), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done() and self.stall is not None:
                raise self.stall.error()
            return await asked
        finally:
            for task in (asked, stalled):
                task.cancel()
            await asyncio.gather(asked, stalled, return_exceptions=True)

    async def ended(self, timeout: float | None = None) -> bool:
        """Wait until QEMU has ended, at most `timeout` seconds; whether it has."""
        try:
            self.exit_status = await self.machine.wait(timeout)
        except DeadlineExceeded:
            return False
        return True

    def explain_death(self) -> Death:
        """Why QEMU ended, as far as logs and exit status tell."""
        return explain_death(
            console_log=self.files.console_log, qemu_log=self.files.qemu_log, pid=self.machine.pid,
            status=self.exit_status,
        )  # fmt: skip

    async def close(self) -> None:
        """Let go of the channel; the VM goes on."""
        for task in (self._clock, self.disk_watch):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._agent is not None:
            await self._agent.channel.close()
            self._agent = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Count a command or transfer: while one runs the VM is not idle."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._idle_since = time.monotonic()

    def began(self) -> None:
        """Its time counts from now: it has become somebody's."""
        self.started = self._idle_since = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """How long nothing has used this VM through limpet."""
        return 0.0 if self._busy else time.monotonic() - self._idle_since

    def set_clock_soon(self) -> None:
        """Set the guest's clock in the background: it stood still for a moment."""
        self._clock = asyncio.create_task(self._set_clock(), name=f"clock of {self.sandbox_id}")

    async def _set_clock(self) -> None:
        with contextlib.suppress(LimpetError):
            await (await self.agent()).check_clock()

    def save_handles(self) -> None:
        """Mirror what is true now to handles.json, for the next daemon."""
        durable.replace_file(self.files.handles, json.dumps(self.machine.handles(), indent=1).encode())


def load_handles(files: SandboxPaths) -> dict[str, Any] | None:
    """handles.json, or None when it is missing or unreadable: then the live system is asked."""
    try:
        found = json.loads(files.handles.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class LiveTable:
    """All running VMs by sandbox id."""

    def __init__(self) -> None:
        self._vms: dict[str, LiveVM] = {}

    def __iter__(self) -> Iterator[LiveVM]:
        return iter(list(self._vms.values()))

    def __len__(self) -> int:
        return len(self._vms)

    def add(self, vm: LiveVM) -> None:
        self._vms[vm.sandbox_id] = vm

    def drop(self, sandbox_id: str) -> LiveVM | None:
        return self._vms.pop(sandbox_id, None)

    def get(self, sandbox_id: str) -> LiveVM | None:
        return self._vms.get(sandbox_id)

    def require(self, sandbox_id: str, name: str) -> LiveVM:
        """The VM of a sandbox; raises FailedPrecondition when it does not run."""
        if (vm := self._vms.get(sandbox_id)) is None:
            raise FailedPrecondition(f"{name} is not running", hint=f"limpet start {name}")
        return vm

    @contextlib.asynccontextmanager
    async def guest(self, sandbox_id: str, name: str) -> AsyncIterator[Agent]:
        """The agent of a running sandbox, counted as in use for the length of the block."""
        vm = self.require(sandbox_id, name)
        with vm.in_use():
            yield await vm.agent(_PATIENCE)
