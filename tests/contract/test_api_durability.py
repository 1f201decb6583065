"""Syncs, vaults, payloads and the trash over the HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.contract.local_server import Running
from tests.contract.local_vaults import KEPT, ODD
from tests.contract.test_api_moments import refusal, result

WEB = "/v1/sandboxes/web"


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        for name in ("web", "broken"):
            result(found, found.post("/v1/sandboxes", json={"name": name}))
        yield found
        server.sandboxes.known.clear()
        server.trash.known.clear()


def test_sync_and_status(client: httpx.Client) -> None:
    """D4"""
    assert result(client, client.post(WEB + "/sync"))["new"] is True
    assert result(client, client.post(WEB + "/sync"))["new"] is False
    status = client.get(WEB + "/sync").json()
    assert (status["generation"], status["pending_files"], status["degraded"]) == (4, None, False)
    assert client.get(WEB + "/sync?pending=1").json()["pending_files"] == 3
    assert [one["sandbox"] for one in client.get("/v1/sync").json()] == ["broken", "web"]
    assert refusal(client.post("/v1/sandboxes/wep/sync"))[0] == "not_found"


def test_history_has_generation_time_files_and_bytes(client: httpx.Client) -> None:
    """D3"""
    found = client.get(WEB + "/history").json()
    assert [one["generation"] for one in found] == [*KEPT]
    assert {"generation", "time", "files", "bytes"} <= found[0].keys()
    versions = client.get(WEB + "/versions", params={"path": "/home/user/t.db"}).json()
    assert [(one["generation"], one["change"], one["bytes"]) for one in versions] == [
        (1, "added", 4),
        (3, "changed", 6),
    ]
    assert refusal(client.get(WEB + "/versions"))[1] == "path is missing"
    assert refusal(client.get(WEB + "/versions?path="))[0] == "bad_request"


def test_directory_is_listed_and_a_file_read_as_they_were(client: httpx.Client) -> None:
    """D3"""
    listing = client.get(WEB + "/vault/entries", params={"path": "/home/user", "at": "3"}).json()
    assert (listing["generation"], listing["entry"]["kind"]) == (3, "dir")
    assert [one["path"] for one in listing["entries"]] == ["/home/user/t.db", ODD]
    answer = client.get(WEB + "/vault/file", params={"path": "/home/user/t.db", "at": "2024-01-01T00:02:30Z"})
    assert (answer.content, answer.headers["limpet-generation"], answer.headers["content-length"]) == (
        b"one\n",
        "1",
        "4",
    )
    assert len(client.get(WEB + "/vault/file", params={"path": "/workspace/endless"}).content) == 300_000
    odd = client.get(WEB + "/vault/file?at=3&path=/home/user/odd%FF%1B[31m")
    assert (odd.status_code, odd.content) == (200, b"")
    assert refusal(client.get(WEB + "/vault/file?path=/home/user"))[0] == "bad_request"
    code, message = refusal(client.get(WEB + "/vault/file?path=/home/user/t.db&at=2"))
    assert (code, message) == ("not_found", "generation 2 is not kept")


def test_file_that_turns_out_damaged_breaks_off_and_never_looks_whole(client: httpx.Client, server: Running) -> None:
    """D6"""
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/v1/sandboxes/broken/vault/file?path=/workspace/endless")


def test_reader_that_goes_away_closes_the_file(client: httpx.Client, server: Running) -> None:
    before = server.vaults.closed
    with client.stream("GET", WEB + "/vault/file?path=/workspace/endless"):
        pass
    assert client.get(WEB + "/history").status_code == 200
    assert server.vaults.closed > before


def test_diff_is_one_line_a_change(client: httpx.Client) -> None:
    """D3"""
    lines = client.get(WEB + "/vault/diff?a=1&b=3").text.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"change": "added", "path": ODD, "before": None, "after": 0},
        {"change": "changed", "path": "/home/user/t.db", "before": 4, "after": 6},
    ]
    assert len(client.get(WEB + "/vault/diff?a=3").text.splitlines()) == 3  # to the newest
    assert client.get(WEB + "/vault/diff?a=3&b=3").text == ""
    assert refusal(client.get(WEB + "/vault/diff?a=2"))[0] == "not_found"
    assert refusal(client.get(WEB + "/vault/diff?a=x"))[0] == "bad_request"
    assert refusal(client.get(WEB + "/vault/diff"))[1] == "a is missing"


def test_restore_from_running_and_removed_sandboxes(client: httpx.Client, tmp_path: Path) -> None:
    """D3, D7"""
    odd = json.dumps({"path": ODD, "at": "3"}).encode()  # httpx's own encoder refuses what is not UTF-8
    back = result(client, client.post(WEB + "/vault/restore", content=odd))
    assert (back["generation"], back["saved"], back["path"]) == (3, 5, ODD)
    gone = "/v1/sandboxes/gone/vault/restore"
    assert result(client, client.post(gone, json={"to": str(tmp_path)}))["files"] == 2
    assert result(client, client.post(gone.replace("gone", "sb_gone"), json={"to": str(tmp_path)}))["files"] == 2
    assert refusal(client.post(gone))[0] == "failed_precondition"
    (tmp_path / "there").touch()
    assert refusal(client.post(gone, json={"to": str(tmp_path)}))[1] == f"{tmp_path} is not empty"
    assert refusal(client.post(gone, json={"form": 1}))[0] == "bad_request"


def test_vaults_are_checked_repaired_thinned_out_and_measured(client: httpx.Client) -> None:
    """D6"""
    assert result(client, client.post(WEB + "/vault/check"))["checks"][0]["ok"] is True
    assert [one["ok"] for one in result(client, client.post("/v1/vaults/check"))["checks"]] == [True, False]
    assert result(client, client.post("/v1/sandboxes/broken/vault/repair"))["checks"][0]["repaired"]
    assert result(client, client.post("/v1/vaults/repair"))["checks"][0]["ok"] is True
    assert result(client, client.post(WEB + "/vault/gc"))["removed"] == ["web@2"]
    assert result(client, client.post("/v1/vaults/gc"))["freed"] == 1024
    assert [one["sandbox_id"] for one in client.get("/v1/vaults").json()] == ["sb_gone", "sb_web"]


def test_payload_is_added_told_confirmed_and_removed(client: httpx.Client, server: Running) -> None:
    """PAY-1"""
    body = {"host_dir": "/src/edited", "guest_dir": "/home/user/p", "interval": 2}
    made = result(client, client.post(WEB + "/payloads", json=body))
    id = made["payload"]["id"]
    assert refusal(client.post(WEB + "/payloads", json=body))[0] == "failed_precondition"
    assert client.get(WEB + "/payloads").json() == client.get("/v1/payloads").json() == [made]
    assert client.get("/v1/sandboxes/broken/payloads").json() == []
    assert result(client, client.post(f"{WEB}/payloads/{id}/confirm", json={"keep": "host"}))["state"] == "ok"
    assert server.payloads.confirmed[-1].keep == "host"
    assert refusal(client.post(f"{WEB}/payloads/{id}/confirm", json={"keep": "both"}))[0] == "bad_request"
    assert client.delete(f"{WEB}/payloads/{id}").status_code == 202
    assert refusal(client.delete(f"{WEB}/payloads/{id}"))[0] == "not_found"
    assert refusal(client.post(WEB + "/payloads", json={"host_dir": "/a", "guest_dir": "/b", "interval": 0}))[0] == (
        "bad_request"
    )


def test_payloads_of_a_create_are_checked_with_it(client: httpx.Client) -> None:
    """PAY-1"""
    wrong = {"name": "p", "payloads": [{"host_dir": "/a"}]}
    assert refusal(client.post("/v1/sandboxes", json=wrong))[1] == "payloads.0.guest_dir is missing"


def test_removed_sandbox_is_in_the_trash_until_it_is_taken_back_or_purged(client: httpx.Client) -> None:
    """D7"""
    assert client.get("/v1/sandboxes/broken/risk").json()["known"] is False
    client.get(f"/v1/operations/{client.delete('/v1/sandboxes/broken').json()['id']}/stream")
    entry = client.get("/v1/trash").json()[0]
    assert (entry["name"], entry["sandbox"]["id"]) == ("broken", entry["id"])
    taken = client.post("/v1/trash/broken/undelete", json={"as_name": "web"})
    assert refusal(taken)[0] == "already_exists"
    assert result(client, client.post("/v1/trash/broken/undelete", json={"as_name": "back"}))["name"] == "back"
    assert client.get("/v1/trash").json() == []
    client.get(f"/v1/operations/{client.delete('/v1/sandboxes/back?purge=1').json()['id']}/stream")
    assert client.get("/v1/trash").json() == []
    assert result(client, client.delete("/v1/trash"))["removed"] == []
    assert refusal(client.delete("/v1/trash/back"))[0] == "not_found"
