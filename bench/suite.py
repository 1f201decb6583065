"""What is measured: one function a row of the table, each returning a figure beside its target."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.measure import cpu_seconds, median, pss, rss, seconds
from limpet import Client
from limpet.client import Sandbox

_BULK = 256 << 20  # bytes
_COLD_MIB = 516  # a size of which there is no template


@dataclass(frozen=True)
class Row:
    """One figure. `better` says which side of `target` is good."""

    what: str
    value: float
    unit: str
    target: float | None = None
    better: str = "less"
    note: str = ""

    @property
    def reached(self) -> bool:
        if self.target is None:
            return True
        return self.value <= self.target if self.better == "less" else self.value >= self.target

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "reached": self.reached}


def cold_create(client: Client, floors: list[float], runs: int = 5) -> Iterator[Row]:
    """create → first output of `echo hi`, on a sandbox that never was."""

    def once() -> None:
        with client.sandboxes.create(memory_mib=_COLD_MIB, ephemeral=True, network="none") as s:
            assert s.exec(["echo", "hi"]).stdout == b"hi\n"
            times.append(time.perf_counter() - began)

    times: list[float] = []
    client.config.set("template.auto", "off")
    try:
        for _ in range(runs):
            began = time.perf_counter()
            once()
    finally:
        client.config.unset("template.auto")
    value, floor = sorted(times)[runs // 2], sorted(floors)[len(floors) // 2]
    yield Row("bare boot of the same kernel to a shell (floor)", round(floor, 3), "s")
    yield Row("cold create → first output of `echo hi`", round(value, 3), "s", 3.0)
    yield Row("  the same, as a multiple of the floor", round(value / floor, 2), "×", 1.6)


def execs(sandbox: Sandbox, client: Client) -> Iterator[Row]:
    """Latency of a small command, and many at once."""
    sandbox.exec(["true"])
    value = median(lambda: sandbox.exec(["true"]), 50)
    yield Row("exec of `true`, SDK, p50", round(value * 1e3, 1), "ms", 20)

    def one(number: int) -> bool:
        return sandbox.exec(["echo", str(number)]).text == f"{number}\n"

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        began = time.perf_counter()
        good = sum(pool.map(one, range(50)))
        took = time.perf_counter() - began
    yield Row("50 execs at once that succeed", good, "of 50", 50, "more", f"{took:.2f} s together")


def command_line(sandbox: Sandbox) -> Iterator[Row]:
    """Whole processes of the CLI."""
    limpet = str(Path(sys.executable).with_name("limpet"))

    def call(*words: str) -> None:
        subprocess.run([limpet, *words], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    call("exec", sandbox.name, "--", "true")
    value = median(lambda: call("exec", sandbox.name, "--", "true"), 15)
    yield Row("`limpet exec NAME -- true`, whole process", round(value * 1e3), "ms", 250)
    yield Row("`limpet --help`", round(median(lambda: call("--help"), 15) * 1e3), "ms", 150)


def bulk(sandbox: Sandbox, daemon: int) -> Iterator[Row]:
    """Throughput of output and files, and the daemon's memory before and after."""
    before = rss(daemon)
    peak = before

    def stdout() -> None:
        nonlocal peak
        received = 0
        with sandbox.exec(["head", "-c", str(_BULK), "/dev/zero"], stream=True) as command:
            for chunk in command:
                received += len(chunk.data)
        peak = max(peak, rss(daemon))
        assert received == _BULK

    yield Row("stdout of a command", round(_BULK / median(stdout, 3) / 1e6), "MB/s", 50, "more")
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(1 << 20) * (_BULK >> 20))
        file.flush()
        into = median(lambda: sandbox.files.upload(file.name, "/var/tmp/bulk"), 3)
        peak = max(peak, rss(daemon))
        yield Row("file in", round(_BULK / into / 1e6), "MB/s", 100, "more")
        out = median(lambda: sandbox.files.download("/var/tmp/bulk", file.name + ".back"), 3)
        peak = max(peak, rss(daemon))
        assert Path(file.name + ".back").read_bytes() == Path(file.name).read_bytes()
        Path(file.name + ".back").unlink()
        yield Row("file out", round(_BULK / out / 1e6), "MB/s", 100, "more")
    yield Row("growth of the daemon while 256 MiB go by", round((peak - before) / (1 << 20)), "MiB", 32)
    sandbox.files.remove("/var/tmp/bulk")


def workspace(client: Client) -> Iterator[Row]:
    """Import of 5,000 files, export of a change of ten."""
    with tempfile.TemporaryDirectory() as name:
        repository = _repository(Path(name), files=5000, size=10_000)
        with client.sandboxes.create(memory_mib=1024, ephemeral=True, network="none") as s:
            took = seconds(lambda: s.workspace.import_(repository))
            yield Row("import of 5,000 files, 50 MB", round(took, 2), "s", 12)
            s.exec("cd /workspace/* && for i in 1 2 3 4 5 6 7 8 9 10; do echo x >> d$i/f$i; done").check()
            yield Row("export of a 10-file change", round(median(s.workspace.patch, 3), 2), "s", 1.5)


def stop(client: Client, runs: int = 3) -> Iterator[Row]:
    """An orderly stop, from the call to the answer."""
    times = []
    for _ in range(runs):
        s = client.sandboxes.create(memory_mib=512, network="none")
        s.exec(["sh", "-c", "echo data > /home/user/data"])
        began = time.perf_counter()
        assert s.stop().durability == "clean"
        times.append(time.perf_counter() - began)
        s.remove()
    yield Row("stop, clean rung", round(sorted(times)[runs // 2], 2), "s", 1.5)


def idle(sandbox: Sandbox, daemon: int, wait: float = 20.0) -> Iterator[Row]:
    """What doing nothing costs."""
    before = cpu_seconds(daemon)
    time.sleep(wait)
    used = (cpu_seconds(daemon) - before) / wait * 100
    yield Row("idle daemon, memory", round(rss(daemon) / (1 << 20)), "MiB RSS", 90)
    yield Row("idle daemon, CPU", round(used, 2), "%", 1.0)
    pid = sandbox.refresh().pid
    assert pid is not None
    yield Row("a 512 MiB sandbox that has run commands", round(pss(pid) / (1 << 20)), "MiB PSS", 260)


def _repository(directory: Path, *, files: int, size: int) -> Path:
    """A git repository of `files` committed files with `size` random bytes each, a hundred to a directory."""
    for number in range(files):
        target = directory / f"d{number // 100}" / f"f{number // 100 if number % 100 == 0 else f'{number}_'}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(os.urandom(size // 2).hex().encode())
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=directory, check=True)
    return directory
