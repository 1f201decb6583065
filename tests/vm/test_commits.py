"""A running sandbox becomes an image, and the image becomes a sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from limpet import Client, errors
from limpet.client import Sandbox
from tests.vm.kit import remains, shell, wait_until

pytestmark = pytest.mark.vm

_IMAGE = "test-committed"  # images are shared by all test homes: no other test may use this name

# Everything that a file system knows of a file, on both disks.
_PREPARE = r"""
import os, stat, struct
cap = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep, revision 2
def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
nobody = 0xFFFFFFFF
rights = acl((1, 6, nobody), (2, 7, 1000), (2, 4, 33), (4, 4, nobody), (8, 5, 50), (16, 7, nobody), (32, 0, nobody))
for root in ("/srv/p", "/home/user/p", "/workspace/p"):
    for name in ("tmp", "var/tmp", "run", "proc", "with space\n", "d\u00fcrr"):
        os.makedirs(f"{root}/{name}")
    for number, name in enumerate(("tmp/file", "var/tmp/file", "run/file", "with space\n/file", "empty", "tool")):
        with open(f"{root}/{name}", "w") as file:
            file.write("x" * number * 1000)
        os.chown(f"{root}/{name}", 1000 + number, 2000 + number)
    os.chmod(f"{root}/tmp", 0o1777)
    os.chmod(f"{root}/var/tmp", 0o2770)
    os.chmod(f"{root}/tmp/file", 0o4755)
    os.chmod(f"{root}/empty", 0)
    os.link(f"{root}/tmp/file", f"{root}/hard")
    os.symlink("tmp/../nowhere", f"{root}/soft")
    os.lchown(f"{root}/soft", 4321, 1234)
    os.mkfifo(f"{root}/fifo", 0o640)
    os.mknod(f"{root}/null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.setxattr(f"{root}/tool", "security.capability", cap)
    os.setxattr(f"{root}/tool", "user.note", "caf\u00e9\0".encode())
    os.setxattr(f"{root}/tmp/file", "trusted.note", b"root's")
    os.setxattr(f"{root}/run/file", "system.posix_acl_access", rights)
    os.setxattr(f"{root}/run", "system.posix_acl_default", rights)
    with open(f"{root}/sparse", "wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
    os.utime(f"{root}/tool", ns=(1234567890123456789, 987654321987654321))
for junk in ("/tmp/junk", "/var/tmp/junk/deep", "/run/junk"):
    os.makedirs(junk)
"""
_SHOW = r"""
import hashlib, os, stat
for root in ("/srv/p", "/home/user/p", "/workspace/p"):
    for directory, names, files in os.walk(root):
        for name in sorted([".", *names, *files]):
            path = os.path.join(directory, name)
            s = os.lstat(path)
            attributes = sorted(os.listxattr(path, follow_symlinks=False))
            found = [(each, os.getxattr(path, each, follow_symlinks=False)) for each in attributes]
            what = os.readlink(path) if stat.S_ISLNK(s.st_mode) else ""
            if stat.S_ISREG(s.st_mode):
                what = hashlib.sha256(open(path, "rb").read()).hexdigest()
            size = 0 if stat.S_ISDIR(s.st_mode) else s.st_size
            inode = oct(s.st_mode), s.st_uid, s.st_gid, size, s.st_nlink, s.st_rdev, s.st_mtime_ns
            print(ascii(path), *inode, what, found)
for path in ("/usr/bin/passwd", "/usr/bin/sudo", "/etc/shadow", "/home/user", "/workspace"):
    s = os.lstat(path)
    print(path, oct(s.st_mode), s.st_uid, s.st_gid, s.st_size, os.listxattr(path))
"""
_WRITER = "i=0; while :; do i=$((i+1)); echo $i >> /srv/log; echo $i >> /home/user/log; sleep 0.01; done"


@pytest.fixture(scope="module")
def source(client: Client) -> Iterator[Sandbox]:
    """A sandbox with a spec of its own, a prepared tree, and a process that writes to both disks without a pause."""
    client.config.set("template.auto", "off")  # nobody will start a second sandbox from the image
    box = client.sandboxes.create(
        "committed", memory_mib=512, env={"COLOUR": "blue"}, labels={"team": "a"}, workdir="/srv",
        entrypoint=["sh", "-c", "echo hello"],
    )  # fmt: skip
    python(box, _PREPARE)
    box.exec(["sh", "-c", _WRITER], user="root", cwd="/", detach=True)
    yield box
    box.remove(force=True, purge=True)
    client.config.unset("template.auto")
    with contextlib.suppress(errors.NotFound):
        client.images.remove(_IMAGE)


def python(box: Sandbox, script: str) -> str:
    return box.exec(["python3", "-c", script], user="root", cwd="/").check().text


def written(box: Sandbox) -> int:
    return int(shell(box, "wc -l < /srv/log"))


def test_the_image_of_a_busy_sandbox_is_exactly_what_it_was_at_one_instant(source: Sandbox, client: Client) -> None:
    """FRZ-1 … 5: owners, modes, times, links, xattrs, ACLs, capabilities and the spec; no /tmp, no identity; and the
    sandbox never stopped."""
    before, tree, began = source.refresh(), python(source, _SHOW), written(source)
    names = set(shell(source, "cat /etc/machine-id; hostname").split())
    result = source.commit(_IMAGE, comment="for a test")
    after = source.refresh()
    assert (after.pid, after.boot_id, after.state) == (before.pid, before.boot_id, "running")
    assert python(source, _SHOW) == tree
    assert (result.image.source, result.image.comment) == ("commit", "for a test")
    assert result.frozen_ms > 0
    assert client.images.verify(_IMAGE).ok
    now = written(source)
    wait_until(lambda: written(source) > now)
    box = client.sandboxes.create("booted", image=_IMAGE)
    try:
        spec = box.refresh().spec
        assert (spec.env, spec.labels, spec.workdir) == ({"COLOUR": "blue"}, {"team": "a"}, "/srv")
        assert (spec.entrypoint, spec.memory_mib) == (["sh", "-c", "echo hello"], 512)
        assert python(box, _SHOW) == tree
        assert shell(box, "stat -c '%A %u %g' /tmp /var/tmp; ls -A /tmp /var/tmp; ls -d /run/junk 2>&1 | wc -l") == (
            "drwxrwxrwt 0 0\n" * 2 + "/tmp:\n\n/var/tmp:\n1\n"
        )
        assert not names & set(shell(box, "cat /etc/machine-id /etc/hostname; hostname").split())
        assert box.exec("echo $COLOUR; pwd").text == "blue\n/srv\n"
        root, data = (shell(box, f"cat {log}").splitlines() for log in ("/srv/log", "/home/user/log"))
        assert root == [str(number) for number in range(1, len(root) + 1)]  # whole lines, none missing
        assert data == root[: len(data)]
        assert len(root) - len(data) in (0, 1)  # both disks at the same instant
        assert began <= len(root) <= now
    finally:
        box.remove(force=True, purge=True)
    assert not remains(client)


def test_a_guest_that_hangs_is_not_committed_and_goes_on(source: Sandbox, client: Client) -> None:
    """FRZ-1, FRZ-4: the error names the sandbox, what came back and what may be the cause; the image of before is
    there as it was."""
    was = client.images.get(_IMAGE).digest if any(i.name == _IMAGE for i in client.images.list()) else None
    pid = source.refresh().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(
            errors.Unavailable, match="committed cannot be committed: its guest does not answer"
        ) as hung:
            source.commit(_IMAGE)
        assert "limpet logs" in (hung.value.hint or "")
    finally:
        os.kill(pid, signal.SIGCONT)
    now = written(source)
    wait_until(lambda: written(source) > now)
    assert source.refresh().state == "running"
    assert was is None or client.images.get(_IMAGE).digest == was
    assert not remains(client)
