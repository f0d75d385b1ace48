"""POYO as a peer on head direction: its environment, and its predictions.

In: the file of a recording, a task, a fold. Out: a prediction as any other; what it took.
"""

import sys
import tempfile
from pathlib import Path

from bench.science import protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Cost, run
from peers.environment import Peer, interpreter

HERE = Path(__file__).resolve().parent
NUM_STEPS = 1000
POYO = Peer(
    name="POYO, torch-brain 0.2.1",
    requirements=("torch-brain==0.2.1", "torch==2.13.0"),
    script="poyo_train.py",
    unfair="made for many sessions and hours on a GPU: here it gets one session and "
    f"{NUM_STEPS:,} steps, a few minutes of one core, and its size and learning rate were set by hand",
)
TASKS = ("hd_acausal", "hd_causal")


def predict(
    recording: Path, task: str, fold: int | None = None, num_steps: int = NUM_STEPS
) -> tuple[protocol.Prediction, Cost]:
    """The test block by POYO. Raises CalledProcessError where pip cannot install it, SystemExit where it fails."""
    split = "main" if fold is None else str(fold)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{task}.npz"
        cost = run(HERE / POYO.script, recording, task, split, num_steps, out, python=interpreter(POYO))
        return protocol.load(out), cost
