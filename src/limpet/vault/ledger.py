"""What a vault has to remember beside its generations. One file, replaced as a whole: its SHA-256, a line of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from limpet import durable
from limpet.vault.errors import Damaged


@dataclass(frozen=True)
class Pin:
    """Why a generation is kept whatever its age, and until when; None: for ever."""

    why: str
    until: datetime | None

    def holds(self, now: datetime) -> bool:
        return self.until is None or now < self.until


@dataclass(frozen=True)
class Ledger:
    """`packs`: seals of the files in packs/ that count. `forgotten`: ranges of generations that are to be gone."""

    packs: tuple[str, ...] = ()
    forgotten: tuple[tuple[int, int], ...] = ()
    pins: dict[int, Pin] = field(default_factory=dict)
    verified: datetime | None = None

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Raises Damaged."""
        try:
            digest, _, text = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise Damaged(f"{path} is damaged: its content has changed")
        data = json.loads(text)
        return cls(
            tuple(data["packs"]),
            tuple((first, last) for first, last in data["forgotten"]),
            {int(number): Pin(pin["why"], _time(pin["until"])) for number, pin in data["pins"].items()},
            _time(data["verified"]),
        )

    def write(self, path: Path) -> None:
        """Replace the file, durably."""
        durable.replace_file(path, self.encode())

    def encode(self) -> bytes:
        data = {
            "packs": sorted(self.packs),
            "forgotten": self.forgotten,
            "pins": {str(number): {"why": pin.why, "until": _text(pin.until)} for number, pin in self.pins.items()},
            "verified": _text(self.verified),
        }
        text = json.dumps(data).encode() + b"\n"
        return hashlib.sha256(text).hexdigest().encode() + b"\n" + text

    def forgets(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.forgotten)

    def last_forgotten(self) -> int:
        return max((last for _, last in self.forgotten), default=0)

    def forgetting(self, numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """`forgotten` with these as well, in as few ranges as possible."""
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self.forgotten, *((number, number) for number in numbers)]):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return tuple(merged)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
