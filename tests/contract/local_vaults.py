"""What the host keeps, for the API's tests: generations that are dicts in memory, payloads and a trash that are
records."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from limpet import moments
from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, NotFound
from limpet.models import (
    GenerationInfo,
    Operation,
    PathChange,
    PathVersion,
    Payload,
    PayloadConfirm,
    PayloadRequest,
    PayloadStatus,
    PruneResult,
    RiskReport,
    Sandbox,
    State,
    SyncResult,
    SyncStatus,
    TrashEntry,
    UndeleteRequest,
    VaultCheck,
    VaultChecks,
    VaultEntry,
    VaultListing,
    VaultRestored,
    VaultRestoreRequest,
    VaultUsage,
)
from limpet.names import new_id
from limpet.services.streams import VaultFile
from tests.contract.local_moments import LONG_AGO, PlayedMoments, begin

Change = Literal["added", "changed", "removed"]
ODD = "/home/user/odd\udcff\x1b[31m"  # a name that is not UTF-8 and would colour a terminal
KEPT: dict[int, dict[str, bytes]] = {
    1: {"/home/user/t.db": b"one\n"},
    3: {"/home/user/t.db": b"three\n", ODD: b""},
    4: {"/home/user/t.db": b"three\n", "/workspace/a@b": b"\x00\xff", "/workspace/endless": b"x" * 300_000},
}


def instant(generation: int) -> datetime:
    return LONG_AGO + timedelta(minutes=generation)


class PlayedVaults:
    """Every sandbox of `known`, and `gone` in the trash, has the generations of KEPT; the vault of `broken` is damaged.
    A restore without `to` wants a running sandbox."""

    def __init__(self, boxes: PlayedMoments) -> None:
        self._boxes = boxes
        self.asked: list[VaultRestoreRequest] = []
        self.closed = 0

    async def _check(self, name: str) -> None:
        if name not in ("gone", "sb_gone"):
            await self._boxes.get(name)

    def _at(self, at: str | None) -> int:
        if at is None:
            return max(KEPT)
        wanted = moments.parse(at, datetime.now(UTC))
        found = [number for number in KEPT if number == wanted]
        if isinstance(wanted, datetime):
            found = [number for number in KEPT if instant(number) <= wanted]
        if not found:
            raise NotFound(f"generation {at} is not kept", hint="the nearest kept ones: 3 and 4")
        return found[-1]

    async def history(self, name: str) -> Sequence[GenerationInfo]:
        await self._check(name)
        return [
            GenerationInfo(
                generation=number, time=instant(number), files=len(files), new_bytes=number,
                bytes=sum(map(len, files.values())), pinned="restored" if number == 1 else None,
            )
            for number, files in KEPT.items()
        ]  # fmt: skip

    async def versions(self, name: str, path: str) -> Sequence[PathVersion]:
        await self._check(name)
        found, before = list[PathVersion](), None
        for number, files in KEPT.items():
            now = files.get(path)
            if now != before:
                change: Change = "removed" if now is None else "added" if before is None else "changed"
                found.append(
                    PathVersion(
                        generation=number, time=instant(number), change=change, files=int(now is not None),
                        bytes=len(now or b""), mode=0o644, modified=instant(number),
                    )
                )  # fmt: skip
            before = now
        if not found:
            raise NotFound(f"no generation has {path}")
        return found

    def _entry(self, path: str, content: bytes | None) -> VaultEntry:
        kind, mode, size = ("dir", 0o755, 0) if content is None else ("file", 0o644, len(content))
        return VaultEntry.model_validate(
            {"path": path, "kind": kind, "mode": mode, "uid": 1000, "gid": 1000, "size": size, "modified": LONG_AGO}
        )

    async def listing(self, name: str, path: str, at: str | None) -> VaultListing:
        await self._check(name)
        number = self._at(at)
        files = KEPT[number]
        if path in files:
            return VaultListing(generation=number, time=instant(number), entry=self._entry(path, files[path]))
        below = [self._entry(one, content) for one, content in files.items() if one.startswith(path.rstrip("/") + "/")]
        if not below:
            raise NotFound(f"generation {number} has no {path}")
        return VaultListing(generation=number, time=instant(number), entry=self._entry(path, None), entries=below)

    async def read(self, name: str, path: str, at: str | None) -> VaultFile:
        found = await self.listing(name, path, at)
        if found.entry.kind != "file":
            raise BadRequest(f"{path} is a directory")
        content = KEPT[found.generation][path]

        async def chunks() -> AsyncIterator[bytes]:
            try:
                for start in range(0, len(content), 100_000):
                    if start and name == "broken":
                        raise FailedPrecondition("gens/000004 is damaged")
                    yield content[start : start + 100_000]
            finally:
                self.closed += 1

        return VaultFile(found.generation, found.entry, chunks())

    async def diff(self, name: str, a: str, b: str | None) -> AsyncIterator[PathChange]:
        await self._check(name)
        older, newer = KEPT[self._at(a)], KEPT[self._at(b)]

        async def changes() -> AsyncIterator[PathChange]:
            for path in sorted(older.keys() | newer.keys()):
                before, after = older.get(path), newer.get(path)
                if before != after:
                    change: Change = "added" if before is None else "removed" if after is None else "changed"
                    sizes = [None if one is None else len(one) for one in (before, after)]
                    yield PathChange(change=change, path=path, before=sizes[0], after=sizes[1])

        return changes()

    async def restore(self, name: str, request: VaultRestoreRequest) -> Operation:
        await self._check(name)
        self.asked.append(request)
        number, saved = self._at(request.at), None
        if request.to is None:
            if name == "gone" or (await self._boxes.get(name)).state is not State.RUNNING:
                raise FailedPrecondition(f"{name} is not running", hint="restore to the host: --to DIR")
            saved = 5
        elif Path(request.to).exists() and any(Path(request.to).iterdir()):
            raise FailedPrecondition(f"{request.to} is not empty")
        result = VaultRestored(
            generation=number, time=instant(number), path=request.path or "/", to=request.to, files=2, bytes=2048,
            left_out={"device": 1}, saved=saved,
        )  # fmt: skip
        return begin(self._boxes.operations, "restore", name, result)

    def _checks(self, name: str | None, *, repaired: bool) -> VaultChecks:
        checks = []
        for one in [name] if name else ["web", "broken"]:
            bad = one == "broken" and not repaired
            checks.append(
                VaultCheck(
                    sandbox=one, ok=not bad, generations=3, objects=12, bytes=4096,
                    problems=["gens/000004: object 2 is not as it was written"] if bad else [],
                    repaired=["gens/000004 set aside; back to generation 3"] if one == "broken" and repaired else [],
                )
            )  # fmt: skip
        return VaultChecks(checks=checks)

    async def check(self, name: str | None) -> Operation:
        return begin(self._boxes.operations, "check", name, self._checks(name, repaired=False))

    async def repair(self, name: str | None) -> Operation:
        return begin(self._boxes.operations, "repair", name, self._checks(name, repaired=True))

    async def collect(self, name: str | None) -> Operation:
        result = PruneResult(removed=[f"{name or 'web'}@2"], freed=1024)
        return begin(self._boxes.operations, "gc", name, result)

    async def usage(self) -> Sequence[VaultUsage]:
        return [
            VaultUsage(
                sandbox=name, sandbox_id=f"sb_{name}", state=state, generations=3, oldest=instant(1),
                newest=instant(4), size=2048, reclaimable=1024,
            )
            for name, state in (("gone", "trashed"), ("web", "running"))
        ]  # fmt: skip


class PlayedSyncing:
    """`web` is in step; others are degraded. The second sync of one finds nothing new."""

    def __init__(self, boxes: PlayedMoments) -> None:
        self._boxes = boxes
        self.synced: set[str] = set()
        self.payloads: PlayedPayloads | None = None

    async def sync(self, name: str) -> Operation:
        await self._boxes.get(name)
        new = name not in self.synced
        self.synced.add(name)
        result = SyncResult(generation=4, time=instant(4), new=new)
        return begin(self._boxes.operations, "sync", name, result)

    async def status(self, name: str, *, pending: bool) -> SyncStatus:
        box = await self._boxes.get(name)
        if name == "web":
            return SyncStatus(
                sandbox=name, sandbox_id=box.id, state=box.state.value, last_durable=instant(4), generation=4, age=0.2,
                pending_files=3 if pending else None, pending_bytes=2048 if pending else None,
                payloads=[] if self.payloads is None else list(await self.payloads.status(name)),
            )  # fmt: skip
        return SyncStatus(
            sandbox=name, sandbox_id=box.id, state=box.state.value, lag=7.25, failures=2, degraded=True,
            why="the host's disk is full\x1b[31m", log=["try 2 failed: no space left on device"],
        )  # fmt: skip

    async def all_status(self) -> Sequence[SyncStatus]:
        return [await self.status(name, pending=False) for name in sorted(self._boxes.known)]


class PlayedPayloads:
    """Payloads that are records; one whose host directory's name is `edited` has drifted."""

    def __init__(self, boxes: PlayedMoments) -> None:
        self._boxes = boxes
        self.known: dict[str, PayloadStatus] = {}
        self.confirmed: list[PayloadConfirm] = []

    async def add(self, name: str, request: PayloadRequest) -> Operation:
        await self._boxes.get(name)
        if any(one.payload.host_dir == request.host_dir for one in self.known.values()):
            raise FailedPrecondition(f"{request.host_dir} is a payload already", hint="limpet payload ls")
        edited = request.host_dir.endswith("/edited")
        made = PayloadStatus(
            payload=Payload(id=new_id("pl"), **request.model_dump()), sandbox=name,
            state="drifted" if edited else "ok", generation=4, time=instant(4), age=1.0,
            reason="a.txt was edited on the host" if edited else None,
            hint="limpet payload confirm" if edited else None,
        )  # fmt: skip
        self.known[made.payload.id] = made
        return begin(self._boxes.operations, "payload", name, made)

    def _one(self, payload: str) -> PayloadStatus:
        found = [one for id, one in self.known.items() if id.startswith(payload)]
        if not found:
            raise NotFound(f"no payload {payload!r}", hint="limpet payload ls")
        return found[0]

    async def remove(self, name: str, payload: str) -> Operation:
        del self.known[self._one(payload).payload.id]
        return begin(self._boxes.operations, "payload", name, None)

    async def status(self, name: str | None) -> Sequence[PayloadStatus]:
        return [one for one in self.known.values() if name in (None, one.sandbox)]

    async def confirm(self, name: str, payload: str, request: PayloadConfirm) -> Operation:
        self.confirmed.append(request)
        one = self._one(payload)
        one.state, one.reason, one.hint = "ok", None, None
        return begin(self._boxes.operations, "payload", name, one)


