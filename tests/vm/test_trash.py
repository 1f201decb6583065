"""The trash with real sandboxes: what comes back, and what is gone for good."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from limpet.paths import discover
from tests.conftest import run_cli
from tests.vm.kit import count, counts_on, hidden_rows, remains, shell, start_counter, wait_until

pytestmark = pytest.mark.vm

Make = Callable[..., Sandbox]

_PROJECT = """git init -q; git config user.name a; git config user.email a@b
for file in f g h; do echo 1 > $file; done; git add .; git commit -qm one
echo changed > g; echo untracked > n"""
_WORK = """set -e; cd /workspace/project
echo 2 > h; git stash -q; git checkout -q stash@{0} -- g; git reset -q
echo 2 > f; git commit -qm two f; echo 3 > f; echo u > 'a b'
git clone -q . ~/clone; cd ~/clone; git -c user.name=a -c user.email=a@b commit -q --allow-empty -m mine"""


@pytest.fixture
def make(client: Client) -> Iterator[Make]:
    """Makes sandboxes; nothing of them is left after the test."""
    names: list[str] = []

    def create(name: str, **options: object) -> Sandbox:
        names.append(name)
        return client.sandboxes.create(name, memory_mib=512, **options)  # type: ignore[arg-type]

    yield create
    for box in client.sandboxes.list():
        if box.name in names:
            box.remove(force=True, purge=True)
    for entry in client.trash.list():
        if entry.name in names:
            client.trash.empty(entry.id)


def test_an_undelete_brings_everything_back(client: Client, home: Path, make: Make) -> None:
    """VM-17, D7: files that nobody had fsynced, checkpoints, variables, ports; and the generations of its vault."""
    box = make("undone", env={"GREETING": "hello"}, ports={0: 8000})
    shell(box, "echo first > /home/user/a; echo first > /workspace/b", user="user")
    checkpoint = box.checkpoint(label="before", disk_only=True)
    shell(box, "echo second > /home/user/a", user="user")
    before = box.refresh()
    box.remove(force=True)
    assert "undone" not in [found.name for found in client.sandboxes.list()]
    with pytest.raises(errors.NotFound) as gone:
        box.refresh()
    assert gone.value.hint == "it is in the trash: limpet undelete undone"
    [entry] = [found for found in client.trash.list() if found.id == before.id]
    assert entry.name == "undone" and entry.size > 0
    assert remains(client) == []

    back = client.trash.undelete("undone")
    after = back.refresh()
    assert (after.id, after.state, after.spec, after.created_at) == (
        before.id,
        "stopped",
        before.spec,
        before.created_at,
    )
    back.start()
    assert len(back.refresh().ports) == 1
    assert (
        back.exec(["sh", "-c", "cat /home/user/a /workspace/b; echo $GREETING"], cwd="/").text
        == "second\nfirst\nhello\n"
    )
    assert [found.id for found in client.checkpoints.list("undone")] == [checkpoint.id]
    back.restore("before", force=True)
    assert shell(back, "cat /home/user/a") == "first\n"


def test_a_suspended_sandbox_goes_on_where_it_was_after_an_undelete(client: Client, home: Path, make: Make) -> None:
    """VM-17, VM-18: its processes were in memory; the daemon was another one meanwhile, and its name was taken."""
    box = make("asleep")
    start_counter(box)
    box.suspend()
    box.remove()
    assert run_cli(home, "daemon", "stop").returncode == 0
    other = make("asleep", start=False)
    with pytest.raises(errors.AlreadyExists) as taken:
        client.trash.undelete("asleep")
    assert taken.value.hint == "limpet undelete asleep --as NEW"
    back = client.trash.undelete("asleep", as_name="awake")
    try:
        assert back.refresh().state == "suspended"
        back.resume()
        counts_on(back, count(back))
    finally:
        back.remove(force=True, purge=True)
    assert other.refresh().state == "stopped"


def test_a_checkpoint_of_a_removed_sandbox_can_be_restored_as_another(client: Client, make: Make) -> None:
    """VM-17, FRZ-7"""
    box = make("source")
    shell(box, "echo kept > /home/user/a && sync")
    checkpoint = box.checkpoint(label="here", disk_only=True)
    box.remove(force=True)
    new = client.checkpoints.restore(checkpoint.id, as_name="from-trash")
    try:
        client.sandboxes.get("from-trash").start()
        assert shell(client.sandboxes.get("from-trash"), "cat /home/user/a") == "kept\n", new
    finally:
        client.sandboxes.get("from-trash").remove(force=True, purge=True)


def test_purging_frees_the_disk_and_emptying_does_too(client: Client, home: Path, make: Make) -> None:
    """VM-17: `rm --purge`, ephemeral sandboxes and `trash empty` leave nothing; `prune` never touches the trash."""
    layers, vaults = discover(home).layers, discover(home).vaults

    def disks() -> set[str]:
        return {path.name for path in (*layers.glob("ly_*"), *vaults.glob("sb_*"))}

    before, kept = disks(), hidden_rows(home, "trashed")
    box = make("purged")
    shell(box, "head -c 8M /dev/urandom > /home/user/a; sync")
    box.remove(force=True, purge=True)
    wait_until(lambda: disks() == before)
    make("brief", ephemeral=True).remove(force=True)
    wait_until(lambda: disks() == before)
    assert "brief" not in [entry.name for entry in client.trash.list()]

    box = make("emptied")
    shell(box, "head -c 8M /dev/urandom > /home/user/a; sync")
    box.remove(force=True)
    assert next(row for row in client.system.df().rows if row.kind == "trash").size > 8 << 20
    client.system.prune()
    assert len(disks()) > len(before)
    result = client.trash.empty("emptied")
    assert result.removed == ["emptied"] and result.freed > 8 << 20
    wait_until(lambda: disks() == before)
    assert hidden_rows(home, "trashed") == kept
    assert remains(client) == []


def test_before_it_is_removed_a_sandbox_says_what_only_it_has(client: Client, make: Make, tmp_path: Path) -> None:
    """VM-17: commits, stashes, changed and untracked files that are not on the host; those that are do not count."""
    host = tmp_path / "project"
    host.mkdir()
    subprocess.run(["sh", "-ec", _PROJECT], cwd=host, check=True)
    box = make("risky")
    assert box.risk().known
    box.workspace.import_(host)
    quiet = box.risk()
    assert (quiet.known, quiet.commits, quiet.stashes, quiet.changed, quiet.untracked) == (True, 0, 0, [], [])
    shell(box, _WORK, user="user")
    report = box.risk()
    assert (report.commits, report.stashes) == (2, 1)
    assert "/workspace/project/f" in report.changed and "/workspace/project/a b" in report.untracked
    assert "/workspace/project/h" not in report.changed
    box.stop()
    assert (box.risk().known, box.risk().reason) == (False, "it is stopped: nobody can look")
