"""What it costs that everything is on the host a moment later, beside what it would cost to copy it with rsync."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import statistics
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from bench.measure import cpu_seconds, rss, seconds
from bench.suite import Row
from limpet import Client, durable, paths
from limpet.client import Sandbox
from limpet.images import bootstrap
from limpet.vault import Generation, Vault

_TREE = "/workspace/tree"  # of 10 × 100 × `_IN_DIRECTORY` files
_COPY = "/var/tmp/tree"  # on the system disk
_IN_DIRECTORY = 100
_QUIET = 30.0  # seconds
_RATE = 5_000_000  # bytes a second
_LIMIT = 60.0  # seconds for one small change

# Two processes, one for each processor. $1, $2: the tops of the tree that each makes.
_MAKE = f"""
import os, sys
for top in sys.argv[1:]:
    for middle in range(100):
        directory = f"{_TREE}/{{top}}/{{middle}}"
        os.makedirs(directory)
        here = os.open(directory, os.O_RDONLY)
        for number in range({_IN_DIRECTORY}):
            file = os.open(f"f{{number}}", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here)
            os.write(file, b"file %d of %d in %s\\n" % (number, middle, top.encode()))
            os.close(file)
        os.close(here)
"""
_WRITE = f"""
import os, time
began = time.monotonic()
for turn in range({int(_QUIET * 10)}):
    with open(f"/workspace/stream{{turn // 100}}", "ab", 0) as file:
        file.write(os.urandom({_RATE // 10}))
    time.sleep(max(began + (turn + 1) / 10 - time.monotonic(), 0))
"""
_RSYNC = "/opt/rsync/usr/bin/rsync"
_LIBRARIES = "LD_LIBRARY_PATH=/opt/rsync/usr/lib/x86_64-linux-gnu"
_PASS = ["sudo", "env", _LIBRARIES, _RSYNC, "-a", "--delete", f"{_TREE}/", f"{_COPY}/"]


def rows(client: Client, where: paths.Paths) -> Iterator[Row]:
    """All rows of the table, in its order."""
    yield from vault_commit(where)
    with client.sandboxes.create(memory_mib=1024, network="none", ephemeral=True) as sandbox:
        with switched_off(client):
            yield from idle(client, sandbox)
            prepare(sandbox)
        yield from first_sync(sandbox)
        yield from small_change(sandbox)
        yield from restore(sandbox)
        yield from sustained(client, sandbox)


@contextmanager
def switched_off(client: Client) -> Iterator[None]:
    """No sync by itself."""
    client.config.set("sync.auto", "off")
    try:
        yield
    finally:
        client.config.unset("sync.auto")


def vault_commit(where: paths.Paths, files: int = 1000) -> Iterator[Row]:
    """A generation of many small files, in this process: how long, and how often the disk was waited for."""
    with tempfile.TemporaryDirectory(dir=where.data) as directory:
        vault = Vault.open(Path(directory) / "vault")
        _commit(vault, "first", 1)
        took = [seconds(lambda number=number: _commit(vault, f"d{number}", files)) for number in range(5)]  # type: ignore[misc]
        with durable.recording() as done:
            _commit(vault, "counted", files)
    syncs = sum(op.kind in ("fsync", "fsync_dir") for op in done)
    yield Row(f"vault commit of {files:,} small files", round(statistics.median(took), 2), "s", 1)
    yield Row("  fsyncs", syncs, "", 3)


def _commit(vault: Vault, directory: str, files: int) -> Generation:
    draft = vault.begin()
    editor = draft.volume("workspace", b"/workspace", base=vault.head)
    editor.mkdir(directory.encode())
    for number in range(files):
        path = f"{directory}/f{number}".encode()
        editor.mkfile(path)
        editor.write(path, 0, path * 20)
        editor.chown(path, 1000, 1000)
        editor.chmod(path, 0o644)
        editor.utimes(path, 1_700_000_000_000_000_000)
    token = uuid.uuid4()
    return draft.commit(datetime.now(UTC), {"workspace": (token.hex, str(token))})


def idle(client: Client, sandbox: Sandbox) -> Iterator[Row]:
    """Sandbox and daemon while nothing is written, with and without syncing. Begins with syncing switched off."""
    processes = [client.status().pid, sandbox.refresh().pid or 0]
    sandbox.sync()
    without = _cpu_of(processes)
    client.config.set("sync.auto", "on")
    time.sleep(5)
    before = sandbox.sync_status(pending=False).generation
    cost = (_cpu_of(processes) - without) / _QUIET * 100
    new = (sandbox.sync_status(pending=False).generation or 0) - (before or 0)
    client.config.set("sync.auto", "off")
    yield Row("syncing while nothing changes, sandbox and daemon, CPU", round(max(cost, 0), 2), "%", 0.2)
    yield Row("  generations made", new, "", 0)


def _cpu_of(processes: list[int]) -> float:
    before = sum(map(cpu_seconds, processes))
    time.sleep(_QUIET)
    return sum(map(cpu_seconds, processes)) - before


def prepare(sandbox: Sandbox) -> None:
    """The tree, rsync, and what rsync has made of the tree already. rsync comes from the packages that setup uses:
    the image has none."""
    halves = " & ".join(f"python3 - {half} <<'END'\n{_MAKE}END\n" for half in ("0 1 2 3 4", "5 6 7 8 9"))
    _run(sandbox, halves.replace("END\n &", "END\n") + "wait")
    sandbox.exec(["sudo", "mkdir", "-p", "/opt/rsync", _COPY], cwd="/").check()
    sandbox.exec(["sudo", "tar", "-C", "/opt/rsync", "-xf", "-"], stdin=_rsync(), cwd="/").check()
    _run(sandbox, f"sudo cp -a {_TREE}/[0-4] {_COPY}/ & sudo cp -a {_TREE}/[5-9] {_COPY}/; wait")
    sandbox.exec(_PASS, cwd="/", timeout=1800).check()


def _run(sandbox: Sandbox, script: str) -> None:
    sandbox.exec(["bash", "-c", script], cwd="/", timeout=1800).check()


def _rsync() -> bytes:
    """A tar of rsync and its libraries that the image lacks."""
    made = io.BytesIO()
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "packages.tar"
        report: bootstrap.Report = lambda _fraction, _detail: None  # noqa: E731
        asyncio.run(bootstrap.mmdebstrap(archive, variant="extract", include=("rsync",), report=report, mirror=None))
        with tarfile.open(archive) as packages, tarfile.open(fileobj=made, mode="w") as wanted:
            for member in packages:
                name = Path(member.name).name
                if member.name.endswith("/usr/bin/rsync") or name.startswith(("libpopt.so", "libxxhash.so")):
                    wanted.addfile(member, packages.extractfile(member) if member.isfile() else None)
    return made.getvalue()


def first_sync(sandbox: Sandbox) -> Iterator[Row]:
    took = seconds(sandbox.sync)
    files = sandbox.vault.history()[-1].files
    yield Row(f"first sync, {files:,} files", round(took, 1), "s")


def small_change(sandbox: Sandbox, runs: int = 9) -> Iterator[Row]:
    """A line is appended to one file: until a generation has it, and what that took of the guest's processors."""
    process = sandbox.refresh().pid or 0
    times, costs = [], []
    with sandbox.exec(["sh"], stream=True, stdin=True, cwd=_TREE) as shell:
        for number in range(runs):
            _settle(sandbox)
            quiet = _cpu_during(process, 2.0)
            before, began, used = _generation(sandbox), time.perf_counter(), cpu_seconds(process)
            shell.stdin.write(b"echo %d >> 7/%d/f5\n" % (number, number))
            while _generation(sandbox) == before:
                if time.perf_counter() - began > _LIMIT:
                    raise RuntimeError(f"no generation within {_LIMIT:g} s: {sandbox.sync_status(pending=False)}")
                time.sleep(0.01)
            times.append(time.perf_counter() - began)
            time.sleep(max(2.0 - times[-1], 0))  # the guest cleans up
            costs.append(cpu_seconds(process) - used - quiet * (time.perf_counter() - began))
    value = statistics.median(times)
    yield Row("one small change in 100,000 files → durable on the host", round(value, 2), "s", 1)
    yield Row("  of the guest's processors", round(statistics.median(costs) * 1e3), "ms", 150)
    passes = []
    for number in range(3):
        _run(sandbox, f"echo again >> {_TREE}/7/{number}/f6")
        passes.append(seconds(lambda: sandbox.exec(_PASS, cwd="/", timeout=600).check()))
    yield Row("  a pass of `rsync -a --delete` to another disk", round(statistics.median(passes), 1), "s")
    yield Row("  as a multiple", round(statistics.median(passes) / value, 1), "×", 20, "more")


def _generation(sandbox: Sandbox) -> int | None:
    return sandbox.sync_status(pending=False).generation


def _settle(sandbox: Sandbox) -> None:
    """Wait until nothing is under way."""
    for _ in range(300):
        before = _generation(sandbox)
        time.sleep(1.5)
        if _generation(sandbox) == before and not sandbox.sync_status(pending=False).lag:
            return
    raise RuntimeError("the syncer finds no rest")


def _cpu_during(process: int, duration: float) -> float:
    """Processors' time a second while nothing happens."""
    before = cpu_seconds(process)
    time.sleep(duration)
    return (cpu_seconds(process) - before) / duration


def sustained(client: Client, sandbox: Sandbox) -> Iterator[Row]:
    """A stream of new bytes: how old the oldest is that the host does not have, and what the daemon needs for it."""
    _settle(sandbox)
    daemon = client.status().pid
    before, peak = rss(daemon), 0
    lags = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_run, sandbox, f"python3 -c '{_WRITE}'")
        while not writing.done():
            lags.append(sandbox.sync_status(pending=False).lag)
            peak = max(peak, rss(daemon))
            time.sleep(0.1)
        writing.result()  # figures of a writer that failed are none
    lags.sort()
    yield Row("5 MB/s for 30 s: lag, p50", round(lags[len(lags) // 2], 2), "s", 1)
    yield Row("  lag, p99", round(lags[int(len(lags) * 0.99)], 2), "s", 3)
    yield Row("  growth of the daemon", round(max(peak - before, 0) / (1 << 20)), "MiB", 64)


def restore(sandbox: Sandbox) -> Iterator[Row]:
    """A directory of the newest generation to the host, every byte verified."""
    rates = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            result = sandbox.vault.restore(f"{_TREE}/3", to=Path(directory) / "restored")
            rates.append(result.files / (time.perf_counter() - began))
    yield Row(f"restore of {result.files:,} files", round(statistics.median(rates)), "files/s", 3000, "more")
