"""What the models share: how keys that are not known are met, and the types of some fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, WithJsonSchema

MIN_MEMORY_MIB = 192  # the least with which the base image boots and git works
DEFAULT_MEMORY_MIB = 1024
DEFAULT_VCPUS = 2


class Model(BaseModel):
    """What the daemon answers. A client may be older than it: unknown keys are passed over."""

    model_config = ConfigDict(extra="ignore")


class Request(BaseModel):
    """What a client asks. An unknown key is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


# A path: any bytes, those that are not UTF-8 as surrogate escapes (PEP 383), which pydantic's own `str` refuses.
AnyPath = Annotated[
    str, PlainValidator(_text), PlainSerializer(lambda value: value), WithJsonSchema({"type": "string"})
]

EnvMap = dict[str, str]


def check_env(env: dict[str, str] | None) -> dict[str, str] | None:
    """A validator for environments."""
    for key, value in (env or {}).items():
        if not key or "=" in key or "\0" in key + value:
            raise ValueError(f"{key!r} is not a valid environment variable")
    return env
