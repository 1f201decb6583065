"""What the contract tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.local_guest import LocalGuest
from tests.contract.local_server import Running, running


@pytest.fixture(scope="module")
def guest() -> Iterator[LocalGuest]:
    """A guest without a machine, one per module."""
    root = Path(tempfile.mkdtemp(prefix="lg", dir="/tmp"))  # short: socket paths are
    found = LocalGuest(root)
    try:
        yield found
    finally:
        found.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A daemon's API without machines behind it, one per module."""
    with running() as found:
        yield found
