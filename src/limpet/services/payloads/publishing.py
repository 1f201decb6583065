"""Publication: the host directory becomes what the guest's volume was in one generation, in one step (PAY-2).

    1  marker compared, directory scanned      not as it was left: drifted; too much gone: held back
    2  tree built beside it                    unchanged files linked, changed ones from the vault; syncfs
    3  state: `coming`                         which tree is about to get the name
    4  exchange of the two names               ← the commit point (renameat2, RENAME_EXCHANGE)
    5  swapped-out tree scanned again          edited since 1: exchanged back, drifted
    6  swapped-out tree gets another name      kept for some time for readers that stand in it; edited meanwhile: kept
                                               for good, and told
    7  state: `published`

A crash before 4 leaves a tree beside the directory that `recover` removes; between 4 and 7 `recover` does 5, 6 and 7.
Where the file system cannot exchange, 4 is two renames: for an instant the name is not there (a crash in between is
made good by `recover`), never half a tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition, Unimplemented
from limpet.services.payloads import marker
from limpet.services.payloads.building import Built, build
from limpet.services.payloads.guard import mass_deletion
from limpet.services.payloads.replaced import Replaced, directory_times, keep_aside, remove
from limpet.services.payloads.scanning import Scan, scan
from limpet.services.payloads.state import PayloadState, Published, short_id
from limpet.vault.trees import Tree


class Drifted(FailedPrecondition):
    """Somebody edited the host directory: nothing is published over that."""


class HeldBack(FailedPrecondition):
    """A generation would delete too much."""


@dataclass(frozen=True)
class Edition:
    """One generation of a payload's volume."""

    generation: int
    time: datetime
    tree: Tree
    token: str = ""
    uuid: str = ""


