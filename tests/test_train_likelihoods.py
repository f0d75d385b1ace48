"""Likelihoods: the numbers of scipy's distributions, nulls that cost nothing, intervals that hold what they promise.

In: readouts and values, drawn. Out: nats, expected values and quantiles, compared with scipy and with draws.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from train_builders import batch_of, moved_model, one_window, reader_of, tiny_run, tiny_store

from train.build import build_model, model_config
from train.config import ModelConfig, RunConfig
from train.masking import draw_mask
from train.model.configuration_brainloom import LIKELIHOODS, BrainloomConfig
from train.model.likelihoods_brainloom import (
    AT_FLOOR,
    FAMILIES,
    MAX_COUNT,
    NUM_READOUTS,
    Likelihoods,
    Readout,
    student_quantile,
)
from train.model.processing_brainloom import source_null

COUNTS = ("poisson", "point_process", "negative_binomial")
VALUES = ("gaussian", "calcium", "student_t", "zero_inflated_gamma")
LIMIT = 6.0
MIXES = [
    {"spikes": "negative_binomial"},
    {"traces": "student_t", "behavior": "student_t"},
    {"traces": "zero_inflated_gamma"},
    {"traces": "calcium"},
]


def readout_of(raw: Any, null: Any = 1.0) -> Readout:
    """A readout of numbers (…, 4), float64."""
    raw = torch.as_tensor(raw, dtype=torch.float64)
    return Readout.of(raw, torch.as_tensor(null, dtype=torch.float64).expand(raw.shape[:-1]), LIMIT)


def drawn(number: int, seed: int = 0) -> tuple[Readout, list[Readout]]:
    """Readouts drawn at random, together and one by one."""
    chance = torch.Generator().manual_seed(seed)
    raw = torch.randn(number, NUM_READOUTS, generator=chance, dtype=torch.float64)
    null = torch.rand(number, generator=chance, dtype=torch.float64) + 0.1
    return readout_of(raw, null), [readout_of(r, n) for r, n in zip(raw, null, strict=True)]


def by_scipy(family: str, readout: Readout) -> Any:
    """The distribution that a single readout means; of the gamma the part above zero, and its weight."""
    location, log_std, shape, logit = (
        float(x) for x in (readout.location, readout.log_std, readout.shape, readout.zero_logit)
    )
    null, std = float(readout.null), np.exp(log_std)
    rate = null * np.exp(LIMIT * np.tanh(location / LIMIT))
    if family in ("poisson", "point_process"):
        return stats.poisson(rate)
    if family == "negative_binomial":
        size = 1 / (0.3 * np.exp(2 * np.tanh(shape / 2)))
        return stats.nbinom(size, size / (size + rate))
    if family == "gaussian":
        return stats.norm(location, std)
    if family == "calcium":
        return stats.norm(location + shape, std)
    if family == "student_t":
        freedom = 2 + 6 * np.exp(3 * np.tanh(shape / 3))
        return stats.t(freedom, location, std * np.sqrt((freedom - 2) / freedom))
    k, height = np.exp(2 * np.tanh(shape / 2)), null - AT_FLOOR
    mean = 2 * height * rate / null
    return stats.gamma(k, loc=-height, scale=mean / k), 1 / (1 + np.exp(logit))


def scipy_log(family: str, readout: Readout, values: Any) -> Any:
    """Log probabilities, or densities, by scipy."""
    if family in COUNTS:
        return by_scipy(family, readout).logpmf(values)
    if family != "zero_inflated_gamma":
        return by_scipy(family, readout).logpdf(values)
    gamma, weight = by_scipy(family, readout)
    above = values + float(readout.null) - AT_FLOOR > 0
    return np.where(above, np.log(weight) + gamma.logpdf(np.where(above, values, 1.0)), np.log1p(-weight))


def draws(family: str, readout: Readout, number: int, seed: int = 0) -> Any:
    """Values drawn by scipy from one readout."""
    chance = np.random.default_rng(seed)
    if family != "zero_inflated_gamma":
        return by_scipy(family, readout).rvs(number, random_state=chance)
    gamma, weight = by_scipy(family, readout)
    return np.where(chance.random(number) < weight, gamma.rvs(number, random_state=chance), -float(readout.null))


def some_values(family: str, readout: Readout) -> Tensor:
    """Values of all kinds: typical, at the null's floor, far out."""
    if family in COUNTS:
        return torch.tensor([0, 1, 2, 7, 40, 254], dtype=torch.float64)
    floor = -float(readout.null)
    return torch.tensor([floor, floor + 0.5 * AT_FLOOR, floor + 0.01, 0.0, 1.3, 20.0], dtype=torch.float64)


