"""Statistics of the train split and features of units, against plain numpy over the whole array at once.

In: arrays with a known answer. Out: nothing.
"""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from store_builders import SECOND_NS, stream

import prep.statistics_pass
from prep.settings import FEATURE_NAMES
from prep.statistics_pass import Statistics, in_blocks, shard_part, train_tokens

ORIGIN = 12_000_000 * SECOND_NS
TRAIN = [(ORIGIN, ORIGIN + 40 * SECOND_NS), (ORIGIN + 50 * SECOND_NS, ORIGIN + 60 * SECOND_NS)]
IN_TRAIN = np.r_[0:400, 500:600]


def statistics(values: np.ndarray[Any, Any], kind: str, modality: str, **more: Any) -> Statistics:
    """Statistics of values (K, S, P), tokens of 100 ms from ORIGIN on, in shards of `shard_tokens`."""
    shard_tokens = more.pop("shard_tokens", 64)
    planned = stream("x", kind, modality, values.shape, **more)
    tokens = train_tokens(planned.spec, planned.start_ns, planned.offset_ns, TRAIN)
    starts = range(0, len(values), shard_tokens)
    parts = [shard_part(planned.spec, tokens, first, values[first : first + shard_tokens]) for first in starts]
    return prep.statistics_pass.statistics(planned.spec, tokens, parts)


def feature(result: Statistics, name: str) -> np.ndarray[Any, Any]:
    return result.features[:, FEATURE_NAMES.index(name)]


def counts(num_samples: int = 5, missing: float = 0.05) -> np.ndarray[Any, Any]:
    """Bursty counts (700, 3, P) with a common drive, a share of the tokens missing."""
    rng = np.random.default_rng(0)
    drive = np.repeat(rng.gamma(4.0, 0.25, (175, 1, 1)), 4, axis=0)
    values = rng.poisson(drive * np.array([0.2, 1.0, 3.0])[:, None], (700, 3, num_samples)).astype(np.uint8)
    values[rng.random(700) < missing] = 255
    return values