class Publisher:
    """Publishes one payload. All methods block: they are called in a thread, one at a time."""

    def __init__(self, state: PayloadState, save: Callable[[PayloadState], None]) -> None:
        self.state = state
        self._save_state = save
        self.directory = Path(state.host_dir)
        self.last: Scan | None = None  # of what is published, for telling what was edited
        self.replaced: list[Replaced] = []
        stem = f".limpet-{self.directory.name.encode()[:100].decode(errors='ignore')}-{short_id(state.payload)}"
        self.staging = self.directory.with_name(f"{stem}.new")
        self._aside = self.directory.with_name(f"{stem}.aside")
        self._old = f"{stem}.old-"

    def save(self, **changes: object) -> None:
        """Change the state, durably."""
        state = self.state.model_copy(update=changes)
        self._save_state(state)
        self.state = state

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────

    def look(self) -> Scan:
        """The directory as it was left. Raises FailedPrecondition without our marker, Drifted when it was edited."""
        assert self.state.published is not None and self.state.nonce is not None
        self._go_on()
        marker.require(self.directory, self.state.nonce)
        found = scan(self.directory)
        if found.digest() != self.state.published.digest:
            raise self._drifted(self.last, found)
        self.last = found
        return found

    def _drifted(self, before: Scan | None, now: Scan) -> Drifted:
        """The error for an edit between two scans."""
        where = before.difference(now) if before is not None else ""
        what = f"{where} in {self.directory}" if where else str(self.directory)
        return Drifted(f"{what} was edited on the host: nothing is published over that")

    # ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────

    def publish(self, edition: Edition, base: Tree | None, *, confirmed: bool = False) -> Built | None:
        """Make the directory this edition; None when it is that already. `base`: the tree that was published last.
        `confirmed`: whatever is there now, and however much goes; what was edited there is kept beside it.
        Raises Drifted, HeldBack, FailedPrecondition, InsufficientSpace, Damaged."""
        assert self.state.nonce is not None
        if confirmed:
            self._go_on()
            marker.require(self.directory, self.state.nonce)
            seen, base = scan(self.directory), None
        else:
            seen = self.look()
            if base is not None and next(iter(base.compare(edition.tree)), None) is None:
                self._note(edition, seen)
                return None
            if (much := mass_deletion(seen, edition.tree)) is not None:
                raise HeldBack(f"generation {edition.generation} was not published to {self.directory}: {much}")
        edited = self.state.published is None or seen.digest() != self.state.published.digest
        built, new = self._build(edition.tree, base, seen)
        if _same(seen, new):
            self._clear()
            self._note(edition, seen)
            return None
        self._exchange(edition, seen, new, edited=edited)
        return built

    def _note(self, edition: Edition, seen: Scan) -> None:
        """The directory is this edition without having been touched."""
        published, before = _published(edition, seen), self.state.published
        known = before is not None and (before.digest, before.token) == (published.digest, published.token)
        if known and self.state.trouble is None:
            self.state = self.state.model_copy(update={"published": published})  # nothing worth a write
        else:
            self.save(published=published, trouble=None, reason=None)
        self.last = seen

    def _build(self, tree: Tree, base: Tree | None, seen: Scan) -> tuple[Built, Scan]:
        self._clear()
        crashpoint("payload.publish.build.before")
        durable.mkdir(self.staging)
        try:
            built = build(tree, base, self.directory, seen, self.staging)
            new = scan(self.staging)
            if any(new.stamps.get(path) != stamp for path, stamp in built.linked.items()):
                raise self._drifted(seen, scan(self.directory))
            crashpoint("payload.publish.build.after")
            durable.sync_filesystem(self.staging)
        except BaseException as error:
            self._clear()
            if isinstance(error, FileNotFoundError):  # what was to be taken over went away
                raise self._drifted(seen, scan(self.directory)) from None
            raise
        return built, new

    def _exchange(self, edition: Edition, seen: Scan, new: Scan, *, edited: bool) -> None:
        published = _published(edition, new)
        crashpoint("payload.publish.intent.before")
        self.save(coming=published)
        crashpoint("payload.publish.exchange.before")
        self._swap()
        crashpoint("payload.publish.exchange.after")
        times = directory_times(self.staging, seen)
        if not self._untouched(seen):
            self._swap_back(published, new)
            raise self._drifted(seen, scan(self.directory))
        if edited:
            keep_aside(self.staging, self.directory)
        else:
            self.replaced.append(Replaced.of(self._rename_old(), seen, new, times))
        crashpoint("payload.publish.state.before")
        self.save(published=published, coming=None, trouble=None, reason=None)
        crashpoint("payload.publish.state.after")
        self.last = new

    def _rename_old(self) -> Path:
        """Keep the swapped-out tree for its readers; where."""
        old = self.directory.with_name(f"{self._old}{time.time_ns()}")
        durable.rename(self.staging, old)
        return old

    def _swap(self) -> None:
        """Exchange the staged tree and the directory; the parent is durable then."""
        try:
            durable.exchange(self.staging, self.directory)
        except Unimplemented:
            durable.rename(self.directory, self._aside)
            durable.sync_directory(self.directory.parent)  # each of the three names depends on the one before
            crashpoint("payload.publish.aside.after")
            durable.rename(self.staging, self.directory)
            durable.sync_directory(self.directory.parent)
            durable.rename(self._aside, self.staging)
        except OSError as error:
            raise FailedPrecondition(
                f"{self.directory} cannot be replaced: {error.strerror}",
                hint="it may have become a mount point, or lie in the lower layer of an overlay",
            ) from error
        durable.sync_directory(self.directory.parent)

    def _untouched(self, seen: Scan) -> bool:
        """Whether the swapped-out tree is what was looked at before the exchange, with our marker."""
        assert self.state.nonce is not None
        try:
            marker.require(self.staging, self.state.nonce)
            out = scan(self.staging)
        except FailedPrecondition:
            return False
        return (out.device, out.inode, out.stamps) == (seen.device, seen.inode, seen.stamps)

    def _swap_back(self, coming: Published, new: Scan | None = None) -> None:
        """The directory that was edited has its name again. `new`: what was staged, where that is known."""
        crashpoint("payload.swap_back.before")
        self._swap()
        crashpoint("payload.swap_back.after")
        self._put_away(coming, new)

    def _put_away(self, coming: Published, new: Scan | None = None) -> None:
        """The staged tree is not published: it goes, unless somebody was quick enough to write there, too."""
        if (staged := scan(self.staging)).digest() != coming.digest:
            there = scan(self.directory)
            own = [path for path, stamp in staged.stamps.items() if there.stamps.get(path) != stamp]
            if new is None or any(new.stamps.get(path) != staged.stamps[path] for path in own):
                keep_aside(self.staging, self.directory)
        crashpoint("payload.put_away.before")
        self.save(coming=None)
        crashpoint("payload.put_away.after")
        self._clear()

    def _clear(self) -> None:
        remove(self.staging)

    # ── later ────────────────────────────────────────────────────────────────────────────────────────────────────

    def tend(self) -> list[Path]:
        """Remove replaced trees that nobody needs any more. Those that somebody wrote to are kept for good; their
        places are answered."""
        kept = []
        for replaced in list(self.replaced):
            if not replaced.due():
                continue
            self.replaced.remove(replaced)
            if replaced.edited():
                kept.append(keep_aside(replaced.path, self.directory))
            else:
                crashpoint("payload.remove.before")
                remove(replaced.path)
                crashpoint("payload.remove.after")
        return kept

    def _go_on(self) -> None:
        """After a publication that failed in the middle: what it left is no edit of somebody else's."""
        if self.state.coming is not None:
            self.recover()

    def recover(self) -> None:
        """After a crash, or before the first publication: end what was begun, remove what is left over."""
        coming, published = self.state.coming, self.state.published
        if self._aside.is_dir():  # between the renames of a file system that cannot exchange
            self._end_renames(coming)
        if coming is not None and coming.is_at(self.directory):
            self._finish(coming, published)
        elif coming is not None and coming.is_at(self.staging):
            self._put_away(coming)
        elif coming is not None:
            self.save(coming=None)
        self._clear()
        known = {replaced.path for replaced in self.replaced}
        for path in self.directory.parent.glob(f"{_literal(self._old)}*"):
            if path not in known:
                self.replaced.append(Replaced(path))

    def _end_renames(self, coming: Published | None) -> None:
        if not self.directory.exists():
            durable.rename(self._aside, self.directory)
        elif coming is not None and coming.is_at(self.directory):
            durable.rename(self._aside, self.staging)
        else:
            keep_aside(self._aside, self.directory)  # somebody else took the name
        durable.sync_directory(self.directory.parent)

    def _finish(self, coming: Published, published: Published | None) -> None:
        """The new tree has the name, and the old one is beside it, if it was not renamed yet."""
        if self.staging.is_dir():
            if published is None or scan(self.staging).digest() != published.digest:
                self._swap_back(coming)  # edited in the instant before the exchange, or published over on purpose
                return
            self.replaced.append(Replaced(self._rename_old()))
        crashpoint("payload.finish.before")
        self.save(published=coming, coming=None, trouble=None, reason=None)
        crashpoint("payload.finish.after")

    def let_go(self) -> None:
        """Remove everything of ours beside the directory; it is as it was published last."""
        self.recover()
        for replaced in self.replaced:
            replaced.expire()
        self.tend()


def _published(edition: Edition, seen: Scan) -> Published:
    published = Published.of(seen, edition.generation)
    return published.model_copy(update={"time": edition.time, "token": edition.token, "uuid": edition.uuid})


def _same(seen: Scan, new: Scan) -> bool:
    """Whether a tree that was built is, but for its directories' inodes, the one that is there."""
    if seen.stamps.keys() != new.stamps.keys():
        return False
    pairs = ((seen.stamps[path], stamp) for path, stamp in new.stamps.items())
    return all(now.mode == was.mode if now.is_directory else now == was for was, now in pairs)


def _literal(text: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)
