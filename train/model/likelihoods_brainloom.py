"""What a readout says of a sample: its distribution given four numbers, for counts, traces, behaviour and events.

In: readouts (location, log scale, shape, zero logit) of samples, the null of their sources, the modality of each.
Out: expected values, NLL - NLL_null in nats per value, quantiles.

A readout of zeros is the null of its family: the train split's mean rate for counts, mean 0 and variance 1 for what has
been standardised. It is a constant of the source, and what predicts the null has a loss of 0, exactly.
Everything is branch-free: each family answers for all samples, and the sample's modality chooses.
An angle is two sources, its cosine and its sine, and needs no family of its own.

Shapes: everything broadcasts to (B, Q, P): batch, queries, samples per token; M modalities that are predicted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_brainloom import LIKELIHOODS, MODALITIES, PREDICTED

NUM_READOUTS = 4
LOG_SCALE_LIMIT = 3.0  # a log standard deviation stays within +-3 of the train split's
MAX_COUNT = 254  # where counts saturate (prep/FORMAT.md)
NULL_DISPERSION, LOG_DISPERSION_LIMIT = 0.3, 2.0  # of the negative binomial: 0.04 to 2.2
NULL_FREEDOM, LOG_FREEDOM_LIMIT = 8.0, 3.0  # of Student's t: 2.3 to 122, so that the variance exists
LOG_SHAPE_LIMIT = 2.0  # of the gamma: 0.14 to 7.4, null 1
AT_FLOOR = 1e-3  # standard deviations above the floor that still count as zero
MIN_HEIGHT = 0.05  # of the mean above the floor, where a source's mean is at or below zero


def bounded(x: Tensor, limit: float) -> Tensor:
    """x near zero, within +-limit far from it."""
    return limit * torch.tanh(x / limit)


@dataclass(frozen=True)
class Readout:
    """What a distribution is made of.

    Attributes:
        location, log_std, shape, zero_logit: what the model read out, zeros are the null; `log_std` is the log standard
            deviation, in those of the train split, within its limit.
        null: of the source. Counts: the train split's mean per bin, positive. Zero-inflated gamma: how far the train
            split's mean lies above physical zero, in standard deviations (mean / scale). Others do not use it.
        rate_limit: largest |log mean - log null mean| of counts and gammas.
    """

    location: Tensor
    log_std: Tensor
    shape: Tensor
    zero_logit: Tensor
    null: Tensor
    rate_limit: float

    @classmethod
    def of(cls, numbers: Tensor, null: Tensor, rate_limit: float) -> "Readout":
        """Of numbers (…, R) as the model read them out; those that no family needs are zero."""
        location, log_scale, shape, zero_logit = F.pad(numbers, (0, NUM_READOUTS - numbers.shape[-1])).unbind(-1)
        return cls(location, bounded(log_scale, LOG_SCALE_LIMIT), shape, zero_logit, null, rate_limit)

    def of_null(self) -> "Readout":
        """The null of the same sources; of the same shape, so that the same arithmetic gives the same bits."""
        zero = torch.zeros_like(self.location)
        return replace(self, location=zero, log_std=zero, shape=zero, zero_logit=zero)


class Likelihood:
    """A family of distributions."""

    def expected(self, readout: Readout) -> Tensor:
        """Mean."""
        raise NotImplementedError

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        """Negative log likelihood in nats, up to what depends on the values alone."""
        raise NotImplementedError

    def quantile(self, level: float, readout: Readout) -> Tensor:
        """The smallest value that is exceeded with a probability of at most 1 - level."""
        raise NotImplementedError

    def excess_nats(self, values: Tensor, readout: Readout) -> Tensor:
        """NLL - NLL_null in nats per value."""
        return self.nll(values, readout) - self.nll(values, readout.of_null())


class Poisson(Likelihood):
    """Counts whose variance is their mean; of typed events, a marked point process.

    Where the intensities l_i of all types i are constant within a bin (Daley & Vere-Jones 2003, chapter 7), the NLL of
    a marked point process is the integral of all intensities minus the sum of log l_i(t) over events (t, i): that of
    Poisson counts, up to what depends on the counts alone. It is the NLL of the time to each event, whose hazard is the
    sum of all l_i, times a categorical over types, l_i over that sum (competing risks; Prentice 1978). See
    events_brainloom.py.
    """

    def expected(self, readout: Readout) -> Tensor:
        return readout.null * self.growth(readout).exp()

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        return self.expected(readout) - values * (readout.null.log() + self.growth(readout))

    def excess_nats(self, values: Tensor, readout: Readout) -> Tensor:
        """Without the terms that the null has too."""
        growth = self.growth(readout)
        return readout.null * torch.expm1(growth) - values * growth

    def quantile(self, level: float, readout: Readout) -> Tensor:
        def log_pmf(count: int) -> Tensor:
            return -self.nll(torch.full_like(readout.location, count), readout) - math.lgamma(count + 1)

        return count_quantile(level, log_pmf)

    @staticmethod
    def growth(readout: Readout) -> Tensor:
        """Log of the mean over that of the null."""
        return bounded(readout.location, readout.rate_limit)


class NegativeBinomial(Poisson):
    """Counts whose variance is mean + dispersion * mean^2: Poisson counts of a rate that is gamma distributed."""

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        log_size = -math.log(NULL_DISPERSION) - bounded(readout.shape, LOG_DISPERSION_LIMIT)
        size, log_odds = log_size.exp(), readout.null.log() + self.growth(readout) - log_size
        choices = torch.lgamma(size) - torch.lgamma(values + size)
        return choices + (values + size) * F.softplus(log_odds) - values * log_odds

    def excess_nats(self, values: Tensor, readout: Readout) -> Tensor:
        return Likelihood.excess_nats(self, values, readout)


class Gaussian(Likelihood):
    """Values around a mean."""

    def expected(self, readout: Readout) -> Tensor:
        return readout.location

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        return 0.5 * ((values - readout.location) * torch.exp(-readout.log_std)) ** 2 + readout.log_std

    def excess_nats(self, values: Tensor, readout: Readout) -> Tensor:
        """As the difference of squares, where large values lose fewer digits."""
        return 0.5 * (((values - readout.location) * torch.exp(-readout.log_std)) ** 2 - values**2) + readout.log_std

    def quantile(self, level: float, readout: Readout) -> Tensor:
        return readout.location + normal_quantile(level) * readout.log_std.exp()


class Calcium(Gaussian):
    """Values around a mean of which a part is an integral of a rate that grows by factors.

    What multiplies in the brain adds up in the log of the rate; calcium of a unit whose rate is a product of tuning
    curves is no sum of any, and no readout that is linear in features would find it. The third number is the rate's
    growth over its mean, integrated (readout_brainloom.py); it adds to the location.
    """

    def expected(self, readout: Readout) -> Tensor:
        return readout.location + readout.shape

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        return super().nll(values, replace(readout, location=self.expected(readout)))

    def excess_nats(self, values: Tensor, readout: Readout) -> Tensor:
        return super().excess_nats(values, replace(readout, location=self.expected(readout)))

    def quantile(self, level: float, readout: Readout) -> Tensor:
        return super().quantile(level, replace(readout, location=self.expected(readout)))


class StudentT(Gaussian):
    """Values around a mean, with outliers; `log_std` is of the standard deviation, whatever the degrees of freedom."""

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        freedom, log_scale = self._freedom(readout)
        standard = (values - readout.location) * torch.exp(-log_scale)
        power = torch.lgamma(0.5 * freedom) - torch.lgamma(0.5 * (freedom + 1)) + 0.5 * freedom.log()
        return power + log_scale + 0.5 * (freedom + 1) * torch.log1p(standard**2 / freedom)

    def excess_nats(self, values: Tensor, readout: Readout) -> Tensor:
        return Likelihood.excess_nats(self, values, readout)

    def quantile(self, level: float, readout: Readout) -> Tensor:
        freedom, log_scale = self._freedom(readout)
        return readout.location + student_quantile(level, freedom) * log_scale.exp()

    @staticmethod
    def _freedom(readout: Readout) -> tuple[Tensor, Tensor]:
        """Degrees of freedom, and the log scale that gives them the standard deviation."""
        above_two = (NULL_FREEDOM - 2) * bounded(readout.shape, LOG_FREEDOM_LIMIT).exp()
        return above_two + 2, readout.log_std - 0.5 * torch.log1p(2 / above_two)


class ZeroInflatedGamma(Likelihood):
    """Values that are zero, or above it as a gamma distribution says (Wei 2020): deconvolved or sparse traces.

    Values are standardised, so physical zero, the floor, is at -null. With h = null - AT_FLOOR, what is at most -h
    is zero, and for what is above, value + h is gamma distributed with mean 2 h exp(location). The null is half zeros,
    half exponential, with the train split's mean. A density beside an atom: nats are of the two together.
    """

    def expected(self, readout: Readout) -> Tensor:
        growth = Poisson.growth(readout).exp()
        return self._height(readout) * (2 * torch.sigmoid(-readout.zero_logit) * growth - 1)

    def nll(self, values: Tensor, readout: Readout) -> Tensor:
        above = values + self._height(readout)
        log_above = torch.where(above > 0, above, 1.0).log()
        log_shape, log_mean = bounded(readout.shape, LOG_SHAPE_LIMIT), self._log_mean(readout)
        shape = log_shape.exp()
        gamma = torch.lgamma(shape) - shape * (log_shape - log_mean) + shape * above * torch.exp(-log_mean)
        gamma = gamma - (shape - 1) * log_above - F.logsigmoid(-readout.zero_logit)
        return torch.where(above > 0, gamma, -F.logsigmoid(readout.zero_logit))

    def quantile(self, level: float, readout: Readout) -> Tensor:
        zero = torch.sigmoid(readout.zero_logit)
        shape = bounded(readout.shape, LOG_SHAPE_LIMIT).exp()
        within = ((level - zero) / (1 - zero)).clamp(0, 1).nan_to_num()
        above = gamma_quantile(within, shape) * self._log_mean(readout).exp() / shape
        return torch.where(within > 0, above, 0.0) - self._height(readout)

    @staticmethod
    def _height(readout: Readout) -> Tensor:
        """How far the train split's mean lies above what counts as zero."""
        return readout.null.clamp(min=MIN_HEIGHT) - AT_FLOOR

    def _log_mean(self, readout: Readout) -> Tensor:
        return (2 * self._height(readout)).log() + Poisson.growth(readout)


