"""What is kept beyond a sandbox's disks: generations, payloads, the trash."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from limpet.models._base import AnyPath, Model, Request
from limpet.models._payloads import Payload
from limpet.models._sandboxes import Sandbox


class GenerationInfo(Model):
    """One instant of what a sandbox keeps: `/home`, `/workspace` and its payloads. `files` and `bytes` are those of
    the whole tree; `new_bytes` is what this generation added to the vault."""

    generation: int
    time: datetime  # at which the guest's snapshot was taken, by the host's clock
    files: int
    bytes: int
    new_bytes: int = 0
    volumes: list[AnyPath] = []  # where they are mounted in the guest
    pinned: str | None = None  # why it is kept whatever its age


class PathVersion(Model):
    """One path from `generation` on, until the next version. `change`: what happened to it there. `files` and `bytes`:
    of the path and everything below it."""

    generation: int
    time: datetime
    change: Literal["added", "changed", "removed"]
    files: int
    bytes: int
    mode: int | None = None
    modified: datetime | None = None


class PathChange(Model):
    """One path that differs between two generations. Sizes are None where it is not a file or not there."""

    change: Literal["added", "changed", "removed"]
    path: AnyPath
    before: int | None = None
    after: int | None = None


class VaultEntry(Model):
    """One path of a generation, as `show` lists directories. Times, owners and modes are the guest's."""

    path: AnyPath
    kind: Literal["file", "dir", "symlink", "fifo", "socket", "char", "block"]
    mode: int
    uid: int
    gid: int
    size: int
    modified: datetime
    target: AnyPath | None = None


class VaultListing(Model):
    """What `entry` was in a generation; for a directory, `entries` is what it held, by name."""

    generation: int
    time: datetime
    entry: VaultEntry
    entries: list[VaultEntry] = []


class VaultRestoreRequest(Request):
    """POST …/vault/restore. `at`: a generation's number or a time (ISO 8601), the newest when None. `path`: absolute in
    the guest, everything when None. `to`: an absolute directory of this host that is not there yet or empty; None: back
    into the running guest, over what is there now (which is made a generation first)."""

    path: AnyPath | None = None
    at: str | None = None
    to: str | None = None


class VaultRestored(Model):
    """`left_out`: what this user or host file system could not take (devices, owners, set-id bits …), counted."""

    generation: int
    time: datetime
    path: AnyPath
    to: str | None
    files: int
    bytes: int
    left_out: dict[str, int] = {}
    saved: int | None = None  # the generation that holds what was overwritten
    seconds: float = 0.0


class VaultCheck(Model):
    """Whether everything in a vault is as it was written. `problems` name the file and what is wrong with it."""

    sandbox: str
    ok: bool
    generations: int
    objects: int
    bytes: int
    problems: list[str] = []
    repaired: list[str] = []
    seconds: float = 0.0


class VaultChecks(Model):
    """The checks of one vault or of all."""

    checks: list[VaultCheck]


class VaultUsage(Model):
    """What a vault takes of the host's disk. `reclaimable`: what the next gc frees."""

    sandbox: str
    sandbox_id: str
    state: str  # the sandbox's, or `trashed`
    generations: int
    oldest: datetime | None = None
    newest: datetime | None = None
    size: int
    reclaimable: int = 0


class SyncResult(Model):
    """`generation` is the newest now; `new`: whether this sync made it (nothing had changed otherwise)."""

    generation: int | None
    time: datetime | None
    new: bool
    seconds: float = 0.0


class PayloadConfirm(Request):
    """POST …/payloads/{id}/confirm: let a held-back deletion through, or choose a side after edits on the host.
    `keep`: `guest` publishes over the host's edits (which stay beside, under `saved`), `host` seeds the guest anew."""

    keep: Literal["guest", "host"] = "guest"


class PayloadStatus(Model):
    """`state`: seeding · ok · held (would delete too much) · drifted (edited on the host) · failing · stopped."""

    payload: Payload
    sandbox: str
    state: Literal["seeding", "ok", "held", "drifted", "failing", "stopped"]
    generation: int | None = None  # what the host directory shows
    time: datetime | None = None
    age: float | None = None  # seconds since the host directory was known to be in step
    failures: int = 0  # in a row
    degraded: bool = False
    reason: str | None = None
    hint: str | None = None


class SyncStatus(Model):
    """How far behind the host is with what a sandbox wrote. `lag`: seconds that the oldest change not yet on the host
    has waited (0: none). `pending_*` are None when nobody could be asked."""

    sandbox: str
    sandbox_id: str
    state: str
    last_durable: datetime | None = None
    generation: int | None = None
    age: float | None = None  # seconds since the host was last known to be in step
    pending_files: int | None = None
    pending_bytes: int | None = None
    lag: float = 0.0
    failures: int = 0  # in a row
    degraded: bool = False
    why: str | None = None
    last_verified: datetime | None = None  # a restore or check that found everything as it was written
    log: list[str] = []  # the last lines of what the syncer had to say
    payloads: list[PayloadStatus] = []


class RiskReport(Model):
    """What only the sandbox has: asked before it is removed. `known` is False when nobody could look."""

    sandbox: str
    known: bool
    reason: str | None = None  # why it is not known
    commits: int = 0
    stashes: int = 0
    changed: list[AnyPath] = []
    untracked: list[AnyPath] = []
    generation: int | None = None  # of the vault, which holds all of it


class TrashEntry(Model):
    """A sandbox in the trash, under the name that it had. `generations`: how many its vault holds."""

    id: str  # the sandbox's
    name: str
    removed_at: datetime
    expires_at: datetime
    size: int
    generations: int
    sandbox: Sandbox


class UndeleteRequest(Request):
    """`as_name`: where its old name is taken by now."""

    as_name: str | None = None
