"""The global sources of chance of one rank: Python's, NumPy's and torch's.

In: a seed, or a checkpoint. Out: generators at a known state. No draw of ours depends on them: samples and dropout have
seeds of their own, from (seed, position); what a library draws by itself goes on where it was.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed every global source of chance."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries may use it
    torch.manual_seed(seed)


def state() -> dict[str, Tensor]:
    """The state of every source, as whole numbers."""
    _, python, _ = random.getstate()
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  the global source is what is saved
    found = {
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.tensor([*numpy["key"].tolist(), numpy["pos"]], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    return {**found, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else found


def restore(folder: Path) -> None:
    """Go on where a checkpoint was; a rank that is new takes the state of another."""
    saved = sorted(folder.glob("chance-*.safetensors"))
    if not saved:
        return
    found = load_file(saved[dist.get_rank() % len(saved)])
    *key, place = found["numpy"].tolist()
    random.setstate((3, tuple(found["python"].tolist()), None))
    np.random.set_state(("MT19937", np.array(key, np.uint32), place, 0, 0.0))  # noqa: NPY002  likewise
    torch.set_rng_state(found["torch"])
    if torch.cuda.is_available() and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])
