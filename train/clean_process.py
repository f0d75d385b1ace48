"""Predict with a hub folder as a stranger would: run by path, in another folder, with this repository not importable.

In: a hub folder and a window.npz of raw arrays and keys. Out: one line of JSON with the largest absolute difference.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def environment(folder: Path) -> dict[str, str]:
    """What the clean process sees: no paths of ours, caches of its own, no network."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return {**kept, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def forget_repository() -> None:
    """Undo an editable install for this process, and prove it."""
    sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
    sys.path_hooks = [hook for hook in sys.path_hooks if "__editable__" not in getattr(hook, "__module__", "")]
    sys.path = [
        entry for entry in sys.path if not (Path(entry) / "train" / "model").exists() and "__editable__" not in entry
    ]
    for name in ("train", "prep"):
        if importlib.util.find_spec(name) is not None:
            raise SystemExit(f"{name} can still be imported: this would prove nothing")


def main(hub: str, window: str) -> None:
    """Load, predict, compare."""
    forget_repository()
    import numpy as np
    import torch
    from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

    model = AutoModelForPreTraining.from_pretrained(hub, trust_remote_code=True).eval()
    trunk = AutoModel.from_pretrained(hub, trust_remote_code=True).eval()
    processor = AutoFeatureExtractor.from_pretrained(hub, trust_remote_code=True)
    stream_class = sys.modules[type(processor).__module__].Stream
    with np.load(window) as file:
        streams = [
            stream_class(
                keys=[str(key) for key in file[f"keys_{i}"]],
                modality=str(file[f"modality_{i}"]),
                sample_s=float(file[f"sample_s_{i}"]),
                **{name: file[f"{name}_{i}"] for name in ("values", "start_s", "offset_s", "visible", "asked")},
            )
            for i in range(int(file["num_streams"]))
        ]
        session = [str(key) for key in file["session"]]
        inputs = processor(streams, pixels=file["pixels"], frame_time_s=file["frame_time_s"], session=session)
        expected = torch.from_numpy(file["expected"])
    with torch.inference_mode():
        output = model(**inputs)
        names = set(inputs) - {"source_null", "labels", "label_mask"}
        latents = trunk(**{n: v for n, v in inputs.items() if n in names and not n.startswith("query_")})
    difference = float((output.predictions[0] - expected).abs().max())
    trunk_difference = float((latents.last_hidden_state - output.last_hidden_state).abs().max())
    physical = processor.physical(output.predictions, inputs["query_source"], [key for s in streams for key in s.keys])
    assert physical.isfinite().all()
    print(
        json.dumps(
            {"max_abs_difference": difference, "trunk_max_abs_difference": trunk_difference, "loss": float(output.loss)}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
