"""The OpenAPI 3.1 document, made from the route table and the models; nothing in it is written by hand twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from limpet import errors
from limpet.api._endpoint import Answer, Endpoint, Many, Raw, Socket
from limpet.api.queries import Control, Parameters
from limpet.models import ExecInfo
from limpet.version import __version__

_REF = "#/components/schemas/{model}"
_ABOUT = "Persistent microVM sandboxes for coding agents. One daemon a user, on a Unix socket."
_ERROR = {
    "type": "object",
    "required": ["code", "message", "hint", "op_id"],
    "properties": {
        "code": {"enum": sorted(errors.BY_CODE)},
        "message": {"type": "string"},
        "hint": {"type": ["string", "null"]},
        "op_id": {"type": ["string", "null"]},
    },
}
_MESSAGES = (
    "Web socket. Client: text `ExecRequest` first (exec only), then binary messages (stdin) and text `Control`. "
    'Server: text {"started": {"id", "pid"}}, binary (one byte lane: 1 stdout, 2 stderr; then bytes), text '
    '{"gap": {"lane", "from", "to"}}, {"exit": ExecInfo}, {"error": Error}.'
)


def document(table: Sequence[Endpoint | Socket]) -> dict[str, Any]:
    """The document for these routes."""
    models = [(model, "validation") for model in sorted(_models(table), key=lambda model: model.__name__)]
    _, schemas = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for line in table:
        method = "get" if isinstance(line, Socket) else line.method.lower()
        paths.setdefault(line.path, {})[method] = _socket(line) if isinstance(line, Socket) else _endpoint(line)
    return {
        "openapi": "3.1.0",
        "info": {"title": "limpet", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR}},
    }


def _models(table: Iterable[Endpoint | Socket]) -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = {Control, ExecInfo}
    for line in table:
        parts = (line.receives,) if isinstance(line, Socket) else (line.body, line.answer)
        for part in parts:
            model = part.model if isinstance(part, (Many, Raw)) else part
            if model is not None:
                found.add(model)
    return found


def _endpoint(line: Endpoint) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": line.name,
        "summary": line.summary,
        "parameters": _parameters(line.path, line.query),
        "responses": {str(line.status): {"description": "done" if line.status == 200 else "begun",
                                         "content": _content(line.answer)}, **_failure()},
    }  # fmt: skip
    if line.body is not None:
        described["requestBody"] = {"content": _content(line.body), "required": _is_required(line.body)}
    return described


def _socket(line: Socket) -> dict[str, Any]:
    return {
        "operationId": line.name,
        "summary": line.summary,
        "description": _MESSAGES,
        "x-websocket": {"receives": _ref(line.receives), "control": _ref(Control)},
        "parameters": _parameters(line.path, line.query),
        "responses": {"101": {"description": "switched to the web socket protocol"}, **_failure()},
    }


def _failure() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {"default": {"description": "failed", "content": content}}


def _content(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, Raw):
        schema: dict[str, Any] = {"type": "string", "format": "binary"} if answer.model is None else _ref(answer.model)
        return {answer.media: {"schema": schema}}
    if isinstance(answer, Many):
        schema = {"type": "array", "items": _ref(answer.model)}
    else:
        schema = {"type": "object"} if answer is None else _ref(answer)
    return {"application/json": {"schema": schema}}


def _parameters(path: str, query: type[Parameters]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    schema = query.model_json_schema(ref_template=_REF)
    for name, one in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        found.append({"name": name, "in": "query", "required": required, "schema": one})
    return found


def _is_required(body: type[BaseModel] | Raw) -> bool:
    return isinstance(body, Raw) or any(field.is_required() for field in body.model_fields.values())


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}
