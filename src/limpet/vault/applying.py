"""A send stream put into effect on a manifest.

Nothing here touches a real directory: every command becomes a call of the Editor, which changes a tree of records. A
symlink in such a tree is a record with a text, so a path that leads "through" one leads nowhere: it is refused as a
path whose parent is no directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from limpet.vault import commands as say
from limpet.vault.commands import Command
from limpet.vault.editing import Editor
from limpet.vault.errors import BadStream
from limpet.vault.sendstream import Limits, Parser


def receive(
    editor: Editor, chunks: Iterable[bytes], *, uuid: str, parent: str | None, limits: Limits | None = None
) -> int:
    """Apply the stream that `chunks` are the bytes of; returns how many commands it had. See `apply`.

    Chunks are asked for one by one, each when the one before is applied, and none is held."""
    limits = limits or Limits()
    if editor.base is not None:
        room = limits.tree - editor.base.totals()[0]
        limits = replace(limits, entries=max(0, min(limits.entries, room)))
    return apply(editor, read(chunks, limits), uuid=uuid, parent=parent)


def read(chunks: Iterable[bytes], limits: Limits | None = None) -> Iterator[Command]:
    """The commands of a whole stream. Raises BadStream, also for one that is cut off."""
    parser = Parser(limits)
    for chunk in chunks:
        yield from parser.feed(chunk)
    parser.finish()


def apply(editor: Editor, commands: Iterable[Command], *, uuid: str, parent: str | None) -> int:
    """Change the editor's tree as the stream says; returns how many commands it had.

    `uuid`: the snapshot's that was asked for. `parent`: that of the snapshot which the editor's base was made from;
    None when everything was asked for and the editor began with nothing. Raises BadStream for a stream of something
    else, and for what does not fit the tree: the editor's draft is to be abandoned then."""
    steps = iter(commands)
    _check_beginning(next(steps, None), uuid, parent)

    def clone(path: bytes, offset: int, length: int, source: bytes, source_offset: int, origin: str) -> None:
        if origin not in (uuid, parent):
            raise BadStream(f"the send stream clones from {origin}, which nobody offered")
        editor.clone(path, offset, length, source, source_offset, origin == parent)

    effects: dict[type[Any], Callable[..., None]] = {
        say.Mkfile: editor.mkfile,
        say.Mkdir: editor.mkdir,
        say.Mknod: editor.mknod,
        say.Symlink: editor.symlink,
        say.Rename: editor.rename,
        say.Link: editor.link,
        say.Unlink: editor.unlink,
        say.Rmdir: editor.rmdir,
        say.SetXattr: editor.set_xattr,
        say.RemoveXattr: editor.remove_xattr,
        say.Write: editor.write,
        say.Clone: clone,
        say.Truncate: editor.truncate,
        say.Chmod: editor.chmod,
        say.Chown: editor.chown,
        say.Utimes: editor.utimes,
        say.UpdateExtent: _no_data,
    }
    count = 1
    for command in steps:
        effects[type(command)](*command)
        count += 1
    return count


def measure(chunks: Iterable[bytes], limits: Limits | None = None) -> tuple[int, int]:
    """(entries, bytes of content) that a stream would change, with its data or without (NO_FILE_DATA): what is pending.
    A directory in which names came or went does not count for that."""
    entries = size = 0
    touched: set[bytes] = set()  # since the last Utimes, with which Btrfs ends what it says of an inode
    for command in read(chunks, limits):
        match command:
            case say.Utimes(path):
                entries += path in touched
                touched.clear()
                continue
            case say.Unlink() | say.Rmdir():
                entries += 1
            case say.Write(_, _, data):
                size += len(data)
            case say.UpdateExtent(_, _, extent) | say.Clone(_, _, extent):
                size += extent
        if len(touched) < 1000:
            touched.add(command.to if isinstance(command, say.Rename) else command.path)
    return entries, size


def _check_beginning(first: Command | None, uuid: str, parent: str | None) -> None:
    match first:
        case say.Subvol() if parent is None:
            pass
        case say.Snapshot(parent=found) if found == parent:
            pass
        case say.Subvol():
            raise BadStream(f"the send stream has everything instead of what changed since {parent}")
        case say.Snapshot(parent=found):
            raise BadStream(f"the send stream begins at {found} instead of {parent or 'nothing'}")
        case _:
            raise BadStream("the send stream does not begin with its subvolume")
    if first.uuid != uuid:
        raise BadStream(f"the send stream is of {first.uuid} instead of {uuid}")


def _no_data(path: bytes, _offset: int, _size: int) -> None:
    raise BadStream(f"the send stream has no data of {path!r}")
