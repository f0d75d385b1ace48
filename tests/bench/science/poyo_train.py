"""POYO of torch-brain, trained on head direction of one recording; run in an environment of its own.

In: a recording, a task, a fold or `main`, steps of training, a file. Out: the prediction's npz; its cost on stdout.

What is unfair to it: it is made for many sessions and hours of training on a GPU, and gets one session and minutes of
one core; its width, depth and learning rate were chosen by hand, not searched. In its favour: it is asked at many times
in each window of training (as its authors do), and keeps the weights of its best moment on the valid block.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_brain.models import POYO
from torch_brain.models.poyo import create_linspace_latent_tokens, create_start_end_unit_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.science import protocol
from bench.science.recordings import Recording, read
from measure import measured

WINDOW_S = 1.0
ASKED_S = {"hd_acausal": 0.5, "hd_causal": 1.0}  # where in the window the query stands
AROUND_S = {"hd_acausal": (0.25, 0.75), "hd_causal": (0.75, 1.0)}  # where those of training stand
NUM_ASKED = 8  # per window of training
SIZE = {"dim": 64, "depth": 2, "dim_head": 32, "cross_heads": 2, "self_heads": 4, "num_latents_per_step": 4}
LATENT_STEP_S = 0.125
DROPOUT = {"ffn_dropout": 0.2, "lin_dropout": 0.2, "atn_dropout": 0.1}
LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE, WARM_UP = 2e-3, 1e-2, 64, 0.05
NUM_LOOKS = 12  # at the valid block
SEED = 0


@dataclass(frozen=True)
class Spikes:
    """All units' spikes in one order of time."""

    time: np.ndarray
    unit: np.ndarray
    num_units: int

    @classmethod
    def of(cls, recording: Recording) -> "Spikes":
        time_s = np.concatenate(recording.spike_times)
        unit = np.repeat(np.arange(recording.num_units), [len(times) for times in recording.spike_times])
        order = np.argsort(time_s, kind="stable")
        return cls(time_s[order], unit[order], recording.num_units)

    def windows(self, start: np.ndarray, vocabulary: np.ndarray) -> dict[str, torch.Tensor]:
        """Inputs of POYO for [start, start + 1) s: a start and an end token per unit, then the spikes, padded."""
        first, stop = np.searchsorted(self.time, start), np.searchsorted(self.time, start + WINDOW_S)
        kind, unit, stamp = create_start_end_unit_tokens(np.arange(self.num_units), 0.0, WINDOW_S)
        slot = np.arange((stop - first).max())
        index = np.minimum(first[:, None] + slot, len(self.time) - 1)
        mask = slot < (stop - first)[:, None]

        def tile(row: np.ndarray) -> np.ndarray:
            return np.tile(row, (len(start), 1))

        return {
            "input_unit_index": torch.from_numpy(vocabulary[np.hstack([tile(unit), self.unit[index]])]),
            "input_timestamps": torch.from_numpy(np.hstack([tile(stamp), self.time[index] - start[:, None]])).float(),
            "input_token_type": torch.from_numpy(np.hstack([tile(kind), np.zeros_like(index)])),
            "input_mask": torch.from_numpy(np.hstack([tile(np.ones_like(unit, bool)), mask])),
        }


def vectors(recording: Recording, time_s: np.ndarray) -> torch.Tensor:
    """(..., 2): cos and sin of the heading."""
    heading = recording.heading_at(time_s)
    return torch.from_numpy(np.stack([np.cos(heading), np.sin(heading)], -1)).float()


class Peer:
    """POYO on one recording."""

    def __init__(self, recording: Recording, task: str) -> None:
        torch.manual_seed(SEED)
        self.recording, self.task, self.spikes = recording, task, Spikes.of(recording)
        self.model = POYO(sequence_length=WINDOW_S, latent_step=LATENT_STEP_S, dim_out=2, **SIZE, **DROPOUT)
        names = [f"unit{unit}" for unit in range(recording.num_units)]
        self.model.unit_emb.initialize_vocab(names)
        self.model.session_emb.initialize_vocab([recording.name])
        self.vocabulary = np.array(self.model.unit_emb.tokenizer(names))
        self.session = int(self.model.session_emb.tokenizer(recording.name))

    def ask(self, start: np.ndarray, asked: np.ndarray) -> torch.Tensor:
        """(windows, queries, 2) at these times of windows that start there."""
        index, stamp = create_linspace_latent_tokens(0.0, WINDOW_S, LATENT_STEP_S, SIZE["num_latents_per_step"])
        return self.model(
            **self.spikes.windows(start, self.vocabulary),
            latent_index=torch.from_numpy(index).expand(len(start), -1),
            latent_timestamps=torch.from_numpy(stamp).float().expand(len(start), -1),
            session_index=torch.full((len(start),), self.session),
            output_timestamps=torch.from_numpy(asked).float(),
        )

    def say(self, time_s: np.ndarray) -> torch.Tensor:
        """(times, 2), each from its own window, as the protocol admits."""
        self.model.eval()
        parts = np.array_split(time_s, math.ceil(len(time_s) / 256))
        asked = ASKED_S[self.task]
        with torch.no_grad():
            return torch.cat([self.ask(part - asked, np.full((len(part), 1), asked))[:, 0] for part in parts])

    def learn(self, start: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
        """Cost of a batch, for which the queries stand at random near the place of those that are scored."""
        self.model.train()
        asked = generator.uniform(*AROUND_S[self.task], (len(start), NUM_ASKED))
        said = self.ask(start, asked)
        return torch.nn.functional.mse_loss(said, vectors(self.recording, start[:, None] + asked))


def train(peer: Peer, fold: int | None, num_steps: int) -> None:
    """Leaves the weights of the best of the looks at valid; what comes out does not depend on the machine's speed."""
    generator = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(peer.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    queries = {split: protocol.queries(peer.recording, peer.task, split, fold) for split in ("train", "valid")}
    starts, valid = queries["train"] - ASKED_S[peer.task], queries["valid"][::2]
    looks = {num_steps * part // NUM_LOOKS for part in range(1, NUM_LOOKS + 1)}
    best, kept = math.inf, peer.model.state_dict()
    for step in range(1, num_steps + 1):
        share = step / num_steps
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, share / WARM_UP, 1.05 - share)
        optimizer.zero_grad()
        peer.learn(generator.choice(starts, BATCH_SIZE), generator).backward()
        optimizer.step()
        if step in looks:
            error = ((peer.say(valid) - vectors(peer.recording, valid)) ** 2).mean().item()
            print(f"step {step} of {num_steps}: {error:.4f} on valid", file=sys.stderr, flush=True)
            if error < best:
                best, kept = error, copy.deepcopy(peer.model.state_dict())
    peer.model.load_state_dict(kept)


def main() -> None:
    """Train, and write what is said of the test block."""
    path, task, fold, num_steps, out = sys.argv[1:]
    torch.set_num_threads(1)
    split = None if fold == "main" else int(fold)
    with measured():
        peer = Peer(read(Path(path)), task)
        train(peer, split, int(num_steps))
        query = protocol.queries(peer.recording, task, "test", split)
        said = peer.say(query).double().numpy()
    num_parameters = sum(parameter.numel() for parameter in peer.model.parameters())
    angle = np.arctan2(said[:, 1], said[:, 0])
    np.savez(out, t=query, angle=angle, num_parameters=num_parameters)


if __name__ == "__main__":
    main()
