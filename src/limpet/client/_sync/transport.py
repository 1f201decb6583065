# Made by tools/unasync.py from ../_async/transport.py: edit that one.
"""Requests to the daemon: HTTP and web sockets over its Unix socket, started when nobody listens."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limpet import paths as limpet_paths
from limpet.client import _daemon, _wire
from limpet.errors import BadRequest

if TYPE_CHECKING:
    import httpx

    from limpet.client import _sio

Body = bytes | Iterable[bytes]


class Transport:
    """One daemon. `home` stands for LIMPET_HOME; `autostart`: start the daemon when nobody listens."""

    def __init__(self, home: str | os.PathLike[str] | None, *, timeout: float, autostart: bool) -> None:
        chosen = home or os.environ.get("LIMPET_HOME")
        self.home = str(Path(chosen).absolute()) if chosen else None
        self.paths = limpet_paths.discover(self.home)
        self.timeout, self.autostart = timeout, autostart
        self._http: httpx.Client | None = None
        self._met = False  # whether the daemon was seen to listen

    def http(self) -> httpx.Client:
        """The HTTP client, made when first needed: its import takes longer than a request."""
        if self._http is None:
            import httpx

            self._http = httpx.Client(
                transport=httpx.HTTPTransport(uds=str(self.paths.daemon_socket)), base_url="http://limpet",
                timeout=httpx.Timeout(self.timeout, connect=_wire.CONNECT_TIMEOUT), trust_env=False,
            )  # fmt: skip
        return self._http

    def start_daemon(self) -> int | None:
        """Start the daemon unless it listens; its pid when it was started now."""
        from limpet.client import _sio

        return _sio.in_thread(_daemon.start, self.paths, self.home)

    @contextlib.contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        params: _wire.Params | None = None,
        content: Body | None = None,
        headers: Mapping[str, str] | None = None,
        silence: float | None = None,
    ) -> Iterator[httpx.Response]:
        """An answer whose body was not read yet; `silence` bounds the wait for each piece in seconds.
        Raises the error that the daemon answered, Unavailable, DeadlineExceeded."""
        import httpx

        sent = {**_wire.headers(), **(headers or {})}
        op_id, silence = sent["Limpet-Op-Id"], silence or self.timeout
        timeout = httpx.Timeout(silence, connect=_wire.CONNECT_TIMEOUT)
        try:
            response = self._open(method, _wire.target(path, params), content, sent, timeout)
            try:
                if response.status_code >= 400:
                    raise _wire.failure(response.status_code, response.read(), response.headers, op_id)
                yield response
            finally:
                response.close()
        except httpx.TimeoutException:
            raise _wire.too_slow(silence, op_id) from None
        except httpx.LocalProtocolError as error:
            raise BadRequest(f"what was sent changed meanwhile: {error}", op_id=op_id) from None
        except httpx.TransportError as error:
            raise _wire.unreachable(error, op_id, self.paths.daemon_socket) from None

    def _open(
        self, method: str, target: str, content: Body | None, headers: dict[str, str], timeout: httpx.Timeout
    ) -> httpx.Response:
        import httpx

        if not self._met and not _daemon.listening(self.paths.daemon_socket):
            if not self.autostart:
                raise httpx.ConnectError("nobody listens")
            self.start_daemon()
        self._met = True
        http = self.http()
        request = http.build_request(method, target, content=content, headers=headers, timeout=timeout)
        try:
            return http.send(request, stream=True)
        except httpx.ConnectError:  # it ended since: nothing of the body was taken yet
            if not self.autostart:
                raise
        self.start_daemon()
        return http.send(request, stream=True)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: _wire.Params | None = None,
        body: Mapping[str, Any] | None = None,
        content: Body | None = None,
        headers: Mapping[str, str] | None = None,
        silence: float | None = None,
    ) -> Any:
        """The JSON that the daemon answers (None for an empty answer). Raises as `stream`."""
        if body is not None:
            content = _wire.dump(body)
            headers = {"Content-Type": "application/json", **(headers or {})}
        with self.stream(
            method, path, params=params, content=content, headers=headers, silence=silence
        ) as response:
            data = response.read()
        return json.loads(data) if data else None

    def lines(
        self, path: str, *, params: _wire.Params | None = None, silence: float | None = None
    ) -> Generator[dict[str, Any], None]:
        """The JSON objects of an NDJSON answer. Raises as `stream`."""
        with self.stream("GET", path, params=params, silence=silence) as response:
            for line in response.iter_lines():
                if line.strip():
                    yield json.loads(line)

    def websocket(self, path: str, params: _wire.Params | None = None) -> _sio.WebSocket:
        """An open web socket. Raises the error that the daemon answered, Unavailable."""
        from limpet.client import _sio

        headers, target = _wire.headers(), _wire.target(path, params)
        op_id, socket = headers["Limpet-Op-Id"], self.paths.daemon_socket
        try:
            try:
                return _sio.WebSocket.connect(socket, target, headers)
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.autostart:
                    raise
            self.start_daemon()
            return _sio.WebSocket.connect(socket, target, headers)
        except _sio.Refused as refused:
            raise _wire.failure(refused.status, refused.body, refused.headers, op_id) from None
        except (OSError, EOFError) as error:
            raise _wire.unreachable(error, op_id, socket) from None

    def close(self) -> None:
        """Close the connections; the transport may be used again."""
        if self._http is not None:
            self._http.close()
            self._http = None