# ---------------------------------------------------------------- against scipy


@pytest.mark.parametrize("family", FAMILIES)
def test_excess_nats_are_differences_of_scipys_log_probabilities(family: str) -> None:
    for readout in drawn(40)[1]:
        values = some_values(family, readout)
        wide = Readout(*(getattr(readout, name).expand_as(values) for name in NAMES), LIMIT)
        expected = scipy_log(family, readout.of_null(), values.numpy()) - scipy_log(family, readout, values.numpy())
        actual = FAMILIES[family].excess_nats(values, wide).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


NAMES = ("location", "log_std", "shape", "zero_logit", "null")


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_values_are_scipys_means(family: str) -> None:
    for readout in drawn(40)[1]:
        if family == "zero_inflated_gamma":
            gamma, weight = by_scipy(family, readout)
            expected = weight * gamma.mean() + (1 - weight) * (AT_FLOOR - float(readout.null))
        else:
            expected = by_scipy(family, readout).mean()
        assert float(FAMILIES[family].expected(readout)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("family", COUNTS)
def test_probabilities_of_counts_sum_to_one(family: str) -> None:
    counts = torch.arange(4000, dtype=torch.float64)
    for readout in drawn(20)[1]:
        log_pmf = -FAMILIES[family].nll(counts, readout) - torch.lgamma(counts + 1)
        assert float(log_pmf.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("family", VALUES)
def test_densities_integrate_to_one(family: str) -> None:
    constant = 0.5 * np.log(2 * np.pi) if family in ("gaussian", "calcium") else 0.5 * np.log(np.pi)
    for readout in drawn(10)[1]:
        # a gamma of a smaller shape has much of its mass nearer to the floor than float64 can say
        readout = replace(readout, shape=readout.shape.clamp(min=-0.5))

        def density(value: float, readout: Readout = readout) -> float:
            return float(torch.exp(-FAMILIES[family].nll(torch.tensor(value, dtype=torch.float64), readout)))

        def in_logarithm(log_height: float, floor: float = AT_FLOOR - float(readout.null)) -> float:
            return density(floor + np.exp(log_height)) * np.exp(log_height)  # may be infinite at the floor, this is not

        if family == "zero_inflated_gamma":
            total = density(-20.0) + integrate.quad(in_logarithm, -34, 8, limit=400)[0]
        else:
            total = np.exp(-constant) * integrate.quad(density, -np.inf, np.inf)[0]
        assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [0.005, 0.05, 0.3, 0.5, 0.9, 0.975])
def test_quantiles_are_scipys(family: str, level: float) -> None:
    for readout in drawn(40)[1]:
        actual = float(FAMILIES[family].quantile(level, readout))
        if family == "zero_inflated_gamma":
            gamma, weight = by_scipy(family, readout)
            within = (level - (1 - weight)) / weight
            expected = gamma.ppf(within) if within > 0 else AT_FLOOR - float(readout.null)
        else:
            expected = by_scipy(family, readout).ppf(level)
        if family in COUNTS:
            assert actual == min(expected, MAX_COUNT)
        else:
            assert actual == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_quantiles_of_student_are_good_to_four_digits_for_all_degrees_of_freedom_that_occur() -> None:
    freedom = 2 + 6 * torch.linspace(-3, 3, 200, dtype=torch.float64).exp()
    for level in (0.0005, 0.025, 0.2, 0.75, 0.95, 0.9995):
        expected = stats.t.ppf(level, freedom.numpy())
        np.testing.assert_allclose(student_quantile(level, freedom).numpy(), expected, rtol=2e-4)


# ---------------------------------------------------------------- nulls and extremes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_predicts_the_null_has_a_loss_of_exactly_zero(family: str, dtype: torch.dtype) -> None:
    null = (torch.rand(1001, dtype=torch.float64) * 3 + 1e-3).to(dtype)  # no multiple of a vector register's width
    zero = torch.zeros_like(null)
    readout = Readout(zero, zero, zero, zero, null, LIMIT)
    values = torch.arange(1001, dtype=dtype) % 255 if family in COUNTS else torch.linspace(-20, 20, 1001, dtype=dtype)
    assert not FAMILIES[family].excess_nats(values, readout).any()
    expected = null if family in COUNTS else zero
    torch.testing.assert_close(FAMILIES[family].expected(readout), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", VALUES)
def test_the_null_of_what_is_standardised_has_mean_zero_and_but_for_the_gamma_variance_one(family: str) -> None:
    null = readout_of(torch.zeros(NUM_READOUTS), 0.7)
    values = draws(family, null, 200_000)
    assert abs(values.mean()) < 0.02
    if family != "zero_inflated_gamma":
        assert values.var() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_at_extremes(family: str) -> None:
    grid = torch.tensor([-1e6, -30.0, 0.0, 30.0, 1e6])
    raw = torch.cartesian_prod(*[grid] * NUM_READOUTS)
    values = [0.0, 1.0, 254.0] if family in COUNTS else [-20.0, -1e-6, 0.0, 1e-6, 20.0]
    for null in (1e-4, 0.5, 50.0):
        for value in values:
            numbers = raw.clone().requires_grad_()
            readout = Readout.of(numbers, torch.full((len(raw),), null), LIMIT)
            excess = FAMILIES[family].excess_nats(torch.full((len(raw),), value), readout)
            answers = (excess, FAMILIES[family].expected(readout))
            assert all(answer.isfinite().all() for answer in answers)
            sum(answer.sum() for answer in answers).backward()
            assert numbers.grad is not None and numbers.grad.isfinite().all()


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_intervals_hold_the_share_of_draws_that_they_promise(family: str, coverage: float) -> None:
    number = 40_000
    within_error = 4 * np.sqrt(coverage * (1 - coverage) / number)
    chosen = {"spikes": family, "traces": "gaussian", "behavior": "gaussian"}
    if family in VALUES:
        chosen = {"spikes": "poisson", "traces": family, "behavior": "gaussian"}
    modality = torch.tensor(0 if family in COUNTS else 1)
    for seed, readout in enumerate(drawn(6, seed=1)[1]):
        lower, upper = (float(x) for x in Likelihoods(chosen).interval(coverage, readout, modality))
        values = draws(family, readout, number, seed)
        if family == "zero_inflated_gamma":
            values = np.maximum(values, AT_FLOOR - float(readout.null))  # all that is zero is at one place
        held = float(((values >= lower - 1e-6) & (values <= upper + 1e-6)).mean())
        assert held > coverage - within_error
        if family in ("gaussian", "student_t"):  # where nothing is lumped together it holds no more either
            assert held < coverage + within_error


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, 90.0])
def test_a_coverage_that_is_none_is_refused(coverage: float) -> None:
    known = {name: names[0] for name, names in LIKELIHOODS.items()}
    with pytest.raises(ValueError, match=f"coverage = {coverage} must lie between 0 and 1, for instance 0.9"):
        Likelihoods(known).interval(coverage, readout_of(torch.zeros(1, NUM_READOUTS)), torch.zeros(1))


