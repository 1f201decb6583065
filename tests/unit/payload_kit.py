"""A payload without a VM: a real host directory, a real vault whose generations are made by hand, a real publisher."""

from __future__ import annotations

import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from limpet.paths import Paths
from limpet.services.payloads import locking
from limpet.services.payloads.locking import Lock
from limpet.services.payloads.marker import NAME, Marker
from limpet.services.payloads.publishing import Edition, Publisher
from limpet.services.payloads.scanning import scan
from limpet.services.payloads.state import PayloadState, Published, States, volume_of
from limpet.vault import Editor, Generation, Node, Vault

Change = Callable[[Editor], None]
Content = Mapping[str, bytes | Node]
ID = "pl_01test"
VOLUME = volume_of(ID)


def paths_in(home: Path) -> Paths:
    paths = Paths(home / "data", home / "cache", home / "run")
    paths.make()
    return paths


def lock(directory: Path, sandbox: str = "box", home: str = "/home/x/limpet") -> Lock:
    """The directory, taken as a daemon takes it."""
    return locking.take(Marker.new(ID, sandbox, f"sb_{sandbox}", Path(home), directory))


class World:
    """One payload that has been seeded with `content`."""

    def __init__(self, root: Path, content: Content) -> None:
        self.host = root / "host"
        self.host.mkdir(parents=True)
        for name, data in content.items():
            assert isinstance(data, bytes)
            (self.host / name).parent.mkdir(parents=True, exist_ok=True)
            (self.host / name).write_bytes(data)
        self.paths = paths_in(root / "home")
        self.states = States(self.paths.payloads)
        self.vault = Vault.open(self.paths.vault("sb_box"))
        self.lock = lock(self.host)
        state = PayloadState(payload=ID, sandbox_id="sb_box", host_dir=str(self.host), nonce=self.lock.marker.nonce)
        self.publisher = Publisher(state, self.states.save)
        self.publisher.last = scan(self.host)
        self.publisher.save(seeded=1, published=Published.of(self.publisher.last))

    def generation(self, change: Change | None = None) -> Generation:
        """The next generation: as the newest (at first: as the host directory), changed."""
        draft, head = self.vault.begin(), self.vault.head
        editor = draft.volume(VOLUME, b"/workspace/data", base=head)
        if head is None:
            copy(self.host, editor)
        if change is not None:
            change(editor)
        return draft.commit(datetime.now(UTC), {VOLUME: (f"t{draft.number}", str(uuid.uuid4()))})

    def publish(self, generation: Generation, base: Generation | None = None, *, confirmed: bool = False) -> bool:
        """Whether something had to be published."""
        info = generation.volumes[VOLUME]
        edition = Edition(generation.number, generation.time, generation.tree(VOLUME), info.token, info.uuid)
        tree = base.tree(VOLUME) if base is not None else None
        return self.publisher.publish(edition, tree, confirmed=confirmed) is not None

    def restarted(self) -> Publisher:
        """The publisher that the next daemon has, with what is on the disk."""
        states = States(self.paths.payloads)
        state = states.get(ID)
        assert state is not None
        self.states, self.publisher = states, Publisher(state, states.save)
        return self.publisher

    @property
    def beside(self) -> list[str]:
        """What lies beside the host directory, but the home."""
        return sorted(path.name for path in self.host.parent.iterdir() if path.name not in ("host", "home"))

    @property
    def state(self) -> PayloadState:
        state = States(self.paths.payloads).get(ID)
        assert state is not None
        return state


def copy(directory: Path, editor: Editor) -> None:
    """A host directory as a guest has it after seeding."""
    for path in [directory, *sorted(directory.rglob("*"))]:
        if path.name == NAME:
            continue
        found, name = path.lstat(), b"" if path == directory else os.fsencode(path.relative_to(directory))
        mode = stat.S_IMODE(found.st_mode)
        if path.is_symlink():
            target = os.fsencode(path.readlink())
            editor.put(name, Node("symlink", 0o777, 1000, 1000, found.st_mtime_ns, target=target))
        elif path.is_dir():
            editor.put(name, Node("dir", mode, 1000, 1000, found.st_mtime_ns))
        elif path.is_file():
            editor.put(name, Node("file", mode, 1000, 1000, found.st_mtime_ns), [path.read_bytes()])


def write(name: str, data: bytes, mode: int = 0o644, mtime_ns: int = 1_700_000_000_123_456_789) -> Change:
    """A change: a file with other content."""
    return lambda editor: editor.put(name.encode(), Node("file", mode, 1000, 1000, mtime_ns), [data])


def unlink(directory: str, numbers: Iterable[int]) -> Change:
    """A change: numbered files of a directory are gone."""

    def change(editor: Editor) -> None:
        for number in numbers:
            editor.unlink(f"{directory}/{number}".encode())

    return change


def both(*changes: Change) -> Change:
    """All of these at once."""

    def change(editor: Editor) -> None:
        for one in changes:
            one(editor)

    return change


def files(directory: Path) -> dict[str, bytes]:
    """What a reader finds, but for the marker."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*")) if path.is_file() and path.name != NAME
    }  # fmt: skip


class Reader(threading.Thread):
    """Reads a file of a directory by its path over and over, as a program on the host that knows nothing of limpet."""

    def __init__(self, *paths: Path) -> None:
        super().__init__(daemon=True)
        self._paths, self._ended = paths, threading.Event()
        self.found: set[tuple[bytes, ...]] = set()

    def run(self) -> None:
        while not self._ended.is_set():
            directory = os.open(self._paths[0].parent, os.O_RDONLY)  # one tree for all of them
            try:
                self.found.add(tuple(_read(directory, path.name) for path in self._paths))
            finally:
                os.close(directory)

    def end(self) -> set[tuple[bytes, ...]]:
        self._ended.set()
        self.join()
        return self.found


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)
