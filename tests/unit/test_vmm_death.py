"""Why machines die, and their bounded logs, from what they really leave behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from limpet.errors import Busy, FailedPrecondition, InsufficientSpace, LimpetError, Unavailable
from limpet.vmm.death import Death, console_tail, explain_death, launch_error, mark_start
from limpet.vmm.logs import trim_log

PANIC = "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n"


def explain(directory: Path, *, console: str = "", own: str = "", status: int | None = None) -> Death:
    (directory / "console.log").write_text(console)
    (directory / "qemu.log").write_text(own)
    return explain_death(console_log=directory / "console.log", qemu_log=directory / "qemu.log", status=status)


def test_a_guest_panic_is_told_with_its_reason(tmp_path: Path) -> None:
    """VM-21: guest panic."""
    death = explain(tmp_path, console=PANIC + "Rebooting\n", status=0)
    assert death.cause == "panic" and "Unable to mount root fs" in death.message and not death.clean


def test_a_panic_of_an_earlier_boot_explains_nothing(tmp_path: Path) -> None:
    """VM-21: the console log spans boots."""
    (tmp_path / "console.log").write_text(PANIC)
    mark_start(tmp_path / "console.log")
    death = explain_death(console_log=tmp_path / "console.log", qemu_log=tmp_path / "qemu.log", status=0)
    assert death.cause == "power_off" and death.clean


def test_a_signal_is_named(tmp_path: Path) -> None:
    """VM-21: killed."""
    death = explain(tmp_path, status=-signal.SIGKILL)
    assert death.cause == "killed" and "SIGKILL" in death.message


def test_who_ended_an_adopted_machine_is_read_from_its_log(tmp_path: Path) -> None:
    """VM-21: its status is not ours to know."""
    death = explain(tmp_path, own="qemu-system-x86_64: terminating on signal 15 from pid 7 (kill)\n")
    assert death.cause == "killed" and "signal 15 from pid 7" in death.message


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """VM-21: disk full."""
    assert explain(tmp_path, own="qemu: write failed: No space left on device\n", status=1).cause == "disk_full"


def test_nothing_known_is_said_to_be_nothing_known(tmp_path: Path) -> None:
    """VM-21: no invented reason; and logs that were removed do not matter."""
    death = explain_death(console_log=tmp_path / "no" / "a", qemu_log=tmp_path / "no" / "b")
    assert death.cause == "unknown"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('-device x: Failed to get "write" lock\nIs another process using the image [/x]?', Busy),
        ("Could not access KVM kernel module: Permission denied", FailedPrecondition),
        ("cannot set up guest memory 'pc.ram': Cannot allocate memory", FailedPrecondition),
        ("-blockdev: Could not open '/v/root.qcow2': No such file or directory", FailedPrecondition),
        ("Could not write: No space left on device", InsufficientSpace),
        ("-foo: invalid option", Unavailable),
    ],
)
def test_what_qemu_says_becomes_a_typed_error(tmp_path: Path, said: str, kind: type[LimpetError]) -> None:
    """VM-6: one clear message, from this launch only."""
    log = tmp_path / "qemu.log"
    log.write_text("No space left on device (of an earlier start)\n")
    start = mark_start(log)
    with log.open("a") as file:
        file.write(f"qemu-system-x86_64: {said}\n")
    error = launch_error(Unavailable("QEMU ended before it greeted"), 1, log, start)
    assert type(error) is kind


def test_a_tail_has_no_control_characters(tmp_path: Path) -> None:
    """The console is written by the guest: hostile bytes must not reach a terminal."""
    log = tmp_path / "console.log"
    log.write_bytes(b"one\n\x1b[31mred\x1b[0m\x07\r\n\xff\n\x1b]0;title\x07x\n")
    assert all(line.isprintable() or "\ufffd" in line for line in console_tail(log, 10))
    assert console_tail(log, 1) == console_tail(log, 10)[-1:]
    assert console_tail(tmp_path / "none", 3) == []


def test_a_log_is_cut_from_the_front_while_it_is_written(tmp_path: Path) -> None:
    """VM-21: bounded, and the writer goes on at the new end."""
    log = tmp_path / "console.log"
    with log.open("ab", buffering=0) as writer:
        for number in range(2000):
            writer.write(b"line %06d\n" % number)
        trim_log(log, 10_000)
        assert log.stat().st_size <= 5_000
        writer.write(b"last\n")
    lines = log.read_text().splitlines()
    assert lines[-2:] == ["line 001999", "last"] and all(line.startswith("line ") for line in lines[:-1])


def test_a_short_or_missing_log_is_left_alone(tmp_path: Path) -> None:
    """VM-21."""
    log = tmp_path / "console.log"
    trim_log(log, 100)
    log.write_text("short\n")
    inode = log.stat().st_ino
    trim_log(log, 100)
    assert log.read_text() == "short\n" and log.stat().st_ino == inode


def test_logs_belong_to_this_user_only(tmp_path: Path) -> None:
    """The console may show secrets."""
    before = os.umask(0)
    try:
        mark_start(tmp_path / "console.log")
    finally:
        os.umask(before)
    assert (tmp_path / "console.log").stat().st_mode & 0o777 == 0o600
