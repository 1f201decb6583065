"""The HTTP API: routes, web sockets, errors as JSON, and the OpenAPI document made from them."""
