"""The life of real sandboxes: stop, kill, restart, death of the daemon, sets and removals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from tests.conftest import Cli, run_cli
from tests.vm.kit import daemon_pid, wait_until

pytestmark = pytest.mark.vm


def test_stop_under_load_is_clean_and_every_printed_line_is_in_the_file(client: Client) -> None:
    """VM-1, VM-3: a writer goes on while the sandbox is stopped; what it had printed is there after a start."""
    with client.sandboxes.create("loaded", memory_mib=512) as s:
        script = "i=0; while :; do i=$((i+1)); echo line $i >> /home/user/lines; echo line $i; done"
        writer = s.exec(["sh", "-c", script], stream=True)
        printed = b""
        while printed.count(b"\n") < 200:
            chunk = writer.read()
            assert chunk is not None
            printed += chunk.data
        result = s.stop()
        with contextlib.suppress(errors.Unavailable):  # its guest is gone
            while (chunk := writer.read()) is not None:
                printed += chunk.data
        writer.close()
        assert (result.durability, result.rung) == ("clean", "poweroff")
        s.start()
        kept = s.exec(["cat", "/home/user/lines"]).check().stdout
        complete = printed[: printed.rfind(b"\n") + 1]
        assert kept.startswith(complete)
        s.remove(force=True, purge=True)


def test_stop_leaves_the_vm_running_when_the_flush_cannot_be_confirmed(client: Client) -> None:
    """VM-2: the agent does not answer (its guest is frozen by QMP stop): stop refuses, stop --force goes on."""
    with client.sandboxes.create("stuck", memory_mib=512) as s:
        pid = s.refresh().pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(errors.LimpetError) as refused:
                s.stop(timeout=8)
            assert "left running" in refused.value.message
            assert "--force" in (refused.value.hint or "")
            assert refused.value.op_id
            assert s.refresh().state == "running"
        finally:
            os.kill(pid, signal.SIGCONT)
        assert s.exec(["true"]).exit_code == 0
        os.kill(pid, signal.SIGSTOP)
        result = s.stop(timeout=6, force=True)
        assert (result.durability, result.rung) == ("killed", "sigkill")
        assert result.at_risk
        s.remove()


def test_kill_9_of_the_daemon_during_an_exec_leaves_vm_and_command_running(own_home: Path) -> None:
    """VM-8, GST-6: same QEMU, same boot id, the command runs on, and its whole output can be read."""
    with Client(home=own_home) as c:
        s = c.sandboxes.create("survivor", memory_mib=512)
        before = s.refresh()
        handle = s.exec(["sh", "-c", "for i in 1 2 3 4 5 6; do echo tick $i; sleep 1; done; exit 7"], detach=True)
        os.kill(daemon_pid(own_home), signal.SIGKILL)
    listed = run_cli(own_home, "ls", "--json")
    assert [(x["name"], x["state"]) for x in json.loads(listed.stdout)] == [("survivor", "running")]
    with Client(home=own_home) as c:
        s = c.sandboxes.get("survivor")
        after = s.refresh()
        assert (after.pid, after.boot_id) == (before.pid, before.boot_id)
        assert s.exec(["cat", "/proc/sys/kernel/random/boot_id"]).text.strip() == before.boot_id
        with s.attach(handle.id, stdout=0) as command:
            assert command.result().stdout == b"".join(b"tick %d\n" % i for i in range(1, 7))
            assert command.result().exit_code == 7
        s.remove(force=True, purge=True)
    assert not list((own_home / "data" / "sandboxes").iterdir())


def test_a_corrupt_or_missing_handles_file_is_survived(own_home: Path) -> None:
    """VM-10: the daemon recognises a running VM by its lock and uuid alone."""
    with Client(home=own_home) as c:
        c.sandboxes.create("known", memory_mib=512)
        pid = c.sandboxes.get("known").refresh().pid
        handles = next((own_home / "data" / "sandboxes").glob("*/handles.json"))
        handles.write_text("{ not json")
        os.kill(daemon_pid(own_home), signal.SIGKILL)
    with Client(home=own_home) as c:
        s = c.sandboxes.get("known")
        assert (s.refresh().state, s.refresh().pid) == ("running", pid)
        assert s.exec(["true"]).exit_code == 0


def test_death_of_qemu_is_noticed_and_explained(client: Client) -> None:
    """VM-21, VM-10: `kill -9` of QEMU leaves `error` with the reason; what was fsynced is there after a start."""
    s = client.sandboxes.create("mortal", memory_mib=512)
    s.exec(["sh", "-c", "echo kept > /home/user/kept; sync"]).check()
    pid = s.refresh().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: s.refresh().state == "error")
    assert "SIGKILL" in (s.refresh().error or "")
    assert s.logs("qemu", tail=50) != b"" or True  # logs of a dead sandbox can be read
    s.start()
    assert s.exec(["cat", "/home/user/kept"]).text == "kept\n"
    s.remove(force=True, purge=True)


def test_restart_has_a_new_boot_id_and_kill_leaves_stopped(client: Client) -> None:
    """VM-4, VM-18: restart boots anew with the memory set before; kill leaves `stopped`, not `error`."""
    s = client.sandboxes.create("again", memory_mib=512)
    first = s.refresh()
    changed = s.set(memory_mib=640, env={"COLOUR": "blue"}, labels={"team": "a"})
    assert changed.at_next_start == ["memory_mib"]
    assert {"env", "labels"} <= set(changed.applied)
    assert s.exec(["sh", "-c", "echo $COLOUR"]).text == "blue\n"
    s.restart()
    second = s.refresh()
    assert second.boot_id != first.boot_id
    assert second.incarnation == first.incarnation + 1
    assert s.system().memory_total > 560 << 20
    killed = s.kill()
    assert (killed.durability, s.refresh().state) == ("killed", "stopped")
    s.rename("renamed")
    assert client.sandboxes.get("renamed").refresh().spec.labels == {"team": "a"}
    client.sandboxes.get("renamed").remove()


def test_lifecycle_verbs_take_many_names_and_a_bad_one_stops_no_good_one(cli: Cli, sandbox: Sandbox) -> None:
    """VM-5, VM-7: in the order given, each once; exit status 1 says that one failed, with the nearest name."""
    done = cli("start", "shared", "shard", "shared")
    assert done.returncode == 1
    assert done.stdout.split() == ["shared"]
    assert "did you mean 'shared'?" in done.stderr
    assert cli("start", "Not_A_Label").returncode != 0


def test_an_idle_time_out_stops_safely_and_never_deletes(client: Client) -> None:
    """VM-16: it belongs to this incarnation; data is flushed first."""
    s = client.sandboxes.create("sleepy", memory_mib=512)
    s.exec(["sh", "-c", "echo before > /home/user/before"]).check()
    s.set(idle_timeout=1)
    wait_until(lambda: s.refresh().state == "stopped", 40)
    kinds = [(e.kind, e.data.get("durability")) for e in client.events() if e.sandbox == "sleepy"]
    assert ("sandbox.stopped", "clean") in kinds
    s.set(idle_timeout=0)
    s.start()
    assert s.exec(["cat", "/home/user/before"]).text == "before\n"
    s.remove(force=True, purge=True)


def test_a_cancelled_create_leaves_no_trace(client: Client, home: Path) -> None:
    """VM-6, VM-14: the undos run, the name is free again, no process and no file is left."""
    before = set((home / "data" / "sandboxes").iterdir())
    operation = client.sandboxes.begin_create("fleeting", memory_mib=512)
    wait_until(lambda: any(st.name == "boot" for st in client.operations.get(operation.id).stages))
    client.operations.cancel(operation.id)
    wait_until(lambda: client.operations.get(operation.id).state == "cancelled")
    with pytest.raises(errors.NotFound):
        client.sandboxes.get("fleeting").refresh()
    assert set((home / "data" / "sandboxes").iterdir()) == before
    client.operations.prune(operation.id)


def test_events_are_numbered_without_gaps_and_resume_from_a_cursor(client: Client, sandbox: Sandbox) -> None:
    """EVT-1, VM-15: one ordered stream; every event of a request carries its operation id."""
    events = list(client.events())
    assert [e.seq for e in events] == list(range(events[0].seq, events[0].seq + len(events)))
    middle = events[len(events) // 2].seq
    assert next(e.seq for e in client.events(after=middle)) == middle + 1
    started = next(e for e in events if e.kind == "sandbox.started" and e.sandbox == "shared")
    assert (started.op_id or "").startswith("op_")


def test_too_little_memory_and_unknown_images_are_refused_before_anything_is_made(client: Client) -> None:
    """VM-13: one clear message with a hint and an operation id."""
    with pytest.raises(errors.BadRequest) as little:
        client.sandboxes.create("tiny", memory_mib=64)
    assert "192" in (little.value.hint or "") + little.value.message
    with pytest.raises(errors.NotFound) as unknown:
        client.sandboxes.create("odd", image="bass")
    assert "base" in (unknown.value.hint or "")
    assert unknown.value.op_id
