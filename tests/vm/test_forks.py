"""Running copies of a running sandbox: each is a machine of its own, and the source does not notice."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from limpet.models import Stage
from tests.vm.kit import clock_error, count, counts_on, remains, shell, start_counter

pytestmark = pytest.mark.vm

# All that names a machine, and what two machines must never share.
_WHO = """
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'; echo
cat /etc/machine-id; hostname; cat /etc/hostname /proc/sys/kernel/random/boot_id /sys/class/net/e*/address
cat /etc/ssh/ssh_host_test_key 2>/dev/null || echo none
"""
_FIELDS = ("urandom", "machine_id", "hostname", "etc_hostname", "boot_id", "mac", "host_key")


def who(box: Sandbox) -> dict[str, str]:
    return dict(zip(_FIELDS, shell(box, _WHO, user="root").split(), strict=True))


@pytest.fixture(scope="module")
def source(client: Client) -> Iterator[Sandbox]:
    """A sandbox with a process that counts in memory, a file, and a host key."""
    box = client.sandboxes.create("source", memory_mib=512)
    shell(box, "mkdir -p /etc/ssh; echo secret > /etc/ssh/ssh_host_test_key; echo mine > /home/user/file", user="root")
    start_counter(box)
    yield box
    box.remove(force=True, purge=True)


def test_ten_forks_are_ten_machines_and_the_source_runs_on(source: Sandbox, client: Client) -> None:
    """FRZ-7, FRZ-8, GST-3: ids, names, entropy and clocks; the counting process lives on in every one."""
    before, counted = source.refresh(), count(source)
    identity = who(source)
    forks = source.fork(10)
    try:
        assert [fork.name for fork in forks] == [f"source-{number}" for number in range(1, 11)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            people = [identity, *pool.map(who, forks)]
        for field in ("urandom", "machine_id", "hostname", "boot_id", "mac"):
            assert len({person[field] for person in people}) == 11, field
        assert len(people[1]["urandom"]) == 64
        assert all(len(person["machine_id"]) == 32 for person in people)
        assert [person["hostname"] for person in people[1:]] == [fork.name for fork in forks]
        assert [person["etc_hostname"] for person in people[1:]] == [fork.name for fork in forks]
        assert [person["boot_id"] for person in people[1:]] == [fork.refresh().boot_id for fork in forks]
        assert {person["host_key"] for person in people[1:]} == {"none"}
        late = {fork.name: error for fork in forks if (error := clock_error(fork)) > 0.1}
        assert not late
        for fork in forks:
            assert counts_on(fork, counted) > counted
            assert shell(fork, "cat /home/user/file") == "mine\n"
        after = source.refresh()
        assert (after.pid, after.boot_id, after.incarnation) == (before.pid, before.boot_id, before.incarnation)
        assert counts_on(source, counted) > counted
        assert {**who(source), "urandom": ""} == {**identity, "urandom": ""}
        assert clock_error(source) <= 0.1
    finally:
        for fork in forks:
            fork.remove(force=True, purge=True)
    assert not remains(client)


def test_forks_are_independent_of_each_other_and_outlive_their_source(client: Client) -> None:
    """FRZ-7, FRZ-8: files and memory diverge; when the source is gone a fork still boots from its disks, as the same
    machine."""
    source = client.sandboxes.create("parent", memory_mib=512, ports={0: 8000})
    shell(source, "echo one > /home/user/file; echo one > /dev/shm/file; echo one > /srv/file", user="root")
    [left] = source.fork(name="left")
    [right] = left.fork(name="right")  # and a fork of a fork
    assert len({box.refresh().ports[0].host for box in (source, left, right)}) == 3
    shell(left, "echo left > /home/user/file; echo left > /dev/shm/file; echo left > /srv/file", user="root")
    for box, content in ((source, "one"), (left, "left"), (right, "one")):
        assert shell(box, "cat /home/user/file /dev/shm/file /srv/file").split() == [content] * 3
    source.remove(force=True, purge=True)
    right.remove(force=True, purge=True)
    identity = who(left)
    left.stop()
    left.start()
    assert shell(left, "cat /home/user/file /srv/file").split() == ["left"] * 2
    assert {name: who(left)[name] for name in ("machine_id", "hostname", "mac")} == {
        name: identity[name] for name in ("machine_id", "hostname", "mac")
    }
    left.remove(force=True, purge=True)
    assert not remains(client)


def test_a_fork_that_cannot_be_made_harms_no_other(source: Sandbox, client: Client) -> None:
    """FRZ-8: a name that is taken while the source's memory is written fails one copy, which is told by name."""
    taken: list[Sandbox] = []

    def take(stage: Stage) -> None:
        if not taken:
            taken.append(client.sandboxes.create("twin-2", start=False))

    result = source.try_fork(3, prefix="twin", on_stage=take)
    boxes = [client.sandboxes.get(info.name) for info in result.forks]
    try:
        assert [info.name for info in result.forks] == ["twin-1", "twin-3"]
        assert [(failure.name, failure.error["code"]) for failure in result.failed] == [("twin-2", "already_exists")]
        assert all(shell(box, "cat /home/user/file") == "mine\n" for box in boxes)
        assert taken[0].refresh().state == "stopped"
    finally:
        for box in (*boxes, *taken):
            box.remove(force=True, purge=True)
    assert not remains(client)


def test_what_cannot_be_forked_is_refused_before_anything_stands_still(source: Sandbox, client: Client) -> None:
    """FRZ-8: one name for several copies, a name that is taken, a sandbox that does not run."""
    with pytest.raises(errors.BadRequest, match="one fork"):
        source.fork(2, name="both")
    with pytest.raises(errors.AlreadyExists, match="source"):
        source.fork(name="source")
    idle = client.sandboxes.create("idle", memory_mib=512, start=False)
    with pytest.raises(errors.FailedPrecondition, match="idle is not running"):
        idle.fork()
    idle.remove(purge=True)
    assert not remains(client)
