"""The peers: what each is run with, in an environment of its own, and what is unfair about it.

In: nothing. Out: PEERS; the interpreter of a peer's environment, made by pip when it is first asked for.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from make_nwb import cache

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One peer: a script of this folder and what it needs."""

    name: str
    requirements: tuple[str, ...]
    script: str
    args: tuple[str, ...] = ()  # after the recording and the folder
    unfair: str = ""

    @property
    def environment(self) -> Path:
        """Its folder: peers with the same requirements share one."""
        return cache() / f"venv-{'-'.join(self.requirements).replace('==', '')}"


ZARR = ("zarr==3.1.6", "zarrs==0.2.3", "h5py==3.16.0", "google-crc32c==1.9.0")
TORCH_BRAIN = Peer(
    name="torch-brain 0.2.1, HDF5",
    requirements=("torch-brain==0.2.1",),
    script="torch_brain_hdf5.py",
    unfair="keeps spike times (float64, unit index) instead of bins; no audit, digests, statistics or bound on "
    "memory; spike times in bulk, which its own helper does not do (unit by unit, Python lists)",
)
PEERS = (
    TORCH_BRAIN,
    Peer(
        name="pynapple 0.11.4, reading alone",
        requirements=("pynapple==0.11.4",),
        script="pynapple_read.py",
        unfair="writes nothing",
    ),
    Peer(
        name="limit, written by zarr-python 3.1.6",
        requirements=ZARR,
        script="zarr_writer.py",
        args=("zarr",),
        unfair="the limit's own reading and binning; no digests",
    ),
    Peer(
        name="limit, written by zarr-python with zarrs 0.2.3",
        requirements=ZARR,
        script="zarr_writer.py",
        args=("zarrs",),
        unfair="the limit's own reading and binning; no digests; zarrs uses threads of its own",
    ),
)

READING = (  # of windows: the script makes what the peer reads, where that is not the store itself
    Peer(
        name="tensorstore 0.1.85",
        requirements=("tensorstore==0.1.85", "numpy"),
        script="",
        args=("tensorstore",),
        unfair="reads our store; no digests but those of the index; threads of its own, whose CPU counts",
    ),
    Peer(name="zarr-python 3.1.6", requirements=ZARR, script="", args=("zarr",), unfair="reads our store; no digests"),
    Peer(
        name="zarr-python with zarrs 0.2.3",
        requirements=ZARR,
        script="",
        args=("zarrs",),
        unfair="reads our store; no digests; threads of its own, whose CPU counts",
    ),
    Peer(
        name="torch-brain 0.2.1, HDF5",
        requirements=TORCH_BRAIN.requirements,
        script=TORCH_BRAIN.script,
        args=("torch-brain",),
        unfair="reads its own HDF5: spike times, not bins; as many samples and spikes, not compared value by value",
    ),
)


def interpreter(peer: Peer) -> Path:
    """Python of the peer's environment. Raises CalledProcessError where pip cannot install it."""
    folder = peer.environment
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, capture_output=True, text=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.requirements]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (folder / "installed").touch()
    return python
