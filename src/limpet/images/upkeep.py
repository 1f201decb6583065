"""Keeping the images on this host in order: their history, what may go, and whether they are still what they were.

`users` tells who builds on a version: it is called with the version's directory, as `Image.directory` has it, and
answers the names of the sandboxes, checkpoints and templates whose layers reach its disks. Nothing with a user is
removed. The caller sees to it that none comes to be while one of these functions runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.digests import file_digest
from limpet.errors import FailedPrecondition
from limpet.images import filesystems, registry
from limpet.images.registry import Image, ImageFacts, Reference, find_image
from limpet.models import ImageVersion
from limpet.paths import Paths

Users = Callable[[Path], Sequence[str]]

_NAMED_USERS = 5  # in an error message


def history(paths: Paths, name: str, users: Users) -> list[ImageVersion]:
    """Every version of the image `name` (a tag is ignored), the newest first. Raises NotFound."""
    reference = Reference.parse(name)
    found = registry.versions(paths, reference.name)
    if not found:
        find_image(paths, reference.name)  # raises, with the nearest name
    tags = _tags(paths, reference.name)
    return [
        ImageVersion(
            **version.info.model_dump(include=set(ImageVersion.model_fields) & set(type(version.info).model_fields)),
            tags=tags.get(version.directory, []),
            used_by=len(users(version.directory)),
        )
        for version in found
    ]


def remove(paths: Paths, name: str, users: Users) -> int:
    """Remove what `NAME[:TAG]` or `NAME@DIGEST` means: the tag, and the version when no other tag names it.
    Returns the bytes that this freed. Raises NotFound, and FailedPrecondition naming the users of a version that is
    in use; nothing is removed then."""
    reference, image = Reference.parse(name), find_image(paths, name)
    own = image.info.tag if reference.digest is None else None
    others = [tag for tag in _tags(paths, reference.name).get(image.directory, []) if tag != own]
    if own is None and others:
        raise FailedPrecondition(
            f"{name} is tagged {', '.join(others)}", hint=f"limpet image rm {reference.name}:{others[0]}"
        )
    if not others and (using := users(image.directory)):
        shown = ", ".join(using[:_NAMED_USERS]) + (" …" if len(using) > _NAMED_USERS else "")
        raise FailedPrecondition(f"image {name} is used by {shown}", hint="remove these first; or give it another tag")
    if own is not None:
        crashpoint("image.untag.before")
        _untag(paths, reference.name, own)
        crashpoint("image.untag.after")
    return 0 if others else _delete(paths, image)


def prune(
    paths: Paths, users: Users, *, tagged: bool = False, keep: Collection[str] = (), dry_run: bool = False
) -> tuple[list[str], int]:
    """Remove every version that no tag names and nobody uses; with `tagged` also those that a tag names, but for the
    images whose names are in `keep`. Returns what was removed (`NAME@DIGEST` or `NAME:TAG`) and the bytes freed;
    with `dry_run` what would be."""
    removed, freed = [], 0
    for name in registry.names(paths):
        tags = _tags(paths, name)
        for version in registry.versions(paths, name):
            own = tags.get(version.directory, [])
            if (own and (not tagged or name in keep)) or users(version.directory):
                continue
            removed += [str(Reference(name, tag)) for tag in own] or [_by_digest(version)]
            freed += version.info.disk_used
            if not dry_run:
                for tag in own:
                    _untag(paths, name, tag)
                _delete(paths, version)
    return removed, freed


def tag(paths: Paths, name: str, new: str) -> Image:
    """Let `new` (`NAME:TAG`, of the same name) mean what `name` means, whatever it meant before."""
    image, reference = find_image(paths, name), Reference.parse(new)
    if reference.name != image.info.name or reference.digest is not None:
        raise FailedPrecondition(f"a tag of {image.info.name} is wanted, not {new}", hint=f"{image.info.name}:TAG")
    registry.point(paths, reference.name, reference.tag, image.directory.name, "")
    return find_image(paths, new)


def verify(paths: Paths, name: str) -> list[str]:
    """Read an image again and say what is wrong with it: nothing, when it is what was published. Raises NotFound."""
    image = find_image(paths, name)
    return problems(image)


def problems(image: Image) -> list[str]:
    """What is wrong with a version's files; reads all of them."""
    found, disks = [], {}
    try:
        seals = registry.disk_seals(image.directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{image.directory / 'image.json'} is damaged: {error}"]
    for disk, seal in seals.items():
        path = image.directory / f"{disk}.raw"
        try:
            size, digest = path.stat().st_size, file_digest(path)
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
            continue
        disks[disk] = {"size": size, "digest": digest}
        if disks[disk] != seal:
            found.append(f"{path} is damaged: its content has changed")
        elif (wrong := filesystems.problem(path, disk)) is not None:
            found.append(f"{path}: {wrong}")
    if not found and registry.content_digest(disks, _facts(image)) != image.info.digest.removeprefix("sha256:"):
        found.append(f"{image.directory / 'image.json'} is damaged: it does not fit the image's digest")
    return found


def sweep(paths: Paths) -> list[Path]:
    """Delete what a crash left unfinished; for a daemon that starts. Returns the paths."""
    strays = []
    for name in registry.names(paths):
        strays += durable.sweep(paths.image(name)) + durable.sweep(paths.image_tags(name))
        _remove_empty(paths, name)
    return strays


def _facts(image: Image) -> ImageFacts:
    info = image.info
    return ImageFacts(user=info.user, home=info.home, spec=info.spec, workspace=info.workspace)


def _tags(paths: Paths, name: str) -> dict[Path, list[str]]:
    """The tags of each version's directory."""
    tags: dict[Path, list[str]] = {}
    for image in registry.tagged(paths, name):
        tags.setdefault(image.directory, []).append(image.info.tag)
    return tags


def _by_digest(image: Image) -> str:
    return str(Reference(image.info.name, digest=image.directory.name))


def _untag(paths: Paths, name: str, tag: str) -> None:
    path = paths.image_tag(name, tag)
    path.unlink(missing_ok=True)
    durable.sync_directory(path.parent)


def _delete(paths: Paths, image: Image) -> int:
    """Remove a version that nothing names; its bytes."""
    crashpoint("image.delete.before")
    durable.remove_tree(image.directory)
    crashpoint("image.delete.after")
    _remove_empty(paths, image.info.name)
    return image.info.disk_used


def _remove_empty(paths: Paths, name: str) -> None:
    """Remove what a name's last image, or a first one that came to nothing, left: rmdir refuses all else."""
    for directory in (paths.image_tags(name), paths.image(name)):
        with contextlib.suppress(OSError):
            directory.rmdir()
