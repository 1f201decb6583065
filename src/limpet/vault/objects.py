"""Where the objects of a vault are, whichever file holds them, and a cache of those that are pages."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from limpet.vault.errors import Damaged
from limpet.vault.objectfile import ObjectFile, ObjectWriter, Ref
from limpet.vault.pages import Page

_OPEN_FILES = 64
_PAGES = 16 << 20  # bytes of decoded pages
_KNOWN = 1 << 15  # digests


class Objects:
    """Reads objects by their address, verified. Threads may share it. `files`: which has a generation's objects."""

    def __init__(self, files: Mapping[int, Path]) -> None:
        self._lock = threading.Lock()
        self._files: dict[int, Path] = dict(files)
        self._open: OrderedDict[Path, ObjectFile] = OrderedDict()
        self._pages: OrderedDict[bytes, Page] = OrderedDict()
        self._held = 0
        self._sink: Sink | None = None

    def place(self, number: int, path: Path | None) -> None:
        """A generation's objects are in this file from now on; None: nowhere."""
        with self._lock:
            if path is None:
                self._files.pop(number, None)
            else:
                self._files[number] = path

    def move(self, files: Mapping[int, Path]) -> None:
        """All files are others now."""
        with self._lock:
            self._files = dict(files)
            self._open.clear()

    def attach(self, sink: Sink | None) -> None:
        """Objects of the generation that is being written come from there."""
        self._sink = sink

    def read(self, ref: Ref) -> bytes:
        """What an object holds. Raises Damaged."""
        if (sink := self._sink) is not None and ref.pack == sink.number:
            return sink.read(ref)
        try:
            return self._file(ref.pack).read(ref)
        except Damaged:
            with self._lock:  # it may have moved to another file in this moment
                self._open.pop(self._files.get(ref.pack, Path()), None)
            return self._file(ref.pack).read(ref)

    def page(self, ref: Ref) -> Page:
        """A page, from the cache when it was read lately."""
        with self._lock:
            if (page := self._pages.get(ref.digest)) is not None:
                self._pages.move_to_end(ref.digest)
                return page
        page = Page.decode(self.read(ref))
        with self._lock:
            if ref.digest not in self._pages:
                self._pages[ref.digest] = page
                self._held += page.weight
            while self._held > _PAGES and len(self._pages) > 1:
                self._held -= self._pages.popitem(last=False)[1].weight
        return page

    def _file(self, number: int) -> ObjectFile:
        with self._lock:
            path = self._files.get(number)
            if path is None:
                raise Damaged(f"the objects of generation {number} are missing")
            if (file := self._open.get(path)) is None:
                file = self._open[path] = ObjectFile(path)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return file


class Sink:
    """Takes the objects of a new generation. What is known to be in the vault is not stored once more."""

    def __init__(self, number: int, writer: ObjectWriter) -> None:
        self.number = number
        self._writer = writer
        self._known: OrderedDict[bytes, Ref] = OrderedDict()

    def store(self, raw: bytes) -> Ref:
        """The address of an object that holds this."""
        digest = hashlib.sha256(raw).digest()
        if (known := self._known.get(digest)) is not None:
            self._known.move_to_end(digest)
            return known
        ref = Ref(self.number, self._writer.count, digest)
        self._writer.add(*ref, raw)
        self.know(ref)
        return ref

    def know(self, ref: Ref) -> None:
        """This object is in the vault already."""
        self._known[ref.digest] = ref
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def read(self, ref: Ref) -> bytes:
        """What an object of this generation holds."""
        raw = self._writer.read(ref.ordinal)
        if hashlib.sha256(raw).digest() != ref.digest:
            raise Damaged(f"object {ref.ordinal} of generation {self.number}, which is being written, has changed")
        return raw
