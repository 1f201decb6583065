"""Names and ids: what a sandbox may be called, and how requests and records are numbered."""

from __future__ import annotations

import os
import random
import re
import time

from limpet.errors import BadRequest

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ADJECTIVES = "able bold brisk calm clear deft eager fair firm keen kind mild neat quick quiet sharp swift warm wise"
_NOUNS = "auk bass carp cod crab dab eel gull hake kelp krill lark orca otter perch pike ray seal smelt squid tern"
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case


def check_name(name: str, what: str = "sandbox") -> str:
    """`name` itself when it is a DNS label (RFC 1123: a-z, 0-9, '-', at most 63); raises BadRequest otherwise."""
    if not _LABEL.fullmatch(name):
        raise BadRequest(
            f"{name!r} is not a valid {what} name",
            hint="use 1 to 63 of a-z, 0-9 and '-', not beginning or ending with '-'"
            + (f", for example '{suggestion}'" if (suggestion := to_label(name)) != name else ""),
        )
    return name


def to_label(text: str, fallback: str = "sandbox") -> str:
    """The DNS label nearest to `text`: lower case, other characters as '-'."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return label or fallback


def random_name() -> str:
    """A name for a sandbox that was given none, such as `calm-otter-41`."""
    return f"{random.choice(_ADJECTIVES.split())}-{random.choice(_NOUNS.split())}-{random.randrange(10, 100)}"


def new_id(prefix: str) -> str:
    """A globally unique, time-ordered id such as `op_01k…`: 48 bits of milliseconds and 80 random ones (as ULID)."""
    number = (int(time.time() * 1000) << 80) | int.from_bytes(os.urandom(10), "big")
    digits = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
    return f"{prefix}_{digits}"
