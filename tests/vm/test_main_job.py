"""The main job, as a user does it: run in a repository, look, apply."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from limpet import Client, errors
from limpet.client import Sandbox
from tests.conftest import Cli

pytestmark = pytest.mark.vm

GIT_ID = ["-c", "user.name=user", "-c", "user.email=user@example.org"]
AGENT = "git config user.name agent; git config user.email agent@example.org"


def git(directory: Path, *words: str) -> str:
    done = subprocess.run(["git", *GIT_ID, *words], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of somebody else's code: a library's sources as they are installed."""
    top = tmp_path / "project"
    shutil.copytree(Path(typer.__file__).parent, top, ignore=shutil.ignore_patterns("__pycache__"))
    (top / "README.md").write_text("# a project\n")
    git(top, "init", "-q", "-b", "main")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "as released")
    return top


def tree_hash(directory: Path) -> str:
    """A digest of every path, mode and byte below a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        digest.update(os.fsencode(path.relative_to(directory)) + b" %o " % path.lstat().st_mode + content)
    return digest.hexdigest()


def test_run_brings_commits_and_untracked_files_back_and_passes_the_exit_code_on(cli: Cli, repository: Path) -> None:
    """WS-2, WS-5, WS-6, WS-7: run, diff, apply; the second run uses the same sandbox."""
    script = AGENT + "; echo x >> README.md && git add -A && git commit -qm x && echo y > untracked; pwd; exit 3"
    before = tree_hash(repository)
    done = cli("run", "--name", "main-job", "--memory", "512M", "--", "sh", "-c", script, cwd=repository)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "/workspace/project\n"
    assert "limpet diff" in done.stderr
    assert tree_hash(repository) == before, "run must not touch the host's repository"

    shown = cli("diff", cwd=repository)
    assert shown.returncode == 0, shown.stderr
    assert "+x\n" in shown.stdout
    assert "+++ b/untracked" in shown.stdout
    checked = subprocess.run(["git", "apply", "--check"], cwd=repository, input=shown.stdout, text=True, check=False)
    assert checked.returncode == 0, "stdout is the patch alone"
    names = cli("diff", "--json", cwd=repository)
    assert {c["path"]: c["status"] for c in json.loads(names.stdout)["changes"]} == {"README.md": "M", "untracked": "A"}

    again = cli("run", "--", "cat", "untracked", cwd=repository)
    assert (again.returncode, again.stdout) == (0, "y\n")
    assert len(json.loads(cli("ls", "--json").stdout)) == len({s["id"] for s in json.loads(cli("ls", "--json").stdout)})

    applied = cli("apply", cwd=repository)
    assert applied.returncode == 0, applied.stderr
    assert (repository / "README.md").read_text().endswith("x\n")
    assert (repository / "untracked").read_text() == "y\n"
    assert git(repository, "log", "--oneline").count("\n") == 1, "apply changes the work tree only"
    assert cli("rm", "--yes", "--force", "main-job").returncode == 0


def test_uncommitted_work_of_the_host_travels_and_is_not_part_of_the_diff(
    client: Client, sandbox: Sandbox, repository: Path
) -> None:
    """WS-1, WS-2: staged, unstaged and untracked work is there; the diff shows what the guest did, and only that."""
    (repository / "README.md").write_text("# changed\n")
    (repository / "staged.txt").write_text("staged\n")
    git(repository, "add", "staged.txt")
    (repository / "new\nline \udcff.txt").write_bytes(b"odd name\n")
    (repository / "link").symlink_to("README.md")
    (repository / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (repository / "run.sh").chmod(0o755)
    head = git(repository, "rev-parse", "HEAD").strip()
    index = (repository / ".git" / "index").read_bytes()
    before = tree_hash(repository)

    result = sandbox.workspace.import_(repository, replace=True)
    assert result.workspace.status == "complete"
    assert tree_hash(repository) == before
    assert (repository / ".git" / "index").read_bytes() == index

    inside = sandbox.exec("git rev-parse HEAD; git status --porcelain -z | tr '\\0' '\\n'; ./run.sh; readlink link")
    assert inside.text.splitlines()[0] == head
    assert "A  staged.txt" in inside.text
    assert " M README.md" in inside.text
    assert inside.text.endswith("ran\nREADME.md\n")
    assert sandbox.workspace.changes().changes == []
    sandbox.exec("echo more >> README.md; rm staged.txt; chmod -x run.sh; head -c 3000 /dev/urandom > blob").check()
    changes = {c.path: c.status for c in sandbox.workspace.changes().changes}
    assert changes == {"README.md": "M", "staged.txt": "D", "run.sh": "M", "blob": "A"}
    sandbox.workspace.apply()
    assert (repository / "README.md").read_text() == "# changed\nmore\n"
    assert not (repository / "staged.txt").exists()
    assert (repository / "blob").read_bytes() == sandbox.files.read("/workspace/project/blob")
    assert client.sandboxes.get("shared").refresh().workspace is not None


def test_export_leaves_the_guests_repository_byte_for_byte(sandbox: Sandbox, repository: Path) -> None:
    """WS-3: index, work tree, refs and object store are as before."""
    sandbox.workspace.import_(repository, replace=True)
    sandbox.exec(AGENT + "; echo a > a; git add a; git commit -qm a; echo b > b; git add b; echo c > c").check()
    sums = "find . -type f -exec sha256sum {} + | sort | sha256sum; find . | sort | sha256sum"
    before = sandbox.exec(sums).text
    patch = sandbox.workspace.patch()
    assert [b"+++ b/" + name in patch for name in (b"a", b"b", b"c")] == [True] * 3
    assert sandbox.exec(sums).text == before


def test_an_import_never_replaces_work_that_was_not_taken_back(sandbox: Sandbox, repository: Path) -> None:
    """WS-1, and the first promise of all: nothing is lost without `replace`."""
    sandbox.workspace.import_(repository, replace=True)
    sandbox.workspace.import_(repository)
    sandbox.exec("echo precious > work").check()
    with pytest.raises(errors.FailedPrecondition) as refused:
        sandbox.workspace.import_(repository)
    assert "limpet apply" in (refused.value.hint or "")
    assert sandbox.exec(["cat", "work"]).text == "precious\n"


def test_exec_warns_when_the_host_moved_since_the_import(sandbox: Sandbox, repository: Path) -> None:
    """WS-6: beside the command, which never waits for it; not when nothing moved."""
    sandbox.workspace.import_(repository, replace=True)
    told: list[str] = []
    sandbox.exec("sleep 2; pwd", on_notice=lambda message, _hint: told.append(message)).check()
    assert told == []
    (repository / "README.md").write_text("moved on\n")
    sandbox.workspace.import_(repository)
    (repository / "README.md").write_text("and on\n")
    assert sandbox.exec("sleep 2; pwd", on_notice=lambda message, _hint: told.append(message)).text
    assert len(told) == 1
    assert "changed since it was imported" in told[0]


def test_a_patch_that_does_not_apply_changes_nothing(sandbox: Sandbox, repository: Path, cli: Cli) -> None:
    """WS-5: all or nothing, with a message that names the file."""
    sandbox.workspace.import_(repository, replace=True)
    sandbox.exec("echo guest > README.md; echo new > new.txt").check()
    (repository / "README.md").write_text("host\n")
    before = tree_hash(repository)
    refused = cli("apply", "shared", cwd=repository)
    assert refused.returncode == 1
    assert "README.md" in refused.stderr
    assert "hint:" in refused.stderr
    assert tree_hash(repository) == before


def test_what_fails_before_the_command_has_its_own_exit_code(cli: Cli, tmp_path: Path) -> None:
    """WS-7: 125 and one clear message."""
    done = cli("run", "-w", str(tmp_path / "missing"), "--", "true")
    assert done.returncode == 125
    assert "missing" in done.stderr
    assert done.stderr.startswith("error: ")
