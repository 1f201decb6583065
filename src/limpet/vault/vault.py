"""The vault of one sandbox: a directory of generations (see layout.py for its files)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import Busy, FailedPrecondition, NotFound
from limpet.vault import retaining
from limpet.vault.checking import Checker, Findings
from limpet.vault.drafts import Draft
from limpet.vault.errors import Damaged
from limpet.vault.generations import Generation
from limpet.vault.layout import NOTHING, Layout
from limpet.vault.ledger import Ledger, Pin
from limpet.vault.objectfile import ObjectFile
from limpet.vault.objects import Objects
from limpet.vault.reaching import mark
from limpet.vault.repairing import repair


@dataclass(frozen=True)
class Usage:
    """`size`: bytes on disk. `reclaimable`: what of them the next `collect` looks at; at most that is freed."""

    generations: int
    oldest: datetime | None
    newest: datetime | None
    size: int
    reclaimable: int


class Vault:
    """One process has it open. Threads may read at any time, also what `begin` adds to; others than the first that
    begin, forget, collect, check or repair at a time are told Busy, but a check and a draft go together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.damage: str | None = None  # why it takes no commits
        self.settled = True  # whether `head` is durable; else a crash may lose it, and only another commit helps
        self._layout = Layout(directory)
        self._writer = threading.Lock()  # held by who adds or removes generations
        self._reader = threading.Lock()  # held by who needs all files to stay, or removes some
        self._remembering = threading.Lock()  # held for moments, by who writes the ledger
        self._ledger = Ledger()
        self._objects = Objects({})
        self._generations: dict[int, Generation] = {}
        self._unreadable: dict[int, Damaged] = {}
        self._head = 0

    @classmethod
    def open(cls, directory: Path) -> Vault:
        """Makes it, durably, when it is missing. Removes what a crash left. A damaged vault opens as well: see
        `damage`. Raises FailedPrecondition for what is no vault."""
        if not directory.exists():
            _make(directory)
        layout = Layout(directory)
        if not (layout.gens.is_dir() or layout.packs.is_dir() or layout.ledger.is_file()):
            raise FailedPrecondition(f"{directory} is no vault", hint="move it away, and a new one is made")
        vault = cls(directory)
        vault._load()
        return vault

    @property
    def head(self) -> Generation | None:
        """The newest generation."""
        return self._generations.get(self._head)

    def generations(self) -> list[Generation]:
        """Kept ones, ascending; without those whose files cannot be read."""
        return [self._generations[number] for number in sorted(self._generations)]

    def generation(self, number: int) -> Generation:
        """Raises NotFound naming the nearest kept ones; Damaged."""
        if (found := self._generations.get(number)) is not None:
            return found
        if number in self._unreadable:
            raise self._unreadable[number]
        known = sorted(self._generations)
        near = [*[n for n in known if n < number][-1:], *[n for n in known if n > number][:1]]
        raise NotFound(
            f"there is no generation {number}",
            hint="the nearest: " + ", ".join(map(str, near)) if near else "there is none at all yet",
        )

    def at(self, when: datetime) -> Generation:
        """The newest not after `when`. Raises NotFound."""
        generations = self.generations()
        if found := [generation for generation in generations if generation.time <= when]:
            return found[-1]
        if not generations:
            raise NotFound("there is no generation at all yet")
        oldest = generations[0]
        raise NotFound(
            f"there is no generation as old as {when:%Y-%m-%d %H:%M:%S}",
            hint=f"the oldest is {oldest.number} of {oldest.time:%Y-%m-%d %H:%M:%S}",
        )

    def newest_with(self, volume: str, snapshots: Mapping[str, str]) -> Generation | None:
        """The newest generation that was made from one of these snapshots ({token: uuid}) of a volume."""
        for generation in reversed(self.generations()):
            found = generation.volumes.get(volume)
            if found is not None and found.token and snapshots.get(found.token) == found.uuid:
                return generation
        return None

    def begin(self) -> Draft:
        """The next generation. Raises Damaged while the vault is damaged, Busy while it is being changed."""
        if not self._writer.acquire(blocking=False):
            raise Busy(f"{self.directory} is being changed")
        try:
            self._require_sound()
            number = max(self._head, self._ledger.last_forgotten()) + 1
            return Draft(self._layout, self._objects, number, self.head, self._ended)
        except BaseException:
            self._writer.release()
            raise

    def pin(self, number: int, why: str, until: datetime | None = None) -> None:
        """Keep a generation whatever its age, until then or for ever. Durable when it returns."""
        with self._remembering:
            generation = self.generation(number)
            self._remember(replace(self._ledger, pins={**self._ledger.pins, number: Pin(why, until)}))
            generation.pinned = why

    def unpin(self, number: int) -> None:
        """Let a generation go when its time comes."""
        with self._remembering:
            pins = {other: pin for other, pin in self._ledger.pins.items() if other != number}
            self._remember(replace(self._ledger, pins=pins))
            if number in self._generations:
                self._generations[number].pinned = None

    def forget(self, numbers: Iterable[int]) -> int:
        """Forget these generations, but never the newest nor a pinned one; returns the bytes freed."""
        doomed = [number for number in numbers if number in self._generations and number != self._head]
        return self._forget(doomed, datetime.now(UTC))

    def collect(self, now: datetime) -> int:
        """Forget what the ladder does not keep, and compact; returns the bytes freed."""
        return self._forget(retaining.superfluous(self.generations(), self._ledger, now), now)

    def check(self, *, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Verify every byte; returns the problems, none when all is well. `progress(bytes done, bytes in all)`."""
        return self.inspect(progress=progress).problems

    def inspect(self, *, progress: Callable[[int, int], None] | None = None) -> Findings:
        """`check` with all that it found out."""
        with self._held(self._reader):
            return Checker(self._layout, progress).run()

    def repair(self) -> list[str]:
        """Fall back to the newest whole generation; what is damaged is kept in damaged/. Returns what was done."""
        with self._held(self._writer, self._reader), self._remembering:
            done = repair(self._layout, Checker(self._layout).run())
            self._load()
            return done

    def usage(self, now: datetime | None = None) -> Usage:
        """What it takes of the disk."""
        generations = self.generations()
        doomed = set(retaining.superfluous(generations, self._ledger, now or datetime.now(UTC)))
        return Usage(
            len(generations),
            generations[0].time if generations else None,
            generations[-1].time if generations else None,
            self._size(),
            sum(generation.new_bytes for generation in generations if generation.number in doomed),
        )

    def mark_verified(self, when: datetime) -> None:
        """Remember that a check or a restore found everything as it was written."""
        with self._remembering:
            self._remember(replace(self._ledger, verified=when))

    @property
    def last_verified(self) -> datetime | None:
        """When `mark_verified` was called last."""
        return self._ledger.verified

    def _load(self) -> None:
        """Find out what is there."""
        self.damage = None
        self._ledger, self._head, seal = Ledger(), 0, ""
        try:
            self._ledger = Ledger.read(self._layout.ledger)
            self._head, seal = self._layout.read_head()
            self._require_head(self._head, seal)
        except Damaged as error:
            self.damage = error.message
        if self.damage is None:
            retaining.sweep(self._layout, self._ledger, self._head)
            self.settled = self._settles()
        else:
            self._head = 0
        self._objects.move(retaining.places(self._layout, self._ledger))
        self._generations.clear()
        self._unreadable.clear()
        for number in self._layout.numbers():
            try:
                self._generations[number] = self._read(number)
            except Damaged as error:
                self._unreadable[number] = error

    def _settles(self) -> bool:
        """Make durable what HEAD says: who renamed it may have been killed before that was."""
        try:
            durable.sync_directory(self.directory)
        except OSError:
            return False
        return True

    def _require_head(self, number: int, seal: str) -> None:
        """Raise Damaged unless the file that HEAD names is the one that it means."""
        if not self._layout.gens.is_dir() or not self._layout.packs.is_dir():
            raise Damaged(f"{self._layout.gens} or {self._layout.packs} is missing")
        if f"{number:06d}-{seal}" == NOTHING:
            return
        file = ObjectFile(self._layout.generation(number))
        if file.seal != seal:
            raise Damaged(f"{file.path} is damaged: it is not the generation that HEAD names")
        file.manifest()
        file.index()

    def _read(self, number: int) -> Generation:
        path = self._layout.generation(number)
        generation = Generation.of(self._objects, ObjectFile(path).manifest())
        if generation.number != number:
            raise Damaged(f"{path} is damaged: it is generation {generation.number}")
        pin = self._ledger.pins.get(number)
        generation.pinned = pin.why if pin else None
        return generation

    def _ended(self, committed: Generation | None, settled: bool) -> None:
        if committed is not None:
            self.settled = settled
            self._generations[committed.number] = committed
            self._head = committed.number
        self._writer.release()

    def _forget(self, doomed: list[int], now: datetime) -> int:
        self._require_sound()
        if not doomed:
            return 0
        with self._held(self._writer, self._reader), self._remembering:
            for error in self._unreadable.values():
                raise error  # nobody knows what it needs
            before = self._size()
            pinned = {number for number, pin in self._ledger.pins.items() if pin.holds(now)}
            doomed = [number for number in doomed if number not in pinned]  # since a moment ago, perhaps
            kept = [generation for number, generation in self._generations.items() if number not in doomed]
            self._ledger = retaining.forget(self._layout, self._ledger, mark(self._objects, kept), doomed)
            for number in doomed:
                del self._generations[number]
            self._objects.move(retaining.places(self._layout, self._ledger))
            retaining.sweep(self._layout, self._ledger, self._head)
            return before - self._size()

    def _remember(self, ledger: Ledger) -> None:
        self._require_sound()
        crashpoint("vault.ledger.before")
        ledger.write(self._layout.ledger)
        crashpoint("vault.ledger.after")
        self._ledger = ledger

    def _require_sound(self) -> None:
        if self.damage is not None:
            raise Damaged(
                f"the vault is damaged: {self.damage}",
                hint="`limpet vault repair` falls back to the newest whole generation; older ones can be restored",
            )

    @contextmanager
    def _held(self, *locks: threading.Lock) -> Iterator[None]:
        with ExitStack() as held:
            for lock in locks:
                if not lock.acquire(blocking=False):
                    raise Busy(f"{self.directory} is being changed or checked")
                held.callback(lock.release)
            yield

    def _size(self) -> int:
        size = 0
        for part in (self._layout.gens, self._layout.packs):
            for path in part.iterdir() if part.is_dir() else ():
                with suppress(FileNotFoundError):
                    size += path.stat().st_size
        return size


def _make(directory: Path) -> None:
    """An empty vault. Its name is the last thing that it gets."""
    staged = durable.staging(directory.parent, directory.name)
    layout = Layout(staged)
    durable.mkdir(layout.gens)
    durable.mkdir(layout.packs)
    Ledger().write(layout.ledger)
    durable.replace_symlink(layout.head, NOTHING)
    crashpoint("vault.make.before")
    durable.publish(staged, directory)
    crashpoint("vault.make.after")
