"""By how much the model is ahead of the linear baseline on the synthetic brain, with an interval.

In: made predictions of counts, window by window. Out: an interval that holds the truth, or leaves out zero.
"""

import numpy as np
from bench.science.synthetic import ahead

from train.evaluate import Row
from train.masking import Task
from train.metrics import deviance_explained


def made(noise_of_ours: float, noise_of_theirs: float) -> Row:
    """Forty windows of counts, and predictions that miss the rates by so much."""
    chance = np.random.default_rng(3)
    row = Row(Task("spikes", "co_smoothing", ("spikes",)), has_ceiling=True)
    for _ in range(40):
        rate = np.exp(chance.normal(0, 0.7, 300))
        wrong = {"prediction": noise_of_ours, "reference": noise_of_theirs}
        said = {name: rate * np.exp(chance.normal(0, size, 300)) for name, size in wrong.items()}
        row.parts.append({"truth": chance.poisson(rate).astype(float), "null": np.full(300, 1.3), **said})
    return row


def test_an_interval_holds_the_difference_and_leaves_out_zero_where_one_is_better() -> None:
    for ours, theirs in ((0.1, 0.5), (0.5, 0.1)):
        row = made(ours, theirs)
        truth, null = row.column("truth"), row.column("null")
        one, other = (deviance_explained("spikes", truth, row.column(n), null) for n in ("prediction", "reference"))
        low, high = ahead(row)
        assert low < one - other < high
        assert low > 0 if ours < theirs else high < 0
    low, high = ahead(made(0.3, 0.3))
    assert low < 0 < high
