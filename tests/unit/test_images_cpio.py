"""The initramfs archive, read back by cpio itself: what the kernel unpacks at a boot (VM-6)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from limpet import process
from limpet.images.cpio import Archive


def sample() -> bytes:
    archive = Archive()
    archive.directory("bin")
    archive.directory("dev")
    archive.file("bin/odd", b"abc", 0o755)  # lengths that need every amount of padding
    archive.file("bin/empty", b"")
    archive.file("bin/four", b"1234", 0o600)
    archive.symlink("bin/sh", "odd")
    archive.character_device("dev/console", 5, 1)
    return archive.to_bytes()


def cpio(data: bytes, *options: str, cwd: Path) -> str:
    tool = process.find("cpio")
    if tool is None:
        pytest.skip("cpio is not installed")
    done = subprocess.run([tool, *options], input=data, cwd=cwd, capture_output=True, check=True)
    return done.stdout.decode()


def test_archive_lists_every_entry_with_its_type_and_mode(tmp_path: Path) -> None:
    listing = cpio(sample(), "-tvn", cwd=tmp_path).splitlines()
    seen = {line.split()[-3 if "->" in line else -1]: line.split()[0] for line in listing}
    assert seen == {
        "bin": "drwxr-xr-x", "dev": "drwxr-xr-x", "bin/odd": "-rwxr-xr-x", "bin/empty": "-rw-r--r--",
        "bin/four": "-rw-------", "bin/sh": "lrwxrwxrwx", "dev/console": "crw-------",
    }  # fmt: skip


def test_archive_unpacks_to_the_same_bytes(tmp_path: Path) -> None:
    cpio(sample(), "-id", "--quiet", "bin/*", cwd=tmp_path)
    assert (tmp_path / "bin/odd").read_bytes() == b"abc"
    assert (tmp_path / "bin/empty").read_bytes() == b""
    assert (tmp_path / "bin/four").read_bytes() == b"1234"
    assert os.readlink(tmp_path / "bin/sh") == "odd"


def test_same_entries_give_the_same_archive() -> None:
    assert sample() == sample()
