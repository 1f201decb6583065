"""Sandboxes as they were: going back, copies of the past, damage, bytes."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from limpet.paths import discover
from tests.vm.kit import (
    chain,
    clock_error,
    count,
    counts_on,
    flip,
    remains,
    shell,
    start_counter,
    wait_until,
)  # fmt: skip

pytestmark = pytest.mark.vm

_TREE = "cd / && find home/user usr/bin/git -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"


@pytest.fixture(scope="module")
def box(client: Client) -> Iterator[Sandbox]:
    box = client.sandboxes.create("kept", memory_mib=512)
    yield box
    box.remove(force=True, purge=True)


@pytest.fixture
def no_checkpoints(box: Sandbox, client: Client) -> Iterator[None]:
    """What a test leaves goes."""
    yield
    for checkpoint in box.checkpoints():
        client.checkpoints.remove(checkpoint.id)


@pytest.mark.usefixtures("no_checkpoints")
def test_undo_brings_everything_back_running_processes_included(box: Sandbox) -> None:
    """FRZ-6, FRZ-7: `rm -rf /home/user /usr/bin/git` is undone; so is the end of a process; and undone again."""
    shell(box, "cd /home/user && mkdir -p a/b && for i in $(seq 50); do echo $i > a/b/$i; done")
    tree, modes = shell(box, _TREE, user="root"), shell(box, "stat -c '%A %U %y' /home/user /usr/bin/git")
    handle = start_counter(box)
    pid, counted = handle.info().pid, count(box)
    checkpoint = box.checkpoint(label="before")
    saved = ""
    assert (checkpoint.kind, checkpoint.sandbox) == ("full", "kept")
    for _ in range(2):
        handle.signal("KILL")
        handle.wait()
        shell(box, "rm -rf /home/user /usr/bin/git; echo later > /srv/later; rm /dev/shm/count", user="root")
        assert not box.exec(["test", "-e", "/usr/bin/git"], cwd="/").ok
        result = box.undo()
        assert result.checkpoint.id == checkpoint.id
        saved = result.saved.id if result.saved else ""
        assert shell(box, _TREE, user="root") == tree
        assert shell(box, "stat -c '%A %U %y' /home/user /usr/bin/git") == modes
        assert shell(box, "git --version").startswith("git version")
        assert not box.exec(["test", "-e", "/srv/later"], cwd="/").ok
        assert (handle.info().running, handle.info().pid) == (True, pid)
        assert counts_on(box, counted) > counted
        assert clock_error(box) <= 0.1
    present = box.restore(saved, force=True)  # what undo replaced was kept
    assert present.checkpoint.made_by == "restore"
    assert shell(box, "cat /srv/later") == "later\n"
    assert not box.exec(["test", "-e", "/usr/bin/git"], cwd="/").ok
    box.restore("before", force=True)
    handle.signal("KILL")


@pytest.mark.usefixtures("no_checkpoints")
def test_ids_that_mean_none_or_several_and_running_sandboxes_are_refused(box: Sandbox, client: Client) -> None:
    """FRZ-7, FRZ-9: two checkpoints at once are two; the beginning of an id has to mean one."""
    before = box.refresh()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda label: box.checkpoint(label=label), ("one", "two"))
    assert first.id != second.id
    listed = {known.id: known for known in box.checkpoints()}
    assert set(listed) == {first.id, second.id}
    newest = max(listed)
    assert listed[newest].parent == min(listed)
    with pytest.raises(errors.BadRequest, match="beginning of 2"):
        box.restore(first.id[:8], force=True)
    with pytest.raises(errors.NotFound):
        box.restore("ck_zzzzzzzz", force=True)
    with pytest.raises(errors.FailedPrecondition, match="kept is running") as refused:
        box.restore("two")
    assert "--force" in (refused.value.hint or "")
    assert (box.refresh().pid, box.refresh().incarnation) == (before.pid, before.incarnation)
    verified = client.checkpoints.verify(second.id, boot=True)
    assert (verified.ok, verified.booted, verified.problems) == (True, True, [])
    assert [known.name for known in client.sandboxes.list() if known.name.startswith("+")] == []
    assert not remains(client)


@pytest.mark.usefixtures("no_checkpoints")
def test_a_damaged_checkpoint_is_named_and_never_started(box: Sandbox, client: Client, home: Path) -> None:
    """FRZ-6, FRZ-9: flipped, truncated, missing or foreign; the sandbox runs on, and the others are of use."""
    whole = box.checkpoint(label="whole")
    damaged = box.checkpoint(label="damaged")
    before = box.refresh()
    directory = discover(home).checkpoints / damaged.id
    state = (directory / "state").read_bytes()

    def refused(problem: str) -> None:
        verified = client.checkpoints.verify(damaged.id)
        assert not verified.ok
        assert any(re.search(problem, found) for found in verified.problems), verified.problems
        for as_name in (None, "copy"):
            with pytest.raises(errors.BadRequest, match=f"{damaged.id} is not as it was written: .*{problem}"):
                box.restore("damaged", force=True, as_name=as_name)

    (directory / "state").write_bytes(state[:-1])
    refused("state has .* bytes")
    (directory / "state").write_bytes((discover(home).checkpoints / whole.id / "state").read_bytes()[: len(state)])
    if (directory / "state").read_bytes() != state:
        refused("state (has|is damaged)")
    (directory / "state").unlink()
    refused("state is missing")
    (directory / "state").write_bytes(state)
    assert client.checkpoints.verify(damaged.id).ok  # the same content, written anew
    flip(directory / "ram")
    refused("ram is damaged")
    flip(directory / "checkpoint.json")
    client.shutdown()
    with pytest.raises(errors.LimpetError, match=r"checkpoint\.json is damaged or foreign"):
        box.restore(damaged.id, force=True)
    assert any("checkpoint.json is damaged" in detail for detail in remains(client))
    client.checkpoints.remove(damaged.id)
    assert (box.refresh().pid, box.refresh().boot_id) == (before.pid, before.boot_id)
    assert len(box.checkpoints()) == 1
    assert client.checkpoints.verify("kept@whole").ok
    assert not remains(client)


@pytest.mark.usefixtures("no_checkpoints")
def test_a_clone_of_the_past_is_a_machine_of_its_own_and_removed_checkpoints_free_their_bytes(
    box: Sandbox, client: Client, home: Path
) -> None:
    """FRZ-6, FRZ-7: restore --as beside the running sandbox; then everything that only the checkpoint needed goes."""
    shell(box, "head -c 32M /dev/urandom > /dev/shm/ballast; echo then > /home/user/when; sync")
    ballast = shell(box, "sha256sum /dev/shm/ballast")
    checkpoint = box.checkpoint()
    shell(box, "rm /dev/shm/ballast; echo now > /home/user/when")
    copy = client.checkpoints.restore(f"kept@{checkpoint.id}", as_name="past")
    past = client.sandboxes.get(copy.sandbox.name)
    assert shell(past, "cat /home/user/when; hostname").split() == ["then", "past"]
    assert shell(past, "cat /etc/machine-id") != shell(box, "cat /etc/machine-id")
    assert clock_error(past) <= 0.1
    assert shell(box, "cat /home/user/when") == "now\n"

    def bytes_of_checkpoints() -> int:
        return next(row.size for row in client.system.df().rows if row.kind == "checkpoints")

    taken = bytes_of_checkpoints()
    freed = client.checkpoints.remove(checkpoint.id).freed
    assert freed >= checkpoint.memory_bytes > 32 << 20
    assert taken - bytes_of_checkpoints() >= checkpoint.memory_bytes
    assert not (discover(home).checkpoints / checkpoint.id).exists()
    assert shell(past, "sha256sum /dev/shm/ballast") == ballast  # its memory is whole still
    past.remove(force=True, purge=True)
    assert not remains(client)


def test_every_exec_keeps_a_ladder_of_disks_and_a_shallow_chain(client: Client, home: Path) -> None:
    """FRZ-6, FRZ-9: each command can be undone; old checkpoints are thinned out, and too many layers are folded while
    the VM runs, without a byte lost."""
    box = client.sandboxes.create("careful", memory_mib=512, every_exec=True)
    try:
        writer = box.exec(
            ["sh", "-c", "while :; do echo x >> /home/user/beside; sync; sleep 0.1; done"], detach=True, cwd="/"
        )
        for number in range(24):
            script = f"echo {number} >> /srv/lines; echo {number} >> /home/user/lines"
            box.exec(["sh", "-c", script], user="root", cwd="/").check()
        kept = box.checkpoints()
        assert {known.made_by for known in kept} == {"exec"}
        assert 20 <= len(kept) <= 22  # the newest, and the last of an hour and of a day that just ended
        box.set(every_exec=False)
        wait_until(lambda: all(len(chain(home, box, disk)) <= 9 for disk in ("root", "data")), 30)
        lines = "".join(f"{number}\n" for number in range(24)) * 2
        assert shell(box, "cat /srv/lines /home/user/lines") == lines
        assert shell(box, "sort -u /home/user/beside") == "x\n"
        writer.signal("KILL")
        undone = box.undo()  # its last command had a checkpoint: the one before it is that of number 23
        assert undone.checkpoint.label is not None
        assert "echo 23 " in undone.checkpoint.label
        assert shell(box, "tail -n1 /srv/lines; tail -n1 /home/user/lines").split() == ["22", "22"]
        old = box.restore(kept[2].id, force=True)
        number = int((old.checkpoint.label or "").split("echo ")[1].split()[0])
        assert shell(box, "wc -l < /srv/lines; wc -l < /home/user/lines").split() == [str(number)] * 2
        assert shell(box, "git --version").startswith("git")
    finally:
        box.remove(force=True, purge=True)
    assert not [known for known in client.checkpoints.list() if known.sandbox == "careful"]
    assert not remains(client)
