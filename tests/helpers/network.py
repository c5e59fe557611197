"""A test that reaches for the network fails at once and says where it was going. Standard library only."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


LOCAL_NAMES = ("localhost", "localhost.localdomain", "")


# Not an OSError: the libraries take those for an unreachable server and carry on without one.
class NetworkAccessError(RuntimeError):
    """A connection to another machine was attempted in a test."""


def is_loopback(host: Any) -> bool:
    """Whether `host` (name or address, `str`, `bytes` or `None`) is this machine."""
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name.lower() in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(host: Any) -> None:
    if not is_loopback(host):
        raise NetworkAccessError(
            f"host={host!r} is another machine and tests run without a network; use a local folder or `loopback_hub`"
        )


@contextmanager
def network_blocked() -> Iterator[None]:
    """Lets only connections to this machine (and unix sockets) through while the context lasts."""
    names = ("connect", "connect_ex", "sendto")
    resolve = socket.getaddrinfo

    def guarded(name: str) -> Any:
        original = getattr(socket.socket, name)

        def method(self: socket.socket, *args: Any) -> Any:
            # The address is the last argument of each of the three calls, and a pair only for the internet families.
            if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(args[-1], tuple):
                _refuse(args[-1][0])
            return original(self, *args)

        return method

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(host)
        return resolve(host, *args, **kwargs)

    for name in names:
        setattr(socket.socket, name, guarded(name))
    socket.getaddrinfo = guarded_resolve
    try:
        yield
    finally:
        for name in names:
            # These three are inherited from the C class; deleting ours uncovers them again.
            delattr(socket.socket, name)
        socket.getaddrinfo = resolve
