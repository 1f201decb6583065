"""The command line as a user meets it: processes, their output and their exit codes, against a stand-in daemon."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limpet.models import State

from .client_kit import PATCH, StandIn, Terminal, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "my-project"
    (directory / ".git").mkdir(parents=True)
    (directory / "src").mkdir()
    return directory


def modules_of(*words: str) -> set[str]:
    """What a command line imports."""
    code = f"import sys; from limpet.cli.main import run; run({list(words)!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


def test_help_loads_nothing_that_takes_long() -> None:
    assert modules_of("--help") & {"httpx", "pydantic", "websockets", "rich", "asyncio"} == set()


def test_exec_loads_neither_models_nor_http(daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMPET_HOME", str(daemon.home))
    seen = modules_of("exec", "web", "--", "true")
    assert "websockets" in seen
    assert seen & {"httpx", "pydantic", "rich", "asyncio"} == set()


def test_help_names_every_exit_code(daemon: StandIn) -> None:
    done = daemon.cli()
    assert done.returncode == 0
    assert {b"124", b"125", b"130"} <= set(done.stdout.split())


def test_unknown_command_names_the_nearest(daemon: StandIn) -> None:
    done = daemon.cli("exce", "web", "true")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"did you mean 'exec'?" in done.stderr


@pytest.mark.parametrize(
    "words", [("ls", "--nonsense"), ("create", "-m", "lots"), ("run", "-p", "x", "true"), ("cp", "a")]
)
def test_wrong_usage_ends_with_two_and_one_message(daemon: StandIn, words: tuple[str, ...]) -> None:
    done = daemon.cli(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"error: ") == 1


def test_errors_show_hint_and_operation(daemon: StandIn) -> None:
    """VM-15"""
    lines = daemon.cli("inspect", "wep").stderr.decode().splitlines()
    assert lines[:2] == ["error: no sandbox named 'wep'", "hint: did you mean 'web'?"]
    assert re.fullmatch(r"\(op_[0-9a-z]+\)", lines[2])


def test_lifecycle_verbs_take_many_names_and_print_them_in_order(daemon: StandIn) -> None:
    """VM-5"""
    for name in ("b", "a"):
        daemon.add(name)
    done = daemon.cli("stop", "b", "nope", "a", "b")
    assert (done.returncode, done.stdout) == (1, b"b\na\n")
    assert b"nope: no sandbox named 'nope'" in done.stderr
    assert daemon.boxes.known["a"].state is State.STOPPED
    answers = json.loads(daemon.cli("start", "--json", "a", "b").stdout)
    assert [(one["name"], one["state"]) for one in answers] == [("a", "running"), ("b", "running")]
    assert daemon.cli("rm", "--yes", "--force", "a", "b").stdout == b"a\nb\n"
    assert daemon.cli("stop").returncode == 1


def test_rm_of_a_running_sandbox_wants_force_and_never_asks_with_yes(daemon: StandIn) -> None:
    daemon.add("busy")
    done = daemon.cli("rm", "--yes", "busy")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"--force" in done.stderr
    assert daemon.cli("rm", "-yf", "busy").returncode == 0


def test_rm_asks_at_a_terminal_when_one_runs_and_a_yes_is_as_good_as_force(daemon: StandIn) -> None:
    daemon.add("asked")
    terminal = Terminal(daemon, "rm", "asked")
    terminal.until(b"asked is running\r\nRemove? [y/N]")
    terminal.press(b"n\r")
    assert terminal.end() == 1
    assert "asked" in daemon.boxes.known
    terminal = Terminal(daemon, "rm", "asked")
    terminal.until(b"[y/N]")
    terminal.press(b"y\r")
    assert terminal.end() == 0
    assert "asked" not in daemon.boxes.known


def test_create_prints_the_name_or_the_sandbox(daemon: StandIn) -> None:
    assert (
        daemon.cli("create", "made", "--cpus", "3", "-m", "1G", "-p", "8000:80", "--label", "a=b").stdout == b"made\n"
    )
    made = json.loads(daemon.cli("inspect", "made").stdout)
    assert (made["spec"]["vcpus"], made["spec"]["memory_mib"], made["spec"]["labels"]) == (3, 1024, {"a": "b"})
    assert json.loads(daemon.cli("create", "--json", "--no-start", "cold").stdout)["state"] == "stopped"
    daemon.cli("rm", "-yf", "made", "cold")


def test_ctrl_c_during_create_undoes_it(daemon: StandIn) -> None:
    """VM-14"""
    with daemon.popen("create", "slowly", "--image", "slow") as process:
        deadline = time.monotonic() + 10
        while "slowly" not in daemon.boxes.begun:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert "slowly" in daemon.boxes.undone


def test_ls_is_columns_in_a_pipe_and_json_on_demand(daemon: StandIn) -> None:
    header, *rows = daemon.cli("ls").stdout.decode().splitlines()
    assert header.split() == ["NAME", "STATE", "AGE", "CPUS", "MEMORY", "PORTS", "WORKSPACE"]
    assert any(row.split()[:2] == ["web", "running"] for row in rows)
    assert "web" in [one["name"] for one in json.loads(daemon.cli("ls", "--json").stdout)]
    assert b"web\n" in daemon.cli("ls", "-q").stdout


def test_ls_is_a_table_at_a_terminal(daemon: StandIn) -> None:
    terminal = Terminal(daemon, "ls")
    assert terminal.end() == 0
    assert b"\x1b[1mNAME" in terminal.seen


def test_run_makes_a_sandbox_for_the_project_and_tells_what_changed(daemon: StandIn, project: Path) -> None:
    """WS-7"""
    done = daemon.cli("run", "--", "sh", "-c", "echo hi; exit 6", cwd=project / "src")
    assert (done.returncode, done.stdout) == (6, b"hi\n")
    told = done.stderr.decode().splitlines()
    assert told[-2:] == [
        "2 files changed: A new.txt, M x\\x1b[31m", "next: limpet diff my-project   limpet apply my-project"
    ]  # fmt: skip
    assert daemon.workspaces.imports[-1].host_dir == str(project)
    assert daemon.local_execs.requests[-1].cwd == "/workspace/src"
    count = len(daemon.workspaces.imports)
    assert daemon.cli("run", "-q", "true", cwd=project).stderr == b""
    assert len(daemon.workspaces.imports) == count
    daemon.cli("rm", "-yf", "my-project")


def test_run_warns_when_the_host_moved_and_syncs_on_demand(daemon: StandIn, project: Path) -> None:
    """WS-6"""
    daemon.cli("run", "true", cwd=project)
    count = len(daemon.workspaces.imports)
    daemon.workspaces.moved = True
    try:
        assert b"changed since it was imported: HEAD moved" in daemon.cli("run", "true", cwd=project).stderr
        daemon.cli("run", "--sync", "true", cwd=project)
    finally:
        daemon.workspaces.moved = False
    assert len(daemon.workspaces.imports) == count + 1
    daemon.cli("rm", "-yf", "my-project")


def test_run_rm_uses_a_sandbox_of_its_own_and_removes_it(daemon: StandIn, project: Path) -> None:
    daemon.cli("run", "true", cwd=project)
    done = daemon.cli("run", "--rm", "--", "sh", "-c", "exit 3", cwd=project)
    assert done.returncode == 3
    assert b"they go with the sandbox" in done.stderr
    assert "my-project" in daemon.boxes.known and "my-project-2" not in daemon.boxes.known
    daemon.cli("rm", "-yf", "my-project")


def test_run_that_cannot_import_gives_125_and_leaves_nothing(daemon: StandIn, project: Path) -> None:
    (project / "unreadable").touch()
    done = daemon.cli("run", "true", cwd=project)
    assert done.returncode == 125
    assert b"cannot read unreadable" in done.stderr
    assert "my-project" not in daemon.boxes.known


def test_diff_prints_the_patch_alone(daemon: StandIn, project: Path) -> None:
    daemon.add("work", workspace=_workspace(project))
    done = daemon.cli("diff", cwd=project)
    assert (done.returncode, done.stdout, done.stderr) == (0, PATCH, b"")
    assert daemon.cli("diff", "--name-only", "work").stdout == b"new.txt\nx\x1b[31m\n"
    assert daemon.cli("diff", "--stat", "work").stdout.decode().splitlines()[-1] == "2 files changed, +3 -0"
    assert json.loads(daemon.cli("diff", "--json", "work").stdout)["changes"][0]["status"] == "A"
    daemon.cli("rm", "-yf", "work")


def _workspace(directory: Path) -> Any:
    from limpet.models import WorkspaceInfo

    return WorkspaceInfo(host_dir=str(directory), guest_dir="/workspace", status="complete", kind="git")


def test_apply_tells_what_it_brought_and_fails_as_a_whole(daemon: StandIn) -> None:
    done = daemon.cli("apply", "web", "-C", "/tmp")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"A new.txt\n", b"1 file applied to /tmp\n")
    assert b"1 file would apply" in daemon.cli("apply", "web", "--check").stderr
    assert json.loads(daemon.cli("apply", "web", "--json").stdout)["applied"] is True
    done = daemon.cli("apply", "web", "--base", "conflict")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"does not apply" in done.stderr


def test_export_writes_the_patch_to_a_file_or_to_stdout(daemon: StandIn, tmp_path: Path) -> None:
    assert daemon.cli("export", "web", "-o", str(tmp_path / "p")).stdout == b""
    assert (tmp_path / "p").read_bytes() == PATCH
    assert daemon.cli("export", "web").stdout == PATCH
    done = daemon.cli("export", "web", "-o", str(tmp_path / "no" / "p"))
    assert (done.returncode, b"cannot write" in done.stderr) == (1, True)


def test_import_dry_run_prints_the_paths(daemon: StandIn, project: Path) -> None:
    done = daemon.cli("import", "web", str(project), "--dry-run")
    assert (done.stdout, done.stderr) == (b"a\n", b"3 files, 10 B would be imported\n")


def test_directory_without_a_sandbox_says_so(daemon: StandIn, tmp_path: Path) -> None:
    done = daemon.cli("diff", cwd=tmp_path)
    assert done.returncode == 1
    assert b"no sandbox for" in done.stderr and b"limpet run" in done.stderr


def test_cp_of_files_directories_and_streams(daemon: StandIn, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "f").write_bytes(b"data")
    for words in (("dir/f", "web:/one"), ("dir", "web:/"), ("dir/.", "web:/flat")):
        done = daemon.cli("cp", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (daemon.guest / "one").read_bytes() == (daemon.guest / "dir" / "f").read_bytes() == b"data"
    assert (daemon.guest / "flat" / "f").exists()
    (tmp_path / "back").mkdir()
    for words in (("web:/one", "two"), ("web:/one", "back"), ("web:/dir", "back"), ("web:/dir", "tree")):
        done = daemon.cli("cp", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for path in ("two", "back/one", "back/dir/f", "tree/f"):
        assert (tmp_path / path).read_bytes() == b"data"
    stream = daemon.cli("cp", "web:/dir", "-").stdout
    (tmp_path / "t.tar").write_bytes(stream)
    with tarfile.open(tmp_path / "t.tar") as tar:
        assert sorted(name.removeprefix("./") for name in tar.getnames()) == [".", "f"]
    (daemon.guest / "from").mkdir()
    assert daemon.cli("cp", "-", "web:/from", input=stream).returncode == 0
    assert (daemon.guest / "from" / "f").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "b"), "one side must be in a sandbox"),
        (("web:/a", "web:/b"), "one side must be in a sandbox"),
        (("nothing-here", "web:/x"), "no such file"),
        (("web:/nothing", "x"), "does not exist in the guest"),
        (("web:/nothing", "no/such/dir"), "no such directory"),
    ],
)
def test_cp_that_cannot_be_says_why(daemon: StandIn, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = daemon.cli("cp", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.decode()


def test_set_rename_and_ports(daemon: StandIn) -> None:
    daemon.add("old")
    assert daemon.cli("rename", "old", "new").stdout == b"new\n"
    assert b"new: memory_mib: in force" in daemon.cli("set", "new", "-m", "2G").stderr
    assert json.loads(daemon.cli("set", "new", "--json", "--cpus", "2").stdout)["applied"] == ["vcpus"]
    assert daemon.cli("ports", "new", "-p", "80").stdout == b"HOST             GUEST\n127.0.0.1:40123  80\n"
    assert json.loads(daemon.cli("ports", "new", "--remove", "40123", "--json").stdout) == []
    daemon.cli("rm", "-yf", "new")


def test_stats_logs_and_events(daemon: StandIn) -> None:
    assert json.loads(daemon.cli("stats", "--json").stdout)[0]["name"] == "web"
    assert daemon.cli("stats").stdout.split()[0] == b"NAME"
    assert daemon.cli("logs", "web", "--source", "agent", "-n", "5").stdout == b"agent 5\n"
    assert daemon.cli("logs", "web", "--source", "nonsense").returncode == 2
    daemon.emit("sandbox.test", why="because")
    lines = [json.loads(line) for line in daemon.cli("events", "--json").stdout.splitlines()]
    assert lines[-1]["kind"] == "sandbox.test"
    assert b"sandbox.test  why=because" in daemon.cli("events").stdout


def test_doctor_fails_when_a_check_does(daemon: StandIn) -> None:
    """VM-20"""
    done = daemon.cli("doctor")
    assert (done.returncode, done.stdout.split()[0]) == (0, b"WARN")
    done = daemon.cli("doctor", "--repair")
    assert (done.returncode, b"repaired: a lock" in done.stderr) == (1, True)
    assert json.loads(daemon.cli("doctor", "--json").stdout)["rows"][0]["check"] == "kvm"


def test_setup_image_version_and_completion(daemon: StandIn) -> None:
    assert json.loads(daemon.cli("setup", "--json", "--mirror", "http://m").stdout)["done"] == ["kernel", "http://m"]
    assert daemon.cli("image", "ls", "-q").stdout.split()[0] == b"base"
    assert json.loads(daemon.cli("image", "ls", "--json").stdout)[0]["name"] == "base"
    assert json.loads(daemon.cli("version", "--json").stdout).keys() == {"version", "protocol"}
    for shell in ("bash", "zsh", "fish"):
        assert b"_LIMPET_COMPLETE" in daemon.cli("completion", shell).stdout
    assert daemon.cli("completion", "tcsh").returncode == 1


def test_completion_knows_commands_and_names(daemon: StandIn) -> None:
    assert daemon.complete("limpet ex") == ["exec", "export"]
    assert "web" in daemon.complete("limpet stop ")


def test_broken_stdout_is_no_traceback(daemon: StandIn) -> None:
    with daemon.popen("events") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.wait(10)
        assert b"Traceback" not in process.stderr.read()


def test_daemon_status_and_stop_start_no_daemon() -> None:
    with stand_in() as server:
        status = json.loads(server.cli("daemon", "status", "--json").stdout)
        assert status["pid"] == os.getpid()
        assert server.cli("daemon", "stop").stderr == b"stopped\n"
        assert server.cli("daemon", "stop").stderr == b"it does not run\n"
        done = server.cli("daemon", "status")
        assert (done.returncode, b"does not run" in done.stderr) == (1, True)


def test_daemon_install_writes_a_unit_that_leaves_sandboxes_alone(daemon: StandIn, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "limpet.cli.main", "daemon", "install"], capture_output=True, text=True, timeout=30,
        env=daemon.environment() | {"XDG_CONFIG_HOME": str(tmp_path)}, check=True,
    )  # fmt: skip
    unit = (tmp_path / "systemd" / "user" / "limpet.service").read_text()
    assert "KillMode=process" in unit and f"LIMPET_HOME={daemon.home}" in unit
    assert "systemctl --user" in done.stderr
