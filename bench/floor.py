"""The floor: limpet's kernel, booted bare by the same QEMU to a shell that prints one line. Nothing of limpet runs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from limpet import images, paths, process
from limpet.images.cpio import Archive
from limpet.vmm import accel, command

_INIT = b"#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs d /dev\necho SHELL > /dev/ttyS0\n/bin/busybox sleep 60\n"
_LIMIT = 30.0  # seconds


def bare_boot(where: paths.Paths, verdict: accel.Verdict, tsc_khz: int | None, directory: Path) -> float:
    """Seconds from starting QEMU to the shell's first line."""
    initramfs = directory / "floor.cpio"
    initramfs.write_bytes(_initramfs())
    pieces = images.artifacts(where)
    argv = [
        process.require(command.QEMU), *command.board(verdict.accel), *command.accelerator(verdict.accel),
        "-smp", "2", "-m", "512", "-kernel", str(pieces.kernel), "-initrd", str(initramfs),
        "-append", " ".join(command.kernel_parameters(verdict.accel, tsc_khz)), "-serial", "stdio",
    ]  # fmt: skip
    began = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        try:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                if b"SHELL" in line:
                    return time.perf_counter() - began
                if time.perf_counter() - began > _LIMIT:
                    break
            raise RuntimeError("the bare boot printed no SHELL")
        finally:
            qemu.kill()


def _initramfs() -> bytes:
    archive = Archive()
    for directory in ("bin", "dev"):
        archive.directory(directory)
    busybox = Path(process.require("busybox")).read_bytes()
    archive.file("bin/busybox", busybox, 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.file("init", _INIT, 0o755)
    return archive.to_bytes()
