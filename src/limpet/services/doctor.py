"""`limpet doctor`: what works on this host, what does not, and what to do about it (VM-20)."""

from __future__ import annotations

import asyncio
import os
import platform
from typing import Literal

from limpet import durable, images, process
from limpet.errors import LimpetError
from limpet.images import upkeep
from limpet.models import DoctorReport, Row, State
from limpet.services import garbage
from limpet.services.host import Host
from limpet.services.vaults import Vaults
from limpet.vmm import accel, lock, network

_VERSIONS = {
    "qemu-system-x86_64": ["--version"], "qemu-img": ["--version"], "mmdebstrap": ["--version"], "git": ["--version"],
    "mke2fs": ["-V"], "mkfs.btrfs": ["--version"], "mksquashfs": ["-version"],
}  # fmt: skip
_SPACE_WARN = 10 << 30
_SPACE_FAIL = 2 << 30


class Doctor:
    """Looks, and with `repair` mends what is safe to mend: leftovers of interrupted work. Never deletes a sandbox."""

    def __init__(self, host: Host, vaults: Vaults) -> None:
        self._host, self._vaults = host, vaults
        self._paths, self._records, self._live = host.paths, host.records, host.live

    async def run(self) -> DoctorReport:
        rows = [*await asyncio.gather(*(_tool(name) for name in _VERSIONS)), _network_tool(), _docker_client()]
        rows += [_python(), await _namespaces(), await self._accelerator(), self._space(), self._pieces()]
        rows += [Row(check="daemon", status="PASS", detail=f"limpetd, pid {os.getpid()}, serves {self._paths.data}")]
        return DoctorReport(rows=[*rows, *await self._vaults.rows(), *self._leftovers()])

    async def repair(self) -> DoctorReport:
        """Sweep what interrupted work left behind, then look again."""
        directories = (self._paths.data, self._paths.sandboxes, self._paths.checkpoints, self._paths.artifacts,
                       self._paths.images)  # fmt: skip
        swept = [str(stray) for directory in directories for stray in durable.sweep(directory)]
        swept += [str(stray) for stray in upkeep.sweep(self._paths)]
        return DoctorReport(rows=(await self.run()).rows, repaired=swept)

    async def _accelerator(self) -> Row:
        try:
            pieces = images.artifacts(self._paths)
            verdict = await accel.probe(
                self._paths.probe, kernel=pieces.kernel, initramfs=pieces.initramfs, key=pieces.key
            )
        except LimpetError as error:
            return Row(check="accelerator", status="FAIL", detail=error.message, remedy=error.hint)
        good = verdict.accel == "kvm"
        return Row(
            check="accelerator",
            status="PASS" if good else "WARN",
            detail=f"{verdict.accel}, isolation: {verdict.isolation}: {verdict.reason}",
            remedy=None
            if good
            else "sandboxes work, about 20 times slower than with KVM; emulation is no security boundary",
        )

    def _space(self) -> Row:
        free = durable.free_bytes(self._paths.data)
        status: Literal["PASS", "WARN", "FAIL"] = "PASS" if free >= _SPACE_WARN else "WARN"
        if free < _SPACE_FAIL:
            status = "FAIL"
        remedy = None if status == "PASS" else "free some space, or set LIMPET_HOME to a larger disk"
        return Row(
            check="disk space", status=status, detail=f"{free >> 30} GiB free at {self._paths.data}", remedy=remedy
        )

    def _pieces(self) -> Row:
        try:
            release = images.artifacts(self._paths).kernel_release
            names = (
                ", ".join(str(images.Reference(image.name, image.tag)) for image in images.list_images(self._paths))
                or "none"
            )
        except LimpetError as error:
            return Row(check="guest pieces", status="FAIL", detail=error.message, remedy=error.hint)
        if old := [recipe.name for recipe in images.RECIPES.values() if recipe.is_outdated(self._paths)]:
            return _warn("guest pieces", f"made by an older limpet: image {', '.join(old)}", "limpet setup")
        return Row(check="guest pieces", status="PASS", detail=f"kernel {release}, images: {names}")

    def _leftovers(self) -> list[Row]:
        """What is on the disk or running without a sandbox that explains it (VM-10: reported, never deleted)."""
        known = {record.id for record in self._records.everything()}
        rows: list[Row] = []
        for directory in sorted(self._paths.sandboxes.iterdir()) if self._paths.sandboxes.is_dir() else ():
            if directory.name in known:
                continue
            if directory.name.startswith("."):
                rows.append(_warn("leftovers", f"{directory} was left by interrupted work", "limpet doctor --repair"))
            elif lock.held(directory / "vm.lock"):
                rows.append(
                    _warn("orphans", f"a VM runs in {directory} but no sandbox owns it", "end it, or keep its disks")
                )
            else:
                rows.append(
                    _warn("orphans", f"{directory} belongs to no sandbox", "look at it, then remove it yourself")
                )
        for checkpoint, problem in self._host.catalogue.damaged.items():
            rows.append(Row(check="checkpoints", status="FAIL", detail=problem,
                            remedy=f"limpet checkpoint rm {checkpoint}"))  # fmt: skip
        for path in garbage.found(self._host, list(garbage.roots(self._host))):
            rows.append(_warn("leftovers", f"nothing needs {path}", "limpet system prune"))
        for record in self._records.everything():
            beginning = record.state in (State.CREATING, State.STARTING)  # it becomes known when it answers
            held = lock.held(self._paths.sandbox(record.id).lock)
            if held and not beginning and self._live.get(record.id) is None:
                rows.append(
                    _warn("orphans", f"the VM of {record.name} runs unattended", "limpet daemon stop, then any command")
                )
        return rows or [Row(check="orphans", status="PASS", detail="none")]


def _warn(check: str, detail: str, remedy: str) -> Row:
    return Row(check=check, status="WARN", detail=detail, remedy=remedy)


async def _tool(name: str) -> Row:
    try:
        done = await process.run([name, *_VERSIONS[name]], timeout=10, check=False)
    except LimpetError as error:
        return Row(check=name, status="FAIL", detail=error.message, remedy=error.hint)
    lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
    return Row(check=name, status="PASS", detail=lines[0] if lines else "installed")


def _network_tool() -> Row:
    if process.find("passt") is None:
        return _warn("passt", "not installed: sandboxes have no network", "sudo apt-get install passt")
    if network.available() is not None:
        return _warn("passt", "installed, but this host has no default route", "connect it, or use --network none")
    return Row(
        check="passt", status="PASS", detail="installed; guests reach out through it, never to the host's loopback"
    )


def _docker_client() -> Row:
    if (program := process.find("docker")) is None:
        return _warn("docker client", "not installed (only `limpet docker` needs it)", "sudo apt-get install docker.io")
    return Row(check="docker client", status="PASS", detail=f"{program}; sandboxes use no engine of this host")


def _python() -> Row:
    return Row(check="python", status="PASS", detail=platform.python_version())


async def _namespaces() -> Row:
    """An ordinary user builds images in a user namespace with a range of sub-ids: `limpet setup` asks the same."""
    if (problem := await images.namespace_problem()) is not None:
        return _warn("namespaces", f"{problem[0]}: images cannot be built", problem[1])
    why = "running as root: not needed" if os.getuid() == 0 else "this user can build images"
    return Row(check="namespaces", status="PASS", detail=why)
