"""One running QEMU: launched or adopted, talked to, measured, ended.

    launch:  kernel → lock vm.lock → listen on both sockets → gate, passt → QEMU, which inherits it all → QMP greeting
    adopt:   vm.lock held? → same process (pid and start time)? → QMP greeting, same uuid?

A crash of ours between any two steps of `launch` leaves at most stale socket files: whatever QEMU did not inherit the
kernel closes with us, and what it did inherit makes it adoptable. QEMU is not our child in any way that matters: it
has its own session, and nothing of it ends with the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from limpet import log, process
from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, DeadlineExceeded, FailedPrecondition, LimpetError, Unavailable
from limpet.process import ProcessRef
from limpet.vmm import kernel, lock, network
from limpet.vmm.command import Accel, Descriptors, MachineSpec, command_line
from limpet.vmm.death import launch_error, mark_start
from limpet.vmm.handles import Handles
from limpet.vmm.lock import gone
from limpet.vmm.qmp import Control, MachineEvent
from limpet.vmm.stats import MachineStats, Meter

GREETING_S = 15.0  # QEMU greets within 100 ms; a host that swaps may need longer
_HELPER_S = 2.0
_LOAD_POLL_S = 0.001
Rung = Literal["quit", "sigterm", "sigkill"]

_log = log.get("vmm")


class Machine:
    """A running virtual machine. Make one with `launch` or `adopt`; `close` forgets it and leaves it running."""

    def __init__(self, handles: Handles, control: Control, children: tuple[process.Child, ...] = ()) -> None:
        self._handles = handles
        self._control = control
        self._meter = Meter(handles.qemu, handles.helpers)
        self._children = children  # QEMU first; empty when adopted

    @classmethod
    async def launch(cls, spec: MachineSpec, *, timeout: float = GREETING_S) -> Machine:
        """Start QEMU for `spec` and wait up to `timeout` seconds for its greeting; the guest boots from then on. With
        a memory image it stands still, with its memory loaded, until `cont`.

        Raises Busy when this machine runs already, Unavailable when a tool is missing or QEMU ends or stays silent,
        FailedPrecondition when it refuses the disks, the memory or the accelerator. On failure nothing is left."""
        mark_start(spec.console_log)
        log_start = mark_start(spec.qemu_log)
        async with _beginning(spec) as kernel_fd:
            with lock.taken(spec.lock) as lock_fd:
                children, handles = _spawn(spec, lock_fd, kernel_fd)
            try:
                crashpoint("launch.spawn.after")
                control = await _first_greeting(spec.qmp_socket, handles.qemu, timeout)
                if spec.memory is not None:
                    await _loaded(control, timeout)
                _require_network(children)
            except BaseException as error:
                status = await asyncio.shield(_destroy(children))
                if isinstance(error, LimpetError):
                    raise launch_error(error, status, spec.qemu_log, log_start) from error
                raise
        _log.info("machine launched", machine=spec.name, pid=handles.qemu.pid, accel=spec.accel)
        return cls(handles, control, children)

    @classmethod
    async def adopt(cls, record: Mapping[str, object], *, timeout: float = 5.0) -> Machine | None:
        """The running machine that `record` (an earlier `handles()`) describes, or None when it runs no more.

        Raises BadRequest for a record that makes no sense, Unavailable when the lock is held but the process is
        another one than recorded, or does not answer: then it is not ours to touch."""
        handles = Handles.from_dict(record)
        if not lock.held(handles.lock):
            return None
        if not handles.qemu.alive():
            raise Unavailable(
                f"{handles.lock} is held, but not by process {handles.qemu.pid}",
                hint="find the holder with: limpet doctor",
            )
        control = await Control.connect(handles.qmp_socket, timeout=timeout)
        try:
            found = (await control.execute("query-uuid", timeout=timeout))["UUID"]
            if found != handles.uuid:
                raise Unavailable(f"the machine on {handles.qmp_socket} is {found}, not {handles.uuid}")
            kvm = (await control.execute("query-kvm", timeout=timeout))["enabled"]
        except BaseException:
            await control.close()
            raise
        return cls(replace(handles, accel="kvm" if kvm else "tcg"), control)

    @property
    def name(self) -> str:
        return self._handles.name

    @property
    def uuid(self) -> str:
        return self._handles.uuid

    @property
    def accel(self) -> Accel:
        return self._handles.accel

    @property
    def pid(self) -> int:
        return self._handles.qemu.pid

    @property
    def channel_socket(self) -> Path:
        return self._handles.channel_socket

    def handles(self) -> dict[str, object]:
        """What another process needs to `adopt` this machine, as JSON-able data."""
        return self._handles.to_dict()

    def alive(self) -> bool:
        """Whether this machine runs, asked from the lock that QEMU holds."""
        return lock.held(self._handles.lock)

    async def qmp(self, command: str, *, timeout: float = 5.0, **arguments: object) -> Any:
        """Run a QMP command; arguments whose names have a dash go in as `**{"job-id": …}`. Errors: see `Control`."""
        return await self._control.execute(command, arguments or None, timeout=timeout)

    async def events(self) -> AsyncIterator[MachineEvent]:
        """What QEMU reports from launch or adoption on, until the connection ends. One consumer at a time."""
        async for event in self._control.events():
            yield event

    async def give(self, name: str, fd: int) -> None:
        """Hand QEMU a duplicate of a descriptor, to be named in a later command (QMP getfd)."""
        await self._control.give(name, fd)

    async def run_state(self) -> str:
        """QEMU's run state (qemu-qmp-ref(7), RunState): running, paused, postmigrate, io-error …"""
        return str((await self.qmp("query-status"))["status"])

    async def stats(self) -> MachineStats:
        """What the machine costs the host now. Raises Unavailable when it has ended."""
        return await self._meter.measure(self._control)

    async def quit(self, *, timeout: float = 5.0) -> None:
        """Ask QEMU to flush its disks and end; `wait` says when it has. A machine that is gone already is fine."""
        with contextlib.suppress(Unavailable):
            await self._control.execute("quit", timeout=timeout)

    def terminate(self, signum: int = signal.SIGTERM) -> bool:
        """Signal QEMU; False when it is gone."""
        return self._handles.qemu.send(signum)

    async def wait(self, timeout: float | None = None) -> int | None:
        """Wait until QEMU has ended, at most `timeout` seconds, and reap it. Returns its status (negative: killed by
        that signal), None when it was adopted: the status is its parent's to know. Raises DeadlineExceeded."""
        await gone(self._handles.qemu, timeout)
        await self._control.close()
        for helper in self._handles.helpers:  # they follow at once
            with contextlib.suppress(DeadlineExceeded):
                await gone(helper, _HELPER_S)
        statuses = [child.poll() for child in self._children]
        return statuses[0] if statuses else None

    async def end(self, *, patience: float = 2.0) -> Rung:
        """End the machine without asking the guest: QMP quit, SIGTERM, SIGKILL, `patience` seconds for each.
        Returns the rung that worked. What the guest has not flushed is lost."""
        with contextlib.suppress(DeadlineExceeded):
            await self.quit(timeout=patience)
            await self.wait(patience)
            return "quit"
        self.terminate(signal.SIGTERM)
        with contextlib.suppress(DeadlineExceeded):
            await self.wait(patience)
            return "sigterm"
        self.terminate(signal.SIGKILL)
        await self.wait(10 * patience)
        return "sigkill"

    async def close(self) -> None:
        """Hang up and forget the machine; it runs on and can be adopted."""
        await self._control.close()
        for child in self._children:
            process.disown(child)
        self._children = ()