class PlayedTrash:
    """What the boxes removed; `precious` has work that is nowhere else."""

    def __init__(self, boxes: PlayedMoments) -> None:
        self._boxes = boxes
        self.known: list[TrashEntry] = []

    def take(self, box: Sandbox) -> None:
        """What `remove` does without `purge`."""
        now = datetime.now(UTC)
        self.known.insert(
            0,
            TrashEntry(
                id=box.id, name=box.name, removed_at=now, expires_at=now + timedelta(days=7), size=2048, generations=3,
                sandbox=box,
            ),
        )  # fmt: skip

    def _one(self, trashed: str) -> TrashEntry:
        for entry in self.known:
            if trashed == entry.name or entry.id.startswith(trashed):
                return entry
        raise NotFound(f"nothing in the trash is named '{trashed}'", hint="limpet trash ls")

    async def list(self) -> Sequence[TrashEntry]:
        return self.known

    async def empty(self, trashed: str | None) -> Operation:
        gone = [*self.known] if trashed is None else [self._one(trashed)]
        self.known = [entry for entry in self.known if entry not in gone]
        result = PruneResult(removed=[entry.name for entry in gone], freed=2048 * len(gone))
        return begin(self._boxes.operations, "empty", trashed, result)

    async def undelete(self, trashed: str, request: UndeleteRequest) -> Operation:
        entry = self._one(trashed)
        name = request.as_name or entry.name
        if name in self._boxes.known:
            raise AlreadyExists(f"there is a sandbox named '{name}' already", hint=f"limpet undelete {name} --as NEW")
        self.known.remove(entry)
        back = entry.sandbox.model_copy(update={"name": name, "state": State.STOPPED})
        self._boxes.known[name] = back
        return begin(self._boxes.operations, "undelete", name, back)

    async def risk(self, name: str) -> RiskReport:
        await self._boxes.get(name)
        if name == "precious":
            paths = [f"src/{number}.py" for number in range(7)]
            return RiskReport(sandbox=name, known=True, commits=2, stashes=1, changed=paths, untracked=[ODD])
        return RiskReport(sandbox=name, known=False, reason="it does not run", generation=4)
