"""Ports to listen on."""

import errno
import socket

from scripts.serving.errors import ServeError


def claim(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """Check that every port in `wanted` (option name -> port, 0 for a free one) can be bound; return the real numbers.

    All are held at once, so that two free ones never coincide, and released on return.
    Raises ServeError for a port that is taken.
    """
    held: dict[str, socket.socket] = {}
    try:
        for option, port in wanted.items():
            held[option] = _bind(host, port, option)
        return {option: listener.getsockname()[1] for option, listener in held.items()}
    finally:
        for listener in held.values():
            listener.close()


def _bind(host: str, port: int, option: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        raise ServeError(
            f"port {port} on {host} is taken: stop what uses it, or choose another with --{option} (0 picks a free one)"
        ) from error
    return listener