def _spawn(spec: MachineSpec, lock_fd: int, kernel_fd: int) -> tuple[tuple[process.Child, ...], Handles]:
    with contextlib.ExitStack() as stack:
        qmp_fd = stack.enter_context(_listening(spec.qmp_socket))
        channel_fd = stack.enter_context(_listening(spec.channel_socket))
        link = stack.enter_context(network.connected(spec.network, spec.qemu_log)) if spec.network else None
        inherited = Descriptors(kernel_fd, qmp_fd, channel_fd, link.fd if link else None)
        keep = [lock_fd, kernel_fd, qmp_fd, channel_fd, *([link.fd] if link else [])]
        qemu = process.spawn_detached(command_line(spec, inherited), log=spec.qemu_log, pass_fds=keep)
    helpers = link.helpers if link else ()
    return (qemu, *helpers), Handles.of(spec, _reference(qemu), tuple(map(_reference, helpers)))


def _reference(child: process.Child) -> ProcessRef:
    # A child that has ended already keeps its pid until it is reaped; it just is not alive.
    return process.reference(child.pid) or ProcessRef(child.pid, -1)


@contextlib.asynccontextmanager
async def _beginning(spec: MachineSpec) -> AsyncIterator[int]:
    """A descriptor of what the machine begins with: the kernel, or the state of its memory image."""
    if spec.memory is None:
        async with kernel.lent(spec.kernel) as fd:
            yield fd
        return
    try:
        fd = os.open(spec.memory.state, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FailedPrecondition(f"cannot read the memory image {spec.memory.state}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[int]:
    """A listening Unix socket (0600) whose descriptor QEMU inherits: it can be connected to before QEMU is ready."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(8)
        yield server.fileno()


async def _first_greeting(path: Path, qemu: ProcessRef, timeout: float) -> Control:
    """The first connection, given up as soon as QEMU has ended."""
    connecting = asyncio.ensure_future(Control.connect(path, timeout=timeout))
    ending = asyncio.ensure_future(gone(qemu, None))
    try:
        await asyncio.wait({connecting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise Unavailable("QEMU ended before it greeted")
        return connecting.result()
    finally:
        for task in (connecting, ending):
            task.cancel()
        await asyncio.gather(connecting, ending, return_exceptions=True)


async def _loaded(control: Control, timeout: float) -> None:
    """Wait until the memory image is loaded. A QEMU that cannot load it ends."""
    async with asyncio.timeout(timeout):
        while (await control.execute("query-status"))["status"] == "inmigrate":
            await asyncio.sleep(_LOAD_POLL_S)


def _require_network(children: tuple[process.Child, ...]) -> None:
    if any(child.poll() is not None for child in children[1:]):
        raise Unavailable("the network did not start", hint="create the sandbox with --network none")


async def _destroy(children: tuple[process.Child, ...]) -> int:
    """Kill what was started and reap it; returns QEMU's own status, which tells whether it ended by itself."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        await asyncio.to_thread(child.wait, 10)
    return int(children[0].returncode)


async def end_leftovers(record: Mapping[str, object] | None, lock_file: Path) -> None:
    """Kill what is left of a machine that cannot be taken over: what its record names, and whoever holds its lock.
    Waits a few seconds for their end."""
    doomed: list[ProcessRef] = []
    with contextlib.suppress(BadRequest):
        handles = Handles.from_dict(record or {})
        doomed += [handles.qemu, *handles.helpers]
    if lock.held(lock_file) and (found := lock.holder(lock_file)) is not None:
        doomed.append(found)
    for ref in doomed:
        ref.send(signal.SIGKILL)
    for ref in doomed:
        with contextlib.suppress(DeadlineExceeded):
            await gone(ref, 5.0)
