"""The payloads of running sandboxes: taken before a VM is launched, seeded before a command runs, published while it
runs, let go when it has ended.

    lock ──► (launch) ──► attach ──► begin ──► … every generation is published … ──► final ──► (end) ──► release
      │                     │                                                                              ▲
      └─────────────────────┴────────────── failed: nothing is left ───────────────────────────────────────┘

What `attach` finds at a later start decides: the host directory is as it was published last: the guest goes on; it was
edited and the guest's copy was not: the guest is seeded anew; both: drifted, and both are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from limpet import images, log
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, LimpetError
from limpet.guest.agent import Agent
from limpet.guest.volumes import Volume, Volumes
from limpet.models import Payload, PayloadRequest, PayloadStatus
from limpet.paths import Paths
from limpet.services.events import Events
from limpet.services.live import LiveVM
from limpet.services.payloads import checking, locking, places, seeding
from limpet.services.payloads.keeping import Keeper, stopped
from limpet.services.payloads.locking import Lock
from limpet.services.payloads.marker import Marker
from limpet.services.payloads.publishing import Publisher
from limpet.services.payloads.scanning import Scan, scan
from limpet.services.payloads.state import PayloadState, Published, States, is_payload, lock_name, volume_of
from limpet.services.vaulttable import VaultTable
from limpet.store import SandboxRecord
from limpet.threads import Workers, to_its_end
from limpet.vault import Generation

_THREADS = 2
_LINGER_S = 5.0  # between two looks at what readers may still need

_log = log.get("payloads")


class Attachments:
    """What is attached to whom, and how it goes."""

    def __init__(self, paths: Paths, events: Events, vaults: VaultTable) -> None:
        self._paths, self._events, self._vaults = paths, events, vaults
        self.states = States(paths.payloads)
        self._workers = Workers(_THREADS, "payload")
        self._locks: dict[str, Lock] = {}
        self._publishers: dict[str, Publisher] = {}
        self.keepers: dict[str, Keeper] = {}
        self._lingering: dict[str, asyncio.Task[None]] = {}

    # ── what may be attached ─────────────────────────────────────────────────────────────────────────────────────

    def checked(self, requests: Sequence[PayloadRequest], present: Sequence[Payload] = ()) -> tuple[Payload, ...]:
        """New payloads, beside those that are there. Raises BadRequest or FailedPrecondition for paths that cannot be,
        Busy for a directory that another VM has. Nothing is touched."""
        return checking.new_payloads(requests, present, self._paths)

    # ── before a VM is launched ──────────────────────────────────────────────────────────────────────────────────

    async def lock(self, record: SandboxRecord) -> None:
        """Take the host directories of a sandbox, and show that each can be written to (PAY-9). `release` undoes it.
        Raises BadRequest, FailedPrecondition, Busy."""
        for payload in record.payloads:
            await self.lock_one(record, payload)

    async def lock_one(self, record: SandboxRecord, payload: Payload) -> None:
        await self._stop_lingering(payload.id)
        await to_its_end(self._lock, record, payload)

    def _lock(self, record: SandboxRecord, payload: Payload) -> None:
        before = self.states.get(payload.id)
        if before is not None:
            self._publisher(before).recover()
        directory = places.check_host(payload.host_dir, self._paths)
        mark = Marker.new(payload.id, record.name, record.id, self._home, directory)
        state = before or PayloadState(payload=payload.id, sandbox_id=record.id, host_dir=str(directory))
        publisher = self._publisher(state)
        publisher.save(nonce=mark.nonce, doomed=False)
        self._locks[payload.id] = locking.take(mark)
        locking.refuse_nested(directory, scan(directory).nested)
        seeding.probe_host(directory)
        if (warning := places.warning(directory)) is not None:
            self._events.emit("payload.warning", sandbox=record, payload=payload.id, reason=warning)

    def _publisher(self, state: PayloadState) -> Publisher:
        if state.payload not in self._publishers:
            self._publishers[state.payload] = Publisher(state, self.states.save)
        return self._publishers[state.payload]

    @property
    def _home(self) -> Path:
        """How others are told whose a directory is."""
        return self._paths.data.parent if self._paths.data.name == "data" else self._paths.data

    # ── before a command runs ────────────────────────────────────────────────────────────────────────────────────

    async def attach(self, vm: LiveVM, record: SandboxRecord, *, warm: bool) -> None:
        """Give the locks to the VM, mount the volumes and fill those that are new. `warm`: programs run in the guest
        already, out of a memory image. The start that this is part of makes the next incarnation."""
        await self._remove_doomed(vm, record)
        agent = await vm.agent()
        volumes = {volume.name: volume for volume in await Volumes(agent).state()}
        for name, mount in (await self.inherited(record)).items():
            if name in volumes and volumes[name].mount is None:
                with contextlib.suppress(LimpetError):  # something else is there by now
                    await Volumes(agent).create(name, mount)
        for payload in record.payloads:
            await self.give(vm, payload)
            await self._mount(agent, record, payload, volumes.get(volume_of(payload.id)), warm=warm)

    async def give(self, vm: LiveVM, payload: Payload) -> None:
        """Hand the lock of a host directory to the VM: the kernel releases it when that ends."""
        lock = self._locks.pop(payload.id)
        try:
            crashpoint("payload.give.before")
            await vm.machine.give(lock_name(payload.id), lock.fd)
            crashpoint("payload.give.after")
        finally:
            lock.close()

    async def _mount(
        self, agent: Agent, record: SandboxRecord, payload: Payload, volume: Volume | None, *, warm: bool
    ) -> None:
        publisher, incarnation = self._publishers[payload.id], record.incarnation + 1
        state, seen = publisher.state, await to_its_end(scan, publisher.directory)
        if state.seeded is None or state.published is None or volume is None:
            if volume is not None:
                await Volumes(agent).remove(volume.name)
            await self.seed(agent, record, payload, incarnation)
        elif seen.digest() == state.published.digest or state.trouble is not None:
            await Volumes(agent).create(volume.name, payload.guest_dir)
            publisher.save(seeded=incarnation)
        elif not warm and _as_published(volume, state.published):
            await Volumes(agent).remove(volume.name)
            await self.seed(agent, record, payload, incarnation)
            self._events.emit("payload.reseeded", sandbox=record, payload=payload.id, host_dir=payload.host_dir)
        else:
            await Volumes(agent).create(volume.name, payload.guest_dir)
            reason = f"{payload.host_dir} was edited while {record.name} did not run, and the guest's copy was, too"
            publisher.save(seeded=incarnation, trouble="drifted", reason=reason)
            self._events.emit("payload.drifted", sandbox=record, payload=payload.id, reason=reason)

    async def seed(
        self, agent: Agent, record: SandboxRecord, payload: Payload, incarnation: int, *, over: bool = False
    ) -> None:
        """Make the guest's copy, from nothing; `over`: in the volume that is there, emptied. Only when all of it is
        there is anything ever published or deleted."""
        publisher, mount = self._publishers[payload.id], payload.guest_dir
        user = record.spec.user or images.find_image(self._paths, record.spec.image).info.user
        publisher.save(seeded=None)
        before: Scan = await to_its_end(scan, publisher.directory)
        crashpoint("payload.volume.before")
        if over:
            await seeding.clear(agent, mount)
        else:
            parent = os.path.dirname(mount)
            if parent != "/":
                await agent.mkdir(parent, parents=True, user=user)
            await Volumes(agent).create(volume_of(payload.id), mount)
        crashpoint("payload.volume.after")
        await seeding.probe_guest(agent, publisher.directory, mount)
        seeded = await seeding.seed(agent, publisher.directory, mount, user, before)
        await agent.sync()
        since = await self._newest(record.id) + 1
        crashpoint("payload.seeded.before")
        publisher.save(seeded=incarnation, published=Published.of(seeded), since=since, trouble=None, reason=None)
        publisher.last = seeded
        crashpoint("payload.seeded.after")

    def since(self, payload: str, generation: int) -> None:
        """Publish no generation before this one: it is the first that has all of the seed."""
        self._publishers[payload].save(since=generation)

    async def _newest(self, sandbox_id: str) -> int:
        """The newest generation of a sandbox, 0 without one."""
        opened = await self._vaults.find(sandbox_id)
        head = opened.vault.head if opened is not None else None
        return head.number if head is not None else 0

    async def leftovers(self, record: SandboxRecord) -> bool:
        """Whether its disks have volumes of payloads that are not its own (any more)."""
        return bool(self.doomed(record) or await self.inherited(record))

    async def inherited(self, record: SandboxRecord) -> dict[str, str]:
        """Volumes that were payloads of a sandbox that this one is a copy of, and where they were mounted: plain
        directories here."""
        opened = await self._vaults.find(record.id)
        head = opened.vault.head if opened is not None else None
        own = {volume_of(payload.id) for payload in record.payloads}
        own |= {volume_of(state.payload) for state in self.doomed(record)}
        volumes = head.volumes if head is not None else {}
        return {
            name: os.fsdecode(info.mount) for name, info in volumes.items()
            if is_payload(name) and name not in own
        }  # fmt: skip

    def doomed(self, record: SandboxRecord) -> list[PayloadState]:
        """What is left of payloads that were let go while nobody could remove the guest's copy, or unlock them."""
        own = {payload.id for payload in record.payloads}
        mine = (state for state in self.states.all() if state.sandbox_id == record.id and state.payload not in own)
        return [state for state in mine if state.doomed]

    def doom(self, payload: str, *, doomed: bool = True) -> None:
        """Note that the guest's copy is about to go, for the case that this is cut off; or that it stays."""
        if (state := self.states.get(payload)) is not None:
            self._publisher(state).save(doomed=doomed)

    async def _remove_doomed(self, vm: LiveVM, record: SandboxRecord) -> None:
        for state in self.doomed(record):
            await self._unlock(vm, state.payload)  # whatever the guest does
            await Volumes(await vm.agent()).remove(volume_of(state.payload))
            self.states.forget(state.payload)

    async def let_go(self, vm: LiveVM, payload: str) -> None:
        """Unlock the host directory and forget the payload; the guest's copy is gone."""
        await self._unlock(vm, payload)
        self.states.forget(payload)

    async def _unlock(self, vm: LiveVM, payload: str) -> None:
        crashpoint("payload.unlock.before")
        with contextlib.suppress(FailedPrecondition):  # it had none
            await vm.machine.qmp("closefd", fdname=lock_name(payload))
        crashpoint("payload.unlock.after")
        await self.release_one(payload)

    # ── while it runs ────────────────────────────────────────────────────────────────────────────────────────────

    async def adopt(self, vm: LiveVM, record: SandboxRecord) -> None:
        """Another daemon attached them, or was about to: see that the VM has the locks, the guest its copies, and
        neither what was let go. What cannot be taken over is told and never published."""
        try:
            await self._remove_doomed(vm, record)
        except LimpetError as error:  # the next start tries again
            _log.warning("payload.copy_left", sandbox=record.id, reason=error.message)
        for payload in record.payloads:
            try:
                await self._adopt(vm, record, payload)
            except (LimpetError, OSError) as error:
                _log.warning("payload.lost", payload=payload.id, reason=str(error))
                self._events.emit("payload.failed", sandbox=record, payload=payload.id, reason=str(error))

    async def _adopt(self, vm: LiveVM, record: SandboxRecord, payload: Payload) -> None:
        state = self.states.get(payload.id)
        cut_off = state is not None and state.doomed  # its removal, so that the guest may have no copy any more
        if state is None or state.nonce is None or state.never_marked():
            await self.lock_one(record, payload)
            await self.give(vm, payload)
        else:
            publisher = self._publisher(state)
            await to_its_end(publisher.recover)
            if (fd := locking.retake(publisher.directory, state.nonce)) is not None:
                self._locks[payload.id] = Lock(fd, Marker.of(publisher.directory, state.nonce))
                await self.give(vm, payload)
        if cut_off or self._publishers[payload.id].state.seeded != record.incarnation:
            before = replace(record, incarnation=record.incarnation - 1)
            volumes = {volume.name: volume for volume in await Volumes(await vm.agent()).state()}
            await self._mount(await vm.agent(), before, payload, volumes.get(volume_of(payload.id)), warm=True)
            self.doom(payload.id, doomed=False)

    def begin(self, record: SandboxRecord) -> None:
        """It runs: publish what it writes from now on."""
        for payload in record.payloads:
            if (publisher := self._publishers.get(payload.id)) is not None:
                keeper = Keeper(
                    payload, record, publisher, events=self._events, vaults=self._vaults, workers=self._workers
                )
                self.keepers[payload.id] = keeper
                keeper.start()

    async def offer(self, sandbox_id: str, generation: Generation) -> None:
        """A generation was committed."""
        for keeper in self._of(sandbox_id):
            keeper.offer(generation)

    async def final(self, sandbox_id: str, timeout: float) -> str | None:
        """The last publications before the VM ends; what prevented them."""
        problems = await asyncio.gather(*(keeper.final(timeout) for keeper in self._of(sandbox_id)))
        return "; ".join(problem for problem in problems if problem) or None

    def go_on(self, sandbox_id: str) -> None:
        """A stop was refused."""
        for keeper in self._of(sandbox_id):
            keeper.start()

    async def leave(self, sandbox_id: str) -> None:
        """Publish no more; the VM is gone, or another daemon's."""
        for keeper in self._of(sandbox_id):
            del self.keepers[keeper.payload.id]
            await keeper.close()

    def _of(self, sandbox_id: str) -> list[Keeper]:
        return [keeper for keeper in self.keepers.values() if keeper.record.id == sandbox_id]

    def status(self, record: SandboxRecord) -> list[PayloadStatus]:
        """How the payloads of a sandbox are, in the order in which they were added."""
        return [self._status(record, payload) for payload in record.payloads]

    def _status(self, record: SandboxRecord, payload: Payload) -> PayloadStatus:
        if (keeper := self.keepers.get(payload.id)) is not None:
            return keeper.status()
        return stopped(payload, record.name, self.states.get(payload.id))

    # ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────────

    async def release(self, record: SandboxRecord) -> None:
        """The VM has ended, or never came: nothing of it is left on the host directories."""
        await self.leave(record.id)
        for payload in record.payloads:
            await self.release_one(payload.id)

    async def release_one(self, payload: str) -> None:
        """Take the marker away, and in time what was replaced."""
        if (lock := self._locks.pop(payload, None)) is not None:
            lock.close()
        state = self.states.get(payload)
        if state is None:
            return
        publisher = self._publisher(state)
        if publisher.state.nonce is not None:
            await to_its_end(locking.release, publisher.directory, publisher.state.nonce)
            publisher.save(nonce=None)
        self._linger(payload, publisher)

    def forget(self, record: SandboxRecord) -> None:
        """The sandbox is gone for good, or was never there: what is known of its payloads goes."""
        for state in self.states.all():
            if state.sandbox_id == record.id:
                if (lock := self._locks.pop(state.payload, None)) is not None:
                    lock.close()
                if state.nonce is not None:
                    locking.release(Path(state.host_dir), state.nonce)
                crashpoint("payload.forget.before")
                self.states.forget(state.payload)
                crashpoint("payload.forget.after")
                if state.payload not in self._lingering:
                    self._publishers.pop(state.payload, None)

    def settle(self, records: Iterable[SandboxRecord]) -> None:
        """After a crash, before VMs are adopted: end publications that were begun, take markers away that no VM holds,
        and forget payloads of sandboxes that are gone. `records`: everything that is known."""
        known = {record.id: {payload.id for payload in record.payloads} for record in records}
        for state in self.states.all():
            publisher = self._publisher(state)
            with contextlib.suppress(LimpetError, OSError):
                publisher.recover()
            if state.nonce is not None and locking.release(publisher.directory, state.nonce):
                publisher.save(nonce=None)
            if (kept := known.get(state.sandbox_id)) is None or (state.payload not in kept and not state.doomed):
                self.states.forget(state.payload)
            if publisher.replaced:
                self._linger(state.payload, publisher)

    def _linger(self, payload: str, publisher: Publisher) -> None:
        """Remove the trees that were replaced lately once nobody can be reading in them."""
        if payload not in self._lingering:
            self._lingering[payload] = asyncio.create_task(self._tend(payload, publisher), name=f"tend {payload}")

    async def _tend(self, payload: str, publisher: Publisher) -> None:
        try:
            while publisher.replaced:
                for place in await to_its_end(publisher.tend):
                    self._events.emit("payload.edit_saved", payload=payload, path=str(place))
                await asyncio.sleep(_LINGER_S)
        except (LimpetError, OSError) as error:
            _log.warning("payload.left_over", payload=payload, reason=str(error))
        finally:
            self._lingering.pop(payload, None)
            if payload not in self.keepers and payload not in self._locks:
                self._publishers.pop(payload, None)

    async def _stop_lingering(self, payload: str) -> None:
        if (task := self._lingering.get(payload)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """The daemon ends; VMs keep their locks."""
        for task in list(self._lingering.values()):
            task.cancel()
        await asyncio.gather(*self._lingering.values(), return_exceptions=True)
        for keeper in list(self.keepers.values()):
            await keeper.close()
        self.keepers.clear()


def _as_published(volume: Volume, published: Published) -> bool:
    """Whether nothing was written to the guest's copy since the generation that was published last."""
    return any(
        (snapshot.token, snapshot.uuid) == (published.token, published.uuid) and volume.ctransid <= snapshot.ctransid
        for snapshot in volume.snapshots
    )
