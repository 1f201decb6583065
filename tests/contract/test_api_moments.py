"""Checkpoints, copies, images and upkeep over the HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from limpet.errors import BY_CODE
from limpet.models import State
from tests.contract.local_server import Running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        result(found, found.post("/v1/sandboxes", json={"name": "web"}))
        yield found
        server.sandboxes.known.clear()


def result(client: httpx.Client, response: httpx.Response) -> dict[str, Any]:
    """What the operation that a request began ended with."""
    assert response.status_code == 202, response.text
    lines = client.get(f"/v1/operations/{response.json()['id']}/stream")
    last: dict[str, Any] = json.loads(lines.text.splitlines()[-1])
    assert last["state"] == "done", last
    found: dict[str, Any] = last["result"]
    return found


def refusal(response: httpx.Response) -> tuple[str, str]:
    found = response.json()
    assert response.status_code == BY_CODE[found["code"]].http_status
    return found["code"], found["message"]


def test_checkpoint_is_made_found_verified_restored_and_removed(client: httpx.Client) -> None:
    """FRZ-6, FRZ-7"""
    made = result(client, client.post("/v1/sandboxes/web/checkpoints", json={"label": "a"}))
    path = f"/v1/checkpoints/{made['id']}"
    assert client.get(path).json() == made
    assert client.get("/v1/sandboxes/web/checkpoints").json() == [made]
    assert result(client, client.post(path + "/verify", json={"boot": True}))["booted"] is True
    assert result(client, client.post(path + "/verify"))["booted"] is None  # every field has a default
    code, message = refusal(client.post("/v1/sandboxes/web/restore", json={"checkpoint": "a"}))
    assert (code, message) == ("failed_precondition", "web is running")
    back = result(client, client.post("/v1/sandboxes/web/restore", json={"checkpoint": "a", "force": True}))
    assert (back["checkpoint"], back["saved"]["made_by"]) == (made, "restore")
    assert result(client, client.post("/v1/sandboxes/web/undo"))["checkpoint"]["id"] == made["id"]
    new = result(client, client.post("/v1/sandboxes/web/restore", json={"checkpoint": "a", "as_name": "new"}))
    assert (new["sandbox"]["name"], new["saved"]) == ("new", None)
    assert result(client, client.delete(path))["removed"] == [made["id"]]
    assert refusal(client.get(path))[0] == "not_found"
    assert made["id"] not in [one["id"] for one in client.get("/v1/checkpoints").json()]


def test_fork_tells_of_copies_and_failures(client: httpx.Client) -> None:
    """FRZ-8"""
    forked = result(client, client.post("/v1/sandboxes/web/fork", json={"count": 4, "prefix": "p"}))
    assert [fork["name"] for fork in forked["forks"]] == ["p-1", "p-2", "p-3"]
    assert [(one["name"], one["error"]["code"]) for one in forked["failed"]] == [("p-4", "insufficient_space")]
    assert refusal(client.post("/v1/sandboxes/web/fork", json={"count": 0}))[0] == "bad_request"
    assert refusal(client.post("/v1/sandboxes/wep/fork"))[0] == "not_found"


def test_pause_suspend_and_resume_answer_with_the_sandbox(client: httpx.Client, server: Running) -> None:
    """VM-16"""
    for verb, state in (("pause", "paused"), ("resume", "running"), ("suspend", "suspended"), ("resume", "running")):
        assert result(client, client.post(f"/v1/sandboxes/web/{verb}"))["state"] == state
    assert server.sandboxes.known["web"].state is State.RUNNING


def test_commit_and_images(client: httpx.Client, server: Running) -> None:
    """FRZ-1, FRZ-4"""
    committed = result(client, client.post("/v1/sandboxes/web/commit", json={"image": "mine:v1"}))
    assert (committed["image"]["name"], committed["image"]["tag"]) == ("mine", "v1")
    assert "base" in [image["name"] for image in client.get("/v1/images").json()]
    assert client.get("/v1/images/base%3Alatest").json()["name"] == "base"
    assert client.get("/v1/images/base/history").json()[0]["tags"] == ["latest", "v2"]
    assert client.post("/v1/images/prune").json()["removed"] == ["base@sha256:11"]
    assert refusal(client.get("/v1/images/prune"))[0] == "not_found"  # an image may have that name
    assert result(client, client.post("/v1/images/broken/verify"))["ok"] is False
    assert result(client, client.post("/v1/images/build", json={"name": "docker", "force": True}))["name"] == "docker"
    assert refusal(client.post("/v1/images/build", json={"name": "dokcer"}))[0] == "not_found"
    assert [(one.name, one.force) for one in server.images.builds] == [("docker", True)]
    assert result(client, client.post("/v1/images/import", json={"path": "/x/far.tar"}))["name"] == "far"
    assert result(client, client.post("/v1/images/far/export", json={"path": "/x/far.limpet"}))["name"] == "far"
    assert [request.path for request in server.images.files] == ["/x/far.tar", "/x/far.limpet"]
    assert client.delete("/v1/images/far").json() == {}
    assert refusal(client.delete("/v1/images/base"))[0] == "failed_precondition"
    assert refusal(client.post("/v1/images/import", json={}))[1] == "path is missing"


def test_templates_settings_and_disk_space(client: httpx.Client, server: Running) -> None:
    """FRZ-5"""
    built = result(client, client.post("/v1/templates", json={"vcpus": 1}))
    assert built["key"] in [one["key"] for one in client.get("/v1/templates").json()]
    assert client.delete(f"/v1/templates/{built['key']}").json() == {}
    assert refusal(client.delete(f"/v1/templates/{built['key']}"))[0] == "not_found"
    assert client.put("/v1/config/pool.size", json={"value": "2"}).json()["value"] == "2"
    assert {one["key"]: one["value"] for one in client.get("/v1/config").json()}["pool.size"] == "2"
    assert client.put("/v1/config/pool.size", json={"value": None}).json()["value"] == "0"
    assert refusal(client.put("/v1/config/pool.size", json={}))[1] == "value is missing"
    assert refusal(client.put("/v1/config/pool.sise", json={"value": "1"}))[0] == "not_found"
    assert client.get("/v1/system/df").json()["total"] == 4 << 20
    assert result(client, client.post("/v1/system/prune", json={"dry_run": True}))["freed"] == 1 << 20
    assert server.storage.requests[-1].dry_run


@pytest.mark.parametrize("path", ["/v1/images/", "/v1/checkpoints/", "/v1/templates/"])
def test_empty_name_is_not_found(client: httpx.Client, path: str) -> None:
    """Bad input"""
    for method in ("GET", "DELETE"):
        assert refusal(client.request(method, path)) == ("not_found", f"no endpoint {path}")
