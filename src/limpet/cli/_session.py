"""A person (or a pipe) at one end, a command in a guest at the other.

The main thread copies the command's output to stdout and stderr, a second one forwards keys or piped input, a third
one signals, which arrive as bytes in a pipe (`signal.set_wakeup_fd`). Ctrl-C goes to the command; the second one lets
go of it. With a terminal Ctrl-C is a key, and a second one counts when it comes soon after the first. Ctrl-] three
times lets go of any command, as in `machinectl shell`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from limpet.cli import _output, _terminal
from limpet.client._results import from_info
from limpet.errors import LimpetError

if TYPE_CHECKING:
    from limpet.client import Exec

_CTRL_C, _CTRL_BRACKET = b"\x03", b"\x1d"
_AGAIN = 3.0  # seconds within which a second Ctrl-C on a terminal means us
_PIECE = 64 << 10
_FORWARDED = {signal.SIGINT: "INT", signal.SIGTERM: "TERM"}
DETACHED = 130
TIMED_OUT = 124


class Ended(NamedTuple):
    """The exit code; `detached`: the command runs on."""

    code: int
    detached: bool = False


class Session:
    """`tty`: raw keys and resizes; `feed`: forward stdin; `let_go`: whether a second Ctrl-C detaches (not in shells).
    `interrupt` signals the command on another connection, since ours may be full of input that nobody reads."""

    def __init__(
        self, command: Exec, interrupt: Callable[[str], None], *, tty: bool, feed: bool, let_go: bool = True
    ) -> None:
        self._command, self._interrupt, self._tty, self._let_go = command, interrupt, tty, let_go
        self._feed = feed and _terminal.is_open(0)
        self._broken = False
        self._signals = 0
        self._keys: dict[bytes, list[float]] = {_CTRL_C: [], _CTRL_BRACKET: []}  # when they were pressed lately

    def run(self) -> Ended:
        """Until the command ends or is let go."""
        with _terminal.raw(0) if self._tty else contextlib.nullcontext(), _wakeups() as (wakeups, stop, end):
            threads = [
                threading.Thread(target=self._watch_signals, args=(wakeups,), daemon=True),
                threading.Thread(target=self._forward_input, args=(stop,), daemon=True),
            ]
            for thread in threads:
                thread.start()
            try:
                self._receive()
            finally:
                self._command.close()
                end()
                for thread in threads:
                    thread.join(timeout=2)
        return self._outcome()

    def _receive(self) -> None:
        try:
            while (chunk := self._command.read()) is not None:
                _terminal.write_all(1 if chunk.lane == "stdout" else 2, chunk.data)
        except BrokenPipeError:  # whoever reads us has had enough: tell the command as a pipe would have done
            self._broken = True
            with contextlib.suppress(LimpetError):
                self._interrupt("PIPE")

    def _outcome(self) -> Ended:
        command = self._command
        if self._broken:
            return Ended(128 + signal.SIGPIPE)
        if command.info is None:
            back = f"limpet attach {command.name} {command.id}"
            _output.note(f"detached; the command runs on. To come back: {back}")
            return Ended(DETACHED, detached=True)
        result = from_info(command.info, lost=command.lost)
        if command.lost:
            _output.warn(f"{command.lost} bytes of old output were no longer kept")
        if result.timed_out:
            _output.note(f"error: {result.how()}")
            return Ended(TIMED_OUT)
        return Ended(result.exit_code)

    def _watch_signals(self, wakeups: int) -> None:
        """A thread: signals that this process gets."""
        while True:
            for number in os.read(wakeups, 256) or b"\0":
                if number == 0:
                    return
                if number == signal.SIGWINCH:
                    if self._tty:
                        with contextlib.suppress(BrokenPipeError):
                            self._command.resize(*_terminal.size())
                else:
                    self._on_signal(_FORWARDED[signal.Signals(number)])

    def _on_signal(self, name: str) -> None:
        """The first one is the command's, the second one ours."""
        self._signals += 1
        if self._signals > 1:
            self._command.close()
            return
        with contextlib.suppress(LimpetError):  # the command ended meanwhile
            self._interrupt(name)

    def _forward_input(self, stop: int) -> None:
        """A thread: keys, or whatever stdin is."""
        with contextlib.suppress(BrokenPipeError):  # the command ended, and the receiver knows
            while self._feed:
                ready = select.select([0, stop], [], [])[0]
                if stop in ready:
                    return
                try:
                    data = os.read(0, _PIECE)
                except OSError:  # the terminal went away
                    data = b""
                if not data:
                    break
                if self._tty and self._leaves(data):
                    self._command.close()
                    return
                self._command.stdin.write(data)
            self._command.stdin.close()

    def _leaves(self, keys: bytes) -> bool:
        """Whether these keys mean that the person wants out."""
        key, now = keys[:1], time.monotonic()
        if key not in self._keys or keys.strip(key):
            return False
        lately = [then for then in self._keys[key] if now - then < _AGAIN]
        self._keys[key] = pressed = lately + [now] * len(keys)
        return len(pressed) >= (2 if self._let_go else 1 << 30) if key == _CTRL_C else len(pressed) >= 3


@contextlib.contextmanager
def _wakeups() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """A pipe into which every signal of interest is written as one byte (the handlers themselves do nothing), one
    that becomes readable at the end, and what ends both."""
    reading, writing = os.pipe()
    stop, stopping = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in (*_FORWARDED, signal.SIGWINCH)}
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def end() -> None:
        signal.set_wakeup_fd(old)
        os.write(writing, b"\0")
        os.write(stopping, b"\0")

    try:
        yield reading, stop, end
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        for fd in (reading, writing, stop, stopping):
            os.close(fd)
