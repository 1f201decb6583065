"""A small vault, what can be done to it, and what must be true of it afterwards. No VM."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from limpet.vault import Editor, Node, Vault, restoring

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
FILE = Node("file", mode=0o644)

Seen = tuple[int, dict[int, dict[bytes, object]], dict[int, str | None]]  # head, what each generation has, pins


def commit(vault: Vault, volume: str, change: Callable[[Editor, int], None]) -> None:
    draft = vault.begin()
    base = vault.head if vault.head is not None and volume in vault.head.volumes else None
    editor = draft.volume(volume, b"/" + volume.encode(), base=base)
    change(editor, draft.number)
    token = f"t{draft.number}"
    draft.commit(EPOCH + timedelta(hours=draft.number), {volume: (token, "uuid-" + token)})


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def first(editor: Editor, number: int) -> None:
    editor.put(b"big", FILE, [noise(1, 200_000)])
    editor.put(b"small", FILE, [b"small"])
    editor.mkdir(b"d")
    editor.put(b"d/x", FILE, [b"x"])


def edit_a(editor: Editor, number: int) -> None:
    """Within a file, and a new one."""
    editor.write(b"big", 150_000, b"A%d" % number)
    editor.put(b"a%d" % number, FILE, [noise(number, 3000)])


def edit_b(editor: Editor, number: int) -> None:
    """A file replaced, a name moved, one taken away."""
    editor.put(b"small", FILE, [b"B%d" % number])
    editor.rename(b"d", b"d%d" % number)
    editor.rename(b"d%d" % number, b"d")
    editor.put(b"d/x", FILE, [noise(-number, 500)])


def abandon(vault: Vault) -> None:
    draft = vault.begin()
    editor = draft.volume("home", b"/home", base=vault.head)
    editor.put(b"never", FILE, [noise(7, 200_000)])
    draft.abandon()


STEPS: dict[str, Callable[[Vault], object]] = {
    "commit A": lambda vault: commit(vault, "home", edit_a),
    "commit B": lambda vault: commit(vault, "workspace", edit_b),
    "forget": lambda vault: vault.forget([generation.number for generation in vault.generations()[-3:-1]]),
    "collect": lambda vault: vault.collect(EPOCH + timedelta(days=400)),
    "pin": lambda vault: vault.pin(vault.generations()[0].number, "test"),
    "repair": lambda vault: vault.repair(),
    "verified": lambda vault: vault.mark_verified(EPOCH),
    "abandon": abandon,
    "open": lambda vault: Vault.open(vault.directory),
}


def recover(directory: Path) -> None:
    """What a daemon does with a vault that it finds."""
    Vault.open(directory / "vault")


def restore(directory: Path) -> None:
    """The newest generation's home as a directory of the host."""
    head = Vault.open(directory / "vault").head
    assert head is not None
    restoring.restore(head.tree("home"), b"", directory / "host" / "out")


def setup(directory: Path) -> None:
    vault = Vault.open(directory / "vault")
    commit(vault, "home", first)
    commit(vault, "workspace", first)
    commit(vault, "home", edit_a)


def seen(vault: Vault) -> Seen:
    generations = vault.generations()
    assert vault.head is not None
    return (
        vault.head.number,
        {generation.number: content(vault, generation.number) for generation in generations},
        {generation.number: generation.pinned for generation in generations},
    )


def content(vault: Vault, number: int) -> dict[bytes, object]:
    generation = vault.generation(number)
    found: dict[bytes, object] = {b"time": generation.time}
    for name, volume in generation.volumes.items():
        tree = generation.tree(name)
        for path, node in tree.walk():
            data = b"".join(tree.read(node)) if node.kind == "file" else b""
            found[volume.mount + b"/" + path] = (node.kind, node.mode, hash(data), len(data))
    return found


def check(legal: list[Seen]) -> Callable[[Path, int, int], None]:
    def check(directory: Path, acked: int, begun: int) -> None:
        vault = Vault.open(directory / "vault")
        assert vault.damage is None, vault.damage
        found = seen(vault)
        assert found in (legal[acked], legal[begun]), f"generations {sorted(found[1])}, HEAD {found[0]}, {found[2]}"
        assert vault.check() == []
        assert not list(directory.rglob(".tmp-*"))
        commit(vault, "home", edit_a)
        again = seen(Vault.open(vault.directory))
        assert again[0] > found[0] and {number: again[1].get(number) for number in found[1]} == found[1]

    return check


def damaged_setup(directory: Path) -> None:
    """The newest generation has a byte changed."""
    setup(directory)
    flip(directory / "vault" / "gens" / "000003")


def packed_setup(directory: Path) -> None:
    """Some generations are forgotten already, so that there is a pack, of which little is needed any more."""
    setup(directory)
    vault = Vault.open(directory / "vault")
    vault.forget([1, 2])
    for volume in ("home", "workspace"):
        commit(vault, volume, lambda editor, number: editor.put(b"big", FILE, [noise(number, 200_000)]))


def dead_setup(directory: Path) -> None:
    """In the newest generation's file something is damaged that no generation needs."""
    setup(directory)

    def edit(editor: Editor, number: int) -> None:
        editor.put(b"dead", FILE, [noise(9, 400_000)])
        editor.unlink(b"dead")
        editor.put(b"alive", FILE, [b"alive"])

    commit(Vault.open(directory / "vault"), "home", edit)
    flip(directory / "vault" / "gens" / "000004", 1000)


def restore_setup(directory: Path) -> None:
    setup(directory)
    (directory / "host").mkdir()


def repair(directory: Path) -> None:
    Vault.open(directory / "vault").repair()


def seen_after(works: Iterable[Callable[[Path], object]]) -> Seen:
    """What is there when nothing goes wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        for work in works:
            work(Path(scratch))
        return seen(Vault.open(Path(scratch) / "vault"))


def flip(path: Path, offset: int | None = None) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def check_repaired(directory: Path, acked: int, begun: int) -> None:
    """The two earlier generations are there, after one more repair if it was cut off."""
    vault = Vault.open(directory / "vault")
    if acked < begun:
        vault.repair()
        vault = Vault.open(directory / "vault")
    assert vault.damage is None and vault.check() == []
    assert vault.head is not None and vault.head.number == 2
    whole = seen_after([setup])[1]
    assert seen(vault)[1] == {number: whole[number] for number in (1, 2)}
    assert any((vault.directory / "damaged").iterdir()), "what was damaged is gone"
    commit(vault, "home", edit_a)
    assert vault.head.number > 3


def check_cleaned(directory: Path, acked: int, begun: int) -> None:
    """All generations are there, after one more repair if it was cut off."""
    vault = Vault.open(directory / "vault")
    vault.repair()
    vault = Vault.open(directory / "vault")
    assert vault.damage is None and vault.check() == []
    assert [generation.number for generation in vault.generations()] == [1, 2, 3, 4]
    commit(vault, "home", edit_a)


def check_restored(directory: Path, acked: int, begun: int) -> None:
    """All of it or nothing."""
    out = directory / "host" / "out"
    if acked < begun and (not out.is_dir() or not any(out.iterdir())):
        restore(directory)  # can be done again
    head = Vault.open(directory / "vault").head
    assert head is not None
    tree = head.tree("home")
    for path, node in tree.walk():
        target = out / os.fsdecode(path)
        assert target.is_dir() if node.kind == "dir" else target.read_bytes() == b"".join(tree.read(node)), target
