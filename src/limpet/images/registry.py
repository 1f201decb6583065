"""The images on this host.

    images/<name>/<digest>/root.raw     the root disk; sandboxes' disks are overlays on it, so it never changes and
                                        is never made anew under the same name: the directory is named by its content
    images/<name>/<digest>/image.json   what it is
    images/<name>/current               the digest that the name means now, and the recipe that it was made by

The rename of `current` is the commit point of an image; a directory that it does not name is an older version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from limpet import durable
from limpet.errors import NotFound, nearest
from limpet.images import keys
from limpet.models import ImageInfo
from limpet.paths import Paths

_DIGEST_LENGTH = 16  # hex digits of the digest in the directory's name


@dataclass(frozen=True)
class Image:
    """An image that sandboxes can be made from. `root` is its root disk (raw, immutable)."""

    root: Path
    info: ImageInfo


def list_images(paths: Paths) -> list[ImageInfo]:
    """The images by name, each in its current version."""
    names = sorted(child.name for child in paths.images.iterdir()) if paths.images.is_dir() else []
    return [image.info for name in names if (image := _current(paths, name))]


def find_image(paths: Paths, name: str) -> Image:
    """The current version of an image. Raises NotFound with the nearest name."""
    if "/" not in name and (image := _current(paths, name)):
        return image
    known = [info.name for info in list_images(paths)]
    hint = nearest(name, known) or (f"there are: {', '.join(known)}" if known else "run `limpet setup` first")
    raise NotFound(f"no image named '{name}'", hint=hint)


def recipe(paths: Paths, name: str) -> str | None:
    """The key of the recipe that the current version was made by; None when there is no whole current version."""
    pointer = _pointer(paths, name)
    return pointer.get("recipe") if pointer and _current(paths, name) else None


def publish(paths: Paths, name: str, staging: Path, recipe_key: str, facts: dict[str, str]) -> Image:
    """Make the directory `staging`, which holds root.raw, the current version of image `name`."""
    root = staging / "root.raw"
    digest = keys.file_digest(root)
    status = root.stat()
    root.chmod(0o444)  # a slip must not write to what overlays depend on
    info = ImageInfo(
        name=name, digest=f"sha256:{digest}", size=status.st_size, disk_used=status.st_blocks * 512,
        created_at=datetime.now(UTC).replace(microsecond=0), user=facts.get("user", "root"),
        home=facts.get("home", "/root"),
    )  # fmt: skip
    document = {**info.model_dump(mode="json"), "recipe": recipe_key, "builder": keys.BUILDER, **facts}
    (staging / "image.json").write_text(json.dumps(document, indent=2) + "\n")
    short = digest[:_DIGEST_LENGTH]
    target = paths.images / name / short
    if not (target / "image.json").exists():  # equal content is there already: nothing to replace
        durable.publish(staging, target)
    pointer = json.dumps({"digest": short, "recipe": recipe_key}) + "\n"
    durable.replace_file(paths.images / name / "current", pointer.encode(), mode=0o644)
    return Image(target / "root.raw", info)


def _current(paths: Paths, name: str) -> Image | None:
    pointer = _pointer(paths, name)
    if pointer is None:
        return None
    directory = paths.images / name / pointer["digest"]
    try:
        info = ImageInfo.model_validate_json((directory / "image.json").read_text())
    except (OSError, ValueError):
        return None
    root = directory / "root.raw"
    return Image(root, info) if root.is_file() else None


def _pointer(paths: Paths, name: str) -> dict[str, str] | None:
    try:
        pointer = json.loads((paths.images / name / "current").read_text())
        return {"digest": str(pointer["digest"]), "recipe": str(pointer["recipe"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
