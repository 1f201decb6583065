"""The files of a vault.

gens/000123     one generation: what it brought, and its manifest; write-once
packs/<seal>    objects of forgotten generations that others still need; write-once, named by its seal
HEAD            symlink that says `000123-<seal>`: the newest generation; its rename is the only commit point
ledger          which packs there are, which generations were forgotten, which are pinned; replaced as a whole
damaged/        what `repair` took out; never deleted
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from limpet.vault.errors import Damaged

NOTHING = "000000-" + "0" * 64  # what the HEAD of an empty vault says
_HEAD = re.compile(r"([0-9]{6,9})-([0-9a-f]{64})")
_NUMBER = re.compile(r"[0-9]{6,9}")


@dataclass(frozen=True)
class Layout:
    """Paths of one vault."""

    directory: Path

    @property
    def gens(self) -> Path:
        return self.directory / "gens"

    @property
    def packs(self) -> Path:
        return self.directory / "packs"

    @property
    def head(self) -> Path:
        return self.directory / "HEAD"

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger"

    @property
    def damaged(self) -> Path:
        return self.directory / "damaged"

    def generation(self, number: int) -> Path:
        return self.gens / f"{number:06d}"

    def draft(self, number: int) -> Path:
        """Where a generation is until it is finished: a name that `durable.sweep` clears away."""
        return self.gens / f".tmp-{number:06d}"

    def numbers(self) -> list[int]:
        """The generations that have a file, whatever it is worth."""
        found = self.gens.iterdir() if self.gens.is_dir() else ()
        return sorted(int(path.name) for path in found if _NUMBER.fullmatch(path.name))

    def read_head(self) -> tuple[int, str]:
        """(number, seal) of the newest generation. Raises Damaged."""
        try:
            text = self.head.readlink().as_posix()
        except FileNotFoundError:
            raise Damaged(f"{self.head} is missing") from None
        except OSError as error:
            raise Damaged(f"{self.head} cannot be read: {error.strerror}") from error
        found = _HEAD.fullmatch(text)
        if found is None or f"{int(found[1]):06d}" != found[1]:
            raise Damaged(f"{self.head} is damaged: it does not name a generation")
        return int(found[1]), found[2]


def head_text(number: int, seal: str) -> str:
    """What HEAD says."""
    return f"{number:06d}-{seal}"