# ---------------------------------------------------------------- chosen by modality, in the model


def run_with(likelihoods: dict[str, str]) -> RunConfig:
    """The tiny run with other likelihoods."""
    run = tiny_run()
    return replace(run, model=ModelConfig(overrides={**run.model.overrides, "likelihoods": likelihoods}))


def inputs(run: RunConfig, tmp_path_factory: pytest.TempPathFactory, session: str) -> dict[str, Tensor]:
    """A batch with everything asked that there is."""
    reader = reader_of(tiny_store(tmp_path_factory.getbasetemp()), run)
    window = one_window(reader, session)
    mask = draw_mask("inpainting", window.tokens, 1.0, np.random.default_rng(0))
    return batch_of(reader, run, "inpainting", [(window, mask)])


def test_each_modality_is_answered_by_its_own_family() -> None:
    chosen = {"spikes": "negative_binomial", "traces": "zero_inflated_gamma", "behavior": "student_t"}
    readout, modality = drawn(30)[0], torch.arange(30) % 3
    values = torch.where(modality == 0, torch.arange(30) % 4, torch.linspace(-2, 3, 30, dtype=torch.float64))
    likelihoods = Likelihoods(chosen)
    for index, family in enumerate(chosen.values()):
        own = modality == index
        for actual, expected in (
            (likelihoods.excess_nats(values, readout, modality), FAMILIES[family].excess_nats(values, readout)),
            (likelihoods.expected(readout, modality), FAMILIES[family].expected(readout)),
            (likelihoods.interval(0.8, readout, modality)[1], FAMILIES[family].quantile(0.9, readout)),
        ):
            assert torch.equal(actual[own], expected[own])


