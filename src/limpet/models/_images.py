"""What sandboxes are made from: images and templates."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from limpet.models._base import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MIN_MEMORY_MIB, Model, Request


class ImageInfo(Model):
    """One version of an image. `digest` names its content: disks, spec and workspace. `spec` is what sandboxes of it
    begin with (env, labels, user, workdir, entrypoint, vcpus, memory_mib: those that were chosen), `workspace` what its
    data disk holds (guest_dir, base, kind)."""

    name: str
    tag: str = "latest"
    digest: str
    size: int  # virtual, of the root disk
    disk_used: int  # of all its disks, on the host
    created_at: datetime
    user: str = "user"
    home: str = "/home/user"
    spec: dict[str, Any] = {}
    workspace: dict[str, Any] | None = None
    parent: str | None = None  # digest of the image that the sandbox was made from
    comment: str | None = None
    source: Literal["built", "commit", "import", "tar"] = "built"


class ImageVersion(Model):
    """One line of an image's history, the newest first."""

    digest: str
    tags: list[str]  # that name it now
    created_at: datetime
    source: str  # built, commit, import, tar
    parent: str | None = None
    comment: str | None = None
    disk_used: int = 0
    used_by: int = 0  # sandboxes, checkpoints and templates that build on it


class ImageFileRequest(Request):
    """Export an image to, or import one from, a file of this host (absolute path). `name`: `NAME[:TAG]` for the
    imported one, default: as in the file. `replace`: overwrite an existing file or tag."""

    path: str
    name: str | None = None
    replace: bool = False


class CommitRequest(Request):
    """POST …/commit: make `image` (`NAME[:TAG]`) out of the sandbox as it is now."""

    image: str
    comment: str | None = None


class CommitResult(Model):
    image: ImageInfo
    frozen_ms: float  # how long the guest's file systems stood still


class TemplateInfo(Model):
    """A booted, warmed VM that sandboxes of this shape start from."""

    key: str
    image: str
    digest: str  # of the image
    vcpus: int
    memory_mib: int
    network: Literal["user", "none"]
    accel: Literal["kvm", "tcg"]
    size: int  # bytes on the host's disk
    created_at: datetime
    used_at: datetime
    current: bool  # False: something it was made of has changed; it will not be used again


class TemplateRequest(Request):
    """POST /v1/templates: build one now."""

    image: str = "base"
    vcpus: Annotated[int, Field(ge=1, le=64)] = DEFAULT_VCPUS
    memory_mib: Annotated[int, Field(ge=MIN_MEMORY_MIB, le=1 << 20)] = DEFAULT_MEMORY_MIB
    network: Literal["user", "none"] = "user"
