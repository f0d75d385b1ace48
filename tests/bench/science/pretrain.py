"""A model before it sees the recording that it is scored on: trained on a synthetic brain and on other recordings.

In: the folder of real recordings, a folder to work in. Out: a hub folder, with which fine-tuning begins; it takes the
same steps as training from seeded weights does (train/pretrained.py).
"""

from pathlib import Path

from bench.science import synthetic
from bench.science.brainloom import HERE, call

RUN = HERE / "pretraining.yaml"
OTHERS = (  # all of the folder that hold something to learn and are not asked about heading
    "foraging_697929.nwb",
    "foraging_717121.nwb.zarr",
    "miniscope_A0634.nwb",
    "motor_cortex_anm00239123.nwb",
    "two_photon_15_rois.nwb",
    "two_photon_suite2p.nwb",
)
ASKED = ("head_direction_A2929",)  # recordings on which fine-tuning is scored


def pretrained(recordings: Path, out: Path) -> Path:
    """Ingest, train, export; a hub folder that is there is not made again."""
    hub, store, hosts = (out / "pretraining" / name for name in ("hub", "store", "hostfile"))
    if (hub / "config.json").exists():
        return hub
    brain = synthetic.make(out / "synthetic" / "long", synthetic.LONG_S, with_others=False)
    others = [recordings / name for name in OTHERS]
    call("prep", "ingest", brain.seen / "nwb", *others, "--out", store, "--dataset", "pretraining", "--workers", "1")
    call("train", "hostfile", "--nodes", "localhost", "--slots", "1", "--out", hosts)
    call("train", "train", "--config", RUN, "--store", store, "--out", hub.parent / "run", "--hostfile", hosts)
    call("train", "export", hub.parent / "run", "--hub", hub)
    return hub
