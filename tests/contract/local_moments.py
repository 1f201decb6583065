"""What a sandbox was, and what is made of it, for the API's tests: checkpoints that are records, copies, images,
templates and disk space. The configuration is the real one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from limpet.errors import BadRequest, FailedPrecondition, InsufficientSpace, NotFound, nearest
from limpet.models import (
    CheckpointInfo,
    CheckpointRequest,
    CommitRequest,
    CommitResult,
    DiskUsage,
    ForkFailure,
    ForkRequest,
    ForkResult,
    ImageBuildRequest,
    ImageFileRequest,
    ImageInfo,
    ImageVersion,
    Operation,
    PruneRequest,
    PruneResult,
    RestoreRequest,
    RestoreResult,
    Sandbox,
    State,
    TemplateInfo,
    TemplateRequest,
    Usage,
    VerifyRequest,
    VerifyResult,
)
from limpet.names import new_id
from limpet.services.operations import Operations, Result, Stages

FITTING = 3  # copies for which the memory of this host is enough
LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)


def begin(operations: Operations, kind: str, target: str | None, result: Result) -> Operation:
    """An operation that ends at once."""

    async def work(stages: Stages) -> Result:
        return result

    return operations.start(kind, target, work)


class PlayedMoments:
    """The verbs that take a sandbox of `known` elsewhere. A fork of more than FITTING copies fails for the rest."""

    operations: Operations
    known: dict[str, Sandbox]

    async def get(self, name: str) -> Sandbox:
        if name not in self.known:
            raise NotFound(f"no sandbox named {name!r}", hint=nearest(name, self.known))
        return self.known[name]

    async def _turn(self, name: str, verb: str, state: State) -> Operation:
        box = await self.get(name)
        box.state = state
        return begin(self.operations, verb, name, box)

    async def pause(self, name: str) -> Operation:
        return await self._turn(name, "pause", State.PAUSED)

    async def resume(self, name: str) -> Operation:
        if (await self.get(name)).state not in (State.PAUSED, State.SUSPENDED):
            raise FailedPrecondition(f"{name} is neither paused nor suspended")
        return await self._turn(name, "resume", State.RUNNING)

    async def suspend(self, name: str) -> Operation:
        return await self._turn(name, "suspend", State.SUSPENDED)

    async def fork(self, name: str, request: ForkRequest) -> Operation:
        source = await self.get(name)
        prefix = request.prefix or name
        names = [request.name] if request.name else [f"{prefix}-{number + 1}" for number in range(request.count)]
        result = ForkResult(source=name, forks=[])
        for number, copy in enumerate(names):
            if copy in self.known or number >= FITTING:
                error = InsufficientSpace(f"no room for {copy}", hint=f"{FITTING} copies fit")
                result.failed.append(ForkFailure(name=copy, error=error.to_dict()))
                continue
            self.known[copy] = source.model_copy(update={"id": new_id("sb"), "name": copy}, deep=True)
            result.forks.append(self.known[copy])
        return begin(self.operations, "fork", name, result)

    async def commit(self, name: str, request: CommitRequest) -> Operation:
        await self.get(name)
        image, _, tag = request.image.partition(":")
        info = played_image(image, tag or "latest").model_copy(update={"comment": request.comment, "source": "commit"})
        return begin(self.operations, "commit", name, CommitResult(image=info, frozen_ms=12.5))


class PlayedCheckpoints:
    """Checkpoints that are records; those labelled "bad" are damaged."""

    def __init__(self, boxes: PlayedMoments) -> None:
        self._boxes = boxes
        self.known: list[CheckpointInfo] = []

    def _make(self, box: Sandbox, request: CheckpointRequest, made_by: Literal["user", "restore"]) -> CheckpointInfo:
        own = [info.id for info in self.known if info.sandbox_id == box.id]
        disk_only = request.disk_only or box.state is State.STOPPED
        made = CheckpointInfo(
            id=new_id("ck"), sandbox=box.name, sandbox_id=box.id, parent=own[-1] if own else None, spec=box.spec,
            created_at=datetime.now(UTC), label=request.label, kind="disk" if disk_only else "full", made_by=made_by,
            memory_bytes=0 if disk_only else 3 << 20, disk_bytes=1 << 20, pause_ms=42,
        )  # fmt: skip
        self.known.append(made)
        return made

    async def create(self, name: str, request: CheckpointRequest) -> Operation:
        return begin(
            self._boxes.operations, "checkpoint", name, self._make(await self._boxes.get(name), request, "user")
        )

    async def list(self, name: str | None) -> Sequence[CheckpointInfo]:
        if name is None:
            return self.known
        box = await self._boxes.get(name)
        return [info for info in self.known if info.sandbox_id == box.id]

    async def get(self, checkpoint: str) -> CheckpointInfo:
        found = [info for info in self.known if info.id.startswith(checkpoint)]
        if len(found) > 1:
            raise BadRequest(f"{checkpoint!r} is the beginning of {len(found)} checkpoints")
        if not found:
            raise NotFound(f"no checkpoint {checkpoint!r}", hint="limpet checkpoint ls")
        return found[0]

    async def verify(self, checkpoint: str, request: VerifyRequest) -> Operation:
        info = await self.get(checkpoint)
        problems = ["ram: is not as it was written"] if info.label == "bad" else []
        booted = not problems if request.boot else None
        result = VerifyResult(id=info.id, ok=not problems, problems=problems, booted=booted)
        return begin(self._boxes.operations, "verify", info.id, result)

    async def remove(self, checkpoint: str) -> Operation:
        info = await self.get(checkpoint)
        self.known.remove(info)
        return begin(self._boxes.operations, "remove", info.id, PruneResult(removed=[info.id], freed=4 << 20))

    async def restore(self, name: str, request: RestoreRequest) -> Operation:
        labelled = [info for info in await self.list(None) if info.label == request.checkpoint]
        info = labelled[-1] if labelled else await self.get(request.checkpoint)
        if request.as_name is not None:
            made = Sandbox(id=new_id("sb"), name=request.as_name, state=State.RUNNING, spec=info.spec,
                           created_at=datetime.now(UTC))  # fmt: skip
            self._boxes.known[made.name] = made
            return begin(self._boxes.operations, "restore", made.name, RestoreResult(sandbox=made, checkpoint=info))
        box = await self._boxes.get(name)
        if box.state is State.RUNNING and not request.force:
            raise FailedPrecondition(f"{name} is running", hint="--force replaces it")
        return self._back(box, info)

    async def undo(self, name: str) -> Operation:
        own = [info for info in await self.list(name) if info.made_by == "user"]
        if not own:
            raise FailedPrecondition(f"{name} has no checkpoint to go back to")
        return self._back(await self._boxes.get(name), own[-1])

    def _back(self, box: Sandbox, info: CheckpointInfo) -> Operation:
        saved = self._make(box, CheckpointRequest(), "restore")
        box.state = State.RUNNING
        return begin(
            self._boxes.operations, "restore", box.name, RestoreResult(sandbox=box, checkpoint=info, saved=saved)
        )


def played_image(name: str, tag: str = "latest") -> ImageInfo:
    """An image; that of the name "served" has an entrypoint."""
    spec = {"entrypoint": ["echo", "from the entrypoint"]} if name == "served" else {}
    return ImageInfo(name=name, tag=tag, digest="sha256:00", size=1, disk_used=2048, created_at=LONG_AGO, spec=spec)


class PlayedImages:
    """`base` and `served` are there; `broken` fails its verification; `base` is in use."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self.known = {image.name: image for image in map(played_image, ("base", "served", "broken"))}
        self.files: list[ImageFileRequest] = []
        self.builds: list[ImageBuildRequest] = []

    async def list(self) -> Sequence[ImageInfo]:
        return [*self.known.values()]

    async def get(self, image: str) -> ImageInfo:
        name, _, tag = image.partition(":")
        if name not in self.known or tag not in ("", self.known[name].tag):
            raise NotFound(f"no image {image!r}", hint=nearest(image, self.known))
        return self.known[name]

    async def history(self, name: str) -> Sequence[ImageVersion]:
        info = await self.get(name)
        return [
            ImageVersion(digest=info.digest, tags=["latest", "v2"], created_at=LONG_AGO, source="commit", used_by=2),
            ImageVersion(digest="sha256:11", tags=[], created_at=LONG_AGO, source="built", comment="first"),
        ]

    async def remove(self, image: str) -> None:
        name = (await self.get(image)).name
        if name == "base":
            raise FailedPrecondition("image base is used by web", hint="remove these first")
        del self.known[name]

    async def prune(self) -> PruneResult:
        return PruneResult(removed=["base@sha256:11"], freed=1 << 20)

    async def verify(self, image: str) -> Operation:
        info = await self.get(image)
        problems = ["root.raw: is not as it was written"] if info.name == "broken" else []
        return begin(
            self._operations, "verify", image, VerifyResult(id=info.digest, ok=not problems, problems=problems)
        )

    async def build(self, request: ImageBuildRequest) -> Operation:
        if request.name not in ("base", "docker"):
            raise NotFound(f"no recipe {request.name!r}", hint=nearest(request.name, ["base", "docker"]))
        self.builds.append(request)
        made = self.known[request.name] = played_image(request.name)
        return begin(self._operations, "image build", request.name, made)

    async def export(self, image: str, request: ImageFileRequest) -> Operation:
        info = await self.get(image)
        self.files.append(request)
        return begin(self._operations, "export", image, info)

    async def import_file(self, request: ImageFileRequest) -> Operation:
        name, _, tag = (request.name or Path(request.path).stem).partition(":")
        self.files.append(request)
        made = self.known[name] = played_image(name, tag or "latest")
        return begin(self._operations, "import", name, made)


