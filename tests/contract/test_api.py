"""The HTTP API as a client meets it: a real uvicorn on a real Unix socket."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from limpet.api.app import TABLE
from limpet.api.server import serving
from limpet.errors import BY_CODE
from tests.contract.local_server import HEADERS, Running, running
from tests.contract.local_services import CHUNK


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def error(response: httpx.Response) -> dict[str, str]:
    """The body of a failed request, checked for its shape (VM-15)."""
    found: dict[str, str] = response.json()
    assert found.keys() == {"code", "message", "hint", "op_id"}
    assert response.status_code == BY_CODE[found["code"]].http_status
    assert found["op_id"] == response.headers["Limpet-Op-Id"]
    return found


def final(client: httpx.Client, response: httpx.Response) -> dict[str, object]:
    """The last line of the stream of the operation that a request began."""
    assert response.status_code == 202, response.text
    lines = client.get(f"/v1/operations/{response.json()['id']}/stream").text.splitlines()
    found: dict[str, object] = json.loads(lines[-1])
    return found


def test_request_gets_an_operation_id_or_keeps_its_own(client: httpx.Client) -> None:
    """VM-15"""
    assert re.fullmatch(r"op_[0-9a-z]{26}", client.get("/v1/status").headers["Limpet-Op-Id"])
    named = client.get("/v1/sandboxes/none", headers={"Limpet-Op-Id": "op_mine"})
    assert error(named)["op_id"] == "op_mine"
    refused = client.get("/v1/status", headers={"Limpet-Op-Id": "no id\x09at all"})
    assert error(refused)["code"] == "bad_request"


@pytest.mark.parametrize("spoken", ["2", None])
def test_other_protocol_is_refused_except_where_a_client_finds_out(client: httpx.Client, spoken: str | None) -> None:
    """Bad input: a daemon of another version."""
    headers = {} if spoken is None else {"Limpet-Protocol": spoken}
    with httpx.Client(transport=client._transport, base_url="http://limpet") as other:
        answer = other.get("/v1/sandboxes", headers=headers)
        assert error(answer)["code"] == "failed_precondition"
        assert answer.headers["Limpet-Protocol"] == "1"
        assert other.get("/v1/status", headers=headers).json()["protocol"] == 1
        assert other.get("/v1/openapi.json", headers=headers).status_code == 200
        assert other.post("/v1/shutdown", headers=headers).json() == {}


def test_create_streams_its_stages_and_the_sandbox_is_the_result(client: httpx.Client) -> None:
    """VM-14"""
    begun = client.post("/v1/sandboxes", json={"name": "web", "labels": {"team": "a"}})
    ended = final(client, begun)
    assert (ended["state"], ended["kind"], ended["target"]) == ("done", "create", "web")
    assert begun.json()["id"] == begun.headers["Limpet-Op-Id"]
    assert isinstance(ended["result"], dict)
    assert ended["result"]["name"] == "web"
    assert client.get("/v1/sandboxes/web").json() == ended["result"]
    listed = client.get("/v1/sandboxes", params=[("label", "team=a"), ("label", "team=a")]).json()
    assert [found["name"] for found in listed] == ["web"]
    assert client.get("/v1/sandboxes?label=team=b").json() == []
    assert final(client, client.delete("/v1/sandboxes/web?force=1"))["state"] == "done"
    assert error(client.get("/v1/sandboxes/web"))["code"] == "not_found"


def test_cancelled_create_is_undone_and_can_be_pruned(client: httpx.Client, server: Running) -> None:
    """VM-14"""
    op_id = client.post("/v1/sandboxes", json={"name": "slow", "image": "slow"}).json()["id"]
    assert error(client.delete(f"/v1/operations/{op_id}"))["code"] == "failed_precondition"
    assert client.post(f"/v1/operations/{op_id}/cancel").json()["state"] == "cancelled"
    assert server.sandboxes.undone == ["slow"]
    assert op_id in [found["id"] for found in client.get("/v1/operations").json()]
    assert client.delete(f"/v1/operations/{op_id}").json() == {}
    assert error(client.get(f"/v1/operations/{op_id}"))["code"] == "not_found"
    assert error(client.get(f"/v1/operations/{op_id}/stream"))["code"] == "not_found"


@pytest.mark.parametrize(
    ("body", "message", "hint"),
    [
        ({"memroy_mib": 512}, "unknown key 'memroy_mib'", "did you mean 'memory_mib'?"),
        ({"qqq": 1}, "unknown key 'qqq'", "known: name, image, vcpus"),
        ({"vcpus": 0}, "vcpus should be greater than or equal to 1 (given: 0)", ""),
        ({"network": "bridge"}, "network should be 'user' or 'none' (given: bridge)", ""),
        ({"ports": [{"host": 1}]}, "ports.0.guest is missing", ""),
        ({"env": {"A=B": "c"}}, "env 'A=B' is not a valid environment variable", ""),
        ([1], "the body must be a JSON object, not list", ""),
    ],
)
def test_bad_body_names_the_field_and_what_is_allowed(
    client: httpx.Client, body: object, message: str, hint: str
) -> None:
    """Bad input"""
    found = error(client.post("/v1/sandboxes", json=body))
    assert found["code"] == "bad_request"
    assert found["message"] == message
    assert hint in (found["hint"] or "")


def test_bad_json_query_path_and_method_are_told(client: httpx.Client) -> None:
    """Bad input"""
    assert "not JSON" in error(client.post("/v1/sandboxes", content=b"{"))["message"]
    assert "larger than 1 MiB" in error(client.post("/v1/sandboxes", content=b" " * (2 << 20)))["message"]
    assert error(client.get("/v1/sandboxes?lable=a=b"))["hint"] == "did you mean 'label'?"
    assert "not key=value" in error(client.get("/v1/sandboxes?label=a"))["message"]
    assert error(client.get("/v1/sandboxes/web/logs?source=x"))["message"].startswith("source should be 'console'")
    assert error(client.get("/v1/sandboxes/web/files"))["message"] == "path is missing"
    assert error(client.get("/v1/sandboxes/web/files?path=/a&path=/b"))["message"] == "path is given twice"
    assert error(client.delete("/v1/sandboxes/web/ports/x"))["message"] == "'x' is not a port number"
    assert error(client.get("/v1/nothing"))["message"] == "no endpoint /v1/nothing"
    wrong = client.put("/v1/sandboxes")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "bad_request")
    assert wrong.json()["op_id"] == wrong.headers["Limpet-Op-Id"]


def test_bug_is_told_as_internal_with_its_operation_id(client: httpx.Client) -> None:
    """VM-15"""
    found = error(client.post("/v1/sandboxes/web/start"))
    assert (found["code"], found["message"]) == ("internal", "ZeroDivisionError: a bug")
    ended = final(client, client.post("/v1/sandboxes", json={"name": "bug", "image": "bug"}))
    assert ended["state"] == "failed"
    assert isinstance(ended["error"], dict)
    assert (ended["error"]["code"], ended["error"]["op_id"]) == ("internal", ended["id"])


def test_plain_requests_reach_their_service(client: httpx.Client) -> None:
    assert client.get("/v1/sandboxes/web/logs?source=agent&tail=5").text == "agent 5\n"
    assert client.get("/v1/stats").json()[0]["name"] == "web"
    assert client.get("/v1/sandboxes/web/execs").json()[0]["exit_code"] == 7
    assert client.post("/v1/sandboxes/web/execs/ex_1/signal", json={"signal": "INT"}).json() == {}
    assert client.get("/v1/sandboxes/web/execs/ex_1/output?lane=stderr&offset=9").text == "stderr from 9"
    assert client.post("/v1/sandboxes/web/ports", json={"host": 0, "guest": 80}).json() == {"host": 0, "guest": 80}
    stopped = final(client, client.post("/v1/sandboxes/web/stop", json={"force": True}))
    assert isinstance(stopped["result"], dict)
    assert stopped["result"]["rung"] == "sigkill"
    assert final(client, client.post("/v1/sandboxes/web/stop"))["state"] == "done"  # every field has a default


def test_file_travels_whole_both_ways(client: httpx.Client, server: Running) -> None:
    """GST-8"""
    content = os.urandom(5_000_000)
    put = client.put("/v1/sandboxes/web/files", params={"path": "/a b", "mode": 0o640}, content=content)
    assert (put.json()["size"], put.json()["mode"]) == (len(content), 0o640)
    assert client.get("/v1/sandboxes/web/files", params={"path": "/a b"}).content == content
    chunked = client.put("/v1/sandboxes/web/archive?path=/", content=(b"x" * 100_000 for _ in range(20)))
    assert chunked.json() == {"files": 1, "bytes": 2_000_000}


def test_name_that_is_not_utf8_travels_both_ways(client: httpx.Client) -> None:
    """Bad input: non-UTF-8 names."""
    client.put("/v1/sandboxes/web/files?path=/n%ff%0A", content=b"here")
    assert client.get("/v1/sandboxes/web/files?path=/n%ff%0A").content == b"here"
    names = [found["path"] for found in client.get("/v1/sandboxes/web/files/list?path=/").json()]
    assert "/n\udcff\n" in names
    moved = json.dumps({"source": "/n\udcff\n", "target": "/plain"})
    assert client.post("/v1/sandboxes/web/files/rename", content=moved).json() == {}
    assert client.get("/v1/sandboxes/web/files/stat?path=/plain").json()["size"] == 4


def test_error_before_the_first_byte_of_a_stream_is_answered_as_one(client: httpx.Client) -> None:
    found = error(client.get("/v1/sandboxes/web/files?path=/none"))
    assert found["message"] == "/none does not exist in the guest"


def test_stream_that_breaks_off_cannot_be_taken_for_complete(client: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/v1/sandboxes/web/files?path=/broken")


def test_reader_that_does_not_read_holds_the_guest_back_and_its_end_closes_the_source(server: Running) -> None:
    """GST-1: constant memory, whatever the size."""
    files = server.files
    files.produced = 0
    with server.client() as client, client.stream("GET", "/v1/sandboxes/web/files?path=/endless") as response:
        seen = 0
        for chunk in response.iter_raw():
            seen += len(chunk)
            if seen > 20 * CHUNK:
                break
        # What is not read lies in the socket's buffers and one write buffer, and it stays there.
        assert files.produced < seen + 16 * CHUNK
    assert files.closed.wait(10)


def test_upload_that_breaks_off_leaves_nothing(server: Running) -> None:
    """Bad input: nothing is left half done."""
    server.files.given_up.clear()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(server.socket))
        raw.sendall(
            b"PUT /v1/sandboxes/web/files?path=/half HTTP/1.1\r\nhost: x\r\nlimpet-protocol: 1\r\n"
            b"content-length: 1000000\r\n\r\n" + bytes(1000)
        )
    assert server.files.given_up.wait(10)
    assert not (server.files.root / "half").exists()


def test_events_resume_and_follow(server: Running, client: httpx.Client) -> None:
    """EVT-1"""
    server.emit("one")
    seq = json.loads(client.get("/v1/events").text.splitlines()[-1])["seq"]
    server.emit("two")
    assert [json.loads(line)["kind"] for line in client.get(f"/v1/events?after={seq}").text.splitlines()] == ["two"]
    with client.stream("GET", "/v1/events?after=now&follow=1") as response:
        server.emit("three", name="\udcff")
        line = json.loads(next(response.iter_lines()))
    assert (line["kind"], line["data"]) == ("three", {"name": "\udcff"})


def test_openapi_describes_every_route_with_its_schemas(client: httpx.Client) -> None:
    document = client.get("/v1/openapi.json").json()
    schemas = document["components"]["schemas"]
    served = {(line.path, getattr(line, "method", "GET").lower()) for line in TABLE}
    assert {(path, method) for path, found in document["paths"].items() for method in found} == served
    described = [found for methods in document["paths"].values() for found in methods.values()]
    assert len({found["operationId"] for found in described}) == len(served)
    for found in described:
        assert found["summary"]
        assert "default" in found["responses"]
        done = next(answer for status, answer in found["responses"].items() if status != "default")
        assert "content" in done or "101" in found["responses"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= schemas.keys()
    assert {"Sandbox", "CreateRequest", "Operation", "ExecRequest", "Error"} <= references | schemas.keys()
    created = document["paths"]["/v1/sandboxes"]["post"]
    assert created["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/CreateRequest")
    assert created["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/Operation")
    queried = document["paths"]["/v1/sandboxes/{name}/files"]["put"]["parameters"]
    assert {one["name"]: one["required"] for one in queried} == {
        "name": True, "path": True, "mode": False, "user": False, "parents": False,
    }  # fmt: skip


def test_socket_is_for_its_owner_only_and_replaces_a_dead_one(server: Running) -> None:
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
    with running() as other:
        left = other.socket
        with other.client() as client:
            assert client.get("/v1/status").status_code == 200
    assert not left.exists()


_STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
try:
    peer.sendall(b"GET /v1/status HTTP/1.1\\r\\nhost: x\\r\\nlimpet-protocol: 1\\r\\n\\r\\n")
except BrokenPipeError:
    pass
sys.stdout.buffer.write(peer.recv(65536))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can connect as somebody else")
def test_other_user_is_refused_although_the_file_lets_it_in() -> None:
    """The socket's mode is the first barrier, the peer's uid the second."""
    home = Path(tempfile.mkdtemp(prefix="limpet-peer-"))
    home.chmod(0o755)
    served = threading.Event()
    ended = threading.Event()
    path = home / "sock"

    def serve() -> None:
        import asyncio

        async def app(scope: object, receive: object, send: object) -> None:
            raise AssertionError("a request of another user reached the application")

        async def main() -> None:
            async with serving(app, path):
                served.set()
                await asyncio.to_thread(ended.wait)

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert served.wait(10)
        path.chmod(0o666)
        stranger = subprocess.run(
            [sys.executable, "-c", _STRANGER, str(path)], capture_output=True, check=True, timeout=60, cwd="/"
        )
    finally:
        ended.set()
        thread.join(30)
        home.rmdir()
    head, _, body = stranger.stdout.partition(b"\r\n\r\n")
    assert b"403 Forbidden" in head
    assert "this limpetd belongs to user 0" in json.loads(body)["message"]


def test_clients_at_once_are_all_served(server: Running) -> None:
    """50 at once all succeed."""
    statuses: list[int] = []

    def ask() -> None:
        with server.client() as client:
            statuses.append(client.get("/v1/status", headers=HEADERS).status_code)

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert statuses == [200] * 50
