"""What a forward and backward pass holds: counted on fake tensors, as on real ones.

In: small models. Out: bytes, beside what autograd is seen to keep, and a GPU's own count where there is one.
"""

import pytest
import torch
from torch import Tensor

from train.activations import DTYPES, LiveBytes, arguments, trace
from train.build import HALVED
from train.config import PRESETS
from train.flops import Shape
from train.model.configuration_brainloom import BrainloomConfig
from train.model.modeling_brainloom import BrainloomForPreTraining

SHAPE = Shape(batch=2, sources=60, tokens=600, frames=4, context_s=1.0, queries=300)
SHAPES = [{}, {"sources": 300, "tokens": 2000}, {"context_s": 3.0}, {"frames": 20}, {"queries": 2000}]


def config(**changed: object) -> BrainloomConfig:
    return BrainloomConfig(**{**PRESETS["debug"], **changed})


def kept_by_autograd(shape: Shape, precision: str) -> int:
    """Bytes of all storages that the real model saves for its backward pass, weights and inputs apart."""
    model, inputs = BrainloomForPreTraining(config()).to(DTYPES[precision]), arguments(config(), shape)
    halved = {name: x.to(DTYPES[precision]) if name in HALVED else x for name, x in inputs.items()}
    others = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *inputs.values())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**halved, context_s=shape.context_s)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("changed", SHAPES, ids=str)
def test_activations_are_what_autograd_keeps(precision: str, changed: dict[str, int]) -> None:
    """What the model returns is alive as well, and not all of it is saved; rows are kept, and come in."""
    shape = Shape(**{**vars(SHAPE), **changed})
    counted, saved = trace(config(), shape, precision, on_cuda=False), kept_by_autograd(shape, precision)
    returned = shape.batch * shape.queries * config().samples_per_token * 4 * 2  # predictions and scales
    rows = shape.batch * shape.sources * config().unit_embed_size * 4
    assert saved <= counted.kept - rows <= 1.01 * (saved + returned)


def test_what_comes_in_is_counted_apart() -> None:
    counted = trace(config(), SHAPE, "fp32")
    inputs = arguments(config(), SHAPE)
    assert counted.inputs == sum(x.nbytes for name, x in inputs.items() if name != "unit_embeds")
    assert counted.rows == SHAPE.batch * SHAPE.sources
    assert counted.most > counted.kept > inputs["unit_embeds"].nbytes


def test_activations_are_linear_in_the_batch() -> None:
    one, two, four = (trace(config(), Shape(**{**vars(SHAPE), "batch": batch}), "fp32").kept for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_checkpointing_keeps_less_the_deeper_a_model_is() -> None:
    """Of each layer more, one vector of each latent stays."""
    shallow, deep = (trace(config(num_hidden_layers=depth), SHAPE, "fp32", checkpointing=True).kept for depth in (4, 8))
    latents = SHAPE.batch * 10 * config().latents_per_step
    assert deep - shallow == pytest.approx(4 * latents * config().hidden_size * 4, rel=0.05)
    assert trace(config(), SHAPE, "fp32").kept > 2 * shallow


def test_the_norm_of_a_gpu_holds_less_than_that_of_a_cpu() -> None:
    on_cuda, on_cpu = (trace(config(), SHAPE, "bf16", on_cuda=where).kept for where in (True, False))
    assert 0.6 * on_cpu < on_cuda < 0.95 * on_cpu


def test_bytes_are_counted_until_a_tensor_is_gone() -> None:
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        first = torch.zeros(100)
        view = first[:10]
        assert live.now == 400, "a view holds nothing of its own"
        second = known.view(10, 100) + first
        assert live.now == 4400
        del first
        assert live.now == 4400, "the view holds it"
        del view, second
    assert (live.now, live.most) == (0, 4400)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", DTYPES)
def test_a_gpu_counts_the_same(precision: str) -> None:
    shape = Shape(**{**vars(SHAPE), "sources": 1000, "tokens": 20_000, "batch": 8})
    model = BrainloomForPreTraining(config()).to("cuda", DTYPES[precision])
    with torch.device("cuda"):
        inputs = arguments(config(), shape)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda taken: setattr(taken, "grad", None))
    for _ in range(2):  # the first pass makes workspaces that stay
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        halved = {name: x.to(DTYPES[precision]) if name in HALVED else x for name, x in inputs.items()}
        output = model(**halved, context_s=shape.context_s)
        output.loss.backward()
        inputs["unit_embeds"].grad = None
        del output, halved
    measured = torch.cuda.max_memory_allocated() - before
    assert trace(config(), shape, precision).most == pytest.approx(measured, rel=0.1)
