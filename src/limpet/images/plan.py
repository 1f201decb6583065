"""Where everything that setup makes will be, known before any of it is made: names are hashes of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from limpet.errors import FailedPrecondition
from limpet.images import agent_disk, blank, initramfs, keys, pieces
from limpet.paths import Paths


@dataclass(frozen=True)
class Artifacts:
    """What a VM is started with. `key` changes when any of it does. `blank_data`: a qcow2 to copy for each sandbox."""

    kernel: Path
    initramfs: Path
    agent_disk: Path
    blank_data: Path
    kernel_release: str
    key: str


@dataclass(frozen=True)
class Plan:
    """Where everything will be, known before any of it is made."""

    paths: Paths
    pieces: Path
    kernel: Path
    initramfs: Path
    agent_disk: Path
    blank_data: Path

    @classmethod
    def make(cls, paths: Paths) -> Plan:
        """The plan of this version of limpet. Reads its sources only; takes some milliseconds."""
        pieces_key = pieces.key()
        scripts = [(initramfs.GUEST / "init").read_bytes(), Path(initramfs.__file__).read_bytes()]

        def artifact(name: str, key: str, suffix: str = "") -> Path:
            return paths.artifacts / f"{name}-{key}{suffix}"

        return cls(
            paths,
            pieces=paths.pieces / pieces_key,
            kernel=artifact("vmlinux", keys.key_of("kernel", pieces_key)),
            initramfs=artifact("initramfs", keys.key_of("initramfs", pieces_key, *scripts)),
            agent_disk=artifact("agent", agent_disk.key(pieces_key), ".squashfs"),
            blank_data=artifact("data", blank.key(pieces_key), ".qcow2"),
        )

    def files(self) -> tuple[Path, ...]:
        """The artifacts, as they are published."""
        return (self.kernel, self.initramfs, self.agent_disk, self.blank_data)

    def missing(self) -> list[Path]:
        """The artifacts that are not there yet."""
        return [path for path in self.files() if not path.exists()]


def artifacts(paths: Paths) -> Artifacts:
    """What to start VMs with. Raises FailedPrecondition when setup has not been run for this version of limpet."""
    plan = Plan.make(paths)
    try:
        if missing := plan.missing():
            raise FileNotFoundError(missing[0])
        release = pieces.load(plan.pieces).kernel_release
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"not set up yet: {error}", hint="limpet setup") from None
    key = keys.key_of(*(path.name for path in plan.files()))
    return Artifacts(plan.kernel, plan.initramfs, plan.agent_disk, plan.blank_data, release, key)
