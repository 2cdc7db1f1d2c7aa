import asyncio
import socket
import subprocess
import sys
import urllib.request

import pytest

URL = "http://192.0.2.1/"  # of the addresses that belong to no one


def test_no_test_reaches_a_network():
    for ask in (
        lambda: socket.create_connection(("example.com", 80), timeout=1),
        lambda: socket.socket().connect(("192.0.2.1", 80)),
        lambda: urllib.request.urlopen(URL, timeout=1),
        lambda: asyncio.run(asyncio.open_connection("192.0.2.1", 80)),
    ):
        with pytest.raises(RuntimeError, match="No test may reach a network"):
            ask()
    code = f"import urllib.request; urllib.request.urlopen('{URL}', timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "No test may reach a network, but this one asks for 192.0.2.1." in done.stderr


def test_this_machine_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("localhost", "127.0.0.1"):
            socket.create_connection((host, server.getsockname()[1])).close()
    socket.getaddrinfo(socket.gethostname(), None)
