"""Names of forks, and what is asked before one is made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from limpet.errors import BadRequest, FailedPrecondition, NotFound
from limpet.models import ForkRequest, PortMapping, SandboxSpec, State
from limpet.services import capacity, clones
from limpet.services.forks import Forks
from limpet.services.host import Host
from limpet.services.live import LiveVM
from limpet.services.sandboxes import Sandboxes
from limpet.store import SandboxRecord
from limpet.vmm.machine import Machine
from tests.unit import services_kit as kit


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with kit.host_in(tmp_path) as host:
        yield host


def forks(host: Host) -> Forks:
    return Forks(host, cast(Sandboxes, None))  # what is refused needs no sandbox's verbs


def running(host: Host, name: str = "box") -> SandboxRecord:
    """As far as a fork looks before it begins."""
    record = kit.add_sandbox(host, name, state=State.RUNNING)
    host.live.add(LiveVM(record.id, cast(Machine, SimpleNamespace(pid=1)), host.paths.sandbox(record.id)))
    return record


def test_forks_get_the_next_numbers_that_are_free(host: Host) -> None:
    """FRZ-8"""
    for name in ("box", "box-2", "box-4"):
        kit.add_sandbox(host, name)
    assert forks(host)._names("box", ForkRequest(count=3)) == ["box-1", "box-3", "box-5"]
    assert forks(host)._names("box", ForkRequest(count=2, prefix="try")) == ["try-1", "try-2"]
    assert forks(host)._names("box", ForkRequest(name="only")) == ["only"]
    assert len(set(forks(host)._names("box", ForkRequest(count=100)))) == 100


@pytest.mark.parametrize(
    "request_", [ForkRequest(name="No!"), ForkRequest(prefix="../x"), ForkRequest(prefix="a" * 63)]
)
def test_a_fork_that_could_not_be_named_is_refused(host: Host, request_: ForkRequest) -> None:
    """VM-7: also when only the number makes the name too long."""
    running(host)
    with pytest.raises(BadRequest):
        asyncio.run(forks(host).fork("box", request_))


def test_one_name_is_for_one_fork(host: Host) -> None:
    running(host)
    with pytest.raises(BadRequest, match="a name names one fork"):
        asyncio.run(forks(host).fork("box", ForkRequest(name="one", count=2)))


def test_only_what_runs_is_forked(host: Host) -> None:
    """FRZ-8"""
    kit.add_sandbox(host, "box")
    with pytest.raises(FailedPrecondition, match="box is not running"):
        asyncio.run(forks(host).fork("box", ForkRequest()))
    with pytest.raises(NotFound):
        asyncio.run(forks(host).fork("bax", ForkRequest()))


def test_forks_that_do_not_fit_are_refused_before_the_source_is_touched(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 3, bad input: "say how many fit"."""
    before = running(host)
    monkeypatch.setattr(capacity, "available_memory", lambda: 1 << 30)
    with pytest.raises(FailedPrecondition, match=r"not enough memory for 50 more sandboxes: \d+ fit"):
        asyncio.run(forks(host).fork("box", ForkRequest(count=50)))
    assert host.records.all() == [before]


def test_a_clone_gets_host_ports_of_its_own(host: Host) -> None:
    """A port of the host can be given once."""
    spec = SandboxSpec(ports=[PortMapping(host=8080, guest=80)], env={"A": "1"}, ttl=5)
    copied = clones.spec_of(spec)
    assert copied.ports == [PortMapping(host=0, guest=80)]
    assert copied.model_copy(update={"ports": spec.ports}) == spec
