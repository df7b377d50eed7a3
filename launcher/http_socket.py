"""The HTTP port, taken before anything is loaded: a second server fails at once."""

import errno
import ipaddress
import socket

from tessera.launcher.errors import LaunchError

BACKLOG = 2048  # connections the system holds until the router accepts them


def open_http_socket(hostname: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        LaunchError: the port is taken, not allowed, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of an earlier server that are still winding down must not hinder this one.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((hostname, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise LaunchError(_explain(error, hostname, port)) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return f"http://localhost:{port}"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


def _explain(error: OSError, hostname: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {hostname} is taken by another process; set PORT to a free one."
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has; set PORT to 1024 or above."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"HOSTNAME={hostname} is not an address of this machine."
    return f"cannot listen on {hostname}:{port}: {error.strerror or error}."