@pytest.mark.parametrize("likelihoods", MIXES, ids=str)
@pytest.mark.parametrize("session", ["full", "imaging"])
def test_a_model_with_any_likelihood_starts_at_its_null_and_has_finite_gradients(
    likelihoods: dict[str, str], session: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = run_with(likelihoods)
    batch = inputs(run, tmp_path_factory, session)
    with torch.inference_mode():
        fresh = build_model(run)
        for proj in fresh.readout.weight_projs:
            proj.weight.zero_()
        fresh = fresh(**batch)
    assert float(fresh.loss) == 0 and not fresh.nats.any()
    model = moved_model(run)
    model(**batch).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradients[f"readout.weight_projs.{kind}.weight"].any() for kind in range(3))


def test_the_loss_of_a_gamma_does_not_hang_on_a_scale_that_it_has_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = run_with({"traces": "zero_inflated_gamma"})
    batch, model = inputs(run, tmp_path_factory, "imaging"), moved_model(run)
    traces = batch["source_modality"].gather(1, batch["query_source"]) == 1
    batch["label_mask"] = batch["label_mask"] & traces[..., None]
    with torch.inference_mode():
        before = model(**batch)
        model.readout.bias_proj.bias[1] += 2
        after = model(**batch)
    assert not torch.equal(before.log_scale, after.log_scale)
    assert before.num_values[0, 1] > 0 and torch.equal(before.loss, after.loss)


def test_labels_and_their_mask_belong_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    batch = inputs(tiny_run(), tmp_path_factory, "full")
    del batch["label_mask"]
    with pytest.raises(ValueError, match="labels and label_mask belong together"):
        moved_model(tiny_run())(**batch)


def test_the_model_gives_intervals_on_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny_run()
    batch = inputs(run, tmp_path_factory, "full")
    with torch.inference_mode():
        plain, asked = moved_model(run)(**batch), moved_model(run)(**batch, coverage=0.9)
    lower, upper = asked.interval
    assert plain.interval is None and torch.equal(plain.predictions, asked.predictions)
    assert lower.shape == upper.shape == asked.predictions.shape and (lower <= upper).all()
    spikes = batch["source_modality"].gather(1, batch["query_source"]) == 0
    assert torch.equal(lower[spikes], lower[spikes].round()) and not torch.equal(lower, lower.round())
    assert (lower[~spikes] < asked.predictions[~spikes]).all() and (upper[~spikes] > asked.predictions[~spikes]).all()


def test_the_default_is_poisson_and_gaussian() -> None:
    expected = {"spikes": "poisson", "traces": "gaussian", "behavior": "gaussian", "events": "point_process"}
    assert BrainloomConfig().likelihoods == model_config(tiny_run()).likelihoods == expected
    assert BrainloomConfig(likelihoods={"traces": "student_t"}).likelihoods == {**expected, "traces": "student_t"}


@pytest.mark.parametrize("likelihoods", [{"spikes": "gaussian"}, {"lick": "poisson"}])
def test_a_likelihood_that_does_not_fit_is_refused(likelihoods: dict[str, str]) -> None:
    ((name, family),) = likelihoods.items()
    with pytest.raises(
        ValueError, match=rf"likelihoods: {name} = '{family}' is not known\. Valid are spikes: poisson, neg"
    ):
        BrainloomConfig(likelihoods=likelihoods)


def test_the_null_of_a_source_is_its_mean_rate_or_its_height_above_physical_zero() -> None:
    modality, mean = np.array([0, 1, 1, 2]), np.array([0.2, 3.0, -1.0, 5.0], np.float32)
    null = source_null(modality, mean, np.array([1.0, 2.0, 1.0, 1.0], np.float32))
    np.testing.assert_array_equal(null, np.array([0.2, 1.5, 0.05, 1.0], np.float32))
