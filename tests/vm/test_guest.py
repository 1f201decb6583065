"""What can be done in a real guest: commands, files, ports, its view of the world."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.client
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from limpet import AsyncClient, Client, errors
from limpet.client import Sandbox
from tests.conftest import LIMPET, Cli

pytestmark = pytest.mark.vm


def test_exec_is_exact_about_streams_exit_codes_signals_users_and_directories(sandbox: Sandbox) -> None:
    """GST-5: on a real guest; the whole matrix is in tests/contract."""
    r = sandbox.exec(["sh", "-c", "echo out; echo err >&2; exit 9"], cwd="/tmp")
    assert (r.stdout, r.stderr, r.exit_code) == (b"out\n", b"err\n", 9)
    assert sandbox.exec(["sh", "-c", "kill -SEGV $$"], cwd="/tmp").signal == signal.SIGSEGV
    assert sandbox.exec(["id", "-un"], cwd="/tmp").text == "user\n"
    assert sandbox.exec(["id", "-un"], user="root", cwd="/").text == "root\n"
    assert sandbox.exec(["sudo", "-n", "id", "-u"], cwd="/tmp").text == "0\n"
    assert sandbox.exec(["cat"], stdin=b"\0binary\xff", cwd="/tmp").stdout == b"\0binary\xff"
    assert sandbox.exec(["sleep", "100"], timeout=0.5, cwd="/tmp").timed_out
    with pytest.raises(errors.LimpetError, match="no-such-command"):
        sandbox.exec(["no-such-command"], cwd="/tmp")


def test_fifty_commands_at_once_all_succeed(sandbox: Sandbox) -> None:
    """GST-1: many streams on one channel."""
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        outputs = list(pool.map(lambda n: sandbox.exec(["echo", str(n)], cwd="/tmp").text, range(50)))
    assert outputs == [f"{n}\n" for n in range(50)]


def test_the_agents_death_ends_neither_the_vm_nor_its_commands(sandbox: Sandbox) -> None:
    """GST-9, GST-6: kill -9 of the agent; the command goes on, its output is whole, the channel comes back."""
    boot = sandbox.refresh().boot_id
    handle = sandbox.exec(["sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.5; done"], detach=True, cwd="/tmp")
    victims = sandbox.exec(["pgrep", "-f", "limpet"], user="root", cwd="/").text.split()
    agent = next(pid for pid in victims if pid != "1")
    sandbox.exec(["sh", "-c", f"(sleep 0.3; kill -9 {agent}) >/dev/null 2>&1 &"], user="root", cwd="/")
    time.sleep(1.0)
    result = handle.wait()
    assert (result.exit_code, handle.output()) == (0, b"1\n2\n3\n4\n5\n6\n")
    assert sandbox.exec(["cat", "/proc/sys/kernel/random/boot_id"], cwd="/tmp").text.strip() == boot


def test_a_gigabyte_of_output_arrives_whole_in_constant_memory(sandbox: Sandbox, client: Client) -> None:
    """GST-1, GST-6: bounded everywhere; every byte is counted."""
    daemon = client.status().pid

    def rss() -> int:
        return int(Path(f"/proc/{daemon}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before, received, peak = rss(), 0, 0
    with sandbox.exec(["head", "-c", str(1 << 30), "/dev/zero"], stream=True, cwd="/tmp") as command:
        for chunk in command:
            received += len(chunk.data)
            peak = max(peak, rss())
        assert command.result().exit_code == 0
    assert received == 1 << 30
    assert peak - before < 100 << 20


def test_files_keep_owner_mode_time_links_and_holes(sandbox: Sandbox, tmp_path: Path) -> None:
    """GST-8: through the bulk lane and back, digests equal."""
    content = os.urandom(24 << 20)
    (tmp_path / "in").write_bytes(content)
    sandbox.files.upload(tmp_path / "in", "/home/user/big", user="user")
    info = sandbox.files.stat("/home/user/big")
    assert (info.size, info.uid) == (len(content), 1000)
    digest = sandbox.exec(["sha256sum", "/home/user/big"], cwd="/tmp").text.split()[0]
    assert digest == hashlib.sha256(content).hexdigest()
    sandbox.files.download("/home/user/big", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    sandbox.files.mkdir("/home/user/d/e", parents=True)
    sandbox.files.write("/home/user/d/e/f", b"small")
    sandbox.files.rename("/home/user/d/e/f", "/home/user/d/g")
    assert sorted(Path(f.path).name for f in sandbox.files.list("/home/user/d")) == ["e", "g"]
    sandbox.files.remove("/home/user/d", recursive=True)
    with pytest.raises(errors.NotFound):
        sandbox.files.stat("/home/user/d")


def test_cp_copies_trees_both_ways(cli: Cli, sandbox: Sandbox, tmp_path: Path) -> None:
    """GST-8, item 9: modes and links survive `limpet cp`."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "tool").write_text("#!/bin/sh\n")
    (tree / "sub" / "tool").chmod(0o755)
    (tree / "link").symlink_to("sub/tool")
    assert cli("cp", str(tree), "shared:/home/user/tree").returncode == 0
    assert cli("cp", "shared:/home/user/tree", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back" / "sub" / "tool").stat().st_mode & 0o777 == 0o755
    assert os.readlink(tmp_path / "back" / "link") == "sub/tool"
    assert sandbox.exec(["rm", "-rf", "/home/user/tree"], cwd="/tmp").exit_code == 0


def test_a_published_port_reaches_the_guests_loopback_from_the_hosts_loopback_only(sandbox: Sandbox) -> None:
    """Item 8, GST-10: a server bound to the guest's 127.0.0.1, over the channel."""
    serve = "cd /usr/share && exec python3 -m http.server --bind 127.0.0.1 8000"
    server = sandbox.exec(["sh", "-c", serve], detach=True, cwd="/tmp")
    try:
        connect = "import socket; socket.create_connection(('127.0.0.1', 8000))"
        sandbox.exec(f'until python3 -c "{connect}" 2>/dev/null; do sleep 0.1; done', cwd="/tmp", timeout=60).check()
        port = sandbox.ports.publish(8000)
        connection = http.client.HTTPConnection("127.0.0.1", port.host, timeout=30)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        assert b"Directory listing" in response.read()
        listening = Path("/proc/net/tcp").read_text()
        assert f"0100007F:{port.host:04X} 00000000:0000 0A" in listening
        assert f"00000000:{port.host:04X} 00000000:0000 0A" not in listening
        sandbox.ports.remove(port.host)
        with pytest.raises(ConnectionError):
            http.client.HTTPConnection("127.0.0.1", port.host, timeout=5).request("GET", "/")
    finally:
        server.signal("KILL")


def test_the_guest_has_a_network_but_no_way_to_the_host(client: Client) -> None:
    """Item 8: an address, a route and a resolver; but no name for this host leads to a service on it."""
    with socket.create_server(("127.0.0.1", 0)) as local, socket.create_server(("0.0.0.0", 0)) as anywhere:
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
        addresses = ["10.0.2.2", "10.0.2.3", "127.0.0.1", "0.0.0.0", *(a for a in own if ":" not in a)]
        ports = [s.getsockname()[1] for s in (local, anywhere)]
        script = (
            "import socket, sys\n"
            f"for address in {addresses!r}:\n"
            f"    for port in {ports!r}:\n"
            "        try:\n"
            "            socket.create_connection((address, port), 1.5)\n"
            "            print('reached', address, port)\n"
            "        except OSError:\n"
            "            pass\n"
        )
        with client.sandboxes.create("networked", memory_mib=512, ephemeral=True, network="user") as s:
            assert "10.0.2.15/24" in s.exec(["ip", "-4", "address"], cwd="/").text
            assert "default via 10.0.2.2" in s.exec(["ip", "route"], cwd="/").text
            assert "nameserver 10.0.2.3" in s.exec(["cat", "/etc/resolv.conf"], cwd="/").text
            assert s.exec(["python3", "-c", script], cwd="/", timeout=120).check().text == ""


def test_system_information_and_clock_are_right(sandbox: Sandbox) -> None:
    """GST-3, GST-4."""
    info = sandbox.system()
    assert (info.hostname, info.arch, info.cpus) == ("shared", "x86_64", 2)
    assert 400 << 20 < info.memory_total < 512 << 20
    assert sandbox.exec(["getent", "hosts", "shared"], cwd="/tmp").text.split() == ["127.0.1.1", "shared"]
    assert info.boot_id == sandbox.refresh().boot_id
    before = time.time()
    inside = float(sandbox.exec(["date", "+%s.%N"], cwd="/tmp").text)
    assert before - 0.1 <= inside <= time.time() + 0.1


def test_statistics_and_logs_are_there(sandbox: Sandbox, cli: Cli) -> None:
    """VM-21: numbers for this sandbox; console and agent log."""
    stats = sandbox.stats()
    assert stats.cpu_seconds > 0
    assert stats.memory_pss > 50 << 20
    assert stats.guest is not None
    assert cli("logs", "shared", "--source", "agent").returncode == 0
    assert cli("stats", "--json").returncode == 0


def test_ctrl_c_reaches_the_guests_command(sandbox: Sandbox, home: Path) -> None:
    """Item 9: SIGINT of the CLI becomes SIGINT of the command's group; its exit code is limpet's."""
    script = "trap 'echo caught; exit 42' INT; echo ready; while :; do sleep 0.1; done"
    words = [str(LIMPET), "exec", "--workdir", "/tmp", "shared", "--", "sh", "-c", script]
    with subprocess.Popen(words, env={**os.environ, "LIMPET_HOME": str(home)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(30) == 42


async def _both(home: Path) -> list[str]:
    import asyncio

    async with AsyncClient(home=home) as c:
        s = await c.sandboxes.get("shared")
        results = await asyncio.gather(*(s.exec(["echo", str(n)], cwd="/tmp") for n in range(5)))
        return [r.text for r in results]


def test_the_async_client_does_the_same(sandbox: Sandbox, home: Path) -> None:
    """Item 10: AsyncClient, against the same daemon."""
    import asyncio

    assert asyncio.run(_both(home)) == [f"{n}\n" for n in range(5)]


def test_an_ephemeral_sandbox_is_gone_after_its_block(client: Client, home: Path) -> None:
    """Item 10: the example of the SDK, to the letter."""
    with client.sandboxes.create(image="base", ephemeral=True) as s:
        r = s.exec(["echo", "hi"])
        assert (r.stdout, r.stderr, r.text, r.exit_code) == (b"hi\n", b"", "hi\n", 0)
        name = s.name
    with pytest.raises(errors.NotFound):
        client.sandboxes.get(name).refresh()


def test_doctor_tells_the_truth_about_kvm(cli: Cli) -> None:
    """VM-20: a verdict from a real probe, and a remedy."""
    import json

    rows = {row["check"]: row for row in json.loads(cli("doctor", "--json").stdout)["rows"]}
    row = rows["accelerator"]
    assert ("emulated" in row["detail"]) == (row["status"] == "WARN")
    if Path("/dev/kvm").exists() and os.access("/dev/kvm", os.W_OK) and row["status"] == "WARN":
        assert "/dev/kvm opens" in row["detail"]
    assert rows["orphans"]["status"] == "PASS"
