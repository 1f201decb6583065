"""Container runtimes over the HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.contract.local_runtime import LINES, MISSING
from tests.contract.local_server import Running
from tests.contract.test_api_moments import refusal, result

RUNTIME = "/v1/sandboxes/web/runtime"


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        for name in ("web", "bare"):
            result(found, found.post("/v1/sandboxes", json={"name": name}))
        yield found
        server.sandboxes.known.clear()
        server.runtimes.ready.clear()


def test_ensure_starts_once_and_tells_the_stages(client: httpx.Client) -> None:
    """RUN-1"""
    begun = client.post(RUNTIME + "/ensure")
    assert result(client, begun) == {"how": "started", "seconds": 6.0, "started": ["containerd", "dockerd"]}
    stages = client.get(f"/v1/operations/{begun.json()['id']}").json()["stages"]
    assert [(stage["name"], stage["state"]) for stage in stages] == [
        ("prerequisites", "done"),
        ("containerd", "done"),
        ("dockerd", "done"),
    ]
    assert result(client, client.post(RUNTIME + "/ensure"))["how"] == "reused"


def test_failed_ensure_names_what_is_missing(client: httpx.Client) -> None:
    """RUN-3"""
    begun = client.post("/v1/sandboxes/bare/runtime/ensure").json()
    lines = client.get(f"/v1/operations/{begun['id']}/stream").text.splitlines()
    ended = json.loads(lines[-1])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "failed_precondition")
    assert (ended["error"]["message"], ended["error"]["hint"]) == (MISSING, "limpet create --image docker")
    assert client.get("/v1/sandboxes/bare/runtime").json()["error"] == MISSING


def test_status_is_per_service_and_names_the_socket(client: httpx.Client) -> None:
    """RUN-5"""
    down = client.get(RUNTIME).json()
    assert (down["state"], [one["state"] for one in down["services"]]) == ("stopped", ["not_ready", "not_ready"])
    result(client, client.post(RUNTIME + "/ensure"))
    up = client.get(RUNTIME).json()
    assert (up["state"], up["version"], up["socket"]) == ("ready", "20.10.24", "/run/web/docker.sock")
    assert [(one["name"], one["pid"]) for one in up["services"]] == [("containerd", 100), ("dockerd", 101)]
    assert refusal(client.get("/v1/sandboxes/wep/runtime"))[0] == "not_found"


def test_stop_has_a_timeout_of_its_own(client: httpx.Client, server: Running) -> None:
    result(client, client.post(RUNTIME + "/ensure"))
    assert result(client, client.post(RUNTIME + "/stop", json={}))["stopped"] == ["dockerd", "containerd"]
    assert server.runtimes.asked[-1].timeout == 20.0
    assert result(client, client.post(RUNTIME + "/stop", json={"timeout": 0}))["stopped"] == []
    assert refusal(client.post(RUNTIME + "/stop", json={"timeout": -1}))[0] == "bad_request"
    assert refusal(client.post(RUNTIME + "/stop", json={"time": 1}))[0] == "bad_request"


def test_logs_are_those_of_one_service_and_their_tail(client: httpx.Client) -> None:
    """RUN-7"""
    assert len(client.get(RUNTIME + "/logs/dockerd").text.splitlines()) == LINES
    assert client.get(RUNTIME + "/logs/containerd?tail=2").text == "containerd line 998\ncontainerd line 999\n"
    assert client.get(RUNTIME + "/logs/dockerd?tail=0").text == ""
    assert refusal(client.get(RUNTIME + "/logs/dockerd?tail=-1"))[0] == "bad_request"
    refused = client.get(RUNTIME + "/logs/docker").json()
    assert (refused["code"], refused["hint"]) == ("not_found", "did you mean 'dockerd'?")


def test_ports_of_containers_are_there_while_the_engine_runs(client: httpx.Client) -> None:
    assert client.get(RUNTIME + "/ports").json() == []
    result(client, client.post(RUNTIME + "/ensure"))
    found = client.get(RUNTIME + "/ports").json()
    assert [(one["container"], one["guest"], one["host"]) for one in found] == [
        ("db", 5432, None),
        ("web", 8080, 40123),
    ]


def test_openapi_document_has_the_runtime(client: httpx.Client) -> None:
    """API-4"""
    document = client.get("/v1/openapi.json").json()
    paths = {path.removeprefix("/v1/sandboxes/{name}/runtime") for path in document["paths"] if "/runtime" in path}
    assert paths == {"", "/ensure", "/stop", "/logs/{service}", "/ports"}
    assert {"RuntimeStatus", "ServiceStatus", "ContainerPort"} <= document["components"]["schemas"].keys()
