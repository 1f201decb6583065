"""A tree being changed, command by command. Memory is bounded: changes are folded into pages when they are many."""

from __future__ import annotations

from collections.abc import Iterable

from limpet.vault.blocks import Blocks, Earlier, File
from limpet.vault.errors import BadStream
from limpet.vault.namespace import Inode, Namespace
from limpet.vault.nodes import BLOCK, MAX_SIZE, Kind, Node
from limpet.vault.objects import Objects, Sink
from limpet.vault.trees import Tree, TreeRoot

_TOUCHED = 50_000  # entries and addresses of blocks in memory
_XATTRS = 1 << 20  # bytes of extended attributes of one node
_XATTR_NAMES = 10_000  # more than listxattr(2) can tell (XATTR_LIST_MAX)
_CLONED = 1 << 30  # bytes that are cloned at a time
_COPIED = 64 << 30  # bytes that clones off the grid of blocks may copy in one edit
_YEARS = 1 << 63  # seconds, what Btrfs has for a time


class Editor:
    """Paths are relative bytes; b"" is the root directory. Everything raises BadStream for what does not fit the tree.
    `base`: the tree that it began with; None: from nothing. `earlier`: a tree that it will probably be like: what both
    have at the same place is not stored again."""

    def __init__(self, objects: Objects, sink: Sink, base: Tree | None, earlier: Tree | None = None) -> None:
        self.base = base
        self._earlier = earlier
        self._blocks = Blocks(objects, sink)
        root = base.root if base is not None else TreeRoot(Node("dir"))
        self._names = Namespace(objects, sink, self._blocks, root, earlier)
        self._copied = 0

    def finish(self) -> TreeRoot:
        """What the tree is now, stored."""
        return self._names.fold()

    def mkfile(self, path: bytes) -> None:
        """An empty file."""
        self._make(path, Inode("file", 0o600))

    def mkdir(self, path: bytes) -> None:
        """An empty directory."""
        self._make(path, Inode("dir", 0o700))

    def symlink(self, path: bytes, target: bytes) -> None:
        """A symbolic link. Nothing ever follows it."""
        self._make(path, Inode("symlink", 0o777, target=target))

    def mknod(self, path: bytes, kind: Kind, mode: int, rdev: int) -> None:
        """A fifo, socket, char or block device."""
        if kind not in ("fifo", "socket", "char", "block"):
            raise BadStream(f"{path!r}: mknod cannot make a {kind}")
        self._make(path, Inode(kind, mode & 0o7777, rdev=_within(rdev, 1 << 64, "device")))

    def rename(self, source: bytes, target: bytes) -> None:
        """As rename(2): over a file, or a directory over an empty one."""
        self._tick()
        if source == target:
            return self._require(source)
        if target.startswith(source + b"/"):
            raise BadStream(f"{source!r} cannot go below itself")
        (old, name), (new, as_name) = self._names.parent(source), self._names.parent(target)
        entry, replaced = self._names.find(old, name), self._names.find(new, as_name)
        if entry is None:
            raise BadStream(f"{source!r} is not there")
        if isinstance(entry, int) and entry == replaced:
            return None  # two names of one inode: nothing happens
        if replaced is not None:
            directory = not isinstance(entry, int) and entry.kind == "dir"
            (self._rmdir if directory else self._unlink)(target)
        self._names.remove(old, name)
        return self._names.put(new, as_name, entry)

    def link(self, path: bytes, existing: bytes) -> None:
        """`path` becomes one more name of `existing`."""
        self._tick()
        parent, name = self._names.parent(existing)
        entry = self._names.find(parent, name)
        if entry is None:
            raise BadStream(f"{existing!r} is not there")
        inode = self._names.opened(parent, name, entry)
        if inode.kind == "dir":
            raise BadStream(f"{existing!r} is a directory, which has one name")
        target, as_name = self._free(path)
        if not isinstance(entry, int):
            entry = self._names.new_group(inode)
            self._names.put(parent, name, entry)
        inode.names += 1
        self._names.put(target, as_name, entry)

    def unlink(self, path: bytes) -> None:
        """Take away a name that is no directory's."""
        self._tick()
        self._unlink(path)

    def rmdir(self, path: bytes) -> None:
        """Take away an empty directory."""
        self._tick()
        self._rmdir(path)

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        """Set an extended attribute."""
        inode = self._inode(path)
        before = len(name) + len(inode.xattrs[name]) if name in inode.xattrs else 0
        inode.attributes += len(name) + len(value) - before
        inode.xattrs[name] = value
        if not 0 < len(name) <= 255 or inode.attributes > _XATTRS or len(inode.xattrs) > _XATTR_NAMES:
            raise BadStream(f"{path!r} has more extended attributes than {_XATTRS} bytes or {_XATTR_NAMES} names")

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        """Remove an extended attribute."""
        inode = self._inode(path)
        if (value := inode.xattrs.pop(name, None)) is None:
            raise BadStream(f"{path!r} has no extended attribute {name!r}")
        inode.attributes -= len(name) + len(value)

    def write(self, path: bytes, offset: int, data: bytes | memoryview) -> None:
        """Write into a file, which grows when that is beyond its end."""
        _within(offset + len(data), MAX_SIZE + 1, "size")
        self._tick()
        self._blocks.write(self._file(path), offset, data)

    def clone(
        self, path: bytes, offset: int, length: int, source_path: bytes, source_offset: int, from_base: bool
    ) -> None:
        """Copy a range of another (or the same) file, as it is now or (`from_base`) was in the base tree. Whole blocks
        at places of blocks cost nothing."""
        self._tick()
        file = self._file(path)
        source = self._base_file(source_path) if from_base else self._file(source_path)
        _within(offset + length, MAX_SIZE + 1, "size")
        if source_offset + length > source.size:
            raise BadStream(f"{source_path!r} ends before what is to be cloned of it")
        if source is file and abs(source_offset - offset) < length:
            raise BadStream(f"{path!r} cannot be cloned over itself")
        for done in range(0, max(length, 1), _CLONED):
            part = min(_CLONED, length - done)
            self._clone_part(path, offset + done, part, source_path, source_offset + done, from_base)

    def _clone_part(
        self, path: bytes, offset: int, length: int, source_path: bytes, source_offset: int, from_base: bool
    ) -> None:
        """So many addresses of blocks that they fit in memory."""
        self._tick()
        file = self._file(path)
        source = self._base_file(source_path) if from_base else self._file(source_path)
        grown = max(file.size, offset + length)
        self._zero(file, offset, min(length, file.size - offset))
        for index in self._blocks.numbers(source, source_offset // BLOCK, (source_offset + length - 1) // BLOCK):
            start = max(index * BLOCK, source_offset)
            end = min((index + 1) * BLOCK, source_offset + length)
            self._clone_block(file, start - source_offset + offset, source, start, end - start, grown)
        file.size = grown

    def truncate(self, path: bytes, size: int) -> None:
        """Cut a file off, or have it grow by a hole."""
        self._tick()
        self._blocks.resize(self._file(path), _within(size, MAX_SIZE + 1, "size"))

    def chmod(self, path: bytes, mode: int) -> None:
        """Set the permission bits."""
        self._inode(path).mode = mode & 0o7777

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        """Set owner and group."""
        inode = self._inode(path)
        inode.uid, inode.gid = _within(uid, 1 << 32, "owner"), _within(gid, 1 << 32, "group")

    def utimes(self, path: bytes, mtime_ns: int) -> None:
        """Set the time of modification."""
        if not -_YEARS <= mtime_ns // 1_000_000_000 < _YEARS:
            raise BadStream(f"{path!r}: {mtime_ns} is no time")
        self._inode(path).mtime_ns = mtime_ns

    def put(self, path: bytes, node: Node, chunks: Iterable[bytes] = ()) -> None:
        """Make `path` what `node` says (all but its size, group and content), a file with these bytes. A directory that
        is there keeps what is in it."""
        self._tick()
        made = Inode.of(Node(node.kind, node.mode, node.uid, node.gid, node.mtime_ns, node.xattrs, 0, node.rdev,
                             node.target))  # fmt: skip
        if path:
            parent, name = self._names.parent(path)
            there = self._names.find(parent, name)
        else:
            there = self._names.inode(path)
        if there is not None and not isinstance(there, int) and there.kind == "dir" == node.kind:
            inode = self._names.inode(path)
            inode.mode, inode.uid, inode.gid, inode.mtime_ns = node.mode, node.uid, node.gid, node.mtime_ns
            inode.xattrs, inode.attributes = made.xattrs, made.attributes
            return
        if there is not None:
            self.unlink(path)
        self._make(path, made)
        offset = 0
        for chunk in chunks:
            self.write(path, offset, chunk)
            offset += len(chunk)

    def _unlink(self, path: bytes) -> None:
        parent, name = self._names.parent(path)
        entry = self._names.find(parent, name)
        if entry is None:
            raise BadStream(f"{path!r} is not there")
        if isinstance(entry, int):
            self._names.drop_name(entry)
        elif entry.kind == "dir":
            raise BadStream(f"{path!r} is a directory")
        self._names.remove(parent, name)

    def _rmdir(self, path: bytes) -> None:
        parent, name = self._names.parent(path)
        inode = self._names.inode(path)
        if inode.kind != "dir" or not self._names.is_empty(inode):
            raise BadStream(f"{path!r} is no empty directory")
        self._names.remove(parent, name)

    def _make(self, path: bytes, inode: Inode) -> None:
        self._tick()
        parent, name = self._free(path)
        self._names.put(parent, name, inode)

    def _free(self, path: bytes) -> tuple[Inode, bytes]:
        parent, name = self._names.parent(path)
        if self._names.find(parent, name) is not None:
            raise BadStream(f"{path!r} is there already")
        return parent, name

    def _inode(self, path: bytes) -> Inode:
        self._tick()
        return self._names.inode(path)

    def _require(self, path: bytes) -> None:
        self._names.inode(path)

    def _file(self, path: bytes) -> File:
        file = self._names.file(path)
        if self._earlier is not None and file.earlier is None:
            file.earlier = Earlier(self._earlier, path)
        return file

    def _base_file(self, path: bytes) -> File:
        node = self.base.lookup(path) if self.base is not None else None
        if node is None or node.kind != "file":
            raise BadStream(f"{path!r} is no file of the snapshot before")
        return File(node.content, node.size)

    def _clone_block(self, file: File, to: int, source: File, start: int, length: int, grown: int) -> None:
        """Copy a part of one block of `source`. It can be shared when it is the whole of both."""
        whole = length == BLOCK or (start + length == source.size and to + length == grown)
        if start % BLOCK == 0 == to % BLOCK and whole:
            self._blocks.share(file, to // BLOCK, self._blocks.address(source, start // BLOCK))
            return
        self._copied += length
        if self._copied > _COPIED:
            raise BadStream(f"clones copy more than {_COPIED >> 30} GiB")
        for part in list(self._blocks.read(source, start, length)):
            self._blocks.write(file, to, part)
            to += len(part)

    def _zero(self, file: File, offset: int, length: int) -> None:
        """Make a range within a file a hole."""
        if length <= 0:
            return
        for index in self._blocks.numbers(file, offset // BLOCK, (offset + length - 1) // BLOCK):
            start, end = max(index * BLOCK, offset), min((index + 1) * BLOCK, offset + length)
            if end - start == BLOCK or (start % BLOCK == 0 and end == file.size):
                self._blocks.share(file, index, None)
            else:
                self._blocks.write(file, start, bytes(end - start))

    def _tick(self) -> None:
        if self._names.touched + self._blocks.stored > _TOUCHED:
            self._names.fold()


def _within(number: int, limit: int, what: str) -> int:
    if not 0 <= number < limit:
        raise BadStream(f"{number} is no {what}")
    return number