def correlation(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    seen = np.isfinite(x) & np.isfinite(y)
    return float(np.corrcoef(x[seen], y[seen])[0, 1])


@pytest.mark.parametrize("missing", [0.0, 0.05])
def test_mean_scale_and_features_of_counts_equal_numpys(missing: float) -> None:
    values = counts(missing=missing)
    result = statistics(values, "counts", "spikes", first_unit=0)
    x = np.where(values == 255, np.nan, values.astype(float))[IN_TRAIN]
    assert_allclose(result.mean, np.nanmean(x, (0, 2)), rtol=1e-6)
    assert_allclose(result.scale, np.nanstd(x, (0, 2)), rtol=1e-6)
    assert_allclose(feature(result, "log_rate"), np.log(np.nanmean(x, (0, 2)) / 0.02 + 0.01), rtol=1e-6)
    assert_allclose(feature(result, "cv"), np.nanstd(x, (0, 2)) / np.nanmean(x, (0, 2)), rtol=1e-6)
    sums = x.sum(2)
    assert_allclose(feature(result, "fano_token"), np.nanvar(sums, 0) / np.nanmean(sums, 0), rtol=1e-6)
    centred = x - np.nanmean(x, (0, 2), keepdims=True)
    assert_allclose(feature(result, "skewness"), np.nanmean(centred**3, (0, 2)) / np.nanstd(x, (0, 2)) ** 3, rtol=1e-5)


@pytest.mark.parametrize("missing", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["counts", "trace"])
def test_correlations_equal_numpys_and_never_cross_a_border(kind: str, missing: float) -> None:
    values = counts(missing=missing)
    x = np.where(values == 255, np.nan, values.astype(float))
    result = statistics(values if kind == "counts" else x.astype(np.float32), kind, "spikes", first_unit=0)
    first, later = x[IN_TRAIN][:, :, :-1], x[IN_TRAIN][:, :, 1:]
    mean = x.mean(2)
    pairs = np.r_[0:399, 500:599]
    population = mean.mean(1)
    for unit in range(3):
        expected = {
            "autocorr_sample": correlation(first[:, unit].ravel(), later[:, unit].ravel()),
            "autocorr_token": correlation(mean[pairs, unit], mean[pairs + 1, unit]),
            "population_coupling": correlation(mean[IN_TRAIN, unit], population[IN_TRAIN]),
        }
        for name, value in expected.items():
            assert_allclose(feature(result, name)[unit], value, rtol=1e-5, err_msg=name)


def test_a_trace_far_from_zero_loses_no_precision() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((700, 2, 3)).astype(np.float32)
    near = statistics(values, "trace", "traces")
    far = statistics(values.astype(np.float64) + 1e7, "trace", "traces")
    assert_allclose(far.scale, near.scale, rtol=1e-5)
    assert_allclose(far.mean - 1e7, near.mean, atol=1)
    for name in ("skewness", "autocorr_sample", "autocorr_token", "population_coupling"):
        assert_allclose(feature(far, name), feature(near, name), atol=1e-5, err_msg=name)
    assert_array_equal(feature(near, "log_rate"), 0)


def test_one_sample_per_token_is_correlated_with_its_neighbour() -> None:
    values = np.sin(np.arange(700) / 5)[:, None, None].astype(np.float32)
    result = statistics(values, "trace", "traces")
    assert feature(result, "autocorr_sample")[0] == feature(result, "autocorr_token")[0] > 0.97


def test_what_lies_outside_the_train_blocks_changes_nothing() -> None:
    values = counts()
    outside = np.setdiff1d(np.arange(700), IN_TRAIN)
    before = statistics(values, "counts", "spikes")
    values[outside] = 200
    after = statistics(values, "counts", "spikes")
    for one, other in zip(vars(before).values(), vars(after).values(), strict=True):
        assert_array_equal(one, other)


def test_a_token_that_an_offset_carries_over_the_border_is_left_out() -> None:
    start_ns = np.arange(5) * 100
    assert in_blocks(start_ns, 100, None, [(0, 300)]).tolist() == [0, 0, 0, -1, -1]
    assert in_blocks(start_ns, 100, np.array([0, 1]), [(0, 300)]).tolist() == [0, 0, -1, -1, -1]
    assert in_blocks(start_ns, 100, None, [(50, 250), (300, 500)]).tolist() == [-1, 0, -1, 1, 1]


@pytest.mark.parametrize(("kind", "modality"), [("counts", "spikes"), ("trace", "traces"), ("frames", "stimulus")])
def test_sources_that_were_never_observed_have_mean_zero_scale_one_and_finite_features(
    kind: str, modality: str
) -> None:
    fill = {"counts": 255, "trace": np.nan, "frames": -1}[kind]
    dtype = {"counts": np.uint8, "trace": np.float32, "frames": np.int32}[kind]
    result = statistics(np.full((700, 2, 1), fill, dtype), kind, modality)
    assert result.mean.tolist() == [0, 0] and result.scale.tolist() == [1, 1]
    assert_array_equal(result.features, 0)


def test_silent_units_and_constant_traces_have_floors() -> None:
    silent = statistics(np.zeros((700, 1, 5), np.uint8), "counts", "spikes")
    assert silent.mean[0] == np.float32(1e-4) and silent.scale[0] == np.float32(1e-2)
    constant = statistics(np.full((700, 1, 3), 7, np.float32), "trace", "traces")
    assert constant.mean[0] == 7 and constant.scale[0] == 1
    assert np.isfinite(silent.features).all() and np.isfinite(constant.features).all()


def test_values_that_are_not_finite_are_missing() -> None:
    values = np.random.default_rng(0).standard_normal((700, 1, 3)).astype(np.float32)
    values[5, 0, 1] = np.inf
    result = statistics(values, "trace", "behavior")
    assert np.isfinite(result.mean).all() and result.scale[0] == pytest.approx(1, abs=0.1)


def test_the_size_of_the_blocks_is_a_matter_of_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics(counts(), "counts", "spikes")
    monkeypatch.setattr(prep.statistics_pass, "BLOCK_VALUES", 100)
    parts = statistics(counts(), "counts", "spikes")
    assert_allclose(parts.features, whole.features, rtol=1e-5)
    assert_allclose(parts.mean, whole.mean, rtol=1e-6)


@pytest.mark.parametrize("shard_tokens", [1, 7, 450, 700])
def test_the_size_of_the_shards_is_a_matter_of_rounding_only(shard_tokens: int) -> None:
    for values, kind in ((counts(), "counts"), (np.where(counts() == 255, np.nan, counts()) + 1e4, "trace")):
        values = values if kind == "counts" else values.astype(np.float32)
        whole = statistics(values, kind, "spikes")
        parts = statistics(values, kind, "spikes", shard_tokens=shard_tokens)
        assert_allclose(parts.features, whole.features, rtol=1e-5, atol=1e-6)
        assert_allclose(parts.mean, whole.mean, rtol=1e-6)
        assert_allclose(parts.scale, whole.scale, rtol=1e-6)
