"""Starting the daemon when nobody answers on its socket.

Two clients may start one at the same time: the daemon holds a lock on its state directory, the loser of the race
exits and its client finds the winner's socket.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from limpet.errors import DeadlineExceeded, Unavailable
from limpet.paths import Paths

START_TIMEOUT = 15.0  # seconds for a daemon to listen
_POLL = 0.02  # seconds between two looks
_RACE = 3.0  # seconds in which the winner of a race must listen after our own daemon exited


def listening(path: Path) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


def start(paths: Paths, home: str | None = None) -> int | None:
    """Start `limpetd` and wait until it listens; the pid of the process started, None when one listened already.
    Raises Unavailable with the daemon's own words when it exits, DeadlineExceeded after START_TIMEOUT seconds."""
    if listening(paths.daemon_socket):
        return None
    from limpet import process  # brings asyncio along, which a client of a running daemon has no use for

    paths.make()
    offset = paths.daemon_errors.stat().st_size if paths.daemon_errors.exists() else 0
    environment = {"LIMPET_HOME": home} if home else None
    child = process.spawn_detached(
        [sys.executable, "-P", "-m", "limpet.daemon"], log=paths.daemon_errors, cwd=Path("/"), env=environment
    )
    deadline = time.monotonic() + START_TIMEOUT
    while not listening(paths.daemon_socket):
        if child.poll() is not None:
            _after_exit(paths, offset)
            return None
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the daemon did not listen within {START_TIMEOUT:g} s", hint="limpet daemon logs")
        time.sleep(_POLL)
    child.returncode = 0  # it outlives us: nobody waits for it, and Popen need not warn about that
    return child.pid


def _after_exit(paths: Paths, offset: int) -> None:
    """Our daemon exited: fine when another one won the race, else its last words are the error."""
    message, hint = _last_words(paths.daemon_errors, offset)
    deadline = time.monotonic() + (_RACE if "another limpetd" in message else 0.0)
    while not listening(paths.daemon_socket):
        if time.monotonic() > deadline:
            raise Unavailable(f"the daemon could not start: {message}", hint=hint)
        time.sleep(_POLL)


def _last_words(log: Path, offset: int) -> tuple[str, str]:
    """What was written to `log` behind `offset`: the text of its `error:` and `hint:` lines, else its last line."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read(64 << 10).decode(errors="replace").splitlines()
    found = {key: line[len(key) + 2 :] for line in lines for key in ("error", "hint") if line.startswith(f"{key}: ")}
    written = [line for line in lines if line.strip()] or ["it said nothing"]
    return found.get("error", written[-1]), found.get("hint", f"see {log}")
