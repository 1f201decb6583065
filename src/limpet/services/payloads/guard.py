"""The guard against mass deletion (PAY-5): when a generation lacks more than half of the files of some directory that
had more than 20, it is not published until somebody confirms that this was meant.

A file that only moved is no deletion: another new one of the same size and time is taken for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from limpet.services.payloads.marker import is_ours
from limpet.services.payloads.scanning import Scan
from limpet.vault.trees import Tree

_FEW = 20  # files of a directory that is not watched over


def mass_deletion(published: Scan, tree: Tree) -> str | None:
    """What a publication of `tree` would delete too much of, in words; None when it would not."""
    there: set[bytes] = set()
    added: Counter[tuple[int, int]] = Counter()
    for path, node in tree.walk():
        if path and not is_ours(path.rpartition(b"/")[2]):
            there.add(path)
            if node.kind != "dir" and path not in published.stamps:
                added[node.size, node.mtime_ns] += 1
    had: Counter[bytes] = Counter()
    lost: Counter[bytes] = Counter()
    for path, stamp in published.stamps.items():
        if not stamp.is_plain:
            continue
        gone = path not in there
        if gone and added[stamp.size, stamp.mtime_ns] > 0:
            added[stamp.size, stamp.mtime_ns] -= 1
            gone = False
        for parent in _parents(path):
            had[parent] += 1
            lost[parent] += gone
    much = [parent for parent in had if had[parent] > _FEW and 2 * lost[parent] > had[parent]]
    if not much:
        return None
    parent = max(much, key=lambda parent: (lost[parent], len(parent)))
    name = parent.decode(errors="backslashreplace") or "it"
    return f"{lost[parent]} of the {had[parent]} files in {name} were deleted"


def _parents(path: bytes) -> Iterator[bytes]:
    while path:
        path = path.rpartition(b"/")[0]
        yield path
