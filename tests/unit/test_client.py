"""The SDK against the real API over a stand-in guest (see client_kit), synchronous and asynchronous."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import AsyncClient, Client, models
from limpet.client import ExecFailed, Sandbox
from limpet.errors import AlreadyExists, BadRequest, FailedPrecondition, NotFound, Unavailable

from .client_kit import PATCH, StandIn, stand_in


@pytest.fixture(scope="module")
def daemon() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def client(daemon: StandIn) -> Iterator[Client]:
    with Client(daemon.home, autostart=False) as client:
        yield client


@pytest.fixture
def web(client: Client) -> Sandbox:
    return client.sandboxes.ref("web")


def test_exec_gives_output_of_both_lanes_and_the_exit_code(web: Sandbox) -> None:
    """API-10"""
    result = web.exec("printf out; printf '\\377' >&2; exit 3")
    assert (result.stdout, result.stderr, result.text, result.exit_code, result.ok) == (
        b"out",
        b"\xff",
        "out",
        3,
        False,
    )
    with pytest.raises(ExecFailed, match="ended with status 3"):
        result.check()


def test_exec_of_a_sequence_passes_arguments_as_they_are(web: Sandbox) -> None:
    assert web.exec(["printf", "%s|", "a b", "$HOME", "*"]).check().text == "a b|$HOME|*|"


def test_exec_ended_by_a_signal_tells_it_as_a_shell_does(web: Sandbox) -> None:
    result = web.exec("kill -9 $$")
    assert (result.signal, result.exit_code) == (9, 137)


def test_exec_with_more_input_and_output_than_any_buffer_holds_ends(web: Sandbox) -> None:
    """A command that echoes what it is fed must not wait for us while we wait for it."""
    data = bytes(range(256)) * 40_000
    assert web.exec(["cat"], stdin=data).stdout == data


def test_exec_that_reads_none_of_its_input_ends(web: Sandbox) -> None:
    assert web.exec(["true"], stdin=bytes(5_000_000)).exit_code == 0


def test_stream_iterates_over_output_as_it_comes_and_takes_input(web: Sandbox) -> None:
    with web.exec(["cat"], stream=True, stdin=True) as command:
        command.stdin.write(b"one")
        assert command.read() == ("stdout", b"one")
        command.stdin.write(b"two")
        command.stdin.close()
        assert b"".join(chunk.data for chunk in command) == b"two"
        assert command.result().exit_code == 0


def test_stream_takes_signals_and_a_terminal_size(web: Sandbox) -> None:
    with web.exec("read x; stty size; exec sleep 60", stream=True, stdin=True, tty=True, rows=10, cols=20) as command:
        command.resize(33, 44)
        command.stdin.write(b"\n")
        seen = b""
        while b"33 44" not in seen:
            chunk = command.read()
            assert chunk is not None
            seen += chunk.data
        command.signal("KILL")
        assert command.result().signal == 9


def test_writing_to_a_command_without_stdin_says_how_to_have_one(web: Sandbox) -> None:
    with web.exec(["true"], stream=True) as command, pytest.raises(BadRequest):
        command.stdin.write(b"x")


def test_detached_command_runs_on_and_can_be_waited_for(web: Sandbox) -> None:
    handle = web.exec("sleep 0.2; exit 5", detach=True)
    assert handle.info().running
    assert handle.wait().exit_code == 5
    assert handle.id in [info.id for info in web.execs()]


def test_closing_a_stream_from_another_thread_ends_its_reader(web: Sandbox) -> None:
    command = web.exec(["sleep", "60"], stream=True)
    threading.Timer(0.1, command.close).start()
    assert command.read() is None
    with pytest.raises(Unavailable, match="let go"):
        command.result()


def test_errors_of_the_daemon_arrive_as_their_class_with_hint_and_operation(client: Client) -> None:
    """VM-15"""
    with pytest.raises(NotFound) as caught:
        client.sandboxes.get("wep")
    assert caught.value.hint == "did you mean 'web'?"
    assert caught.value.op_id is not None and caught.value.op_id.startswith("op_")
    with pytest.raises(NotFound, match="no sandbox named 'wep'"):
        client.exec("wep", ["true"])
    with pytest.raises(NotFound, match="command not found"):
        client.exec("web", ["no-such-command"])


def test_invalid_name_is_refused_before_anything_is_sent(client: Client) -> None:
    """VM-7"""
    with pytest.raises(BadRequest, match="not a valid sandbox name"):
        client.sandboxes.ref("../etc")


def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    with Client(tmp_path, autostart=False) as client:
        with pytest.raises(Unavailable, match="cannot reach the daemon"):
            client.sandboxes.list()
        with pytest.raises(Unavailable, match="cannot reach the daemon"):
            client.exec("web", ["true"])


def test_ephemeral_sandbox_is_removed_when_its_block_is_left(client: Client) -> None:
    with client.sandboxes.create("short", ephemeral=True) as box:
        assert box.exec(["echo", "hi"]).text == "hi\n"
    with client.sandboxes.create("long") as box:
        pass
    assert "short" not in [box.name for box in client.sandboxes.list()]
    client.sandboxes.get("long").remove(force=True)


def test_create_reports_stages(client: Client) -> None:
    """VM-14"""
    seen: list[models.Stage] = []
    client.sandboxes.create("staged", on_stage=seen.append).remove(force=True)
    assert ("boot", "done") in [(stage.name, stage.state) for stage in seen]


def test_giving_up_on_a_create_cancels_it(daemon: StandIn, client: Client) -> None:
    """VM-14"""

    def give_up(stage: models.Stage) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.sandboxes.create("given-up", image="slow", on_stage=give_up)
    assert "given-up" in daemon.boxes.undone


def test_begun_create_can_be_followed_and_pruned(client: Client) -> None:
    operation = client.sandboxes.begin_create("begun")
    done = client.operations.wait(operation.id)
    assert (done.state, done.result and done.result["name"]) == ("done", "begun")
    client.operations.prune(operation.id)
    assert operation.id not in [one.id for one in client.operations.list()]
    client.sandboxes.ref("begun").remove(force=True)


def test_lifecycle_verbs_answer_with_what_they_reached(client: Client) -> None:
    box = client.sandboxes.create("cycle")
    assert box.stop().durability == "clean"
    assert box.refresh().state == "stopped"
    with pytest.raises(FailedPrecondition) as caught:
        box.exec(["true"])
    assert caught.value.hint == "limpet start cycle"
    assert box.exec(["true"], start=True).ok
    assert box.start().state == "running"
    with pytest.raises(FailedPrecondition, match="is running"):
        box.remove()
    box.rename("cycled")
    assert box.name == "cycled"
    box.remove(force=True)


def test_files_go_both_ways_in_pieces(web: Sandbox, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    assert web.files.write("/a", data).size == len(data)
    assert web.files.read("/a") == data
    web.files.write("/b", io.BytesIO(b"from a file"))
    web.files.write("/c", iter([b"from ", b"pieces"]))
    assert (web.files.read_text("/b"), web.files.read_text("/c")) == ("from a file", "from pieces")
    (tmp_path / "up").write_bytes(data)
    (tmp_path / "up").chmod(0o750)
    assert web.files.upload(tmp_path / "up", "/up").mode == 0o750
    web.files.download("/up", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == data
    assert web.files.exists("/up") and not web.files.exists("/nowhere")
    web.files.remove("/up")
    assert sorted(info.path for info in web.files.list("/")) == ["/a", "/b", "/c"]
    for name in "abc":
        web.files.remove(f"/{name}")


def test_file_names_that_are_not_utf8_work(web: Sandbox, daemon: StandIn) -> None:
    web.files.write("/\udcff", b"x")
    assert (daemon.guest / "\udcff").read_bytes() == b"x"
    assert [info.path for info in web.files.list("/")] == ["/\udcff"]
    web.files.remove("/\udcff")


def test_failed_download_leaves_no_file(web: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        web.files.download("/nowhere", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_directories_go_both_ways_with_modes_and_links(web: Sandbox, daemon: StandIn, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"content" * 1000)
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("deep/file")
    web.archive.upload(source, "/tree")
    assert (daemon.guest / "tree" / "link").readlink() == Path("deep/file")
    assert web.archive.download("/tree", tmp_path / "back") == 5
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == b"content" * 1000
    assert (tmp_path / "back" / "run").stat().st_mode & 0o777 == 0o755
    web.files.remove("/tree", recursive=True)


def test_workspace_goes_there_and_back(client: Client, tmp_path: Path) -> None:
    box = client.sandboxes.for_directory(tmp_path, name="work")
    assert box.info.workspace is not None and box.info.workspace.host_dir == str(tmp_path.resolve())
    assert client.sandboxes.find(tmp_path / "below").name == "work"
    assert client.sandboxes.for_directory(tmp_path).name == "work"
    assert box.workspace.patch() == PATCH
    assert box.workspace.changes().changes[0].path == "new.txt"
    assert box.workspace.apply(tmp_path).applied
    assert not box.workspace.drift().moved
    with pytest.raises(AlreadyExists, match="belongs to"):
        client.sandboxes.for_directory("/tmp", name="work")
    box.remove(force=True)


def test_failed_import_removes_the_sandbox_that_was_made_for_it(client: Client, tmp_path: Path) -> None:
    (tmp_path / "unreadable").touch()
    with pytest.raises(BadRequest, match="cannot read"):
        client.sandboxes.for_directory(tmp_path, name="half")
    assert "half" not in [box.name for box in client.sandboxes.list()]


def test_sandbox_for_a_directory_gets_the_first_free_name(client: Client, tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "My App", tmp_path / "b" / "My App"
    for directory in (one, two):
        directory.mkdir(parents=True)
        client.sandboxes.for_directory(directory)
    names = [client.sandboxes.find(directory).name for directory in (one, two)]
    assert names == ["my-app", "my-app-2"]
    for name in names:
        client.sandboxes.ref(name).remove(force=True)


def test_ports_are_published_and_withdrawn(web: Sandbox) -> None:
    assert web.ports.publish(80).host == 40123
    assert [port.guest for port in web.ports.list()] == [80]
    web.ports.remove(40123)
    assert web.ports.list() == []


def test_events_resume_behind_the_cursor(daemon: StandIn, client: Client) -> None:
    """EVT-1"""
    for number in range(3):
        daemon.emit("tick", number=number)
    seen = [event for event in client.events(0) if event.kind == "tick"]
    assert [event.data["number"] for event in seen] == [0, 1, 2]
    assert [event.seq for event in client.events(seen[1].seq) if event.kind == "tick"] == [seen[2].seq]


def test_events_follow_gives_what_comes(daemon: StandIn, client: Client) -> None:
    daemon.emit("before")
    last = list(client.events(0))[-1].seq
    following = client.events(last, follow=True)
    daemon.emit("after")
    assert next(iter(following)).kind == "after"


async def _all_of_it(home: Path) -> None:
    async with AsyncClient(home, autostart=False) as client:
        async with await client.sandboxes.create("async", ephemeral=True) as box:
            data = bytes(5_000_000)
            assert (await box.exec(["cat"], stdin=data)).stdout == data
            async with await box.exec("echo a; read x; echo $x >&2; exit 4", stream=True, stdin=True) as command:
                await command.stdin.write(b"b\n")
                assert [chunk async for chunk in command] == [("stdout", b"a\n"), ("stderr", b"b\n")]
                assert (await command.result()).exit_code == 4
            handle = await box.exec(["true"], detach=True)
            assert (await handle.wait()).ok
            await box.files.write("/x", b"async")
            async with box.files.stream("/x") as chunks:
                assert [chunk async for chunk in chunks] == [b"async"]
            with pytest.raises(NotFound):
                await box.exec(["no-such-command"])
        assert "async" not in [one.name for one in await client.sandboxes.list()]


def test_asynchronous_client_has_the_same_surface(daemon: StandIn) -> None:
    import asyncio

    asyncio.run(_all_of_it(daemon.home))


def test_cancelled_task_cancels_its_create(daemon: StandIn) -> None:
    import asyncio

    async def create() -> None:
        async with AsyncClient(daemon.home, autostart=False) as client:
            began = asyncio.Event()
            task = asyncio.create_task(
                client.sandboxes.create("cancelled", image="slow", on_stage=lambda _: began.set())
            )
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(create())
    assert "cancelled" in daemon.boxes.undone
