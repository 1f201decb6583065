"""What people write on a command line, as values. Raises BadRequest with an example of what is right."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from limpet import moments
from limpet.errors import BadRequest

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def memory_mib(text: str) -> int:
    """`1G`, `512M`, `1.5GiB`: mebibytes; a bare number is mebibytes already."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise BadRequest(f"{text!r} is not a size", hint="write for example 512M or 2G")
    power = {"": 0, "k": -1, "m": 0, "g": 1, "t": 2}[match[2].lower()]
    value = float(match[1]) * 1024.0**power
    if value != int(value):
        raise BadRequest(f"{text!r} is not a whole number of MiB", hint="write for example 512M or 2G")
    return int(value)


def seconds(text: str) -> float:
    """`90`, `90s`, `5m`, `1.5h`: seconds."""
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise BadRequest(f"{text!r} is not a time span", hint="write for example 30s, 5m or 2h")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def port(text: str) -> tuple[int, int]:
    """`8080:80` as (host, guest); `80` publishes guest port 80 on any free host port (0)."""
    host, colon, guest = text.rpartition(":")
    try:
        pair = (int(host) if colon else 0, int(guest))
    except ValueError:
        pair = (-1, -1)
    if not (0 <= pair[0] <= 65535 and 1 <= pair[1] <= 65535):
        raise BadRequest(f"{text!r} is not a port mapping", hint="write HOST:GUEST, for example 8080:80")
    return pair


def ports(texts: Iterable[str]) -> list[tuple[int, int]]:
    return [port(text) for text in texts]


def environment(texts: Iterable[str]) -> dict[str, str]:
    """`K=V`; a bare `K` takes the value that K has here and is left out when it has none."""
    result: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key:
            raise BadRequest(f"{text!r} is not an environment variable", hint="write KEY=VALUE")
        if equals:
            result[key] = value
        elif key in os.environ:
            result[key] = os.environ[key]
    return result


def labels(texts: Iterable[str]) -> dict[str, str]:
    """`k=v`; a bare `k` has an empty value."""
    result: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key:
            raise BadRequest(f"{text!r} is not a label", hint="write KEY=VALUE")
        result[key] = value
    return result


def settings(texts: Iterable[str]) -> dict[str, str | None]:
    """`K=V` sets, `K-` removes (as kubectl has it)."""
    result: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if (not equals and not key.endswith("-")) or not key.rstrip("-"):
            raise BadRequest(f"{text!r} neither sets nor removes", hint="write KEY=VALUE to set, KEY- to remove")
        if equals:
            result[key] = value
        else:
            result[key.removesuffix("-")] = None
    return result


def checkpoint(text: str) -> tuple[str | None, str]:
    """`NAME@ID` as (name, id), where ID may be a label; a bare `ID` as (None, id)."""
    name, at, reference = text.rpartition("@")
    if not reference or (at and not name):
        which = f"limpet checkpoint ls {name}" if name else "limpet checkpoint ls"
        raise BadRequest(f"{text!r} names no checkpoint", hint=f"write {name or 'NAME'}@ID; {which} lists them")
    return name or None, reference


def checkpoints(texts: Iterable[str]) -> list[tuple[str | None, str]]:
    return [checkpoint(text) for text in texts]


def words(text: str) -> list[str]:
    """A command as a shell would split it."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise BadRequest(f"{text!r} is not a command: {error}", hint="quote as in a shell") from None
    if not found:
        raise BadRequest("the command is empty", hint="for example --entrypoint 'make test'")
    return found


class Place(NamedTuple):
    """One side of a copy: a host path when `sandbox` is None; `-` is a tar on stdin or stdout."""

    sandbox: str | None
    path: str


def place(text: str) -> Place:
    """`NAME:PATH` is in a sandbox; everything else is on the host, a colon too when a `/` stands before it."""
    name, colon, path = text.partition(":")
    if not colon or not _LABEL.fullmatch(name):
        return Place(None, text)
    if not path:
        raise BadRequest(f"{text!r} names no path", hint=f"write {name}:PATH, for example {name}:/workspace")
    return Place(name, path)


class Payload(NamedTuple):
    """A host directory and the guest directory that it is kept in step with."""

    host: str
    guest: str
    interval: float | None = None

    @property
    def given(self) -> tuple[str, str] | tuple[str, str, float]:
        """As the SDK takes it: without what was not said."""
        return (self.host, self.guest) if self.interval is None else (self.host, self.guest, self.interval)


def payload(text: str) -> Payload:
    """`HOST:GUEST` or `HOST:GUEST:interval=TIME`; GUEST is absolute, HOST may have colons in it."""
    example = "write HOSTDIR:GUESTDIR, for example ./data:/home/user/data or ./data:/home/user/data:interval=5s"
    pair, colon, option = text.rpartition(":")
    interval = None
    if colon and not option.startswith("/"):
        key, _, value = option.partition("=")
        if key != "interval":
            raise BadRequest(f"{text!r} is not a payload", hint=example)
        interval = seconds(value)
    else:
        pair = text
    host, _, guest = pair.rpartition(":")
    if not host or not guest.startswith("/"):
        raise BadRequest(f"{text!r} is not a payload", hint=example)
    return Payload(host, guest, interval)


def payloads(texts: Iterable[str]) -> list[Payload]:
    return [payload(text) for text in texts]


def instant(text: str) -> str:
    """A generation as the daemon takes it: its number, or a time with its zone. `10m` is ten minutes ago."""
    found = moments.parse(text, datetime.now().astimezone())
    return str(found) if isinstance(found, int) else found.isoformat()


def is_instant(text: str) -> bool:
    try:
        instant(text)
    except BadRequest:
        return False
    return True


class Kept(NamedTuple):
    """What of a vault is meant: everything when `path` is None, the newest generation when `at` is."""

    path: str | None
    at: str | None


def kept(text: str) -> Kept:
    """`[PATH][@GEN|@TIME]`. The last `@` counts, where a generation or a time follows it; else it belongs to PATH."""
    path, at, moment = text.rpartition("@")
    if not at or not is_instant(moment):
        path, moment = text, ""
    if path and not path.startswith("/"):
        if path.startswith("@"):
            raise BadRequest(f"{path[1:]!r} is neither a generation nor a time", hint=moments.HINT)
        raise BadRequest(f"{path!r} is not an absolute path in the guest", hint=f"for example /home/user/{path}")
    return Kept(path or None, instant(moment) if moment else None)
