"""A home whose daemon is killed over and over, and what must be true of it afterwards.

    prepare ──► token written and synced ──► arm one point ──► operate ──► crash ──► daemon again ──► check ──► again

One sandbox, `box`, lives through all of it. Its token is in a file that was synced, and in memory (tmpfs): the first
must never be lost, the second only where the operation ends the VM. `check` asks the daemon, the kernel and the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from limpet import Client
from limpet.client import Sandbox, _daemon
from limpet.errors import LimpetError, NotFound
from limpet.models import State
from limpet.vmm import layers, lock
from tests.crash.counting import COUNT, Loss

Action = Literal["kill", "raise", "machine"]
SHAPE: dict[str, Any] = {"memory_mib": 512, "vcpus": 2}  # one for all: every other one would need a template of its own
EARLY = "early"  # label and token of the checkpoint that is there from the beginning
TOKEN = "/home/user/token"
_MEMORY = "/dev/shm/token"
_SETTLE_S = 10.0  # for what was cut off to end by itself: one-off VMs, helpers of a killed daemon
_SKEW_S = 1.0
_SYNC_S = 5.0  # within which a sync that is under way has ended
_DEATH_S = 40.0  # within which an operation has to reach the armed point
_MINE = {"orphans", "leftovers", "checkpoints"}  # the doctor's rows that speak of what a crash may leave
_RUNNING = (State.RUNNING, State.PAUSED)


class World:
    """A home with its daemon, and the sandbox `box`."""

    def __init__(self, pieces: Path) -> None:
        self.home = _home(pieces)
        self.client = Client(home=self.home, autostart=False)
        self.orders = self.home / "orders"
        self.token = EARLY
        self.generation = 0  # the newest that was seen
        os.environ["LIMPET_CRASHPOINTS"] = str(self.orders)  # daemons inherit it
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self.start()
        self.client.config.set("template.auto", "off")
        self.client.config.set("pool.size", "0")
        if not self.client.templates.list():
            self.client.templates.build("base", **SHAPE)
        self.box = self.client.sandboxes.create("box", **SHAPE)
        self.write(EARLY)
        self.early = self.box.checkpoint(label=EARLY).id
        self.box.sync()  # there is a vault to look at, however early it comes to that

    # ── the daemon ───────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self.client.start_daemon()

    def alive(self) -> bool:
        """Whether the daemon listens."""
        return _daemon.listening(self.home / "run" / "daemon.sock")

    def dead(self, daemon: int) -> bool:
        """Whether a daemon has ended: all of its threads, which hold its socket longer than the first one lives."""
        return _state(daemon) in "ZX" and not self.alive()

    def die_starting(self, point: str) -> None:
        """Start a daemon that is killed before it serves, or soon after."""
        self.arm(point, "kill")
        with contextlib.suppress(LimpetError):
            self.start()
        until(lambda: not self.armed and not self.alive(), _DEATH_S, f"{point} was not reached")
        COUNT.faults += 1

    def start_changed(self, patch: str) -> None:
        """Start a daemon that runs these statements before anything else."""
        program = f"{patch}\nfrom limpet.daemon import main\nmain()"
        environment = {**os.environ, "LIMPET_HOME": str(self.home)}
        with (self.home / "run" / "daemon.err").open("ab") as errors:
            subprocess.Popen([sys.executable, "-P", "-c", program], env=environment, stderr=errors, cwd="/",
                             stdin=subprocess.DEVNULL, start_new_session=True).returncode = 0  # fmt: skip
        until(self.alive, 15, "the daemon does not listen")

    def pid(self) -> int:
        return int(json.loads((self.home / "run" / "daemon.json").read_text())["pid"])

    def kill_daemon(self) -> None:
        os.kill(pid := self.pid(), signal.SIGKILL)
        until(lambda: self.dead(pid), _SETTLE_S, "the daemon does not die")

    def stop_daemon(self) -> None:
        self.client.shutdown()

    def recover(self) -> None:
        """A new daemon. Templates that were being made are old by now: another daemon could still be at work."""
        for stray in (self.home / "cache" / "templates").glob(".tmp-*"):
            os.utime(stray, (0, 0))
        self.client.close()
        self.start()

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────

    def arm(self, point: str, action: Action) -> None:
        written = self.orders.with_suffix(".new")
        written.write_text(f"{point}={'stop' if action == 'machine' else action}")
        written.rename(self.orders)

    @property
    def armed(self) -> bool:
        return self.orders.exists()

    def disarm(self) -> None:
        self.orders.unlink(missing_ok=True)

    def crash(self, point: str, action: Action, operate: Callable[[], object]) -> LimpetError | None:
        """Operate with a point armed; the error that the user saw. A daemon that is killed is left dead."""
        daemon = self.pid()
        seen: list[LimpetError] = []

        def work() -> None:
            try:
                operate()
            except LimpetError as error:
                seen.append(error)
            except Loss:  # it waited for what does not come any more
                pass

        self.arm(point, action)
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        if action == "kill":
            until(lambda: self.dead(daemon), _DEATH_S, f"{point} was not reached")
        else:
            until(lambda: not self.armed, _DEATH_S, f"{point} was not reached")
        if action == "machine":
            until(lambda: _state(daemon) == "T", _SETTLE_S, "the daemon does not stop")
            for machine in self.machines():
                os.kill(machine, signal.SIGKILL)
            os.kill(daemon, signal.SIGCONT)
        worker.join(_DEATH_S)
        assert not worker.is_alive(), f"the operation does not end after {point}={action}"
        COUNT.faults += 1
        return seen[0] if seen else None

    # ── the sandbox ──────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, token: str) -> None:
        """Let the box hold a new token, durably on its disk and fleetingly in its memory."""
        line = f"echo {token} > {TOKEN}; echo {token} > {_MEMORY}; sync"
        self.box.exec(["sh", "-c", line]).check()
        self.token = token

    def read(self, sandbox: Sandbox) -> tuple[str, str]:
        """The tokens on the disk and in the memory of a sandbox (there none after a boot)."""
        found = sandbox.exec(["sh", "-c", f"cat {TOKEN}; cat {_MEMORY} 2>/dev/null || echo none"]).check().text
        on_disk, in_memory = found.split()
        return on_disk, in_memory

    def ready(self) -> None:
        """Bring the box to where every operation can begin: running."""
        self.wake(self.box)

    def wake(self, sandbox: Sandbox) -> None:
        sandbox.refresh()
        sandbox.wake()

    def gone(self, *names: str) -> None:
        """Remove sandboxes for good, if they are there."""
        for name in names:
            with contextlib.suppress(NotFound):
                self.client.sandboxes.get(name).remove(force=True, purge=True)

    def empty_trash(self) -> None:
        self.client.trash.empty()
        _demand(self.client.trash.list() == [], "the trash is not empty")

    def forget_checkpoints(self) -> None:
        """Remove all but the early one."""
        for info in self.client.checkpoints.list():
            if info.id != self.early and info.made_by != "suspend":
                self.client.checkpoints.remove(info.id)

    def pooled(self) -> list[str]:
        """The states of limpet's own sandboxes."""
        return [state for name, state, _ in self._rows() if name.startswith("+")]

    def drain(self) -> None:
        """Have no warm VMs."""
        self.client.config.set("pool.size", "0")
        until(lambda: not self.pooled(), 20, "the pool is not drained")

    def tidy(self) -> None:
        """As it was before the operation, but for the token."""
        self.disarm()
        self.ready()
        self.gone("twin", "back", "new")
        self.empty_trash()
        for payload in self.box.payloads.list():
            self.box.payloads.remove(payload.payload.id)
        self.client.config.set("sync.auto", "on")
        self.forget_checkpoints()

    def close(self) -> None:
        """End everything and remove the home."""
        os.environ.pop("LIMPET_CRASHPOINTS", None)
        self.disarm()
        with contextlib.suppress(LimpetError, OSError):
            self.client.start_daemon()
            self.client.shutdown()
        for machine in self.machines():
            os.kill(machine, signal.SIGKILL)
        self.client.close()
        shutil.rmtree(self.home, ignore_errors=True)

    # ── what must be true ────────────────────────────────────────────────────────────────────────────────────────

    def check(
        self, *, states: Iterable[State], memory: bool, goes_back: bool = False, others: Iterable[str] = ()
    ) -> None:
        """Raise Loss unless all is well. `states`: what the box may be; `memory`: whether its memory must have lasted;
        `goes_back`: whether it may be as it was early; `others`: sandboxes that may be there besides it."""
        COUNT.states += 1
        try:
            self._check_names(set(others))
            self._check_state(set(states))
            self._check_machines()
            self._check_files()
            self._check_checkpoints()
            self.check_vault()
            self._check_data(memory, goes_back)
        except (Loss, LimpetError) as error:
            COUNT.losses.append(str(error))
            raise

    def _check_names(self, others: set[str]) -> None:
        names = {sandbox.name for sandbox in self.client.sandboxes.list()}
        _demand("box" in names, "the sandbox is gone")
        _demand(names - {"box"} <= others, f"there are sandboxes {names - {'box'}}, allowed are {others}")

    def _check_state(self, states: set[State]) -> None:
        until(self._state_is_true, _SETTLE_S, "the sandbox does not run as it says")
        found = self.box.refresh()
        _demand(found.state in states, f"the sandbox is {found.state.value} ({found.error}), not one of {states}")

    def _state_is_true(self) -> bool:
        found = self.box.refresh()
        return (found.pid is not None and _state(found.pid) not in "ZX") == (found.state in _RUNNING)

    def _check_machines(self) -> None:
        """No VM runs that `ls` does not show, and each writes to disks that the records know."""
        shown = [box.info for box in self.client.sandboxes.list()]
        pids = {info.pid for info in shown if info.state in _RUNNING and info.pid is not None}
        until(lambda: set(self.machines()) == pids, _SETTLE_S, f"VMs run that belong to nobody, beside {pids}")
        held = [path.parent.name for path in (self.home / "data" / "sandboxes").glob("*/vm.lock") if lock.held(path)]
        _demand(len(held) == len(pids), f"held locks: {held}, running: {pids}")
        reachable = self._reachable()
        for pid in pids:
            for written in _written(pid):
                _demand(written in reachable, f"process {pid} writes to {written}, which no record reaches")

    def _reachable(self) -> set[str]:
        """The files below all recorded disks."""
        tops = [self.home / "data" / "layers" / f"{layer}.qcow2" for _, _, disks in self._rows() for layer in disks]
        return {os.path.realpath(path) for top in tops for path in layers.chain(top)}

    def _rows(self) -> list[tuple[str, str, list[str]]]:
        """The names of all sandboxes that are recorded, with their states and layers."""
        with contextlib.closing(sqlite3.connect(f"file:{self.home}/data/limpet.db?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT name, state, disks FROM sandboxes").fetchall()
        return [(name, state, list(json.loads(disks or "{}").values())) for name, state, disks in rows]

    def _check_files(self) -> None:
        rows = [row for row in self.client.doctor().rows if row.check in _MINE and row.status != "PASS"]
        _demand(not rows, "; ".join(f"{row.check}: {row.detail}" for row in rows))
        roots = [self.home / "data", self.home / "cache" / "templates"]
        strays = [stray for root in roots for stray in root.rglob(".tmp-*")]
        deadline = time.monotonic() + _SYNC_S
        while strays and time.monotonic() < deadline:  # a sync may be at it just now
            time.sleep(0.1)
            strays = [stray for stray in strays if stray.exists()]
        _demand(not strays, f"left behind: {[str(stray) for stray in strays]}")

    def _check_checkpoints(self) -> None:
        ids = [info.id for info in self.client.checkpoints.list()]
        _demand(self.early in ids, "the earlier checkpoint is gone")
        for checkpoint in ids:
            verified = self.client.checkpoints.verify(checkpoint)
            _demand(verified.ok, f"checkpoint {checkpoint}: {verified.problems}")

    def check_vault(self) -> None:
        """Every byte of every generation, and none that was acknowledged is gone."""
        (found,) = self.client.vaults.check("box")
        _demand(found.ok, f"the vault: {found.problems}")
        newest = max((known.generation for known in self.box.vault.history()), default=0)
        _demand(newest >= self.generation, f"generation {self.generation} was acknowledged, {newest} is the newest")
        self.generation = newest

    def _check_data(self, memory: bool, goes_back: bool) -> None:
        saved = any(info.made_by == "restore" for info in self.client.checkpoints.list())
        self.wake(self.box)
        on_disk, in_memory = self.read(self.box)
        went_back = goes_back and on_disk == EARLY and saved  # what it was before is in a checkpoint
        _demand(on_disk == self.token or went_back, f"on the disk is {on_disk!r}, not {self.token!r}")
        _demand(not memory or in_memory == on_disk, f"in memory is {in_memory!r}, on the disk {on_disk!r}")
        until(lambda: self._skew() < _SKEW_S, _SETTLE_S, "its clock is wrong")

    def _skew(self) -> float:
        """Seconds that the box's clock is off, the way to it included."""
        return abs(float(self.box.exec(["date", "+%s.%N"]).text) - time.time())

    def machines(self) -> list[int]:
        """The processes of all VMs of this home."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    words = (entry / "cmdline").read_bytes()
                    if b"qemu-system" in words.split(b"\0")[0] and os.fsencode(self.home) in words:
                        found.append(int(entry.name))
        return found


def until(condition: Callable[[], bool], seconds: float, complaint: str) -> None:
    """Wait for a condition. Raises Loss."""
    deadline = time.monotonic() + seconds
    while not condition():
        _demand(time.monotonic() < deadline, complaint)
        time.sleep(0.02)


def _demand(condition: bool, complaint: str) -> None:
    if not condition:
        raise Loss(complaint)


def _state(pid: int) -> str:
    """The process's state letter (proc(5)); Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _written(pid: int) -> list[str]:
    """The qcow2 files that a process has open for writing; a deleted one is named so."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            flags = next(line for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
                         if line.startswith("flags:")).split()[1]  # fmt: skip
            if ".qcow2" in target and int(flags, 8) & os.O_ACCMODE == os.O_RDWR:
                found.append(target)
    return found


def _home(pieces: Path) -> Path:
    """A home with images and templates of its own; what `setup` made is shared."""
    home = Path(tempfile.mkdtemp(prefix="limpet-crash-"))
    for directory in ("data/images", "cache/templates", "run"):
        (home / directory).mkdir(mode=0o700, parents=True)
    for name in ("artifacts", "pieces"):
        (home / "cache" / name).symlink_to(pieces / "cache" / name)
    (home / "data" / "images" / "base").symlink_to(pieces / "data" / "images" / "base")
    for template in (pieces / "cache" / "templates").glob("[!.]*"):
        shutil.copytree(template, home / "cache" / "templates" / template.name, copy_function=os.link)
    if (probe := pieces / "cache" / "probe.json").exists():
        shutil.copy(probe, home / "cache")
    return home
