"""Making a damaged vault one that takes generations again. What is damaged is kept, in damaged/.

    1. damaged/   one more name for every file that is not sound
    2. ledger     forgets the generations that are not; packs get along without what is damaged
    3. HEAD       names the newest generation that is whole

A crash between these leaves a damaged vault, to be repaired again. HEAD comes last: a vault is sound as soon as it
names a whole generation, and then the numbers of the others must not be given again.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.vault.checking import Findings
from limpet.vault.errors import Damaged
from limpet.vault.layout import NOTHING, Layout, head_text
from limpet.vault.ledger import Ledger
from limpet.vault.objectfile import ObjectFile
from limpet.vault.objects import Objects
from limpet.vault.reaching import Live, mark
from limpet.vault.retaining import forget, places, rewritten


def repair(layout: Layout, found: Findings) -> list[str]:
    """Repair what was found; says what was done. The vault must be opened anew."""
    if not found.problems:
        return []
    done: list[str] = []
    for directory in (layout.gens, layout.packs, layout.damaged):
        if not directory.is_dir():
            durable.mkdir(directory)
            durable.sync_directory(layout.directory)
    live = mark(Objects(places(layout, _ledger(found))), found.sound)
    done += _quarantined(layout, found)
    done += _cleaned(layout, found, live)
    forgotten = _forgotten(layout, found, live)
    return done + _fallen_back(layout, found) + forgotten


def _ledger(found: Findings) -> Ledger:
    return replace(found.ledger or Ledger(), packs=tuple(found.packs))


def _quarantined(layout: Layout, found: Findings) -> list[str]:
    doubtful = {*found.broken, *(layout.generation(number) for number in found.unsound)}
    if found.ledger is None:
        doubtful.add(layout.ledger)
    crashpoint("vault.repair.keep.before")
    kept = []
    for path in sorted(doubtful):
        target = layout.damaged / path.name
        if path.exists() and not _linked(path, target):
            while target.exists():
                target = target.with_name(target.name + "~")
            durable.link(path, target)
            kept.append(f"{path} is kept as {target}")
    durable.sync_directory(layout.damaged)
    crashpoint("vault.repair.keep.after")
    return kept


def _linked(path: Path, target: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.samefile(target)
    return False


def _cleaned(layout: Layout, found: Findings, live: Live) -> list[str]:
    """Generations that are whole, in whose files something is damaged that nobody needs."""
    done = []
    for number in (generation.number for generation in found.sound):
        if layout.generation(number) in found.broken:
            crashpoint("vault.repair.clean.before")
            rewritten(layout, number, live)
            crashpoint("vault.repair.clean.after")
            found.head_is_sound = False  # it may name this one, with another seal
            done.append(f"{layout.generation(number)} is without what was damaged, which nobody needs")
    return done


def _fallen_back(layout: Layout, found: Findings) -> list[str]:
    if found.head_is_sound:
        return []
    newest = found.sound[-1] if found.sound else None
    text = head_text(newest.number, ObjectFile(layout.generation(newest.number)).seal) if newest else NOTHING
    crashpoint("vault.repair.head.before")
    durable.replace_symlink(layout.head, text)
    durable.sync_directory(layout.directory)
    crashpoint("vault.repair.head.after")
    if newest is None:
        return ["no generation is whole: the next one is the first"]
    return [f"the newest generation is {newest.number} of {newest.time:%Y-%m-%d %H:%M:%S}"]


def _forgotten(layout: Layout, found: Findings, live: Live) -> list[str]:
    """The ledger as it should be: of the generations that ever were, only those that are whole are not forgotten."""
    ledger = _ledger(found)
    sound = {generation.number for generation in found.sound}
    last = max([*sound, *found.unsound, *layout.numbers(), ledger.last_forgotten(), *_head_number(layout)], default=0)
    doomed = [number for number in layout.numbers() if number not in sound and not ledger.forgets(number)]
    gone = [number for number in range(1, last + 1) if number not in sound]
    forgotten = replace(ledger, forgotten=ledger.forgetting(gone))
    forget(layout, forgotten, live, doomed, broken=found.broken)
    said = [f"generation {number} is no more: it was damaged" for number in gone if not ledger.forgets(number)]
    return said if found.ledger is not None else [*said, "which generations were pinned is not known any more"]


def _head_number(layout: Layout) -> list[int]:
    with contextlib.suppress(Damaged):
        return [layout.read_head()[0]]
    return []
