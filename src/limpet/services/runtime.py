"""The container runtime of a sandbox: brought up, looked at, stopped; its logs, and what its containers publish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from limpet.errors import FailedPrecondition, Unimplemented
from limpet.guest.runtime import Container, Runtime, Told
from limpet.models import (
    ContainerPort,
    Operation,
    RuntimeResult,
    RuntimeStatus,
    RuntimeStopped,
    RuntimeStopRequest,
    ServiceName,
    Stage,
    State,
)
from limpet.services import engines
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.operations import Stages
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord


class Runtimes:
    def __init__(self, host: Host, sandboxes: Sandboxes) -> None:
        self._host, self._sandboxes = host, sandboxes

    async def ensure(self, name: str) -> Operation:
        """See that it is ready, with the guest's own stages. A paused or suspended sandbox goes on first; raises
        FailedPrecondition for one that is stopped."""
        record = self._host.records.by_name(name)
        if record.state is State.STOPPING:  # it would bring back what the stop has just ended
            raise FailedPrecondition(f"{name} is stopping", hint=f"limpet start {name}")
        asleep = record.state in (State.PAUSED, State.SUSPENDED)
        if not asleep:
            self._host.live.require(record.id, name)

        async def work(stages: Stages) -> RuntimeResult:
            if asleep:
                async with self._host.locks.lifecycle(record.id, "resume"):
                    await self._sandboxes.ensure_running(record.id, stages)
            vm = self._host.live.require(record.id, name)
            with _telling(stages) as told:
                ensured = await self._host.engines.ensure_now(vm, told)
            return RuntimeResult.model_validate(ensured.model_dump())

        return self._host.operations.start("runtime ensure", name, work)

    async def status(self, name: str) -> RuntimeStatus:
        """As the guest sees it now; nothing is started. Raises FailedPrecondition unless the sandbox runs."""
        vm = self._awake(self._host.records.by_name(name))
        found = await Runtime(await vm.agent()).status()
        return found.model_copy(update={"socket": str(vm.files.docker_socket)})

    async def stop(self, name: str, request: RuntimeStopRequest) -> Operation:
        """Containers first, then the engine; it does not come back by itself. Raises FailedPrecondition unless the
        sandbox runs."""
        record = self._host.records.by_name(name)
        vm = self._awake(record)

        async def work(stages: Stages) -> RuntimeStopped:
            began = time.monotonic()
            async with stages.run("stop"):
                with vm.in_use():
                    ended = await engines.stop_now(vm, request.timeout, keep=False)
            seconds = round(time.monotonic() - began, 3)
            result = RuntimeStopped(stopped=list(ended.stopped), killed=list(ended.killed), seconds=seconds)
            self._host.events.emit("runtime.stopped", sandbox=record, **result.model_dump())
            return result

        return self._host.operations.start("runtime stop", name, work)

    async def logs(self, name: str, service: ServiceName, tail: int | None) -> AsyncIterator[bytes]:
        """The last `tail` lines that a service wrote, at most 4 MiB; empty when it never ran."""
        vm = self._awake(self._host.records.by_name(name))
        return Runtime(await vm.agent()).log(service, tail)

    async def ports(self, name: str) -> Sequence[ContainerPort]:
        """What containers publish in the guest, and where it can be reached on this host. Nothing when the engine does
        not run; it is not started for that."""
        record = self._host.records.by_name(name)
        vm = self._host.live.get(record.id)
        if vm is None or record.state is not State.RUNNING:
            return []
        try:
            containers = await Runtime(await vm.agent()).containers()
        except (FailedPrecondition, Unimplemented):
            return []
        return _published(containers, {mapping.guest: mapping.host for mapping in self._host.ports.of(record.id)})

    def _awake(self, record: SandboxRecord) -> LiveVM:
        """The VM of a sandbox whose guest can be asked."""
        if record.state in (State.PAUSED, State.SUSPENDED):
            raise FailedPrecondition(f"{record.name} is {record.state.value}", hint=f"limpet resume {record.name}")
        return self._host.live.require(record.id, record.name)


@contextlib.contextmanager
def _telling(stages: Stages) -> Iterator[Told]:
    """What a guest tells about a start, as stages. Those that a failure leaves under way have failed."""
    began: dict[str, float] = {}

    def told(stage: str, state: str, detail: str | None) -> None:
        since = began.setdefault(stage, time.monotonic())
        if state == "done":
            del began[stage]
            stages.report(Stage(name=stage, state="done", detail=detail, seconds=round(time.monotonic() - since, 3)))
        else:
            stages.report(Stage(name=stage, state="running", detail=detail))

    try:
        yield told
    except BaseException:
        for stage, since in began.items():
            stages.report(Stage(name=stage, state="failed", seconds=round(time.monotonic() - since, 3)))
        raise


def _published(containers: Sequence[Container], hosts: dict[int, int]) -> list[ContainerPort]:
    """One line for each port: Docker tells those of IPv4 and IPv6 apart. `hosts`: this host's ports by the guest's."""
    found = {
        (bound.public, bound.protocol, container.id): ContainerPort(
            container=container.name, image=container.image, guest=bound.public, port=bound.private,
            protocol=bound.protocol, host=hosts.get(bound.public) if bound.protocol == "tcp" else None,
        )
        for container in containers for bound in container.ports if bound.public
    }  # fmt: skip
    return [found[key] for key in sorted(found)]
