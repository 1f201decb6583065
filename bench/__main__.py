"""`python -m bench`: run everything, print the table, write bench/results/*.json and docs/performance.md's table."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from bench import durability, engine, floor, suite, warm
from limpet import Client, images, paths, process
from limpet.vmm import accel

_ROOT = Path(__file__).parent.parent


def rows(client: Client, floors: list[float]) -> Iterator[suite.Row]:
    daemon = client.status().pid
    yield from suite.cold_create(client, floors)
    with client.sandboxes.create(memory_mib=512, ephemeral=True, network="none") as sandbox:
        yield from suite.execs(sandbox, client)
        yield from suite.command_line(sandbox)
    with client.sandboxes.create(memory_mib=512, ephemeral=True, network="none") as sandbox:
        sandbox.exec("git --version && python3 -c 'print(1)'").check()
        yield from suite.idle(sandbox, daemon)
        yield from suite.bulk(sandbox, daemon)
    yield from suite.workspace(client)
    yield from suite.stop(client)


async def conditions(where: paths.Paths) -> tuple[accel.Verdict, int | None]:
    """The accelerator that sandboxes get here, and the TSC's frequency under emulation."""
    pieces = images.artifacts(where)
    verdict = await accel.probe(where.probe, kernel=pieces.kernel, initramfs=pieces.initramfs, key=pieces.key)
    return verdict, await accel.tsc_khz(where.probe, kernel=pieces.kernel) if verdict.accel == "tcg" else None


def table(measured: list[suite.Row]) -> str:
    lines = ["| what | measured | to reach |", "|---|---|---|"]
    for row in measured:
        sign = "≤" if row.better == "less" else "≥"
        target = "" if row.target is None else f"{sign} {row.target:g} {row.unit}" + ("" if row.reached else " ✗")
        lines.append(f"| {row.what} | {row.value:g} {row.unit}{f' ({row.note})' if row.note else ''} | {target} |")
    return "\n".join(lines)


def main(wanted: list[str]) -> int:
    where = paths.discover()
    asyncio.run(images.setup(where, progress=lambda stage: None))
    verdict, tsc = asyncio.run(conditions(where))
    reached = True
    with Client() as client:
        if not wanted or "main" in wanted:
            with tempfile.TemporaryDirectory() as directory:
                floors = [floor.bare_boot(where, verdict, tsc, Path(directory)) for _ in range(5)]
            reached &= record("main", verdict.accel, rows(client, floors))
        if not wanted or "warm" in wanted:
            reached &= record("warm", verdict.accel, warm.rows(client, where))
        if not wanted or "durable" in wanted:
            reached &= record("durable", verdict.accel, durability.rows(client, where))
        if not wanted or "engine" in wanted:
            reached &= record("engine", verdict.accel, engine.rows(client))
    return 0 if reached else 1


def record(name: str, accelerator: str, measuring: Iterator[suite.Row]) -> bool:
    """Print the rows as they come, keep them; whether all reach their targets."""
    measured: list[suite.Row] = []
    for row in measuring:
        measured.append(row)
        print(f"{row.what:62} {row.value:>9g} {row.unit:10} {'' if row.reached else 'MISSED'}", flush=True)
    document = {
        "time": datetime.now(UTC).isoformat(),
        "accel": accelerator,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "qemu": process.run_sync(["qemu-system-x86_64", "--version"]).stdout.decode().splitlines()[0],
        "rows": [row.to_dict() for row in measured],
    }
    results = _ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}-{accelerator}.json").write_text(json.dumps(document, indent=1) + "\n")
    page, begin, end = _ROOT / "docs" / "performance.md", f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{table(measured)}\n{end}{rest.partition(end)[2]}")
    return all(row.reached for row in measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
