"""The ASGI application: the route table, put together."""

from __future__ import annotations

import json

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from limpet.api import (
    _routes_checkpoints,
    _routes_execs,
    _routes_files,
    _routes_images,
    _routes_payloads,
    _routes_runtime,
    _routes_sandboxes,
    _routes_system,
    _routes_trash,
    _routes_upkeep,
    _routes_vaults,
    _routes_workspace,
    openapi,
)
from limpet.api._endpoint import Call, Endpoint, Socket, routes
from limpet.api._envelope import Envelope, on_http_exception
from limpet.api.door import Services


async def openapi_document(_call: Call) -> Response:
    return Response(json.dumps(openapi.document(TABLE), indent=1), media_type="application/json")


TABLE: tuple[Endpoint | Socket, ...] = (
    *_routes_system.ROUTES,
    *_routes_sandboxes.ROUTES,
    *_routes_execs.ROUTES,
    *_routes_files.ROUTES,
    *_routes_workspace.ROUTES,
    *_routes_checkpoints.ROUTES,
    *_routes_vaults.ROUTES,
    *_routes_payloads.ROUTES,
    *_routes_runtime.ROUTES,
    *_routes_trash.ROUTES,
    *_routes_images.ROUTES,
    *_routes_upkeep.ROUTES,
    Endpoint("GET", "/v1/openapi.json", openapi_document, "This document"),
)


def create_app(services: Services) -> Starlette:
    """The API over these services."""
    app = Starlette(
        routes=routes(TABLE, services),
        middleware=[Middleware(Envelope)],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False  # `/v1/images/` names an image of no name, not all of them
    return app
