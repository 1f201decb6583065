"""Images that become machines: a root file system from anywhere, and the disks of a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet import Client, errors, images, process
from limpet.images import ImageFacts, artifacts, find_image, pieces, plan, upkeep
from limpet.models import Stage
from limpet.paths import Paths, discover

pytestmark = pytest.mark.vm


@pytest.fixture
def paths(home: Path) -> Iterator[Paths]:
    """The images of the shared home; those that a test makes are called `test-…` and go."""
    paths = discover(home)
    yield paths
    for name in ("test-busybox", "test-commit", "test-copy"):
        with contextlib.suppress(errors.NotFound):
            upkeep.remove(paths, name, lambda directory: ())
    upkeep.prune(paths, lambda directory: () if directory.parent.name.startswith("test-") else ("somebody",))


def busybox(paths: Paths, file: Path) -> Path:
    """A tar with a busybox and a link to it, and nothing else."""
    with tarfile.open(file, "w:gz") as tar:
        tar.add(pieces.load(plan.Plan.make(paths).pieces).busybox, "bin/busybox")
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)
    return file


def test_a_tar_with_nothing_but_busybox_boots_and_runs_commands(client: Client, paths: Paths, tmp_path: Path) -> None:
    """FRZ-5, GST-5: no /etc, no /dev, no account, no Python in the image."""
    file = busybox(paths, tmp_path / "busybox.tar.gz")
    asyncio.run(images.import_(paths, file, "test-busybox", progress=lambda stage: None))
    sandbox = client.sandboxes.create("test-busybox", image="test-busybox", memory_mib=256)
    try:
        assert sandbox.exec(["busybox", "id", "-u"]).text == "0\n"
        assert sandbox.exec(["sh", "-c", "cd; busybox pwd; exit 7"]).exit_code == 7
        mounts = sandbox.exec(["busybox", "cat", "/proc/mounts"]).text
        assert " /home btrfs " in mounts
        assert " /workspace btrfs " in mounts
        sandbox.files.write("/workspace/file", b"content")
        assert (
            sandbox.exec(["sh", "-c", "busybox cat /workspace/file >/tmp/copy; busybox wc -c </tmp/copy"]).text == "7\n"
        )
    finally:
        sandbox.remove(force=True, purge=True)


PREPARE = r"""
set -e
mkdir -p /srv/p/tmp /srv/p/run /tmp/junk
echo kept >/srv/p/tmp/file
echo x >/tmp/junk/file
echo x >/var/tmp/file
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
mkdir -p /etc/ssh /etc/docker
echo secret | tee /etc/ssh/ssh_host_rsa_key >/etc/docker/key.json
head -c 60000000 /dev/urandom >/home/user/gone
echo mine >/home/user/mine
echo work >/workspace/work
chown 1000:33 /srv/p/tmp/file
chmod 4751 /srv/p/tmp/file
python3 -c "
import os
os.setxattr('/srv/p/tmp/file', 'user.note', b'hello')
os.setxattr('/srv/p/tmp/file', 'security.capability', bytes.fromhex('0100000200040000000000000000000000000000'))
os.setxattr('/srv/p/tmp/file', 'system.posix_acl_access', bytes.fromhex(
    '02000000' '01000600ffffffff' '02000700e8030000' '04000400ffffffff' '10000700ffffffff' '20000400ffffffff'))
"
sync
python3 -c "
import fcntl, os, struct
def call(directory, request, head, name):
    fd = os.open(directory, os.O_RDONLY)
    fcntl.ioctl(fd, request, bytearray((head + name).ljust(4096, bytes(1))))
