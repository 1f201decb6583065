"""What the container engine of a sandbox costs: to have it, to ask it through the proxy, to give it a large image."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import socket
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import median, seconds
from bench.suite import Row
from limpet import Client
from limpet.client import Sandbox

_MIB = 1024
_COLD_MIB = 1028  # a size of which there is no template
_NOISE = 100 << 20  # bytes in the large image
_IN_GUEST = "/var/tmp/image.tar"
_LOAD = "/images/load?quiet=1"
_TAR = {"Content-Type": "application/x-tar"}
# The floor of a load: a client beside the engine.
_LOAD_IN_GUEST = f"curl -fsS --unix-socket /run/docker.sock -T {_IN_GUEST} -X POST -o /dev/null 'http://d{_LOAD}'"
_LIMIT = 120.0  # seconds that one answer may take


def rows(client: Client) -> Iterator[Row]:
    """All rows of the table, in its order."""
    client.images.build("docker")
    yield from cold(client)
    client.templates.build("docker", memory_mib=_MIB, network="none")
    yield from cloned(client)
    with client.sandboxes.create(image="docker", memory_mib=_MIB, network="none", ephemeral=True) as sandbox:
        sandbox.runtime.ensure()
        yield from pings(sandbox)
        yield from load(sandbox)


def cold(client: Client, runs: int = 3) -> Iterator[Row]:
    """ensure after a boot: nothing of the engine is in the guest's memory yet, no kernel module is loaded."""
    times = []
    client.config.set("template.auto", "off")
    sandbox = client.sandboxes.create(image="docker", memory_mib=_COLD_MIB, network="none")
    try:
        sandbox.runtime.stop()  # it would come back with the sandbox
        for _ in range(runs):
            sandbox.restart()
            times.append(_ensured(sandbox, "started"))
            sandbox.runtime.stop()
    finally:
        sandbox.remove(force=True, purge=True)
        client.config.unset("template.auto")
    yield Row("ensure, cold", round(statistics.median(times), 1), "s", 25)


def cloned(client: Client, runs: int = 5) -> Iterator[Row]:
    """In a sandbox from a template the engine runs already: ensure is a question."""
    ensured, whole = [], []
    for _ in range(runs):
        began = time.perf_counter()
        with client.sandboxes.create(image="docker", memory_mib=_MIB, network="none", ephemeral=True) as sandbox:
            ensured.append(_ensured(sandbox, "reused"))
            with _Connection(sandbox) as connection:
                _ask(connection, "GET", "/version")
            whole.append(time.perf_counter() - began)
    yield Row("ensure, sandbox from a template", round(statistics.median(ensured), 2), "s", 1)
    yield Row("  create → the engine has answered", round(statistics.median(whole), 2), "s")


def _ensured(sandbox: Sandbox, how: str) -> float:
    began = time.perf_counter()
    result = sandbox.runtime.ensure()
    took = time.perf_counter() - began
    assert result.how == how, f"{result.how}, not {how}"
    return took


def pings(sandbox: Sandbox) -> Iterator[Row]:
    """GET /_ping, as SDKs ask (one connection for many calls) and as the stock client does (a new one for each)."""
    with _Connection(sandbox) as connection:
        _ask(connection, "GET", "/_ping")
        kept = median(lambda: _ask(connection, "GET", "/_ping"), 100)
    yield Row("`GET /_ping` through the proxy, p50", round(kept * 1e3, 1), "ms", 15)

    def anew() -> None:
        with _Connection(sandbox) as connection:
            _ask(connection, "GET", "/_ping")

    yield Row("  each on a connection of its own", round(median(anew, 50) * 1e3, 1), "ms", 15)


def load(sandbox: Sandbox, runs: int = 3) -> Iterator[Row]:
    """What `docker load` sends, from here and from a client inside the guest, in turn: both see the same weather."""
    inside, through = [], []
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "image.tar"
        image.write_bytes(_image())
        sandbox.files.upload(image, _IN_GUEST)
        for _ in range(runs):
            inside.append(seconds(lambda: sandbox.exec(_LOAD_IN_GUEST, user="root").check()))
            _forget(sandbox)
            through.append(seconds(lambda: _load(sandbox, image)))
            _forget(sandbox)
    floor, value = _NOISE / statistics.median(inside) / 1e6, _NOISE / statistics.median(through) / 1e6
    yield Row("load of a 100 MB image by a client in the guest (floor)", round(floor, 1), "MB/s")
    yield Row("`docker load` of the same, from the host", round(value, 1), "MB/s", 15, "more")


def _load(sandbox: Sandbox, image: Path) -> None:
    with _Connection(sandbox) as connection, image.open("rb") as file:
        _ask(connection, "POST", _LOAD, file)


def _forget(sandbox: Sandbox) -> None:
    with _Connection(sandbox) as connection:
        _ask(connection, "DELETE", "/images/noise:latest")


class _Connection(http.client.HTTPConnection):
    """HTTP to a sandbox's engine."""

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__("docker", timeout=_LIMIT, blocksize=32 << 10)  # bytes of a body at once, as Go does
        self._path = sandbox.docker_host.removeprefix("unix://")

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(connection: http.client.HTTPConnection, method: str, path: str, body: io.BufferedReader | None = None) -> None:
    headers = {} if body is None else {**_TAR, "Content-Length": str(os.fstat(body.fileno()).st_size)}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    told = answer.read()
    assert answer.status == 200, f"{method} {path}: {answer.status} {told[:200]!r}"


def _image() -> bytes:
    """An image `noise` of one layer that cannot be compressed, as `docker save` writes one."""
    layer = _tar({"noise": os.urandom(_NOISE)})
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    })  # fmt: skip
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["noise:latest"], "Layers": ["layer.tar"]}])
    return _tar({"manifest.json": manifest.encode(), "config.json": config.encode(), "layer.tar": layer})


def _tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()
