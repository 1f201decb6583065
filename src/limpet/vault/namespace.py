"""The names of a tree that is being changed: only those that were touched are here, over the tree as it was."""

from __future__ import annotations

from limpet.vault import growing, pages
from limpet.vault.blocks import Blocks, File
from limpet.vault.errors import BadStream, Damaged, unless_damaged
from limpet.vault.nodes import (
    Kind,
    Node,
    decode,
    decode_group,
    encode,
    encode_group,
    encode_link,
    link_group,
    number_key,
    weigh,
    weigh_group,
)
from limpet.vault.objects import Objects, Sink
from limpet.vault.pages import Root, Weight
from limpet.vault.trees import Tree, TreeRoot


class Inode:
    """A node that may be changed. `children`: of a directory, what is not as in `content`; None: it is gone."""

    __slots__ = ("attributes", "children", "content", "file", "gid", "kind", "mode", "mtime_ns", "names", "rdev",
                 "target", "uid", "xattrs")  # fmt: skip

    def __init__(self, kind: Kind, mode: int, *, rdev: int = 0, target: bytes = b"") -> None:
        self.kind: Kind = kind
        self.mode, self.uid, self.gid, self.mtime_ns = mode, 0, 0, 0
        self.rdev, self.target = rdev, target
        self.xattrs: dict[bytes, bytes] = {}
        self.attributes = 0  # bytes of xattrs
        self.names = 1  # of a hard-link group
        self.content = Root()
        self.children: dict[bytes, Entry | None] = {}
        self.file = File() if kind == "file" else None

    @classmethod
    def of(cls, node: Node) -> Inode:
        """One that is as `node`."""
        made = cls(node.kind, node.mode, rdev=node.rdev, target=node.target)
        made.uid, made.gid, made.mtime_ns = node.uid, node.gid, node.mtime_ns
        made.xattrs = dict(node.xattrs)
        made.attributes = sum(len(name) + len(value) for name, value in node.xattrs)
        if node.kind == "file":
            made.file = File(node.content, node.size)
        else:
            made.content = node.content
        return made

    def node(self, content: Root) -> Node:
        """The node that it has become."""
        size = self.file.size if self.file is not None else 0
        weight = content.child.weight if content.child is not None and self.kind == "dir" else Weight()
        return Node(
            self.kind, self.mode, self.uid, self.gid, self.mtime_ns, tuple(sorted(self.xattrs.items())),
            size, self.rdev, self.target, content=content, weight=weight,
        )  # fmt: skip


Entry = Inode | Node | int  # what a name stands for: changed, as it was, or one name of a hard-link group


