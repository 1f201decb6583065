"""A small file system for tests that fill one up. It takes root; without, such tests are skipped and say so."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BALLAST = "ballast"


@contextlib.contextmanager
def mounted(directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size on a directory, for the length of the block."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "limpet-test", str(directory)]
    if (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)


def fill(directory: Path, left: int) -> Path:
    """Leave so many bytes free; what takes the rest, to be deleted."""
    ballast = directory / BALLAST
    with ballast.open("wb") as file:
        if (size := shutil.disk_usage(directory).free - left) > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    return ballast