def normal_quantile(level: float) -> float:
    """Of the standard normal distribution."""
    return float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))


def student_quantile(level: float, freedom: Tensor) -> Tensor:
    """Of Student's t with more than two degrees of freedom (Hill 1970, algorithm 396)."""
    tails, normal = 2 * min(level, 1 - level), normal_quantile(min(level, 1 - level))
    a = 1 / (freedom - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * (a * math.pi / 2).sqrt() * freedom
    y = (d * tails) ** (2 / freedom)
    c = c + torch.where(freedom < 5, 0.3 * (freedom - 4.5) * (normal + 0.6), 0.0)
    c = (((0.05 * d * normal - 5) * normal - 7) * normal - 2) * normal + b + c
    square = normal**2
    inner = (((((0.4 * square + 6.3) * square + 36) * square + 94.5) / c - square - 3) / b + 1) * normal
    near = torch.expm1(a * inner**2)
    far = 1 / (((freedom + 6) / (freedom * y) - 0.089 * d - 0.822) * (freedom + 2) * 3) + 0.5 / (freedom + 4)
    far = (far * y - 1) * (freedom + 1) / (freedom + 2) + 1 / y
    size = (freedom * torch.where(y > 0.05 + a, near, far)).sqrt()
    return size if level > 0.5 else -size


def gamma_quantile(level: Tensor, shape: Tensor) -> Tensor:
    """Of the gamma distribution of scale 1, by bisection of its logarithm."""
    low, high = torch.full_like(shape, -60.0), torch.full_like(shape, 6.0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        below = torch.special.gammainc(shape, middle.exp()) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high.exp()


def count_quantile(level: float, log_pmf: Callable[[int], Tensor]) -> Tensor:
    """The smallest count whose cumulative probability reaches the level, at most MAX_COUNT."""
    below = log_pmf(0).exp()
    count = torch.zeros_like(below)
    for k in range(1, MAX_COUNT + 1):
        count = count + (below < level).to(count.dtype)
        below = below + log_pmf(k).exp()
    return count


POISSON = Poisson()
FAMILIES: dict[str, Likelihood] = {
    "poisson": POISSON,
    "point_process": POISSON,  # one and the same, so that it is computed once
    "negative_binomial": NegativeBinomial(),
    "gaussian": Gaussian(),
    "calcium": Calcium(),
    "student_t": StudentT(),
    "zero_inflated_gamma": ZeroInflatedGamma(),
}
assert {name for names in LIKELIHOODS.values() for name in names} == set(FAMILIES)


class Likelihoods:
    """The family of each modality; all methods choose by the samples' modality (B, Q, 1), an index into MODALITIES."""

    def __init__(self, names: dict[str, str]) -> None:
        """`names`: the family of each modality; of one that is not named the default."""
        chosen = {modality: FAMILIES[names.get(modality, LIKELIHOODS[modality][0])] for modality in PREDICTED}
        self._families = [
            (family, tuple(MODALITIES.index(name) for name, other in chosen.items() if other is family))
            for family in dict.fromkeys(chosen.values())
        ]

    def _choose(self, modality: Tensor, answer: Callable[[Likelihood, Tensor], Tensor]) -> Tensor:
        chosen: Tensor | None = None
        for family, own in reversed(self._families):
            mine = torch.stack([modality == i for i in own]).any(0)
            answered = answer(family, mine)
            chosen = answered if chosen is None else torch.where(mine, answered, chosen)
        assert chosen is not None
        return chosen

    def expected(self, readout: Readout, modality: Tensor) -> Tensor:
        """Expected values: counts per bin, or standardised values."""
        return self._choose(modality, lambda family, _: family.expected(readout))

    def excess_nats(self, values: Tensor, readout: Readout, modality: Tensor) -> Tensor:
        """NLL - NLL_null in nats per value; values must be finite, and are shown to their own family alone."""
        return self._choose(modality, lambda family, mine: family.excess_nats(torch.where(mine, values, 0.0), readout))

    @torch.no_grad()
    def interval(self, coverage: float, readout: Readout, modality: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper quantile between which a value lies with the probability `coverage`; for counts at least."""
        if not 0 < coverage < 1:
            raise ValueError(f"coverage = {coverage} must lie between 0 and 1, for instance 0.9.")
        lower, upper = 0.5 * (1 - coverage), 0.5 * (1 + coverage)
        return (
            self._choose(modality, lambda family, _: family.quantile(lower, readout)),
            self._choose(modality, lambda family, _: family.quantile(upper, readout)),
        )


def sum_by_modality(excess_BQP: Tensor, mask_BQP: Tensor, modality_BQ: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of nats and numbers of values, both (B, M)."""
    per_query = torch.where(mask_BQP, excess_BQP, 0.0).sum(-1)
    observed = mask_BQP.sum(-1).to(per_query.dtype)
    is_modality = torch.stack([modality_BQ == MODALITIES.index(name) for name in PREDICTED], -1).to(per_query.dtype)
    return torch.einsum("bq,bqm->bm", per_query, is_modality), torch.einsum("bq,bqm->bm", observed, is_modality)
