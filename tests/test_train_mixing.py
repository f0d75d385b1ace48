"""Mixing weights: a window comes as often as the weights of its dataset, session and modalities say, in every pass.

In: sessions of so many windows, weights. Out: counts; messages.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from train_builders import tiny_run, tiny_store
from yaml import safe_dump

from prep.settings import ConfigError
from prep.store import Store
from train import config
from train.build import model_config
from train.config import DataConfig, Weights
from train.eras import Order
from train.loader import TrainingSamples
from train.mixing import session_weights


def entry(key: str, *modalities: str) -> dict[str, Any]:
    """What the catalog says of a session."""
    dataset_id, session_id = key.split("/")
    streams = [{"modality": modality} for modality in modalities]
    return {"dataset_id": dataset_id, "session_id": session_id, "streams": streams}


ENTRIES = [entry("a/1", "spikes", "behavior"), entry("a/2", "traces"), entry("b/1", "spikes", "traces", "traces")]


def passes(num_passes: int, **sessions: tuple[int, float]) -> list[list[int]]:
    """The windows of some passes over sessions of so many windows, each with its weight."""
    spans, first = {}, 0
    for key, (num_windows, weight) in sessions.items():
        spans[key] = (range(first, first + num_windows), weight)
        first += num_windows
    order = Order([], spans, 3)
    drawn = [order.draw(position) for position in range(num_passes * len(order))]
    return [[one.window for one in drawn if one.pass_ == pass_] for pass_ in range(num_passes)]


def test_a_sessions_weight_is_the_product_of_its_datasets_its_own_and_its_modalities() -> None:
    weights = Weights(datasets={"b": 3.0}, sessions={"a/1": 0.5}, modalities={"spikes": 2.0, "traces": 5.0})
    assert session_weights(ENTRIES, weights) == {"a/1": 1.0, "a/2": 5.0, "b/1": 30.0}
    assert session_weights(ENTRIES, Weights()) == {"a/1": 1.0, "a/2": 1.0, "b/1": 1.0}


def test_in_the_turns_of_a_mix_its_own_weights_stand_before_those_of_modalities() -> None:
    weights = Weights(modalities={"spikes": 2.0, "traces": 5.0}, families={"leave_out": {"traces": 0.5}})
    assert session_weights(ENTRIES, weights, "leave_out") == {"a/1": 2.0, "a/2": 0.5, "b/1": 1.0}
    assert session_weights(ENTRIES, weights, "encoding") == {"a/1": 2.0, "a/2": 5.0, "b/1": 10.0}


def test_whole_weights_are_kept_exactly_in_every_pass() -> None:
    for one in passes(3, a=(20, 1.0), b=(7, 3.0), c=(5, 1.0), d=(9, 0.0)):
        assert Counter(one) == {**dict.fromkeys(range(20), 1), **dict.fromkeys(range(20, 27), 3)} | dict.fromkeys(
            range(27, 32), 1
        )


def test_a_weight_of_a_half_takes_every_window_once_in_two_passes_and_never_the_same_half() -> None:
    halves = passes(4, a=(40, 0.5), b=(10, 1.0))
    of_a = [{window for window in one if window < 40} for one in halves]
    assert [len(one) for one in halves] == [30] * 4 and [len(half) for half in of_a] == [20] * 4
    assert of_a[0] | of_a[1] == of_a[2] | of_a[3] == set(range(40))
    assert of_a[0] != of_a[2] and of_a[0] != set(range(20)), "a part of every stretch of time, not the first half"


def test_weights_that_are_no_fractions_are_kept_in_the_long_run() -> None:
    counts = Counter(window for one in passes(50, a=(30, 1.7), b=(11, 0.3)) for window in one)
    assert {round(counts[window] / 50, 1) for window in range(30)} == {1.7}
    assert all(abs(counts[window] / 50 - 0.3) < 0.05 for window in range(30, 41))


def test_heavy_and_light_windows_are_spread_over_a_pass() -> None:
    (one,) = passes(1, a=(300, 1.0), b=(100, 3.0))
    shares = [sum(window >= 300 for window in one[part : part + 100]) / 100 for part in range(0, 600, 100)]
    assert all(0.3 < share < 0.7 for share in shares)


def test_training_samples_come_by_the_weights_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tiny_store(tmp_path_factory.getbasetemp())
    run = tiny_run()
    weighted = config.RunConfig(
        seed=run.seed,
        model=run.model,
        train=run.train,
        data=DataConfig(stride_s=0.5, weights=Weights(sessions={"d1/blind": 2.0}, modalities={"traces": 0.0})),
    )
    samples = TrainingSamples(store, weighted, model_config(weighted))
    ids = [one["session_id"] for one in Store(store).entries]
    drawn = [samples.order.draw(position).window for position in range(samples.order.num_tickets())]
    counts = Counter(ids[samples.windows.locate(window)[0]] for window in drawn)
    assert counts == {"full": 23, "blind": 46, "still": 23}


def test_a_name_that_the_store_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.weights\.sessions: the store has no 'a/3'\. Did you mean a/2\?"):
        session_weights(ENTRIES, Weights(sessions={"a/3": 2.0}))
    with pytest.raises(ConfigError, match=r"data\.weights\.datasets: the store has no 'visual'\. It has a, b\."):
        session_weights(ENTRIES, Weights(datasets={"visual": 2.0}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"modalities": {"spike": 2}}, r"data\.weights\.modalities: 'spike' is not a modality\. Did you mean spikes\?"),
        (
            {"families": {"encoding": {"trace": 2}}},
            r"families\.encoding: 'trace' is not a modality\. Did you mean traces",
        ),
        (
            {"families": {"encoding": {"traces": -1}}},
            r"families\.encoding\.traces = -1\.0 must be between 0 and 1000\.",
        ),
        (
            {"families": {"leave_out": {"traces": 1}}},
            r"families: 'leave_out' is not in train\.families\. It has co_smoothing, forecasting, encoding",
        ),
        ({"sessions": {"a/1": -1}}, r"data\.weights\.sessions\.a/1 = -1\.0 must be between 0 and 1000\."),
        (
            {"dataset": {"a": 1}},
            r"data\.weights\.dataset = .* is not a known key\. Did you mean data\.weights\.datasets",
        ),
    ],
)
def test_wrong_weights_are_refused(tmp_path: Path, weights: dict[str, Any], message: str) -> None:
    (tmp_path / "run.yaml").write_text(safe_dump({"data": {"weights": weights}}))
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "run.yaml")


def test_turns_in_which_no_session_has_a_weight_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    store, run = tiny_store(tmp_path_factory.getbasetemp()), tiny_run()
    data = DataConfig(weights=Weights(families={"encoding": {"spikes": 0.0, "traces": 0.0}}))
    with pytest.raises(ConfigError, match=r"whose weight is more than 0 in the turns of encoding\. Shorten"):
        TrainingSamples(store, config.RunConfig(model=run.model, train=run.train, data=data), model_config(run))


def test_weights_of_nothing_leave_no_window(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tiny_store(tmp_path_factory.getbasetemp())
    run = tiny_run()
    data = DataConfig(weights=Weights(datasets={"d1": 0.0}))
    with pytest.raises(ConfigError, match=r"has no window of 1.0 s in the train split whose weight is more than 0"):
        TrainingSamples(store, config.RunConfig(model=run.model, train=run.train, data=data), model_config(run))
