"""Python runs this at its start where the folder is on PYTHONPATH: from then on it reaches no other machine."""

import ipaddress
import socket
import sys

OWN_NAME = socket.gethostname()


def is_here(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if not host or host in ("localhost", OWN_NAME) or host.startswith(f"{OWN_NAME}."):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # Processes of one run find each other by the machine's name, and so by the address it has to others.
    return address.is_loopback or address.is_unspecified or host in socket.gethostbyname_ex(OWN_NAME)[2]


def refuse(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # text is a socket in a file
        host = arguments[1][0]
    else:
        return
    if not is_here(host):
        raise RuntimeError(f"No test may reach a network, but this one asks for {host}.")


sys.addaudithook(refuse)
