"""A link between two hosts of one machine with a rate and a delay, as `tc netem` makes it, for kernels without it.

In: two hosts (hosts_on_one_machine.py). Out: an interface `slow0` on each, whose packets leave at a rate and arrive
after a delay, each direction by itself. A process of its own carries them from one TUN device to the other.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

from hosts_on_one_machine import Hosts

NAME = "slow0"
MTU = 60_000  # large, so that few packets cost the CPU little
LONGEST = 8 * 2**20  # bytes that wait on the link; what is more is lost, and sent again
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000


@contextlib.contextmanager
def slow_link(made: Hosts, mbit_s: float, delay_ms: float) -> Iterator[None]:
    """A link between the first two hosts, as long as the block; the way to choose it is GLOO_SOCKET_IFNAME=slow0."""
    spaces = [made.space(name) for name in made.names[:2]]
    command = [sys.executable, __file__, str(mbit_s), str(delay_ms), *spaces]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n", "no TUN device"
        yield
    finally:
        process.kill()
        process.wait()


def open_end(space: str, number: int) -> int:
    """A TUN device in a network namespace, with an address; the device lives as long as what is returned is open."""
    with open(f"/run/netns/{space}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", NAME.encode(), IFF_TUN | IFF_NO_PI))
    for words in (f"addr add 10.99.0.{number}/24 dev {NAME}", f"link set {NAME} mtu {MTU} up"):
        subprocess.run(["ip", *words.split()], check=True)
    return end


class Direction:
    """Packets on their way from one end to the other."""

    def __init__(self, source: int, sink: int, bytes_s: float, delay_s: float) -> None:
        self.source, self._sink, self._bytes_s, self._delay_s = source, sink, bytes_s, delay_s
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._size, self._free_at = 0, 0.0

    def take(self) -> None:
        """Let what has been sent begin its way: behind what was sent before."""
        with contextlib.suppress(BlockingIOError):  # nothing more has come
            while packet := os.read(self.source, MTU + 100):
                if self._size + len(packet) > LONGEST:
                    continue
                self._size += len(packet)
                self._free_at = max(self._free_at, time.monotonic()) + len(packet) / self._bytes_s
                self._under_way.append((self._free_at + self._delay_s, packet))

    def deliver(self) -> float:
        """Hand over what has arrived; seconds until the next packet does."""
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            packet = self._under_way.popleft()[1]
            self._size -= len(packet)
            with contextlib.suppress(OSError):  # an end that is down
                os.write(self._sink, packet)
        return self._under_way[0][0] - time.monotonic() if self._under_way else 60.0


def main() -> None:
    """Carry packets until killed."""
    bytes_s, delay_s = float(sys.argv[1]) * 1e6 / 8, float(sys.argv[2]) / 1e3
    first, second = (open_end(space, number) for number, space in enumerate(sys.argv[3:5], 1))
    directions = [Direction(first, second, bytes_s, delay_s), Direction(second, first, bytes_s, delay_s)]
    print("ready", flush=True)
    while True:
        wait_s = max(0.0, min(direction.deliver() for direction in directions))
        select.select([first, second], [], [], wait_s)
        for direction in directions:
            direction.take()


if __name__ == "__main__":
    main()
