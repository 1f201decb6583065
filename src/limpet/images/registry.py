"""The images on this host.

    images/<name>/<digest>/root.raw     the root disk; sandboxes' disks are overlays on it, so it never changes and
                                        is never made anew under the same name: the directory is named by its content
    images/<name>/<digest>/data.raw     the data disk, where it is not blank
    images/<name>/<digest>/image.json   what it is, with the digest of each disk
    images/<name>/current               the digest that the name means now, and the recipe that it was made by
    images/<name>/tags/<tag>            the same for `<name>:<tag>`; `current` is the tag `latest`

A version is published by the rename of its directory; the rename of the tag's file is the commit point. A crash between
the two leaves a version that no tag names, which `upkeep.prune` removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from limpet import durable
from limpet.crashpoint import crashpoint
from limpet.digests import file_digest
from limpet.errors import AlreadyExists, BadRequest, InsufficientSpace, LimpetError, NotFound, nearest
from limpet.images import keys
from limpet.models import ImageInfo
from limpet.names import check_name
from limpet.paths import Paths

LATEST = "latest"
DISKS = ("root", "data")
# what of a sandbox's spec an image keeps: nothing that is only true on one host
SPEC_KEYS = frozenset({"env", "labels", "user", "workdir", "entrypoint", "vcpus", "memory_mib", "every_exec"})

_DIGEST_LENGTH = 16  # hex digits of the digest in the directory's name
_VERSION = re.compile(rf"[0-9a-f]{{{_DIGEST_LENGTH}}}")
_SHORTEST_DIGEST = 4  # hex digits that a person may give instead of all


@dataclass(frozen=True)
class Image:
    """An image that sandboxes can be made from. `root` and `data` are its disks (raw, immutable); None: blank."""

    root: Path
    info: ImageInfo
    data: Path | None = None

    @property
    def directory(self) -> Path:
        return self.root.parent

    @property
    def spec(self) -> dict[str, Any]:
        return self.info.spec


@dataclass(frozen=True)
class ImageFacts:
    """What an image is besides its disks. `user` is who commands run as. The rest is as in `models.ImageInfo`."""

    user: str = "root"
    home: str = "/root"
    spec: dict[str, Any] = field(default_factory=dict)
    workspace: dict[str, Any] | None = None
    parent: str | None = None
    comment: str | None = None
    source: Literal["built", "commit", "import", "tar"] = "built"
    created_at: datetime | None = None  # None: now


@dataclass(frozen=True)
class Reference:
    """`NAME`, `NAME:TAG` or `NAME@DIGEST`, where DIGEST may be its first digits, with or without `sha256:`."""

    name: str
    tag: str = LATEST
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises BadRequest for what cannot name an image."""
        name, at, digest = text.partition("@")
        name, colon, tag = name.partition(":")
        check_name(name, "image")
        if at:
            return cls(name, digest=digest.removeprefix("sha256:"))
        return cls(name, check_name(tag, "tag") if colon else LATEST)

    def __str__(self) -> str:
        if self.digest is not None:
            return f"{self.name}@{self.digest}"
        return self.name if self.tag == LATEST else f"{self.name}:{self.tag}"


def list_images(paths: Paths) -> list[ImageInfo]:
    """The images by name and tag, each as the version that it means now; `latest` comes first."""
    return [image.info for name in names(paths) for image in tagged(paths, name)]


def names(paths: Paths) -> list[str]:
    """The names below which there may be images, sorted."""
    found = paths.images.iterdir() if paths.images.is_dir() else ()
    return sorted(child.name for child in found if child.is_dir() and not child.name.startswith("."))


def tagged(paths: Paths, name: str) -> list[Image]:
    """The tagged images of one name, `latest` first."""
    directory = paths.image_tags(name)
    others = sorted(child.name for child in directory.iterdir()) if directory.is_dir() else []
    return [image for tag in (LATEST, *others) if (image := _tagged(paths, name, tag))]


def versions(paths: Paths, name: str) -> list[Image]:
    """Every version of one name, the newest first, tagged or not."""
    directory = paths.image(name)
    found = [child for child in directory.iterdir() if _VERSION.fullmatch(child.name)] if directory.is_dir() else []
    images = [image for child in found if (image := load(child))]
    return sorted(images, key=lambda image: (image.info.created_at, image.info.digest), reverse=True)


def find_image(paths: Paths, name: str) -> Image:
    """The image that `NAME[:TAG]` or `NAME@DIGEST` means. Raises NotFound with the nearest name."""
    with contextlib.suppress(LimpetError):
        reference = Reference.parse(name)
        if image := _find(paths, reference):
            return image
    known = [str(Reference(info.name, info.tag)) for info in list_images(paths)]
    hint = nearest(name, known) or (f"there are: {', '.join(known)}" if known else "run `limpet setup` first")
    raise NotFound(f"no image named '{name}'", hint=hint)


def recipe(paths: Paths, name: str) -> str | None:
    """The key of the recipe that the current version was made by; None when there is no whole current version."""
    pointer = _pointer(paths, name, LATEST)
    return pointer["recipe"] if pointer and _tagged(paths, name, LATEST) else None


def refuse_existing(paths: Paths, reference: Reference) -> None:
    """Raise AlreadyExists when the tag means something already."""
    if _tagged(paths, reference.name, reference.tag):
        raise AlreadyExists(f"there is an image {reference} already", hint="give another name or tag, or --replace")


