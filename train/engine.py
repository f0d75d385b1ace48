"""The engine: the model under ZeRO-3, its optimizer, and the unit table beside it.

In: a run's configuration and batches. Out: losses, and parameters that move.
One process or many: the same weights, the same batches, the same steps.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from prep.settings import ConfigError
from train.build import HALVED, build_model, whole
from train.compiled import compile_blocks, compile_whole
from train.config import OptimConfig, RunConfig, deepspeed_config
from train.model.modeling_brainloom import BrainloomForPreTraining, BrainloomPreTrainingOutput
from train.muon import MATRICES, Muon, is_matrix
from train.partitions import MASTER, Partitions
from train.sampler import mix
from train.schedule import average_decay, lr_factor
from train.timing import StepTimer
from train.unit_table import UnitTable

BETAS = (0.9, 0.95)


def _gather(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Whole parameters, set by rank 0, handed round in partitions."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return context


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and embeddings do not, and have a learning rate of their own.

    Those that Muon moves are a group of their own.
    """
    groups: dict[str, list[nn.Parameter]] = {MATRICES: [], "decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if config.optimizer == "muon" and is_matrix(name, shape):
            groups[MATRICES].append(parameter)
        else:
            groups["decay" if len(shape) >= 2 and not name.endswith("_embed") else "no_decay"].append(parameter)
    matrices = {"weight_decay": config.weight_decay, "lr": config.lr}
    vectors = {"weight_decay": 0.0, "lr": config.lr * config.vector_lr_scale}
    return [
        {"params": parameters, "name": name, **(vectors if name == "no_decay" else matrices)}
        for name, parameters in groups.items()
        if parameters
    ]


def make_optimizer(model: nn.Module, config: OptimConfig, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), or Muon; `initial_lr` of a group is its peak, as in torch's schedulers.

    `fused`: in one pass over memory; None leaves it to torch.
    """
    groups = [{**group, "initial_lr": group["lr"]} for group in parameter_groups(model, config)]
    return Muon(groups, BETAS) if config.optimizer == "muon" else torch.optim.AdamW(groups, betas=BETAS, fused=fused)


def count_in_norm(optimizer: Any, table: UnitTable) -> None:
    """Let the norm of the gradient by which DeepSpeed clips be that of core and table together.

    It takes the norm inside `step` and has no place for a gradient of ours, so that its sum gets one term more, after
    the table's gradients have been exchanged. A norm that is not finite, of whichever of the two, skips both.
    """
    if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
        groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [*(norms := groups()), table.norm.to(norms[0].device)]
    else:  # ZeRO-1 and ZeRO-2
        total = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: torch.hypot(norm := total(), table.norm.to(norm.device))


def check_nvme(mechanics: dict[str, Any], path: str) -> None:
    """Refuse to keep states on NVMe where DeepSpeed could not compile what writes there."""
    devices = {mechanics[key]["device"] for key in ("offload_optimizer", "offload_param") if key in mechanics}
    if "nvme" in devices and not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            f"{path} keeps states on NVMe, for which DeepSpeed compiles an op that needs libaio, and it is not here. "
            "Install it (Debian: `apt-get install libaio-dev`), or use ds_configs/zero3_offload.json."
        )


class Engine:
    """The model under DeepSpeed and the unit table; one `train_step` is one optimizer step."""

    def __init__(self, config: RunConfig, keys: list[str], world_size: int) -> None:
        self.config = config
        self.ds_config = deepspeed_config(config, world_size)
        mechanics = self.ds_config["zero_optimization"]
        check_nvme(mechanics, config.ds_config)
        stage3 = mechanics["stage"] == 3
        with deepspeed.zero.Init(config_dict_or_path=self.ds_config) if stage3 else contextlib.nullcontext():
            model = build_model(config, _gather if stage3 else whole)
        if config.train.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if config.train.compile:
            (compile_blocks if stage3 else compile_whole)(model)
        if stage3:
            # ZeRO-3 gathers weights in hooks: around a block, all of its weights at once. Around each part of it they
            # cannot be compiled, and cost as much as the part.
            set_z3_leaf_modules(model, model._no_split_modules)
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        # On the host, torch's other ways of computing the step are several times slower.
        optimizer = make_optimizer(model, config.train, fused=True if "offload_optimizer" in mechanics else None)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.ds_config, dist_init_required=False
        )
        self.device: torch.device = self.deepspeed.device
        self.timer = StepTimer(self.device)
        averages = config.train.average_steps > 0
        # A group of its own: the exchange of rows does not queue behind ZeRO's gathers.
        self.table = UnitTable(keys, model.config.unit_embed_size, self.device, averages, dist.new_group())
        count_in_norm(self.optimizer, self.table)
        self.partitions = Partitions(self.deepspeed)
        if isinstance(optimizer, Muon):
            optimizer.follow(self.partitions)
        # Of this rank's partitions of the master weights: what it costs is four bytes for each.
        self.average = [buffer[MASTER].clone() for buffer in self.partitions.buffers()] if averages else []

    @property
    def model(self) -> BrainloomForPreTraining:
        """The module inside the engine."""
        module: BrainloomForPreTraining = self.deepspeed.module
        return module

    def forward(self, batch: dict[str, Tensor], context_s: float) -> BrainloomPreTrainingOutput:
        """Predictions and loss of one micro-batch of windows of one length."""
        arguments = {name: tensor for name, tensor in batch.items() if name != "unit_rows"}
        arguments["unit_embeds"] = self.table.lookup(batch["unit_rows"])
        if self.config.train.precision == "bf16":  # times, labels and the table's rows stay as they are
            arguments |= {name: arguments[name].bfloat16() for name in HALVED}
        output: BrainloomPreTrainingOutput = self.deepspeed(context_s=context_s, **arguments)
        return output

    @torch.no_grad()
    def predict(self, batch: dict[str, Tensor], context_s: float) -> Tensor:
        """Predictions (B, Q, P) of a batch without dropout; every rank calls it, and nothing of the training moves.

        Nothing is compiled for it: each batch has a shape of its own.
        """
        self.timer.on_phase("validation")  # of each batch anew: all of them may last longer than a phase may
        unlabelled = {name: tensor for name, tensor in batch.items() if name not in ("labels", "label_mask")}
        self.deepspeed.eval()
        with torch.compiler.set_stance("force_eager"):
            predictions = self.forward(unlabelled, context_s).predictions
        self.deepspeed.train()
        self.table.discard()
        assert predictions is not None
        return predictions

    def gradient_norm(self) -> float | None:
        """Of the gradient at the last step, before it was clipped; None where DeepSpeed does not take it."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def train_step(self, micro_batches: list[dict[str, Tensor]], step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step, or none where loss or gradient is not finite on any rank: then nothing moves on all.

        Returns the mean loss of this rank, and nats and values of each of its W windows (2, W, M).
        """
        factor = lr_factor(step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        context_s = self.config.turn(step).context_s
        loss, windows = torch.zeros(()), []
        size = self.config.train.micro_batch_size
        self.table.fetch(*(batch["unit_rows"] for batch in micro_batches))
        for number, batch in enumerate(micro_batches, dist.get_rank() * len(micro_batches)):
            # A micro-batch is of the same samples on any number of ranks, and so is what dropout leaves out of it.
            torch.manual_seed(mix(step * self.config.train.global_batch_size + number * size, self.config.seed))
            with self.timer.phase("forward"):
                output = self.forward(batch, context_s)
            assert output.loss is not None and output.nats is not None and output.num_values is not None
            with self.timer.phase("backward"):
                self.deepspeed.backward(infectious(output.loss))
                if self.deepspeed.is_gradient_accumulation_boundary():
                    self.table.exchange()
            with self.timer.phase("optimizer"):
                self.deepspeed.step()
            loss += output.loss.detach().cpu() / len(micro_batches)
            windows.append(torch.stack([output.nats.detach(), output.num_values.to(output.nats)]).cpu())
        self._follow(step, self.config.train.unit_lr * factor)
        return loss, torch.cat(windows, dim=1)

    @property
    def moved(self) -> bool:
        """Did the last step move anything? DeepSpeed decides by the norm of the gradient that all ranks share."""
        return bool(self.deepspeed.was_step_applied())

    def _follow(self, step: int, unit_lr: float) -> None:
        """The unit table and the averages move where the core has moved."""
        if not self.moved:
            self.table.discard()
            return
        keep = average_decay(step, self.config.train) if self.average else 0.0
        norm = torch.as_tensor(self.deepspeed.get_global_grad_norm())
        with self.timer.phase("optimizer"):
            self.table.step(unit_lr, step + 1, keep, (self.config.train.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            for kept, buffer in zip(self.average, self.partitions.buffers(), strict=False):
                kept.lerp_(buffer[MASTER], 1 - keep)


def infectious(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, every gradient is not, whatever the loss is made of.

    So the one decision on the gradient, which all ranks take together, holds for the loss of each.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
