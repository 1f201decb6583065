"""What sandboxes wrote: on its way to the host (sync), and as the host keeps it (vaults)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from limpet.api._endpoint import NDJSON, RAW, Call, Endpoint, Many, Raw, lines, stream
from limpet.api.queries import DiffQuery, PathQuery, SyncQuery, VaultQuery
from limpet.models import (
    GenerationInfo,
    Operation,
    PathChange,
    PathVersion,
    SyncStatus,
    VaultListing,
    VaultRestoreRequest,
    VaultUsage,
)

_SANDBOX = "/v1/sandboxes/{name}"
_VAULT = _SANDBOX + "/vault"


async def sync_status(call: Call) -> SyncStatus:
    return await call.services.syncing.status(call.name, pending=call.query(SyncQuery).pending)


async def sync_sandbox(call: Call) -> Operation:
    return await call.services.syncing.sync(call.name)


async def all_sync_status(call: Call) -> Sequence[SyncStatus]:
    return await call.services.syncing.all_status()


async def vault_history(call: Call) -> Sequence[GenerationInfo]:
    return await call.services.vaults.history(call.name)


async def path_versions(call: Call) -> Sequence[PathVersion]:
    return await call.services.vaults.versions(call.name, call.query(PathQuery).path)


async def vault_entries(call: Call) -> VaultListing:
    query = call.query(VaultQuery)
    return await call.services.vaults.listing(call.name, query.path, query.at)


async def vault_file(call: Call) -> Response:
    query = call.query(VaultQuery)
    found = await call.services.vaults.read(call.name, query.path, query.at)
    headers = {"Content-Length": str(found.entry.size), "Limpet-Generation": str(found.generation)}
    return await stream(found.chunks, RAW, headers)


async def vault_diff(call: Call) -> Response:
    query = call.query(DiffQuery)
    return await stream(lines(await call.services.vaults.diff(call.name, query.a, query.b)), NDJSON)


async def restore_from_vault(call: Call) -> Operation:
    return await call.services.vaults.restore(call.name, call.body(VaultRestoreRequest))


async def check_vault(call: Call) -> Operation:
    return await call.services.vaults.check(call.name)


async def repair_vault(call: Call) -> Operation:
    return await call.services.vaults.repair(call.name)


async def collect_vault(call: Call) -> Operation:
    return await call.services.vaults.collect(call.name)


async def list_vaults(call: Call) -> Sequence[VaultUsage]:
    return await call.services.vaults.usage()


async def check_vaults(call: Call) -> Operation:
    return await call.services.vaults.check(None)


async def repair_vaults(call: Call) -> Operation:
    return await call.services.vaults.repair(None)


async def collect_vaults(call: Call) -> Operation:
    return await call.services.vaults.collect(None)


ROUTES = (
    Endpoint("GET", _SANDBOX + "/sync", sync_status, "How far behind the host is", SyncStatus, query=SyncQuery),
    Endpoint("POST", _SANDBOX + "/sync", sync_sandbox, "Bring everything to the host now (result: SyncResult)",
             Operation, status=202),
    Endpoint("GET", "/v1/sync", all_sync_status, "How far behind the host is, for all that have a VM",
             Many(SyncStatus)),
    Endpoint("GET", _SANDBOX + "/history", vault_history, "List its generations, the oldest first",
             Many(GenerationInfo)),
    Endpoint("GET", _SANDBOX + "/versions", path_versions, "List the generations in which a path changed",
             Many(PathVersion), query=PathQuery),
    Endpoint("GET", _VAULT + "/entries", vault_entries, "What a path was, and what a directory held", VaultListing,
             query=VaultQuery),
    Endpoint("GET", _VAULT + "/file", vault_file, "Read a file of a generation (header Limpet-Generation)", Raw(),
             query=VaultQuery),
    Endpoint("GET", _VAULT + "/diff", vault_diff, "What differs between two generations, a line each",
             Raw(NDJSON, PathChange), query=DiffQuery),
    Endpoint("POST", _VAULT + "/restore", restore_from_vault, "Bring a generation back (result: VaultRestored)",
             Operation, body=VaultRestoreRequest, status=202),
    Endpoint("POST", _VAULT + "/check", check_vault, "Compare it with its digests (result: VaultChecks)", Operation,
             status=202),
    Endpoint("POST", _VAULT + "/repair", repair_vault, "Set damage aside (result: VaultChecks)", Operation,
             status=202),
    Endpoint("POST", _VAULT + "/gc", collect_vault, "Thin out old generations (result: PruneResult)", Operation,
             status=202),
    Endpoint("GET", "/v1/vaults", list_vaults, "What the vaults take of the disk", Many(VaultUsage)),
    Endpoint("POST", "/v1/vaults/check", check_vaults, "Check all of them (result: VaultChecks)", Operation,
             status=202),
    Endpoint("POST", "/v1/vaults/repair", repair_vaults, "Repair all of them (result: VaultChecks)", Operation,
             status=202),
    Endpoint("POST", "/v1/vaults/gc", collect_vaults, "Thin out all of them (result: PruneResult)", Operation,
             status=202),
)  # fmt: skip
