"""What templates, pool, forks, checkpoints and commit cost, beside the floor: bare QEMU restoring the same template."""

from __future__ import annotations

import asyncio
import concurrent.futures
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from bench.floor import bare_restore
from bench.measure import pss
from bench.suite import Row
from limpet import Client, paths
from limpet.client import Sandbox

_MIB = 512
_NETWORK: Literal["none"] = "none"
_IN_USE = 140 << 20  # bytes of noise in memory: with what the guest itself uses, some 200 MiB
_ALIVE = 50


def rows(client: Client, where: paths.Paths) -> Iterator[Row]:
    """All rows of the table, in its order."""
    client.config.set("pool.size", "0")
    client.templates.build(memory_mib=_MIB, network=_NETWORK)
    yield from create(client, where)
    yield from pool(client)
    yield from many(client)
    with client.sandboxes.create(memory_mib=_MIB, network=_NETWORK, ephemeral=True) as source:
        source.exec(["sh", "-c", f"head -c {_IN_USE} /dev/urandom > /dev/shm/noise"]).check()
        yield from forks(client, source)
        yield from checkpoints(client, source)
    yield from commit(client)


def create(client: Client, where: paths.Paths, runs: int = 9) -> Iterator[Row]:
    """create → first output from a template, and the floor in turn with it: both see the same weather."""
    _first_output(client)  # the daemon's first look at the template reads it
    floors, times = [], []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(runs):
            floors.append(
                asyncio.run(bare_restore(where, Path(directory) / str(number), memory_mib=_MIB, network=_NETWORK))
            )
            times.append(_first_output(client))
    floor, value = statistics.median(floors), statistics.median(times)
    yield Row("bare QEMU restore of the same template → first output (floor)", round(floor * 1e3), "ms")
    yield Row("create → first output, template", round(value * 1e3), "ms", 250)
    yield Row("  the same, as a multiple of the floor", round(value / floor, 2), "×", 1.3)


def _first_output(client: Client) -> float:
    began = time.perf_counter()
    with client.sandboxes.create(memory_mib=_MIB, network=_NETWORK, ephemeral=True) as sandbox:
        assert sandbox.exec(["echo", "hi"]).stdout == b"hi\n"
        return time.perf_counter() - began


def pool(client: Client, size: int = 5) -> Iterator[Row]:
    """The same out of the warm pool, once it is full."""
    client.config.set("pool.size", str(size))
    times = []
    try:
        _first_output(client)  # tells the pool what shape is wanted
        _pooled(client, size)
        times = [_first_output(client) for _ in range(size)]
    finally:
        client.config.unset("pool.size")
    yield Row("create → first output, pool", round(statistics.median(times) * 1e3), "ms", 60)


def _pooled(client: Client, size: int) -> None:
    """Wait until the pool is full."""
    for _ in range(600):
        if client.status().pooled >= size:
            return
        time.sleep(0.1)
    raise RuntimeError("the pool did not fill")


def many(client: Client) -> Iterator[Row]:
    """Twenty creates at once, and what fifty sandboxes cost that are alive at the same time."""
    with ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(20) as threads:

        def one(_number: int) -> Sandbox:
            sandbox = client.sandboxes.create(memory_mib=_MIB, network=_NETWORK, ephemeral=True)
            stack.callback(sandbox.remove, force=True)
            sandbox.exec(["true"]).check()
            return sandbox

        began = time.perf_counter()
        alive = list(threads.map(one, range(20)))
        yield Row("20 creates at once, all have run a command", round(time.perf_counter() - began, 2), "s", 6)
        alive += list(threads.map(one, range(_ALIVE - 20)))
        assert all(sandbox.exec(["echo", "alive"]).text == "alive\n" for sandbox in alive)
        costs = [pss(sandbox.refresh().pid or 0) for sandbox in alive]
        yield Row(f"{_ALIVE} sandboxes alive, each", round(statistics.mean(costs) / 1e6), "MB PSS", 110)


def forks(client: Client, source: Sandbox, runs: int = 7) -> Iterator[Row]:
    """A copy of a running sandbox that answers; how long the source stood still."""
    times, pauses = [], []
    for _ in range(runs):
        began = time.perf_counter()
        result = source.try_fork()
        copy = client.sandboxes.ref(result.forks[0].name)
        copy.exec(["true"]).check()
        times.append(time.perf_counter() - began)
        copy.remove(force=True)
        pauses.append(result.pause_ms)
    yield Row("fork, 200 MiB in use → the copy has run a command", round(statistics.median(times) * 1e3), "ms", 600)
    yield Row("  the source's pause", round(statistics.median(pauses)), "ms", 100)


def checkpoints(client: Client, source: Sandbox, runs: int = 7) -> Iterator[Row]:
    """Taking one, and a sandbox out of it that answers."""
    times, pauses, restores = [], [], []
    for number in range(runs):
        began = time.perf_counter()
        made = source.checkpoint()
        times.append(time.perf_counter() - began)
        pauses.append(made.pause_ms)
        began = time.perf_counter()
        result = source.restore(made.id, as_name=f"bench-restored-{number}")
        restores.append(time.perf_counter() - began)
        copy = client.sandboxes.ref(result.sandbox.name)
        copy.exec(["true"]).check()
        copy.remove(force=True)
    yield Row("checkpoint of the same, whole", round(statistics.median(times), 2), "s", 1.5)
    yield Row("  its pause", round(statistics.median(pauses)), "ms", 100)
    yield Row("restore of it", round(statistics.median(restores) * 1e3), "ms", 500)


def commit(client: Client, runs: int = 3) -> Iterator[Row]:
    """An image out of a sandbox with 500 MB of its own."""
    frozen, times = [], []
    with client.sandboxes.create(memory_mib=1024, network="none", ephemeral=True) as sandbox:
        sandbox.exec(["sh", "-c", "head -c 300M /dev/urandom >/home/user/a"]).check()
        sandbox.exec(["sudo", "sh", "-c", "head -c 200M /dev/urandom >/opt/b; sync"]).check()
        try:
            for _ in range(runs):
                began = time.perf_counter()
                frozen.append(sandbox.commit("bench-commit").frozen_ms)
                times.append(time.perf_counter() - began)
        finally:
            client.images.remove("bench-commit")
    yield Row("commit, 500 MB: the guest is frozen", round(statistics.median(frozen)), "ms", 200)
    yield Row("  whole", round(statistics.median(times), 1), "s", 6)
