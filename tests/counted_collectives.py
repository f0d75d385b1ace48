"""A rank that counts what it sends: `python tests/counted_collectives.py RUN_DIR`, started by the launcher.

In: a run folder. Out: the run itself, and `collectives.jsonl` there: a line per step, each call with its whole payload.
"""

import argparse
import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

CALLS: list[tuple[str, int]] = []
# The argument that holds the whole payload: what is gathered, scattered, reduced; what a rank gives to all others.
WHOLE = {
    "all_reduce": "tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    "all_to_all_single": "input",
    "broadcast": "tensor",
    "reduce": "tensor",
    "barrier": "",
}


def count(name: str) -> None:
    """Put a function that notes its calls in the place of a collective."""
    collective = getattr(dist, name)
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments.get(WHOLE[name])
        CALLS.append((name, given.nbytes if isinstance(given, torch.Tensor) else 0))
        return collective(*args, **kwargs)

    setattr(dist, name, counted)
    setattr(distributed_c10d, name, counted)


def main(run_dir: Path) -> int:
    """Train as `python -m train worker` does."""
    for name in WHOLE:
        count(name)
    from train import loop  # only now: DeepSpeed keeps the functions that it finds

    take_step = loop.take_step

    def noted(*args: Any) -> Any:
        CALLS.clear()
        result = take_step(*args)
        if os.environ["RANK"] == "0":
            with open(run_dir / "collectives.jsonl", "a") as file:
                file.write(json.dumps(CALLS) + "\n")
        return result

    loop.take_step = noted
    return loop.main(argparse.Namespace(out=run_dir, resume="auto"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