class PlayedTemplates:
    """One template at first."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self.known: dict[str, TemplateInfo] = {}
        self._add("0123456789abcdef", TemplateRequest())

    def _add(self, key: str, request: TemplateRequest) -> TemplateInfo:
        made = TemplateInfo(
            key=key, digest="sha256:00", accel="tcg", size=5 << 20, created_at=LONG_AGO, used_at=LONG_AGO,
            current=True, **request.model_dump(),
        )  # fmt: skip
        self.known[key] = made
        return made

    async def list(self) -> Sequence[TemplateInfo]:
        return [*self.known.values()]

    async def build(self, request: TemplateRequest) -> Operation:
        async def work(stages: Stages) -> TemplateInfo:
            async with stages.run("boot"):
                return self._add(f"{len(self.known):016x}", request)

        return self._operations.start("template", request.image, work)

    async def remove(self, key: str) -> None:
        if key not in self.known:
            raise NotFound(f"no template {key!r}", hint="limpet template ls")
        del self.known[key]


class PlayedStorage:
    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self.requests: list[PruneRequest] = []

    async def usage(self) -> DiskUsage:
        rows = [
            Usage(kind="images", count=2, active=1, size=3 << 20, reclaimable=1 << 20),
            Usage(kind="trash", count=1, active=0, size=1 << 20, reclaimable=1 << 20),
        ]
        return DiskUsage(rows=rows, total=4 << 20, free=9 << 30)

    async def prune(self, request: PruneRequest) -> Operation:
        self.requests.append(request)

        return begin(self._operations, "prune", None, PruneResult(removed=["trash/one"], freed=1 << 20))
