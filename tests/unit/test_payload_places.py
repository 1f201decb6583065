"""Which host and guest directories can be payloads, and what is said of those that cannot."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from limpet.errors import BadRequest, FailedPrecondition, LimpetError
from limpet.services.payloads import places
from tests.unit.payload_kit import paths_in


def refused(text: str, home: Path) -> LimpetError:
    with pytest.raises(LimpetError) as error:
        places.check_host(text, paths_in(home))
    assert error.value.hint
    return error.value


def test_what_cannot_be_a_payload_is_refused_with_a_hint(tmp_path: Path) -> None:
    """PAY-9, bad input."""
    home = tmp_path / "home"
    (tmp_path / "file").write_text("")
    assert "does not exist" in refused(str(tmp_path / "missing"), home).message
    assert "not a directory" in refused(str(tmp_path / "file"), home).message
    assert "not an absolute path" in refused("relative", home).message
    assert "everything you have" in refused("/", home).message
    assert "everything you have" in refused(str(Path("~").expanduser()), home).message
    for inside in (home / "data", home / "data" / "vaults", home, tmp_path):
        assert "where limpet keeps its own files" in refused(str(inside), home).message
    assert "mounted inside" in refused("/dev", home).message or os.path.ismount("/dev")


def test_a_symlink_means_the_directory_that_it_leads_to(tmp_path: Path) -> None:
    """PAY-3."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert places.check_host(str(tmp_path / "link"), paths_in(tmp_path / "home")) == tmp_path / "real"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a directory of another user")
def test_another_users_directory_is_refused() -> None:
    """Bad input: not writable."""
    with tempfile.TemporaryDirectory(dir="/tmp") as theirs:
        Path(theirs).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(FailedPrecondition, match="belongs to another user"):
                places._check_rights(Path(theirs))
        finally:
            os.seteuid(0)


def test_passing_file_systems_are_warned_of(tmp_path: Path) -> None:
    """Bad input: tmpfs and NFS give no promise."""
    assert places.warning(tmp_path) is None
    shm = Path("/dev/shm")
    assert "a reboot of the host loses it" in (places.warning(shm) or "")
    table = places.parse_mounts(
        b"1 0 254:0 / / rw - ext4 /dev/vda rw\n2 1 0:5 / /mnt/a\\040b rw shared:1 - nfs4 server:/x rw\n"
    )
    assert places.mount_of(Path("/mnt/a b/c"), table).kind == "nfs4"
    assert places.mount_of(Path("/mnt/a"), table).kind == "ext4"


def test_aliases_follow_bind_mounts_in_both_directions() -> None:
    """PAY-3."""
    table = places.parse_mounts(
        b"1 0 254:0 / / rw - ext4 /dev/vda rw\n"
        b"2 1 254:0 /data/p /mnt/p rw - ext4 /dev/vda rw\n"
        b"3 1 254:0 /data/p/sub /mnt/s rw - ext4 /dev/vda rw\n"
    )
    everywhere = [Path("/data/p/sub/x"), Path("/mnt/p/sub/x"), Path("/mnt/s/x")]
    for name in everywhere:
        assert places.aliases(name, table) == everywhere
    assert places.aliases(Path("/data/p"), table) == [Path("/data/p"), Path("/mnt/p")]


@pytest.mark.parametrize("path", ["data", "/", "/etc/x", "/usr", "/proc/1", "/home", "/workspace", "/a/../etc", "/tmp"])
def test_guest_directories_that_belong_to_the_system_are_refused(path: str) -> None:
    with pytest.raises(BadRequest):
        places.check_guest(path)


def test_guest_directories_are_normalised() -> None:
    assert places.check_guest("/workspace//data/./x/") == "/workspace/data/x"
    assert places.guest_overlap("/a/b", "/a") and not places.guest_overlap("/a/b", "/a/bc")
