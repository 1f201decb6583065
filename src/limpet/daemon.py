"""limpetd: puts the parts together, makes the records true, serves, and lets go. VMs outlive it.

lock the state directory → open the store → reconcile → listen → (serve) → stop listening → let go of the VMs
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from limpet import durable, log, paths
from limpet.api.app import create_app
from limpet.api.door import Services
from limpet.api.server import serving
from limpet.errors import LimpetError
from limpet.services import timers
from limpet.services.catalogue import Catalogue
from limpet.services.checkpoints import Checkpoints
from limpet.services.commits import Commits
from limpet.services.config import Config
from limpet.services.dockersockets import DockerSockets
from limpet.services.doctor import Doctor
from limpet.services.engines import Engines
from limpet.services.events import Events
from limpet.services.execs import Execs
from limpet.services.files import Files
from limpet.services.forks import Forks
from limpet.services.host import Host
from limpet.services.images import Images
from limpet.services.live import LiveTable
from limpet.services.locks import Locks
from limpet.services.operations import Operations
from limpet.services.payloads import Attachments
from limpet.services.payloads.service import Payloads
from limpet.services.pool import Pool
from limpet.services.ports import Ports
from limpet.services.reconcile import reconcile
from limpet.services.records import Records
from limpet.services.restoring import Restoring
from limpet.services.runtime import Runtimes
from limpet.services.sandboxes import Sandboxes
from limpet.services.standing import Standing
from limpet.services.starting import Starter
from limpet.services.stats import StatsService
from limpet.services.storage import Storage
from limpet.services.syncing import Syncing
from limpet.services.system import System
from limpet.services.templatecache import TemplateCache
from limpet.services.templates import Templates
from limpet.services.trash import Trash
from limpet.services.vaults import Vaults
from limpet.services.vaulttable import VaultTable
from limpet.services.workspace import Workspaces
from limpet.store import Store
from limpet.version import __version__
from limpet.vmm.layers import Layers

_log = log.get("daemon")


def main() -> None:
    """The command `limpetd`. Exit status 1 when it cannot start, with `error:` and `hint:` lines on stderr."""
    os.umask(0o077)
    found = paths.discover()
    try:
        found.make()
        durable.sync_directory(found.data)  # the names of what an upgrade added to it
        log.configure(found.daemon_log)
        asyncio.run(run(found))
    except LimpetError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(1)


async def run(where: paths.Paths) -> None:
    """Serve until SIGTERM, SIGINT or a shutdown request."""
    store = Store.open(where)
    try:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, ended.set)
        host = build_host(where, store)
        parts = build_parts(host)
        with log.operation():
            await reconcile(host, parts.sandboxes)
        parts.pool.refill()
        info = {"pid": os.getpid(), "version": __version__}
        durable.replace_file(where.daemon_info, json.dumps(info).encode())
        ticking = timers.run(host, parts.sandboxes, parts.standing, parts.syncing, parts.vaults)
        clock = asyncio.create_task(ticking, name="timers")
        app = create_app(build_services(host, parts, ended.set))
        try:
            async with serving(app, where.daemon_socket):
                await ended.wait()
                host.events.close()
                await host.operations.close()
        finally:
            clock.cancel()
            await parts.templates.close()
            await parts.pool.close()
            await parts.syncing.close()
            await host.payloads.close()
            await host.engines.close()
            await parts.vaults.close()
            await let_go(host)
    finally:
        store.close()
        where.daemon_info.unlink(missing_ok=True)


@dataclass(frozen=True)
class Parts:
    """The services that others are built from."""

    templates: Templates
    pool: Pool
    syncing: Syncing
    sandboxes: Sandboxes
    standing: Standing
    vaults: Vaults
    payloads: Payloads


def build_host(where: paths.Paths, store: Store) -> Host:
    """The shared parts, once."""
    records, live, layers = Records(store), LiveTable(), Layers(where.layers)
    events, vaults = Events(store), VaultTable(where.vaults)
    engines = Engines(records, events)
    return Host(
        paths=where,
        records=records,
        events=events,
        operations=Operations(store),
        locks=Locks(),
        live=live,
        ports=Ports(records, live),
        layers=layers,
        catalogue=Catalogue(where.checkpoints, layers),
        templates=TemplateCache(where.templates, layers),
        vaults=vaults,
        config=Config(store),
        payloads=Attachments(where, events, vaults),
        engines=engines,
        docker_sockets=DockerSockets(records, engines.ensure_now),
    )


def build_parts(host: Host) -> Parts:
    """Starting comes before sandboxes, sandboxes before what is done with them."""
    templates = Templates(host)
    starter = Starter(host, templates)
    pool = Pool(host, starter, templates)
    syncing = Syncing(host)
    sandboxes = Sandboxes(host, starter, pool, syncing)
    standing = Standing(host, sandboxes, syncing)
    return Parts(templates, pool, syncing, sandboxes, standing, Vaults(host, syncing), Payloads(host, syncing))


def build_services(host: Host, parts: Parts, end: Callable[[], None]) -> Services:
    """Everything that the API calls."""
    storage = Storage(host, parts.templates)
    return Services(
        system=System(host, end),
        sandboxes=parts.sandboxes,
        standing=parts.standing,
        forks=Forks(host, parts.sandboxes),
        commits=Commits(host),
        checkpoints=Checkpoints(host, Restoring(host, parts.sandboxes)),
        templates=parts.templates,
        config=host.config,
        storage=storage,
        execs=Execs(host, parts.sandboxes),
        files=Files(host),
        ports=host.ports,
        workspaces=Workspaces(host),
        images=Images(host, storage),
        doctor=Doctor(host, parts.vaults),
        trash=Trash(host),
        runtimes=Runtimes(host, parts.sandboxes),
        syncing=parts.syncing,
        vaults=parts.vaults,
        payloads=parts.payloads,
        stats=StatsService(host.paths, host.records, host.live, host.layers),
        operations=host.operations,
        events=host.events,
    )


async def let_go(host: Host) -> None:
    """End what is ours and leave the VMs running."""
    for vm in host.live:
        if vm.watcher is not None:
            vm.watcher.cancel()
        await host.ports.withdraw(vm.sandbox_id)
        await host.docker_sockets.close(vm.sandbox_id)
        await vm.close()
        await vm.machine.close()


if __name__ == "__main__":
    main()
