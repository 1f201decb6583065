"""What kind of machine this host runs: what a memory image must be of to be started here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from limpet import images
from limpet.models import SandboxSpec
from limpet.paths import Paths
from limpet.vmm import accel


class MachineFacts(BaseModel):
    """A memory image fits a machine of this kind and no other."""

    accel: Literal["kvm", "tcg"]
    qemu: str
    vcpus: int
    memory_mib: int
    network: Literal["user", "none"]

    def applied_to(self, spec: SandboxSpec) -> SandboxSpec:
        """The spec with this machine's vCPUs and memory: they come with a memory image."""
        return spec.model_copy(update={"vcpus": self.vcpus, "memory_mib": self.memory_mib})

    def difference(self, other: MachineFacts) -> str | None:
        """How another machine differs, as words for the user; None when it does not."""
        mine, others = self.model_dump(), other.model_dump()
        return (
            ", ".join(f"{key} {others[key]} instead of {mine[key]}" for key in mine if mine[key] != others[key]) or None
        )


def shape(spec: SandboxSpec) -> SandboxSpec:
    """Of a spec, what a template or a pooled VM has to share."""
    return SandboxSpec(image=spec.image, vcpus=spec.vcpus, memory_mib=spec.memory_mib, network=spec.network)


async def verdict(paths: Paths) -> accel.Verdict:
    """The accelerator that machines get here, probed when it is not known."""
    pieces = images.artifacts(paths)
    return await accel.probe(paths.probe, kernel=pieces.kernel, initramfs=pieces.initramfs, key=pieces.key)


async def here(paths: Paths, spec: SandboxSpec) -> MachineFacts:
    """The machine that a sandbox of this spec would run on."""
    return MachineFacts(
        accel=(await verdict(paths)).accel, qemu=await accel.qemu_version(), vcpus=spec.vcpus,
        memory_mib=spec.memory_mib, network=spec.network,
    )  # fmt: skip
