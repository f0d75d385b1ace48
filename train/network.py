"""The way from this host to the others: which interface, which address they see, a port that is free.

In: another host's name or address. Out: plain data; nothing is sent, nothing is changed.
"""

import fcntl
import socket
import struct
from dataclasses import dataclass

SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Way:
    """The interface that leads to another host ("" where none is found), and this host's address on it."""

    interface: str
    address: str


def way_to(peer: str) -> Way:
    """How this host reaches another; without one, the loopback."""
    addresses = {name: address for name in interfaces() if (address := _ipv4(name))}
    address = _address_towards(peer, addresses) if peer else "127.0.0.1"
    return Way(next((name for name in addresses if addresses[name] == address), ""), address)


def interfaces() -> list[str]:
    """The names of this host's interfaces."""
    return [name for _, name in socket.if_nameindex()]


def free_port(address: str = "127.0.0.1") -> str:
    """A port that nobody listens on at an address of this machine; "" is all of them."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return str(probe.getsockname()[1])


def _address_towards(peer: str, addresses: dict[str, str]) -> str:
    """This host's address on the way to another; on the first interface that is no loopback, if its name is unknown."""
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror:  # ssh or SLURM alone may know it
        return sorted(addresses.values(), key=lambda address: address.startswith("127."))[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: the kernel chooses the way
        return str(probe.getsockname()[0])


def _ipv4(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:  # it has no address
            return ""
    return socket.inet_ntoa(packed[20:24])
