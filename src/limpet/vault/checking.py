"""Reading a vault as a whole: is every byte as it was written, and is everything there that generations need?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from limpet.vault.errors import Damaged
from limpet.vault.generations import Generation
from limpet.vault.layout import NOTHING, Layout, head_text
from limpet.vault.ledger import Ledger
from limpet.vault.objectfile import ObjectFile, Ref
from limpet.vault.objects import Objects
from limpet.vault.reaching import Soundness
from limpet.vault.retaining import places

T = TypeVar("T")
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Digests:
    """Which objects are as they were written, and what they hold: 32 bytes for each."""

    def __init__(self) -> None:
        self._of: dict[int, bytearray] = {}
        self.count = 0

    def add(self, pack: int, ordinal: int, digest: bytes) -> None:
        held = self._of.setdefault(pack, bytearray())
        if 32 * ordinal >= len(held):
            held += bytes(32 * (ordinal + 256) - len(held))
        held[32 * ordinal : 32 * ordinal + 32] = digest
        self.count += 1

    def has(self, ref: Ref) -> bool:
        return self._of.get(ref.pack, b"")[32 * ref.ordinal : 32 * ref.ordinal + 32] == ref.digest


@dataclass
class Findings:
    """`sound`: generations that are whole, ascending. `broken`: files with something wrong in them. `packs`: seals of
    the packs that can be read at all. `head_is_sound`: HEAD names a generation of these, or none as there is none."""

    problems: list[str] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    packs: list[str] = field(default_factory=list)
    sound: list[Generation] = field(default_factory=list)
    unsound: list[int] = field(default_factory=list)
    ledger: Ledger | None = None
    head_is_sound: bool = False
    objects: int = 0
    bytes: int = 0


class Checker:
    """One look at all of a vault."""

    def __init__(self, layout: Layout, progress: Progress | None = None) -> None:
        self._layout = layout
        self._progress = progress or (lambda done, total: None)
        self._found = Findings()
        self._digests = Digests()
        self._seals: dict[int, str] = {}
        self._readable: dict[int, bytes] = {}  # manifests

    def run(self) -> Findings:
        """Read everything, then see what each generation needs. Generations may be added meanwhile."""
        found = self._found
        head = self._tried(self._layout.read_head)
        ledger = found.ledger = self._tried(lambda: Ledger.read(self._layout.ledger))
        files = list(self._files(ledger))
        total, done = sum(path.stat().st_size for path, _ in files if path.exists()), 0
        for path, number in files:
            self._file(path, number)
            done += path.stat().st_size if path.exists() else 0
            self._progress(done, total)
        found.objects, found.bytes = self._digests.count, done
        self._generations(ledger or Ledger(packs=tuple(found.packs)))
        if head is not None:
            self._head(*head, ledger)
        return found

    def _files(self, ledger: Ledger | None) -> Iterator[tuple[Path, int | None]]:
        """Each file with its generation; None for packs."""
        for number in self._layout.numbers():
            if ledger is None or not ledger.forgets(number):
                yield self._layout.generation(number), number
        if ledger is not None:
            packs = list(ledger.packs)
        else:
            packs = [path.name for path in self._layout.packs.iterdir()] if self._layout.packs.is_dir() else []
        for seal in sorted(packs):
            yield self._layout.packs / seal, None

    def _file(self, path: Path, number: int | None) -> None:
        try:
            file = ObjectFile(path)
            manifest = json.loads(file.manifest())
            if (file.seal != path.name) if number is None else (manifest.get("generation") != number):
                raise Damaged(f"{path} is damaged: it is another file than its name says")
            entries = list(file.verify())
            wrong = [problem for _, problem in entries if problem is not None]
        except Damaged as error:
            wrong = [error.message]
        else:
            if number is None:
                self._found.packs.append(path.name)
            else:
                self._seals[number], self._readable[number] = file.seal, file.manifest()
            for entry, problem in entries:
                if problem is None:
                    self._digests.add(entry.pack, entry.ordinal, entry.digest)
        if wrong:
            self._found.problems += wrong
            self._found.broken.append(path)

    def _generations(self, ledger: Ledger) -> None:
        objects = Objects(places(self._layout, ledger))
        soundness = Soundness(objects, self._digests.has)
        for number, manifest in sorted(self._readable.items()):
            generation = Generation.of(objects, manifest)
            if (lost := soundness.problem(generation)) is None:
                self._found.sound.append(generation)
            else:
                self._found.unsound.append(number)
                self._found.problems.append(f"generation {number} is damaged: it needs {lost}")
        self._found.unsound += [number for number in self._layout.numbers() if number not in self._readable]

    def _head(self, number: int, seal: str, ledger: Ledger | None) -> None:
        if ledger is not None:
            for missing in range(1, number):
                if not ledger.forgets(missing) and not self._layout.generation(missing).exists():
                    self._found.problems.append(f"{self._layout.generation(missing)} is missing")
        if head_text(number, seal) == NOTHING:
            self._found.head_is_sound = True
            return
        if number not in self._seals:
            if not self._layout.generation(number).exists():
                self._found.problems.append(f"{self._layout.generation(number)} is missing, which HEAD names")
        elif self._seals[number] != seal:
            self._found.problems.append(f"{self._layout.head} is damaged: generation {number} is another one")
        else:
            self._found.head_is_sound = any(generation.number == number for generation in self._found.sound)

    def _tried(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Damaged as error:
            self._found.problems.append(error.message)
            return None
