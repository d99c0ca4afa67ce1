# SPDX-License-Identifier: Apache-2.0
"""An HTTP server of ours: the names under which it may be reached, its port, its thread."""

from __future__ import annotations

import ipaddress
import platform
import re
import threading
from typing import Any, Self

from lora_rlhf import extras
from lora_rlhf.errors import SetupError

LOOPBACK = "127.0.0.1"

_HOST = re.compile(r"(?P<name>\[[^\]]+\]|[^:]+)(?::(?P<port>\d+))?")
_TCP_NODELAY = (6, 1)  # IPPROTO_TCP and its option, the same on all systems


def is_address(name: str) -> bool:
    """Return True for an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches the host."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def knows_host(header: str, host: str, port: int, *, shared: bool) -> bool:
    """Return True if the Host of a request is a server of ours, under a name that is its own.

    A page of another site, whose name is made to point here, sends that name.

    Args:
        shared: Other machines may use it, so that they call it by its address or name.
    """
    parts = _HOST.fullmatch(header)
    if parts is None or (parts["port"] or "80") != str(port):  # clients leave out HTTP's own port
        return False
    name = parts["name"].strip("[]").lower()
    if name == host or is_loopback(name):
        return True
    mine = platform.node().lower()
    return shared and (is_address(name) or name in (mine, f"{mine}.local"))


def reached_at(host: str, port: int) -> str:
    """Return the address of a server's root, without a slash at its end."""
    host = platform.node() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class LocalServer:
    """An application on an open port; `run` serves in this thread, `start` in one of its own.

    Args:
        needs: Its user and extra, for the error if uvicorn is missing.
    """

    def __init__(self, host: str, port: int, needs: tuple[str, str]) -> None:
        self._uvicorn = extras.load("uvicorn", *needs)
        self._socket, self.host = self._bound(host, port), host
        self.port: int = self._socket.getsockname()[1]
        self._thread: threading.Thread | None = None
        self._server: Any = None

    def _bound(self, host: str, port: int) -> Any:
        """Take the port, so that it is known before the server answers."""
        config = self._uvicorn.Config(None, host=host, port=port, log_level="critical")
        try:
            listening = config.bind_socket()
        except SystemExit:  # uvicorn's way to say that the port is not free
            raise SetupError(
                f"port {port} of {host} cannot be used",
                expected="a free port",
                remedy="stop the other server, or give another --port",
            ) from None
        # asyncio does not set it for uvicorn's sockets: each answer would wait 40 ms for an ACK.
        listening.setsockopt(*_TCP_NODELAY, 1)
        listening.listen(1024)  # a client that comes now waits until the server answers
        return listening

    def _serves(self, application: Any, **options: Any) -> None:
        """Set the application, with options of uvicorn."""
        config = self._uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,  # it would show tokens
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            **options,
        )
        self._server = self._uvicorn.Server(config)

    @property
    def address(self) -> str:
        """The address of the root."""
        return f"{reached_at(self.host, self.port)}/"

    def run(self) -> None:
        """Serve until a signal."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.close()

    def close(self) -> None:
        """Close what the server has open, after it has ended."""

    def start(self) -> None:
        """Serve in a thread, and return when requests are answered."""
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)

    @property
    def running(self) -> bool:
        """True while the thread of `start` serves."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the thread."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
