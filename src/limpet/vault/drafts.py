"""The next generation, being made.

    1. gens/.tmp-…      objects as they come, then index, manifest and trailer; fsync           a crash leaves a stray
    2. rename           to gens/000124, fsync of gens/                              a crash leaves a file above HEAD
    3. rename of HEAD   the commit; fsync of the vault's directory                      only now it is acknowledged

`Vault.open` removes what a crash before 3 left. An fsync that fails fails the generation and is never tried again on
the same file. When it is the last one, nobody can know which HEAD the disk has: what either names is whole and durable,
and the next commit settles it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import datetime

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.errors import FailedPrecondition
from limpet.vault.editing import Editor
from limpet.vault.generations import Generation, VolumeInfo
from limpet.vault.layout import Layout, head_text
from limpet.vault.objectfile import ObjectWriter
from limpet.vault.objects import Objects, Sink


class Draft:
    """Volumes that are not touched are carried over from HEAD. `over`: called once at its end, with the generation that
    HEAD names from then on, if it is a new one, and whether that is known to be durable."""

    def __init__(
        self, layout: Layout, objects: Objects, number: int, head: Generation | None,
        over: Callable[[Generation | None, bool], None],
    ) -> None:  # fmt: skip
        self.number = number
        self._layout = layout
        self._objects = objects
        self._head = head
        self._over = over
        self._volumes = dict(head.volumes) if head is not None else {}
        self._editors: dict[str, tuple[bytes, Editor]] = {}
        self._temporary = layout.draft(number)
        self._file = contextlib.ExitStack()
        crashpoint("vault.begin.before")
        self._writer = ObjectWriter(self._file.enter_context(durable.new_file(self._temporary)))
        crashpoint("vault.begin.after")
        self._sink = Sink(number, self._writer)
        objects.attach(self._sink)
        self._open = True

    def volume(self, name: str, mount: bytes, *, base: Generation | None) -> Editor:
        """An editor over `base`'s tree of that volume; None: from nothing. Raises NotFound."""
        self._require_open()
        newest = self._head.tree(name) if self._head is not None and name in self._head.volumes else None
        tree = base.tree(name) if base is not None else None
        editor = Editor(self._objects, self._sink, tree, newest if tree is None else None)
        self._editors[name] = (mount, editor)
        return editor

    def drop(self, name: str) -> None:
        """Leave a volume out from this generation on."""
        self._volumes.pop(name, None)
        self._editors.pop(name, None)

    def commit(self, time: datetime, snapshots: Mapping[str, tuple[str, str]]) -> Generation:
        """Finish. `snapshots`: (token, uuid) of each edited volume's snapshot. The generation is durable when this
        returns. When it raises there is none; or, after the last fsync failed, one that may be lost in a crash."""
        self._require_open()
        committed: Generation | None = None
        settled = False
        try:
            generation = self._finished(time, snapshots)
            seal = self._written(generation)
            committed = self._published(generation, seal)
            durable.sync_directory(self._layout.directory)
            settled = True
            crashpoint("vault.commit.after")
            return generation
        except BaseException as error:
            self._discard(error)
            raise
        finally:
            self._end(committed, settled)

    def abandon(self) -> None:
        """Forget it all. Does nothing after `commit`."""
        if self._open:
            self._discard(FailedPrecondition("abandoned"))
            self._end(None, False)

    def _finished(self, time: datetime, snapshots: Mapping[str, tuple[str, str]]) -> Generation:
        for name, (mount, editor) in self._editors.items():
            token, uuid = snapshots.get(name, ("", ""))
            self._volumes[name] = VolumeInfo(mount, token, uuid, editor.finish())
        new_bytes = self._writer.size
        return Generation(self._objects, self.number, time, self._volumes, new_bytes)

    def _written(self, generation: Generation) -> str:
        crashpoint("vault.write.before")
        seal = self._writer.finish(generation.manifest())
        self._file.close()  # fsync
        crashpoint("vault.write.after")
        return seal

    def _published(self, generation: Generation, seal: str) -> Generation:
        path = self._layout.generation(self.number)
        durable.rename(self._temporary, path)
        try:
            crashpoint("vault.name.after")
            durable.sync_directory(self._layout.gens)
            crashpoint("vault.commit.before")
            durable.replace_symlink(self._layout.head, head_text(self.number, seal))
        except BaseException:
            durable.unlink(path, missing_ok=True)
            raise
        self._objects.place(self.number, path)
        return generation

    def _discard(self, error: BaseException) -> None:
        """Take the file away, if it has not become a generation."""
        self._file.__exit__(type(error), error, error.__traceback__)
        durable.unlink(self._temporary, missing_ok=True)

    def _end(self, committed: Generation | None, settled: bool) -> None:
        self._open = False
        self._objects.attach(None)
        self._over(committed, settled)

    def _require_open(self) -> None:
        if not self._open:
            raise FailedPrecondition(f"generation {self.number} is over: it was committed, failed or abandoned")
