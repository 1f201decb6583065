"""What users ask of payloads: add one, let one go, see how they are, decide where one stands still."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from limpet.crashpoint import crashpoint
from limpet.errors import BadRequest, FailedPrecondition, LimpetError, NotFound
from limpet.guest.volumes import Volumes
from limpet.models import Operation, Payload, PayloadConfirm, PayloadRequest, PayloadStatus, State
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.payloads.keeping import Keeper
from limpet.services.payloads.state import volume_of
from limpet.services.syncing import Syncing
from limpet.store import SandboxRecord

_FINAL_S = 15.0
_KEPT = timedelta(days=7)  # what the guest had when the host's version was chosen


class Payloads:
    def __init__(self, host: Host, syncing: Syncing) -> None:
        self._host, self._syncing, self._attached = host, syncing, host.payloads
        syncing.add_listener(self._attached.offer)
        syncing.payloads = self._attached.status

    async def status(self, name: str | None) -> Sequence[PayloadStatus]:
        """Of one sandbox or of all, in the order in which they were added."""
        records = self._host.records.all() if name is None else [self._host.records.by_name(name)]
        return [status for record in records for status in self._attached.status(record)]

    # ── add ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def add(self, name: str, request: PayloadRequest) -> Operation:
        """Seeded at once in a running sandbox, at the next start in another one. A failure leaves nothing."""
        record = self._host.records.by_name(name)
        self._attached.checked([request], record.payloads)

        async def work(stages: Stages) -> PayloadStatus:
            async with self._host.locks.lifecycle(record.id, "payload add"):
                now = self._host.records.by_id(record.id)
                [payload] = self._attached.checked([request], now.payloads)
                self._require_standing(now)
                now = self._host.records.update(now.id, payloads=(*now.payloads, payload))
                crashpoint("payload.add.recorded")
                if (vm := self._host.live.get(now.id)) is not None:
                    await self._bring_in(vm, now, payload, stages)
            self._host.events.emit(
                "payload.added", sandbox=record, payload=payload.id, host_dir=payload.host_dir,
                guest_dir=payload.guest_dir,
            )  # fmt: skip
            return self._one(record, payload)

        return self._host.operations.start("payload add", name, work)

    async def _bring_in(self, vm: LiveVM, record: SandboxRecord, payload: Payload, stages: Stages) -> None:
        attached = self._attached
        try:
            async with stages.run("preflight"):
                await attached.lock_one(record, payload)
                await attached.give(vm, payload)
            async with stages.run("seed"):
                agent = await vm.agent()
                await attached.seed(agent, record, payload, record.incarnation)
                attached.since(payload.id, (await self._syncing.now(record.id)).generation or 0)
        except BaseException:
            with contextlib.suppress(LimpetError):
                await _remove_copy(vm, payload)
            await attached.let_go(vm, payload.id)
            left = tuple(other for other in record.payloads if other.id != payload.id)
            self._host.records.update(record.id, payloads=left)
            raise
        attached.begin(replace(record, payloads=(payload,)))

    # ── remove ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def remove(self, name: str, payload: str) -> Operation:
        """Publish a last time, where it can be; then the guest's copy goes and the host directory is free."""
        record = self._host.records.by_name(name)
        chosen = _find(record, payload)

        async def work(stages: Stages) -> dict[str, Any]:
            async with self._host.locks.lifecycle(record.id, "payload rm"):
                now = self._host.records.by_id(record.id)
                self._require_standing(now)
                vm = self._host.live.get(record.id)
                problem = await self._take_out(vm, now, chosen, stages) if vm is not None else None
                if vm is None:
                    self._attached.doom(chosen.id)
                crashpoint("payload.rm.before")
                left = tuple(other for other in now.payloads if other.id != chosen.id)
                self._host.records.update(record.id, payloads=left)
                crashpoint("payload.rm.after")
                if vm is not None:
                    await self._attached.let_go(vm, chosen.id)
            self._host.events.emit(
                "payload.removed", sandbox=record, payload=chosen.id, host_dir=chosen.host_dir, problem=problem
            )
            return {}

        return self._host.operations.start("payload rm", name, work)

    async def _take_out(self, vm: LiveVM, record: SandboxRecord, payload: Payload, stages: Stages) -> str | None:
        """The last publication, and the end of the guest's copy. Raises FailedPrecondition, with everything as it
        was, while programs use that."""
        problem: str | None = None
        keeper = self._attached.keepers.get(payload.id)
        async with stages.run("publish"):
            try:
                await self._syncing.now(record.id)
            except LimpetError as error:
                problem = error.message
            if keeper is not None:
                problem = await keeper.final(_FINAL_S) or problem
        async with stages.run("remove"):
            try:
                self._attached.doom(payload.id)
                crashpoint("payload.take_out.before")
                await _remove_copy(vm, payload)
                crashpoint("payload.take_out.after")
            except BaseException:
                self._attached.doom(payload.id, doomed=False)
                if keeper is not None:
                    keeper.start()
                raise
        self._attached.keepers.pop(payload.id, None)
        return problem

    # ── confirm ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def confirm(self, name: str, payload: str, request: PayloadConfirm) -> Operation:
        """Go on where publishing stopped. `guest`: what it has is published, and what was edited on the host stays
        beside it; `host`: the guest is seeded anew, and what it had stays a generation for some days."""
        record = self._host.records.by_name(name)
        chosen = _find(record, payload)
        self._host.live.require(record.id, name)

        async def work(stages: Stages) -> PayloadStatus:
            async with self._host.locks.lifecycle(record.id, "payload confirm"):
                now = self._host.records.by_id(record.id)
                vm, keeper = self._host.live.require(now.id, now.name), self._attached.keepers.get(chosen.id)
                if keeper is None or keeper.publisher.state.trouble is None:
                    raise FailedPrecondition(f"{chosen.host_dir} waits for no decision", hint=f"limpet status {name}")
                async with stages.run("sync"):
                    newest = (await self._syncing.now(now.id)).generation
                async with stages.run(f"keep {request.keep}"):
                    if request.keep == "guest":
                        await keeper.publish_anyway()
                    else:
                        await self._reseed(vm, now, chosen, keeper, newest)
            self._host.events.emit("payload.confirmed", sandbox=record, payload=chosen.id, keep=request.keep)
            return self._one(record, chosen)

        return self._host.operations.start("payload confirm", name, work)

    async def _reseed(
        self, vm: LiveVM, record: SandboxRecord, payload: Payload, keeper: Keeper, newest: int | None
    ) -> None:
        if newest is not None:
            opened = await self._host.vaults.open(record.id)
            async with opened.lock:
                why, until = f"what the guest had in {payload.guest_dir}", datetime.now(UTC) + _KEPT
                await self._host.vaults.run(opened.vault.pin, newest, why, until)
        async with keeper.standing():
            await self._attached.seed(await vm.agent(), record, payload, record.incarnation, over=True)
            self._attached.since(payload.id, (await self._syncing.now(record.id)).generation or 0)

    # ── shared ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _one(self, record: SandboxRecord, payload: Payload) -> PayloadStatus:
        now = self._host.records.by_id(record.id)
        return next(status for status in self._attached.status(now) if status.payload.id == payload.id)

    def _require_standing(self, record: SandboxRecord) -> None:
        if record.state in (State.PAUSED, State.SUSPENDED):
            raise FailedPrecondition(
                f"{record.name} is {record.state.value}: its programs would find other files when it goes on",
                hint=f"limpet resume {record.name}",
            )


async def _remove_copy(vm: LiveVM, payload: Payload) -> None:
    """Take the guest's copy away. Raises FailedPrecondition while programs use it."""
    agent = await vm.agent()
    if not await Volumes(agent).remove(volume_of(payload.id)):
        return  # nothing was mounted: what has that name is not ours
    with contextlib.suppress(LimpetError):  # there may be other things in the directory by now
        await agent.remove(payload.guest_dir)


def _find(record: SandboxRecord, payload: str) -> Payload:
    """A payload by its id, the beginning of one, or its host directory. Raises NotFound, BadRequest."""
    exact = [known for known in record.payloads if payload in (known.id, known.host_dir)]
    found = exact or [known for known in record.payloads if payload and known.id.startswith(payload)]
    if len(found) > 1:
        raise BadRequest(f"{payload} begins the ids of {len(found)} payloads", hint=", ".join(p.id for p in found))
    if not found:
        known = ", ".join(f"{known.id} ({known.host_dir})" for known in record.payloads)
        raise NotFound(f"{record.name} has no payload {payload}", hint=f"it has {known or 'none'}")
    return found[0]