@contextlib.contextmanager
def staging(paths: Paths, name: str) -> Iterator[Path]:
    """A directory in which a version of image `name` is made; what `publish` does not take is gone afterwards.
    An OSError of a full disk in the block becomes InsufficientSpace."""
    home = paths.image(name)
    durable.make_directory(home)
    work = durable.staging(home, "image")
    try:
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InsufficientSpace(f"no space left for image {name}", hint="free some space and try again") from None
    finally:
        durable.remove_tree(work)
        with contextlib.suppress(OSError):
            home.rmdir()  # a first version that came to nothing


def publish(
    paths: Paths, name: str, staged: Path, facts: ImageFacts, *, tag: str = LATEST, recipe_key: str = "",
    expected: str | None = None,
) -> Image:  # fmt: skip
    """Make the directory `staged`, which holds root.raw and perhaps data.raw, the version that `name:tag` means.

    `recipe_key`: what it was built by. `expected`: the digest that it must have (`sha256:…`); raises BadRequest, and
    publishes nothing, when it has another. Reads the disks: call it in a thread."""
    document = describe(name, staged, facts)
    if expected is not None and document["digest"] != expected:
        raise BadRequest(f"the image's content is {document['digest']}, not {expected} as it claims")
    (staged / "image.json").write_text(json.dumps({**document, "recipe": recipe_key}, indent=2) + "\n")
    short = str(document["digest"]).removeprefix("sha256:")[:_DIGEST_LENGTH]
    target = paths.image(name) / short
    if load(target) is None:  # equal content is there already: nothing to replace
        durable.remove_tree(target)  # what is left of a damaged one
        crashpoint("image.publish.before")
        durable.publish(staged, target)
        crashpoint("image.publish.after")
    point(paths, name, tag, short, recipe_key)
    image = _tagged(paths, name, tag)
    assert image is not None
    return image


def point(paths: Paths, name: str, tag: str, version: str, recipe_key: str) -> None:
    """Let a tag mean a version."""
    pointer = json.dumps({"digest": version, "recipe": recipe_key}) + "\n"
    path = paths.image_tag(name, tag)
    durable.make_directory(path.parent)
    crashpoint("image.tag.before")
    durable.replace_file(path, pointer.encode(), mode=0o644)
    crashpoint("image.tag.after")


def describe(name: str, directory: Path, facts: ImageFacts) -> dict[str, Any]:
    """The image.json of the disks in a directory: reads all of them."""
    disks: dict[str, dict[str, Any]] = {}
    used = 0
    for disk in DISKS:
        path = directory / f"{disk}.raw"
        if path.is_file():
            path.chmod(0o444)  # a slip must not write to what overlays depend on
            status = path.stat()
            disks[disk] = {"size": status.st_size, "digest": file_digest(path)}
            used += status.st_blocks * 512
    info = ImageInfo(
        name=name, digest=f"sha256:{content_digest(disks, facts)}", size=disks["root"]["size"], disk_used=used,
        **{**asdict(facts), "created_at": facts.created_at or datetime.now(UTC).replace(microsecond=0)},
    )  # fmt: skip
    return {**info.model_dump(mode="json", exclude={"tag"}), "disks": disks, "builder": keys.BUILDER}


def content_digest(disks: dict[str, Any], facts: ImageFacts) -> str:
    """What an image is named by: the root disk's digest when that is all there is to it, else a hash over everything
    that a sandbox made from it would see."""
    if set(disks) == {"root"} and not facts.spec and facts.workspace is None:
        return str(disks["root"]["digest"])
    seen = {"disks": disks, "spec": facts.spec, "workspace": facts.workspace, "user": facts.user, "home": facts.home}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def load(directory: Path, tag: str = LATEST) -> Image | None:
    """The version in a directory; None when it is not whole. The disks are not read."""
    try:
        info = ImageInfo.model_validate_json((directory / "image.json").read_text())
    except (OSError, ValueError):
        return None
    # the names are those of its place: the directory of a name may have been copied
    info = info.model_copy(update={"name": directory.parent.name, "tag": tag})
    root, data = directory / "root.raw", directory / "data.raw"
    if not root.is_file() or ("data" in disk_seals(directory) and not data.is_file()):
        return None
    return Image(root, info, data if data.is_file() else None)


def disk_seals(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of each disk of a version, as recorded. Raises OSError, ValueError."""
    document = json.loads((directory / "image.json").read_text())
    # before there were data disks, the image's digest was the root disk's
    only_root = {"root": {"size": document["size"], "digest": document["digest"].removeprefix("sha256:")}}
    return dict(document.get("disks") or only_root)


def _find(paths: Paths, reference: Reference) -> Image | None:
    if reference.digest is None:
        return _tagged(paths, reference.name, reference.tag)
    if len(reference.digest) < _SHORTEST_DIGEST:
        return None
    found = [v for v in versions(paths, reference.name) if v.info.digest.startswith(f"sha256:{reference.digest}")]
    return found[0] if len(found) == 1 else None


def _tagged(paths: Paths, name: str, tag: str) -> Image | None:
    pointer = _pointer(paths, name, tag)
    return load(paths.image(name) / pointer["digest"], tag) if pointer else None


def _pointer(paths: Paths, name: str, tag: str) -> dict[str, str] | None:
    try:
        pointer = json.loads(paths.image_tag(name, tag).read_text())
        found = {"digest": str(pointer["digest"]), "recipe": str(pointer["recipe"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if _VERSION.fullmatch(found["digest"]) else None
