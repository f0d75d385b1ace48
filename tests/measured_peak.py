"""The peak memory of a rank of a training run: `python tests/measured_peak.py RUN_DIR WARM_DIR PORT`, by the launcher.

In: two run folders, of the run that is measured, and of a tiny one that is trained before. Out: bytes above what the
process had after the tiny run, in RUN_DIR/peak-RANK.json: only then is everything imported, since DeepSpeed and torch
go on importing, compile and start threads until the first steps are done.

On a CPU: the most that was resident, of the kernel's own count. Freed blocks go back to the kernel at once
(`ALLOCATOR`, set by who starts this): else the C library keeps what it likes of them.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


def resident(which: str) -> int:
    """Bytes of this process that are in memory: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def main(run_dir: Path, warm_dir: Path, port: str) -> None:
    """Train the tiny run, then the other, and write what that took."""
    import torch
    import torch.distributed as dist

    from train import loop

    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # both runs are of one group
    loop.main(argparse.Namespace(out=warm_dir, resume="auto"))
    os.environ["MASTER_PORT"] = port  # the self-check begins anew, where nothing has been said yet
    gc.collect()
    before = resident("VmRSS")
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    loop.main(argparse.Namespace(out=run_dir, resume="auto"))
    most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    destroy()
    (run_dir / f"peak-{os.environ['RANK']}.json").write_text(json.dumps({"before": before, "peak": most - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