class Namespace:
    """Finds and replaces what names stand for. `touched`: how many entries are here, since the last `fold`.
    `earlier`: a tree that this one is probably like, whose pages need not be stored again."""

    def __init__(self, objects: Objects, sink: Sink, blocks: Blocks, root: TreeRoot, earlier: Tree | None) -> None:
        self._objects, self._sink, self._blocks, self._earlier = objects, sink, blocks, earlier
        self._links = root.links
        self._next_group = root.next_group
        self._groups: dict[int, Inode | None] = {}
        self._root = Inode.of(root.node)
        self.touched = 0

    def inode(self, path: bytes) -> Inode:
        """The node at `path`, to be changed."""
        found = self._root
        for name in path.split(b"/") if path else ():
            if found.kind != "dir":
                raise BadStream(f"{path!r} leads through what is no directory")
            if (entry := self.find(found, name)) is None:
                raise BadStream(f"{path!r} is not there")
            found = self.opened(found, name, entry)
        return found

    def file(self, path: bytes) -> File:
        """The content of the file at `path`."""
        if (file := self.inode(path).file) is None:
            raise BadStream(f"{path!r} is no file")
        return file

    def parent(self, path: bytes) -> tuple[Inode, bytes]:
        """The directory that `path` is in, and its name there."""
        before, _, name = path.rpartition(b"/")
        if not name or name in (b".", b"..") or len(name) > 255:
            raise BadStream(f"{path!r} is no path of a tree")
        parent = self.inode(before)
        if parent.kind != "dir":
            raise BadStream(f"{before!r} is no directory")
        return parent, name

    def find(self, parent: Inode, name: bytes) -> Entry | None:
        """What a name in a directory stands for."""
        if name in parent.children:
            return parent.children[name]
        if parent.content.empty:
            return None
        value = pages.get(self._objects.page, parent.content, name)
        if value is None:
            return None
        return decode(value) if (group := link_group(value)) is None else group

    def opened(self, parent: Inode, name: bytes, entry: Entry) -> Inode:
        """The node of an entry, to be changed."""
        if isinstance(entry, int):
            return self.group(entry)
        if isinstance(entry, Node):
            entry = Inode.of(entry)
            self.put(parent, name, entry)
        return entry

    def put(self, parent: Inode, name: bytes, entry: Entry) -> None:
        """Have a name stand for something."""
        self.touched += name not in parent.children
        parent.children[name] = entry

    def remove(self, parent: Inode, name: bytes) -> None:
        """Have a name stand for nothing."""
        if parent.content.empty:
            self.touched -= parent.children.pop(name, None) is not None
        else:
            self.touched += name not in parent.children
            parent.children[name] = None

    def is_empty(self, directory: Inode) -> bool:
        """Whether there is no name in a directory."""
        if any(entry is not None for entry in directory.children.values()):
            return False
        return all(name in directory.children for name, _ in pages.items(self._objects.page, directory.content))

    def group(self, number: int) -> Inode:
        """The node of a hard-link group, to be changed."""
        found = self._groups.get(number)
        if found is None:
            value = pages.get(self._objects.page, self._links, number_key(number))
            if value is None or number in self._groups:
                raise Damaged(f"hard link group {number} is not in its tree")
            names, node = decode_group(value, number)
            found = self._groups[number] = Inode.of(node)
            found.names = names
            self.touched += 1
        return found

    def new_group(self, inode: Inode) -> int:
        """Make a node one that can have several names."""
        number = self._next_group
        self._next_group += 1
        self._groups[number] = inode
        return number

    def drop_name(self, number: int) -> None:
        """A hard-link group has a name less; with the last one it goes."""
        inode = self.group(number)
        inode.names -= 1
        if not inode.names:
            self._groups[number] = None

    def fold(self) -> TreeRoot:
        """Write all changes into pages, and go on from there."""
        self._blocks.flush()
        folded: dict[Inode, Node] = {}
        for directory, earlier in reversed(self._directories()):
            folded[directory] = self._folded(directory, earlier, folded)
        changes = [
            (number_key(number), None if inode is None else encode_group(inode.names, self._plain(inode)))
            for number, inode in sorted(self._groups.items())
        ]
        self._links = growing.changed(self._objects, self._sink, self._links, changes, weigh_group)
        node = folded[self._root]
        self._groups, self._root, self.touched = {}, Inode.of(node), 0
        return TreeRoot(node, self._links, self._next_group)

    def _directories(self) -> list[tuple[Inode, Node | None]]:
        """All directories that may have changed, parents first, with what the earlier tree has at their places."""
        found: list[tuple[Inode, Node | None]] = [(self._root, self._earlier.root.node if self._earlier else None)]
        for directory, earlier in found:  # grows
            for name, entry in directory.children.items():
                if isinstance(entry, Inode) and entry.kind == "dir":
                    found.append((entry, self._earlier_child(earlier, name)))
        return found

    def _earlier_child(self, parent: Node | None, name: bytes) -> Node | None:
        tree = self._earlier
        if tree is None or parent is None or parent.kind != "dir":
            return None
        return unless_damaged(lambda: tree.child(parent, name))

    def _folded(self, directory: Inode, earlier: Node | None, folded: dict[Inode, Node]) -> Node:
        if not directory.children:
            return directory.node(directory.content)
        if earlier is not None:
            unless_damaged(lambda: growing.know(self._objects, self._sink, earlier.content))
        changes: list[growing.Change] = []
        for name, entry in sorted(directory.children.items()):
            if entry is None:
                changes.append((name, None))
            elif isinstance(entry, int):
                changes.append((name, encode_link(entry)))
            elif isinstance(entry, Node):
                changes.append((name, encode(entry)))
            else:
                changes.append((name, encode(folded.get(entry) or self._plain(entry))))
        return directory.node(growing.changed(self._objects, self._sink, directory.content, changes, weigh))

    def _plain(self, inode: Inode) -> Node:
        return inode.node(self._blocks.finished(inode.file) if inode.file is not None else Root())
