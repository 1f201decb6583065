"""What all tests share. VM tests run against one real daemon in a home of its own, with the guest pieces that
`make test` built (`LIMPET_TEST_HOME`, default: `.make/home` of the checkout)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from limpet import Client
from limpet.client import Sandbox

ROOT = Path(__file__).parent.parent

# Whoever starts the tests in the background hands SIGINT down ignored; the commands under test must get it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The installed command: `python -m` would import from the directory that it is started in.
LIMPET = Path(sys.executable).with_name("limpet")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def pieces() -> Path:
    """A home in which `limpet setup` has run."""
    home = Path(os.environ.get("LIMPET_TEST_HOME") or ROOT / ".make" / "home")
    if not (home / "data" / "images" / "base").is_dir():
        pytest.fail(f"no guest pieces in {home}: run `make test`, or `LIMPET_HOME={home} limpet setup`")
    return home


def new_home(pieces: Path) -> Path:
    """A fresh home that shares the guest pieces: its own database, sandboxes, sockets and daemon."""
    home = Path(tempfile.mkdtemp(prefix="limpet-test-"))
    (home / "data").mkdir(mode=0o700)
    (home / "cache").symlink_to(pieces / "cache")
    (home / "data" / "images").symlink_to(pieces / "data" / "images")
    return home


def leave_home(home: Path) -> None:
    """End everything that runs in a home, then remove it."""
    with Client(home=home) as client:
        for sandbox in client.sandboxes.list():
            sandbox.remove(force=True, purge=True)
    run_cli(home, "daemon", "stop")
    shutil.rmtree(home, ignore_errors=True)


def run_cli(
    home: Path, *words: str, cwd: Path | None = None, input: str | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """The command line as a user meets it: a process, its output and its exit status."""
    return subprocess.run(
        [str(LIMPET), *words], env={**os.environ, "LIMPET_HOME": str(home)}, cwd=cwd,
        input=input, stdin=subprocess.DEVNULL if input is None else None, capture_output=True, text=True,
        errors="surrogateescape", timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def home(pieces: Path) -> Iterator[Path]:
    """The home that most VM tests share."""
    home = new_home(pieces)
    try:
        yield home
    finally:
        leave_home(home)


@pytest.fixture
def own_home(pieces: Path) -> Iterator[Path]:
    """A home for a test that hurts its daemon."""
    home = new_home(pieces)
    try:
        yield home
    finally:
        leave_home(home)


@pytest.fixture
def cli(home: Path) -> Cli:
    def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
        return run_cli(home, *words, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def client(home: Path) -> Iterator[Client]:
    with Client(home=home) as client:
        yield client


@pytest.fixture(scope="session")
def sandbox(client: Client) -> Sandbox:
    """One running sandbox for all tests that leave it as they found it."""
    return client.sandboxes.create("shared", memory_mib=512, labels={"for": "tests"})
