"""Changing such maps: only the pages on the way to a change are read, and written anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from limpet.vault.objects import Objects, Sink
from limpet.vault.pages import Child, Page, Root, Weight

Change = tuple[bytes, bytes | None]  # a key, and its new value; None: it goes
Weigh = Callable[[bytes], Weight]  # what one value counts


def changed(
    objects: Objects, sink: Sink, root: Root, changes: Sequence[Change], weigh: Weigh | None = None, inline: int = 0
) -> Root:
    """The map after these changes, which are sorted by key. A map of at most `inline` entries stays without a page."""
    return _Growth(objects, sink, weigh).run(root, changes, inline)


def know(objects: Objects, sink: Sink, root: Root) -> None:
    """The pages of a map need not be stored again."""
    below = [(root.child, root.height)] if root.child is not None else []
    for child, height in below:  # grows
        sink.know(child.ref)
        if height > 0:
            page = objects.page(child.ref)
            below += [(page.child(place), height - 1) for place in range(len(page.keys))]


class _Growth:
    """One page being filled for each height. A whole page can take the place of its entries while all below are empty;
    otherwise it is unpacked, until the cuts are again where they were."""

    def __init__(self, objects: Objects, sink: Sink, weigh: Weigh | None) -> None:
        self._objects = objects
        self._sink = sink
        self._weigh = weigh
        self._open: list[Page] = [Page(0, [], [])]

    def run(self, root: Root, changes: Sequence[Change], inline: int) -> Root:
        if root.child is None:
            self._entries(root.page(self._objects.page), changes)
        else:
            self._merge(root.child, root.height, changes, rightmost=True)
        return self._finish(inline)

    def _merge(self, child: Child, height: int, changes: Sequence[Change], rightmost: bool) -> None:
        """Add what a page holds, changed. The rightmost one of each height has no natural end: something may follow."""
        page = self._load(child)
        if height == 0:
            self._entries(page, changes)
            return
        begin = 0
        for place, last in enumerate(page.keys):
            final = rightmost and place == len(page.keys) - 1
            end = len(changes) if final else _first_beyond(changes, last, begin)
            if begin == end and not final:
                self._whole(last, page.child(place), height - 1)
            else:
                self._merge(page.child(place), height - 1, changes[begin:end], final)
            begin = end

    def _entries(self, page: Page, changes: Sequence[Change]) -> None:
        merged = dict(zip(page.keys, page.values, strict=True))
        for key, value in changes:
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = value
        for key in sorted(merged):
            self._add(0, key, merged[key])

    def _whole(self, last: bytes, child: Child, height: int) -> None:
        """Add a page that is as it was, if possible in one piece."""
        if not any(page.keys for page in self._open[: height + 1]):
            self._add(height + 1, last, child.encode())
            return
        page = self._load(child)
        for place, key in enumerate(page.keys):
            if height == 0:
                self._add(0, key, page.values[place])
            else:
                self._whole(key, page.child(place), height - 1)

    def _add(self, height: int, key: bytes, value: bytes) -> None:
        while len(self._open) <= height:
            self._open.append(Page(len(self._open), [], []))
        page = self._open[height]
        page.keys.append(key)
        page.values.append(value)
        if page.ends():
            self._close(height)

    def _close(self, height: int) -> None:
        page = self._open[height]
        self._open[height] = Page(height, [], [])
        child = Child(self._sink.store(page.encode()), self._sum(page))
        self._add(height + 1, page.keys[-1], child.encode())

    def _finish(self, inline: int) -> Root:
        height = 0
        while True:
            page, above = self._open[height], any(page.keys for page in self._open[height + 1 :])
            if above:
                if page.keys:
                    self._close(height)
                height += 1
            elif height > 0 and len(page.keys) == 1:
                return Root(child=page.child(0), height=height - 1)
            elif not page.keys:
                return Root()
            elif height == 0 and len(page.keys) <= inline:
                return Root(inline=page.encode())
            else:
                return Root(child=Child(self._sink.store(page.encode()), self._sum(page)), height=height)

    def _sum(self, page: Page) -> Weight:
        if page.height > 0:
            return Weight.total([page.child(place).weight for place in range(len(page.keys))])
        return Weight.total(map(self._weigh, page.values)) if self._weigh else Weight(len(page.keys))

    def _load(self, child: Child) -> Page:
        self._sink.know(child.ref)
        return self._objects.page(child.ref)


def _first_beyond(changes: Sequence[Change], key: bytes, begin: int) -> int:
    end = begin
    while end < len(changes) and changes[end][0] <= key:
        end += 1
    return end
