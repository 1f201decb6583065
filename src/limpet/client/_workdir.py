"""Which host directory a command in this directory means."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from limpet.errors import BadRequest

T = TypeVar("T")


def nearest(owned: Iterable[tuple[str, T]], directory: str | os.PathLike[str]) -> list[T]:
    """Those whose directory is the given one, else those of its nearest parent that has any."""
    owned = list(owned)
    here = Path(os.path.realpath(directory))
    for candidate in (here, *here.parents):
        if found := [item for host_dir, item in owned if Path(host_dir) == candidate]:
            return found
    return []


def project_root(directory: str | os.PathLike[str], owned: Iterable[str] = ()) -> Path:
    """The directory to import for work in `directory`: the nearest that a sandbox has already, else the git
    repository around it, else itself. Raises BadRequest for the root and home directories: too much to import by
    accident."""
    here = Path(os.path.realpath(directory))
    known = nearest([(host_dir, host_dir) for host_dir in owned], here)
    if known:
        return Path(known[0])
    root = next((place for place in (here, *here.parents) if (place / ".git").exists()), here)
    if root in (Path("/"), Path(os.path.realpath(Path.home()))):
        raise BadRequest(f"refusing to import all of {root}", hint="go to a project, or name the directory: -w DIR")
    return root


def host_path(path: str | os.PathLike[str]) -> str:
    """Absolute, for the daemon works elsewhere. Links are left to it, which knows what it must be sure of."""
    return str(Path(path).expanduser().absolute())
