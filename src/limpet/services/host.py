"""What every service needs, in one place; `daemon.py` puts it together once."""

from __future__ import annotations

from dataclasses import dataclass

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.models import Sandbox, State
from limpet.paths import Paths
from limpet.services.catalogue import Catalogue
from limpet.services.config import Config
from limpet.services.dockersockets import DockerSockets
from limpet.services.engines import Engines
from limpet.services.events import Events
from limpet.services.live import LiveTable
from limpet.services.locks import Locks
from limpet.services.operations import Operations
from limpet.services.payloads import Attachments
from limpet.services.ports import Ports
from limpet.services.records import Records
from limpet.services.templatecache import TemplateCache
from limpet.services.vaulttable import VaultTable
from limpet.store import SandboxRecord
from limpet.vmm.layers import Layers


@dataclass(frozen=True)
class Host:
    """The daemon's shared parts. Locks are taken in the order that services/locks.py gives."""

    paths: Paths
    records: Records
    events: Events
    operations: Operations
    locks: Locks
    live: LiveTable
    ports: Ports
    layers: Layers
    catalogue: Catalogue
    templates: TemplateCache
    vaults: VaultTable
    config: Config
    payloads: Attachments
    engines: Engines
    docker_sockets: DockerSockets

    def forget(self, record: SandboxRecord) -> None:
        """Remove the row and the files of a sandbox that does not run, and is wanted by nobody any more. Its directory
        (logs, no data) and its vault are set aside first, where the next daemon sweeps; layers are collected."""
        files = self.paths.sandbox(record.id)
        crashpoint("forget.files.before")
        durable.remove_tree(files.sockets)
        self.payloads.forget(record)
        self.vaults.drop(record.id)
        with durable.set_aside(files.root):
            crashpoint("forget.row.before")
            self.records.delete(record.id)
            crashpoint("forget.row.after")

    def view(self, record: SandboxRecord) -> Sandbox:
        """A sandbox as users see it: the durable row and what is true now."""
        vm = self.live.get(record.id)
        accel = vm.machine.accel if vm else None
        return Sandbox(
            id=record.id,
            name=record.name,
            state=State.PAUSED if vm and vm.stall and record.state is State.RUNNING else record.state,
            spec=record.spec,
            created_at=record.created_at,
            started_at=record.started_at,
            boot_id=record.boot_id,
            incarnation=record.incarnation,
            accel=accel,
            isolation=None if accel is None else "hardware" if accel == "kvm" else "emulated",
            workspace=record.workspace,
            ports=self.ports.of(record.id),
            error=vm.stall.message if vm and vm.stall else record.error,
            pid=vm.machine.pid if vm else None,
        )
