"""Ports for the servers that tests start."""

import itertools
import os
import socket

# Below 32768, where the system gives no port to a connection between the choice here and the server's start; every
# process of the suite has a thousand of its own, taken in turn; another suite on the machine begins elsewhere.
_FIRST = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_CANDIDATES = (_FIRST + number % 1_000 for number in itertools.count(os.getpid()))


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens to, and that none of the last thousand calls returned."""
    for port in itertools.islice(_CANDIDATES, 1_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {_FIRST} to {_FIRST + 999}")
