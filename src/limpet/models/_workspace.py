"""The imported directory, and its changes on their way back."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from limpet.models._base import AnyPath, Model, Request


class WorkspaceInfo(Model):
    """The directory that was imported. `base` is the commit of the imported state: what `diff` compares with."""

    host_dir: str
    guest_dir: str
    status: Literal["partial", "complete"]
    kind: Literal["git", "directory"]
    base: str | None = None
    head: str | None = None  # the host's HEAD at import, to notice that it moved
    fingerprint: str | None = None  # of the host tree at import
    imported_at: datetime | None = None
    files: int = 0
    bytes: int = 0


class ImportRequest(Request):
    """Bring a host directory into the guest. `dry_run` only says what would be copied. A workspace that is there and
    has changes which `replace` does not give up is kept: the import is refused."""

    host_dir: str
    untracked: bool = True
    replace: bool = False
    dry_run: bool = False


class ImportResult(Model):
    workspace: WorkspaceInfo
    files: int
    bytes: int
    paths: list[AnyPath] | None = None  # with dry_run: every path that would be copied
    warnings: list[str] = []  # what was left out or comes differently


class Change(Model):
    """One changed file: git's status letter (A, M, D, T), path, lines added and removed (None: binary)."""

    status: str
    path: AnyPath
    added: int | None = None
    removed: int | None = None


class Changes(Model):
    base: str
    changes: list[Change]
    patch_bytes: int = 0
    warnings: list[str] = []  # what git in the sandbox could not take along


class ApplyRequest(Request):
    """Apply the sandbox's changes to `host_dir` (default: where it was imported from)."""

    host_dir: str | None = None
    base: str | None = None
    check: bool = False  # only say whether it would apply


class ApplyResult(Model):
    host_dir: str
    base: str
    changes: list[Change]
    applied: bool


class Drift(Model):
    """Whether the host directory changed since its import, and how that shows."""

    moved: bool
    why: str | None = None
