"""Bytes from a client into models, and models into bytes.

Not by pydantic's own JSON: paths in the guest need not be UTF-8, and only Python's `json` carries their surrogate
escapes (as `\\udcXX`).
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from limpet.errors import BadRequest, nearest

M = TypeVar("M", bound=BaseModel)
_MOST = 3  # mistakes told at once


def body(model: type[M], content: bytes) -> M:
    """A JSON body. Raises BadRequest naming the field; an empty body is an empty object."""
    try:
        data = json.loads(content) if content.strip() else {}
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(data).__name__}")
    return validate(model, data)


def query(model: type[M], query_string: bytes) -> M:
    """A query string; bytes that are not UTF-8 become surrogate escapes. Raises BadRequest naming the parameter."""
    given: dict[str, Any] = {}
    for key, value in parse_qsl(query_string.decode("ascii", "surrogateescape"), True, errors="surrogateescape"):
        if _is_list(model, key):
            given.setdefault(key, []).append(value)
        elif key in given:
            raise BadRequest(f"{key} is given twice")
        else:
            given[key] = value
    return validate(model, given)


def validate(model: type[M], data: Mapping[str, Any]) -> M:
    """`data` as the model. Raises BadRequest with what is wrong, which values are allowed, the nearest known key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False)
        unknown = next((str(one["loc"][-1]) for one in mistakes if one["type"] == "extra_forbidden"), None)
        hint = None
        if unknown is not None:
            hint = nearest(unknown, model.model_fields) or f"known: {', '.join(model.model_fields)}"
        told = list(dict.fromkeys(_tell(one) for one in mistakes))
        more = f" (and {len(told) - _MOST} more)" if len(told) > _MOST else ""
        raise BadRequest("; ".join(told[:_MOST]) + more, hint=hint) from None


def dump(value: BaseModel) -> bytes:
    """One model as JSON, in ASCII."""
    return json.dumps(value.model_dump(mode="json"), separators=(",", ":")).encode()


def _tell(mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {where!r}"
    if mistake["type"] == "missing":
        return f"{where} is missing"
    what = str(mistake["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    given = f" (given: {str(mistake['input'])[:60]})" if isinstance(mistake["input"], (str, int, float)) else ""
    return (f"{where} {what}" if where else what) + given


def _is_list(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    if field is None:
        return False
    annotation = field.annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(get_origin(option) is list for option in options)
