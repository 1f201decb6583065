"""One instant of all of a sandbox's volumes."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from limpet.errors import BadRequest, NotFound
from limpet.models import GenerationInfo
from limpet.vault.nodes import decode, encode
from limpet.vault.objects import Objects
from limpet.vault.pages import Root
from limpet.vault.trees import Tree, TreeRoot


@dataclass(frozen=True)
class VolumeInfo:
    """`mount`: absolute guest path. `token`, `uuid`: of the guest's snapshot that it was made from."""

    mount: bytes
    token: str
    uuid: str
    root: TreeRoot


class Generation:
    """What a manifest says; `pinned`: why it is kept whatever its age."""

    def __init__(
        self, objects: Objects, number: int, time: datetime, volumes: Mapping[str, VolumeInfo], new_bytes: int = 0,
    ) -> None:  # fmt: skip
        self._objects = objects
        self.number = number
        self.time = time
        self.volumes = dict(volumes)
        self.new_bytes = new_bytes
        self.pinned: str | None = None

    @property
    def info(self) -> GenerationInfo:
        """Of all volumes together."""
        totals = [self.tree(name).totals() for name in self.volumes]
        return GenerationInfo(
            generation=self.number,
            time=self.time,
            files=sum(files for files, _ in totals),
            bytes=sum(size for _, size in totals),
            new_bytes=self.new_bytes,
            volumes=[os.fsdecode(volume.mount) for volume in self.volumes.values()],
            pinned=self.pinned,
        )

    def tree(self, volume: str) -> Tree:
        """Raises NotFound."""
        if volume not in self.volumes:
            raise NotFound(f"generation {self.number} has no volume {volume!r}")
        return Tree(self._objects, self.volumes[volume].root)

    def locate(self, guest_path: bytes) -> tuple[str, bytes]:
        """(volume, path relative to it) of an absolute guest path. Raises BadRequest; NotFound naming the mounts."""
        parts = [part for part in guest_path.split(b"/") if part not in (b"", b".")]
        if not guest_path.startswith(b"/") or b".." in parts:
            raise BadRequest(f"{os.fsdecode(guest_path)!r} is no absolute path without '..'")
        mounts = {tuple(filter(None, volume.mount.split(b"/"))): name for name, volume in self.volumes.items()}
        for length in range(len(parts), -1, -1):
            if (name := mounts.get(tuple(parts[:length]))) is not None:
                return name, b"/".join(parts[length:])
        raise NotFound(
            f"generation {self.number} does not have {os.fsdecode(guest_path)!r}",
            hint="it has " + (", ".join(sorted(os.fsdecode(v.mount) for v in self.volumes.values())) or "nothing"),
        )

    def manifest(self) -> bytes:
        """What its file says about it."""
        return json.dumps(
            {
                "generation": self.number,
                "time": self.time.isoformat(),
                "new_bytes": self.new_bytes,
                "volumes": {
                    name: {
                        "mount": os.fsdecode(volume.mount),
                        "token": volume.token,
                        "uuid": volume.uuid,
                        "root": b64encode(encode(volume.root.node)).decode(),
                        "links": b64encode(volume.root.links.encode()).decode(),
                        "next_group": volume.root.next_group,
                    }
                    for name, volume in self.volumes.items()
                },
            }
        ).encode()

    @classmethod
    def of(cls, objects: Objects, manifest: bytes) -> Generation:
        """The generation of such a manifest."""
        data = json.loads(manifest)
        volumes = {
            name: VolumeInfo(
                os.fsencode(volume["mount"]),
                volume["token"],
                volume["uuid"],
                TreeRoot(
                    decode(b64decode(volume["root"])), Root.decode(b64decode(volume["links"])), volume["next_group"]
                ),
            )
            for name, volume in data["volumes"].items()
        }
        return cls(objects, data["generation"], datetime.fromisoformat(data["time"]), volumes, data["new_bytes"])