top = '/run/limpet/data'
home = os.open('/home', os.O_RDONLY)
call(top + '/.snapshots', 0x50009417, struct.pack('=qQQ32x', home, 0, 2), b'home.test')  # read-only, with all of gone
call(top, 0x5000940E, bytes(8), b'@payload-0a1b2c3d')
call(top + '/@payload-0a1b2c3d', 0x5000940E, bytes(8), b'nested')
open(top + '/@payload-0a1b2c3d/nested/file', 'w').write('x')
call(top, 0x5000940E, bytes(8), b'@docker')
open(top + '/@docker/layers', 'w').write('kept')
open(top + '/@docker/engine-id', 'w').write('secret')
"
rm /home/user/gone
sync
"""

STATE = r"""
stat -c '%n %A %u %g %s %Y' /srv/p /srv/p/tmp /srv/p/tmp/file /srv/p/run /home/user/mine /workspace/work /usr/bin/passwd
python3 -c "
import os
print([(name, os.getxattr('/srv/p/tmp/file', name)) for name in sorted(os.listxattr('/srv/p/tmp/file'))])
"
cat /srv/p/tmp/file /home/user/mine /workspace/work
"""


def test_committed_disks_keep_everything_but_what_belongs_to_one_machine(
    client: Client, paths: Paths, tmp_path: Path
) -> None:
    """FRZ-2, FRZ-3, FRZ-4: owners, modes, times, xattrs, ACLs and capabilities; nested tmp directories; and the way
    through a file to another name."""
    sandbox = client.sandboxes.create("test-commit", memory_mib=512)
    try:
        prepared = sandbox.exec(["sh", "-c", PREPARE], user="root", cwd="/")
        assert prepared.exit_code == 0, prepared.stderr
        before = sandbox.exec(["sh", "-c", STATE], user="root", cwd="/").text
        sandbox.stop()
        facts = ImageFacts(user="user", home="/home/user", spec={"env": {"A": "1"}}, source="commit")
        seen: list[Stage] = []
        root, data = disks(paths, sandbox.refresh().id)
        image = asyncio.run(
            images.build_from_disks(
                paths, name="test-commit", tag="latest", root=root, data=data, facts=facts, progress=seen.append
            )
        )
    finally:
        sandbox.remove(force=True, purge=True)
    assert [stage.name for stage in seen if stage.state == "done"] == ["tidy", "flatten", "publish"]
    assert image.data is not None
    assert image.data.stat().st_blocks * 512 < 40 << 20  # what was deleted is not in it
    file = tmp_path / "image.limpet"
    asyncio.run(images.export(image, file, progress=seen.append))
    asyncio.run(images.import_(paths, file, "test-copy", progress=seen.append))
    assert find_image(paths, "test-copy").info.digest == image.info.digest
    copy = client.sandboxes.create("test-copy", image="test-copy", memory_mib=512)
    try:
        assert copy.exec(["sh", "-c", STATE], user="root", cwd="/").text == before
        assert copy.exec(["stat", "-c", "%A", "/tmp", "/var/tmp"], cwd="/").text == "drwxrwxrwt\n" * 2
        left = copy.exec(
            ["sh", "-c", "ls -A /tmp /var/tmp; ls /etc/ssh; cat /etc/machine-id"], user="root", cwd="/"
        ).text
        assert not {"junk", "file", "ssh_host_rsa_key", "0123456789abcdef0123456789abcdef"} & set(left.split())
        assert not copy.files.exists("/etc/docker/key.json")
        volumes = copy.exec(
            "cd /run/limpet/data && echo @* && echo @docker/* && ls .snapshots", user="root", cwd="/"
        ).text
        assert volumes.startswith("@docker @home @workspace\n@docker/layers\n")
        assert "test" not in volumes
    finally:
        copy.remove(force=True, purge=True)


def test_disk_that_cannot_be_mounted_leaves_the_old_image(paths: Paths, tmp_path: Path) -> None:
    """FRZ-4: the tidy VM says what it found, and nothing is published."""
    broken = tmp_path / "broken.qcow2"
    process.run_sync(["qemu-img", "create", "-q", "-f", "qcow2", str(broken), "1G"])
    with pytest.raises(errors.Unavailable, match="cannot mount the root disk"):
        asyncio.run(
            images.build_from_disks(
                paths, name="test-commit", tag="latest", root=broken, data=artifacts(paths).blank_data,
                facts=ImageFacts(), progress=lambda stage: None,
            )
        )  # fmt: skip
    assert not paths.image("test-commit").exists()


def disks(paths: Paths, sandbox_id: str) -> tuple[Path, Path]:
    """The layers of a stopped sandbox, as the database has them."""
    with contextlib.closing(sqlite3.connect(f"file:{paths.database}?mode=ro", uri=True)) as database:
        row = database.execute("SELECT disks FROM sandboxes WHERE id = ?", (sandbox_id,)).fetchone()
    names = json.loads(row[0])
    return paths.layers / f"{names['root']}.qcow2", paths.layers / f"{names['data']}.qcow2"
