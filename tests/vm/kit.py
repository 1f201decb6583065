"""Questions that several VM tests ask about a sandbox, a home, or this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from limpet import Client
from limpet.client import ExecHandle, Sandbox
from limpet.guest import Agent, Channel
from limpet.paths import SandboxPaths, discover
from limpet.vmm import layers
from tests.conftest import leave_home, new_home, run_cli

# Counts in memory, line by line: shows that a process lived on, stood still, or went back.
_COUNT = "while :; do echo >> /dev/shm/count; sleep 0.2; done"


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for `condition()` to be true, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def shell(box: Sandbox, script: str, user: str | None = None) -> str:
    """What a script prints; it has to succeed."""
    return box.exec(["sh", "-c", script], user=user, cwd="/", timeout=60).check().text


def start_counter(box: Sandbox) -> ExecHandle:
    """A process that counts; `count` tells how far it is."""
    handle = box.exec(["sh", "-c", _COUNT], detach=True, cwd="/")
    wait_until(lambda: box.exec(["test", "-s", "/dev/shm/count"], cwd="/").ok)
    return handle


def count(box: Sandbox) -> int:
    return int(shell(box, "wc -c < /dev/shm/count"))


def counts_on(box: Sandbox, above: int) -> int:
    """Wait until the counter has passed `above`; where it is then."""
    wait_until(lambda: count(box) > above)
    return count(box)


def clock_error(box: Sandbox) -> float:
    """By how many seconds the guest's clock may at most be wrong: of several questions the one that was answered
    fastest counts, with half of its round trip added."""
    answers: list[tuple[float, float]] = []
    clock = ["sh", "-c", "while read -r _; do date +%s.%N; done"]
    with box.exec(clock, stream=True, stdin=True, cwd="/") as command:
        for _ in range(12):
            began, asked = time.time(), time.monotonic()
            command.stdin.write(b"\n")
            chunk = command.read()
            trip = time.monotonic() - asked
            assert chunk is not None
            answers.append((trip, abs(float(chunk.data) - (began + trip / 2))))
        command.stdin.close()
    trip, offset = min(answers)
    return offset + trip / 2


def chain(home: Path, box: Sandbox, disk: str) -> list[Path]:
    """The files of a sandbox's disk, the one that is written to first."""
    paths = discover(home)
    with contextlib.closing(sqlite3.connect(f"file:{paths.database}?mode=ro", uri=True)) as database:
        row = database.execute("SELECT disks FROM sandboxes WHERE id = ?", (box.refresh().id,)).fetchone()
    return layers.chain(paths.layers / f"{json.loads(row[0])[disk]}.qcow2")


def hidden_rows(home: Path, state: str) -> list[str]:
    """The ids of limpet's own sandboxes in this state."""
    with contextlib.closing(sqlite3.connect(f"file:{discover(home).database}?mode=ro", uri=True)) as database:
        found = database.execute("SELECT id FROM sandboxes WHERE name LIKE '+%' AND state = ?", (state,))
        return [row[0] for row in found]


def qemu_of(home: Path, sandbox_id: str) -> int:
    """The pid of a sandbox's QEMU, by what its daemon noted."""
    return int(json.loads(discover(home).sandbox(sandbox_id).handles.read_bytes())["qemu"]["pid"])


def command_line(box: Sandbox) -> str:
    """How the QEMU of a running sandbox was started."""
    return Path(f"/proc/{box.refresh().pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def daemon_pid(home: Path) -> int:
    return int(json.loads(run_cli(home, "daemon", "status", "--json").stdout)["pid"])


def flip(path: Path) -> None:
    """Change one byte in the middle of a file's data."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        start = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        middle = start + (os.lseek(file.fileno(), start, os.SEEK_HOLE) - start) // 2
        byte = os.pread(file.fileno(), 1, middle)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), middle)


def remains(client: Client, seconds: float = 30.0) -> list[str]:
    """What doctor says about orphans, leftovers and checkpoints; nothing when all is well. Layers are only collected
    when nothing is being built, a template for example: so for some seconds there may be some."""
    deadline = time.monotonic() + seconds
    while (found := _remains(client)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _remains(client: Client) -> list[str]:
    rows = client.doctor().rows
    watched = [row for row in rows if row.check in ("orphans", "leftovers", "checkpoints")]
    return [row.detail for row in watched if row.status != "PASS"]


@contextlib.contextmanager
def alone(pieces: Path, **spec: Any) -> Iterator[SandboxPaths]:
    """The files and sockets of a sandbox that runs without a daemon."""
    home = new_home(pieces)
    try:
        with Client(home=home) as client:
            box = client.sandboxes.create("alone", memory_mib=512, **spec)
            client.shutdown()
        yield discover(home).sandbox(box.info.id)
    finally:
        leave_home(home)


@contextlib.asynccontextmanager
async def connected(guest: SandboxPaths) -> AsyncIterator[Agent]:
    """The agent of such a sandbox."""
    channel = await Channel.connect(guest.channel, intake=guest.intake, timeout=15)
    try:
        yield Agent(channel)
    finally:
        await channel.close()
