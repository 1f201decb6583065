"""Checkpoints, copies, images and upkeep on the command line, against a stand-in daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limpet.cli import checkpoints
from limpet.models import CheckpointInfo, SandboxSpec, State
from tests.contract.local_moments import FITTING

from .client_kit import StandIn, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "served-project"
    (directory / ".git").mkdir(parents=True)
    return directory


def made(daemon: StandIn, name: str, *words: str) -> str:
    """The id of a new checkpoint."""
    done = daemon.cli("checkpoint", "create", name, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def played(id: str, parent: str | None) -> CheckpointInfo:
    now = datetime.now(UTC)
    return CheckpointInfo(
        id=id, sandbox="web", sandbox_id="sb", parent=parent, created_at=now, kind="full", spec=SandboxSpec()
    )


def test_tree_sets_in_what_was_given_up_and_keeps_a_long_line_straight() -> None:
    """FRZ-6"""
    parents = {"1": None, "2": "1", "2a": "2", "2b": "2a", "2a2": "2a", "3": "2", "9": "gone"}
    order = ("1", "2", "2a", "2b", "2a2", "3", "9")
    found = [played(id, parents[id]) for id in order]
    drawn = [mark + info.id for mark, info in checkpoints.tree(found)]
    assert drawn == ["1", "2", "├─ 2a", "│  ├─ 2b", "│  2a2", "3", "9"]


def test_checkpoint_create_prints_the_id_and_ls_all_about_it(daemon: StandIn) -> None:
    """FRZ-6"""
    daemon.add("kept")
    done = daemon.cli("checkpoint", "create", "kept", "--label", "before")
    id = done.stdout.decode().strip()
    assert id.startswith("ck_")
    assert done.stderr == b"full, 4.0 MiB; the guest stood still for 42 ms\n"
    disk = json.loads(daemon.cli("checkpoint", "create", "--json", "--disk-only", "kept").stdout)
    assert (disk["kind"], disk["parent"]) == ("disk", id)
    header, first, second = daemon.cli("checkpoint", "ls", "kept").stdout.decode().splitlines()
    assert header.split() == ["CHECKPOINT", "SANDBOX", "AGE", "KIND", "SIZE", "BY", "LABEL"]
    assert (first.split()[0], first.split()[-1]) == (id, "before")
    assert second.split()[0] == disk["id"]
    assert daemon.cli("checkpoint", "ls", "-q", "kept").stdout.decode().split() == [id, disk["id"]]
    assert id in [one["id"] for one in json.loads(daemon.cli("checkpoint", "ls", "--json").stdout)]


@pytest.mark.parametrize("reference", ["{id}", "marked@{id}", "marked@{short}", "marked@here", "{short}"])
def test_checkpoint_is_named_by_id_prefix_or_label(daemon: StandIn, reference: str) -> None:
    """FRZ-6"""
    daemon.checkpoints.known.clear()
    daemon.add("marked")
    id = made(daemon, "marked", "--label", "here")
    told = daemon.cli("checkpoint", "inspect", reference.format(id=id, short=id[:20]))
    assert json.loads(told.stdout)["id"] == id


def test_checkpoint_of_a_sandbox_that_is_gone_is_still_found_by_its_name(daemon: StandIn) -> None:
    daemon.add("gone")
    id = made(daemon, "gone", "--label", "left")
    daemon.cli("rm", "-yf", "gone")
    assert json.loads(daemon.cli("checkpoint", "inspect", "gone@left").stdout)["id"] == id
    assert daemon.cli("restore", f"gone@{id}", "--as", "back").stdout == b"back\n"
    assert daemon.boxes.known["back"].state is State.RUNNING


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("restore", "web@"), 2, "write web@ID; limpet checkpoint ls web lists them"),
        (("restore", "@ck_1"), 2, "write NAME@ID"),
        (("restore", ""), 2, "write NAME@ID"),
        (("checkpoint", "rm"), 2, "Missing argument"),
        (("checkpoint", "rm", "web@"), 2, "write web@ID"),
        (("checkpoint", "inspect", "ck_none"), 1, "no checkpoint 'ck_none'"),
        (("checkpoint", "verify", "ck"), 1, "is the beginning of 2 checkpoints"),
        (("checkpoint", "inspect", "wep@ck_1"), 1, "did you mean 'web'?"),
        (("checkpoint", "create", "wep"), 1, "did you mean 'web'?"),
        (("restore", "web@ck_none"), 1, "no checkpoint 'ck_none'"),
    ],
)
def test_wrong_checkpoint_is_told(daemon: StandIn, words: tuple[str, ...], code: int, message: str) -> None:
    """Bad input"""
    daemon.checkpoints.known.clear()
    for _ in range(2):
        made(daemon, "web")
    done = daemon.cli(*words)
    assert (done.returncode, done.stdout) == (code, b"")
    assert message in done.stderr.decode().replace("\n", " ")


def test_checkpoint_of_another_sandbox_is_not_taken_for_this_ones(daemon: StandIn) -> None:
    """Bad input"""
    daemon.add("mine")
    daemon.add("yours")
    made(daemon, "mine")
    id = made(daemon, "yours")
    done = daemon.cli("checkpoint", "rm", f"mine@{id}")
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"'mine' has no checkpoint '{id}'" in done.stderr.decode()
    assert id in [info.id for info in daemon.checkpoints.known]


def test_verify_fails_for_a_damaged_checkpoint_and_names_what_is_wrong(daemon: StandIn) -> None:
    """FRZ-9"""
    daemon.add("checked")
    good, bad = made(daemon, "checked"), made(daemon, "checked", "--label", "bad")
    done = daemon.cli("checkpoint", "verify", "--boot", good)
    assert (done.returncode, done.stdout) == (0, f"{good}: ok, boots\n".encode())
    done = daemon.cli("checkpoint", "verify", bad)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"error: ram: is not as it was written" in done.stderr
    assert json.loads(daemon.cli("checkpoint", "verify", "--json", bad).stdout)["ok"] is False


def test_checkpoint_rm_takes_many_and_tells_what_was_freed(daemon: StandIn) -> None:
    daemon.add("many")
    ids = [made(daemon, "many"), made(daemon, "many")]
    done = daemon.cli("checkpoint", "rm", ids[0], "ck_none", f"many@{ids[1]}")
    assert (done.returncode, done.stdout.decode().split()) == (1, ids)
    assert b"ck_none: no checkpoint" in done.stderr and b"8.0 MiB freed" in done.stderr


def test_restore_in_place_wants_force_and_says_how_to_come_back(daemon: StandIn) -> None:
    """FRZ-7"""
    daemon.add("live")
    id = made(daemon, "live", "--label", "good")
    done = daemon.cli("restore", "live@good")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"hint: --force replaces it" in done.stderr
    done = daemon.cli("restore", "--force", "live@good")
    saved = daemon.checkpoints.known[-1].id
    assert (done.returncode, done.stdout) == (0, b"live\n")
    assert done.stderr.decode().splitlines() == [
        f"as it was at {id} (good)",
        f"what it was before: limpet restore --force live@{saved}",
    ]
    assert json.loads(daemon.cli("restore", "--json", "-f", id).stdout)["checkpoint"]["id"] == id


def test_restore_by_a_bare_id_finds_the_sandbox_under_its_new_name(daemon: StandIn) -> None:
    daemon.add("older")
    id = made(daemon, "older")
    daemon.cli("rename", "older", "newer")
    assert daemon.cli("restore", "-qf", id).stdout == b"newer\n"


def test_undo_goes_back_to_the_newest_checkpoint(daemon: StandIn) -> None:
    """FRZ-7"""
    daemon.add("slip")
    done = daemon.cli("undo", "slip")
    assert (done.returncode, b"no checkpoint to go back to" in done.stderr) == (1, True)
    made(daemon, "slip")
    id = made(daemon, "slip")
    done = daemon.cli("undo", "slip")
    assert (done.returncode, done.stdout) == (0, b"slip\n")
    assert f"as it was at {id}".encode() in done.stderr


def test_fork_prints_the_copies_and_tells_the_failures_beside(daemon: StandIn) -> None:
    """FRZ-8"""
    daemon.add("source")
    assert daemon.cli("fork", "source", "--name", "only").stdout == b"only\n"
    assert daemon.cli("fork", "source", "-n", "2", "--name", "p").stdout == b"p-1\np-2\n"
    done = daemon.cli("fork", "source", "-n", str(FITTING + 1))
    assert (done.returncode, done.stdout) == (1, b"source-1\nsource-2\nsource-3\n")
    assert done.stderr.decode().splitlines() == ["error: source-4: no room for source-4", "hint: 3 copies fit"]
    done = daemon.cli("fork", "source", "--json", "-n", "2", "--name", "p")
    assert (done.returncode, json.loads(done.stdout)["forks"]) == (1, [])
    assert daemon.cli("fork", "source", "-n", "0").returncode == 2


def test_pause_suspend_and_resume_take_many_names_and_ls_shows_them(daemon: StandIn) -> None:
    """VM-16"""
    for name in ("one", "two"):
        daemon.add(name)
    assert daemon.cli("pause", "one", "two").stdout == b"one\ntwo\n"
    assert json.loads(daemon.cli("suspend", "--json", "two").stdout)[0]["state"] == "suspended"
    rows = {row.split()[0]: row.split()[1] for row in daemon.cli("ls").stdout.decode().splitlines()[1:]}
    assert (rows["one"], rows["two"]) == ("paused", "suspended")
    done = daemon.cli("resume", "one", "two", "web")
    assert (done.returncode, done.stdout) == (1, b"one\ntwo\n")
    assert b"web: web is neither paused nor suspended" in done.stderr


def test_commit_prints_the_image_and_how_to_move_it(daemon: StandIn) -> None:
    """FRZ-1"""
    done = daemon.cli("commit", "web", "mine:v1", "--comment", "works")
    assert (done.returncode, done.stdout) == (0, b"mine:v1\n")
    assert b"limpet image export mine:v1 FILE" in done.stderr
    told = json.loads(daemon.cli("commit", "--json", "web", "mine").stdout)
    assert (told["image"]["name"], told["frozen_ms"]) == ("mine", 12.5)


def test_image_verbs(daemon: StandIn, tmp_path: Path) -> None:
    """FRZ-4"""
    assert json.loads(daemon.cli("image", "inspect", "base").stdout)["name"] == "base"
    assert len(json.loads(daemon.cli("image", "inspect", "base", "served").stdout)) == 2
    assert b"latest v2" in daemon.cli("image", "history", "base").stdout
    assert daemon.cli("image", "prune").stdout == b"base@sha256:11\n"
    assert daemon.cli("image", "verify", "base").returncode == 0
    done = daemon.cli("image", "verify", "broken")
    assert (done.returncode, b"error: root.raw: is not" in done.stderr) == (1, True)
    assert daemon.cli("image", "build", "docker").stdout == b"docker\n"
    done = daemon.cli("image", "build", "dokcer")
    assert done.returncode != 0
    assert b"docker" in done.stderr
    assert daemon.cli("image", "import", "far.tar", "--name", "debian:13", cwd=tmp_path).stdout == b"debian:13\n"
    assert daemon.images.files[-1].path == str(tmp_path / "far.tar")
    assert b"debian:13" in daemon.cli("image", "ls", "-q").stdout
    assert daemon.cli("image", "export", "debian:13", "out.limpet", cwd=tmp_path).stdout == b"out.limpet\n"
    assert daemon.images.files[-1].path == str(tmp_path / "out.limpet")
    done = daemon.cli("image", "rm", "base", "debian:13")
    assert (done.returncode, done.stdout) == (1, b"debian:13\n")
    assert b"base: image base is used by web" in done.stderr


def test_templates_are_built_listed_and_removed(daemon: StandIn) -> None:
    """FRZ-5"""
    key = daemon.cli("template", "build", "--cpus", "4", "-m", "512M").stdout.decode().strip()
    found = {one["key"]: one for one in json.loads(daemon.cli("template", "ls", "--json").stdout)}
    assert (found[key]["vcpus"], found[key]["memory_mib"], found[key]["image"]) == (4, 512, "base")
    assert key.encode() in daemon.cli("template", "ls", "-q").stdout
    assert daemon.cli("template", "ls").stdout.split()[0] == b"KEY"
    done = daemon.cli("template", "rm", key, "nope")
    assert (done.returncode, done.stdout) == (1, key.encode() + b"\n")


def test_config_is_set_read_and_unset(daemon: StandIn) -> None:
    assert daemon.cli("config", "get", "pool.size").stdout == b"0\n"
    assert daemon.cli("config", "set", "pool.size", "3").stdout == b"3\n"
    assert daemon.cli("config", "get", "pool.size").stdout == b"3\n"
    assert b"pool.size" in daemon.cli("config", "ls").stdout
    assert daemon.cli("config", "unset", "pool.size").stdout == b"0\n"
    for words in (("get", "pool.sise"), ("set", "pool.sise", "1"), ("unset", "pool.sise")):
        done = daemon.cli("config", *words)
        assert (done.returncode, b"did you mean 'pool.size'?" in done.stderr) == (1, True)
    assert b"is no value of pool.size" in daemon.cli("config", "set", "pool.size", "lots").stderr


def test_system_df_and_prune_account_for_the_disk(daemon: StandIn) -> None:
    done = daemon.cli("system", "df")
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["WHAT", "COUNT", "ACTIVE", "SIZE", "RECLAIMABLE"]
    assert lines[-1].split() == ["total", "-", "-", "4.0", "MiB", "2.0", "MiB"]
    assert json.loads(daemon.cli("system", "df", "--json").stdout)["total"] == 4 << 20
    done = daemon.cli("system", "prune", "--images", "--no-templates", "--dry-run")
    assert (done.stdout, done.stderr) == (b"trash/one\n", b"1.0 MiB would be freed\n")
    asked = daemon.storage.requests[-1]
    assert (asked.images, asked.templates, asked.dry_run) == (True, False, True)


def test_create_leaves_to_the_image_what_was_not_given(daemon: StandIn) -> None:
    """FRZ-2: an image brings its own spec along."""
    daemon.cli("create", "plain", "--image", "served:v1")
    decided = {"vcpus", "memory_mib", "env", "labels", "user", "workdir", "entrypoint"}
    assert daemon.boxes.created[-1].model_fields_set & decided == set()
    done = daemon.cli(
        "create", "full", "--user", "root", "--workdir", "/srv", "--entrypoint", "make 'all of it'", "--every-exec",
        "--idle-suspend", "10m", "-e", "A=b", "--cpus", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent = daemon.boxes.created[-1]
    assert (sent.user, sent.workdir, sent.entrypoint) == ("root", "/srv", ["make", "all of it"])
    assert (sent.every_exec, sent.idle_suspend, sent.env, sent.vcpus) == (True, 600, {"A": "b"}, 1)
    done = daemon.cli("create", "odd", "--entrypoint", "'open")
    assert (done.returncode, b"is not a command" in done.stderr) == (2, True)


def test_run_without_a_command_runs_the_entrypoint(daemon: StandIn, project: Path) -> None:
    """WS-7"""
    done = daemon.cli("run", "-q", "--image", "served", cwd=project)
    assert (done.returncode, done.stdout) == (0, b"from the entrypoint\n")
    assert daemon.cli("run", "-q", cwd=project).stdout == b"from the entrypoint\n"
    done = daemon.cli("run", "-q", "--rm", "--entrypoint", "echo own", cwd=project)
    assert done.stdout == b"own\n"
    assert daemon.cli("run", "-q", "--no-workspace", "--name", "served-project", cwd=project).stdout.startswith(b"from")
    daemon.cli("rm", "-yf", "served-project")


def test_run_without_command_and_entrypoint_makes_nothing(daemon: StandIn, project: Path) -> None:
    """WS-7"""
    count = len(daemon.boxes.created)
    done = daemon.cli("run", cwd=project)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"image 'base' has no entrypoint" in done.stderr
    assert len(daemon.boxes.created) == count


def test_run_resumes_a_suspended_sandbox(daemon: StandIn, project: Path) -> None:
    daemon.cli("run", "-q", "true", cwd=project)
    daemon.cli("suspend", "served-project")
    assert daemon.cli("run", "-q", "echo", "awake", cwd=project).stdout == b"awake\n"
    assert daemon.boxes.known["served-project"].state is State.RUNNING
    daemon.cli("rm", "-yf", "served-project")


def test_set_dry_run_only_tells(daemon: StandIn) -> None:
    """VM-18"""
    done = daemon.cli("set", "web", "--dry-run", "--cpus", "4", "--no-every-exec", "--user", "")
    told = done.stderr.decode()
    assert (done.returncode, done.stdout) == (0, b"web\n")
    assert "every_exec" in told and "user" in told and "vcpus: at the next start" in told
    done = daemon.cli("set", "web", "--idle-suspend", "5m", "--every-exec", "--workdir", "/srv")
    assert done.stderr == b"web: every_exec, idle_suspend, workdir: in force\n"
