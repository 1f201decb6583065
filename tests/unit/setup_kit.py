"""Setup without a network: the slow builders are replaced by ones that write small real files; the steps, the lock, the
staging and the publishing are the real ones. Run as a program it is a setup that can be killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from limpet.images import agent_disk, blank, debian, initramfs, kernel, pieces, requirements, setup
from limpet.images.bootstrap import Report
from limpet.models import Stage
from limpet.paths import Paths

STEPS = ["pieces", "kernel", "initramfs", "agent disk", "data disk", "image base"]


def paths_in(home: Path) -> Paths:
    return Paths(home / "data", home / "cache", home / "run")


async def run(home: Path, *, hang_in: str = "", seen: list[Stage] | None = None, fail_in: str = "") -> list[str]:
    """Set up `home`; `hang_in` names a step that never ends, `fail_in` one that breaks; both do half their work."""
    with builders(hang_in, fail_in):
        return await setup(paths_in(home), progress=(seen if seen is not None else []).append)


@contextlib.contextmanager
def builders(hang_in: str = "", fail_in: str = "") -> Iterator[None]:
    """The quick builders instead of the real ones."""

    async def work(step: str, directory: Path) -> None:
        (directory / "half").write_bytes(bytes(1 << 20))
        if step == hang_in:
            print("hanging", flush=True)
            time.sleep(600)  # blocks: nothing but a kill ends it
        if step == fail_in:
            raise OSError("the disk broke")
        (directory / "half").unlink()

    async def fake_pieces(staging: Path, report: Report, mirror: str | None) -> None:
        await work("pieces", staging)
        (staging / "vmlinuz").write_bytes(b"kernel")
        (staging / "facts.json").write_text(json.dumps({"kernel_release": "6.1.0-test"}))

    async def fake_kernel(content: bytes) -> bytes:
        return b"\x7fELF" + content

    async def fake_agent(found: pieces.Pieces, staging: Path, target: Path) -> None:
        await work("agent disk", staging)
        target.write_bytes(b"agent")

    async def fake_blank(found: pieces.Pieces, vmlinux: Path, staging: Path, target: Path) -> None:
        await work("data disk", staging)
        target.write_bytes(b"blank")

    async def fake_disk(
        staging: Path, packages: Sequence[str], hooks: Sequence[str], report: Report, mirror: str | None
    ) -> None:
        await work(f"image {staging.parent.name}", staging)
        report(0.5, "half")
        (staging / "root.raw").write_bytes(" ".join(packages).encode())

    async def no_check(paths: Paths) -> None:
        return None

    with (
        mock.patch.object(pieces, "build", fake_pieces), mock.patch.object(kernel, "vmlinux", fake_kernel),
        mock.patch.object(initramfs, "build", lambda found: b"cpio"),
        mock.patch.object(agent_disk, "build", fake_agent), mock.patch.object(blank, "build", fake_blank),
        mock.patch.object(debian, "build", fake_disk),
        mock.patch.object(requirements, "check", no_check),
    ):  # fmt: skip
        yield


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(Path(sys.argv[1]), hang_in=sys.argv[2] if len(sys.argv) > 2 else ""))))
