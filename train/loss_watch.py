"""Where the loss stands out: a spike is a loss far above what its turn usually has, several steps in a row.

In: the loss of each step, the same on all ranks. Out: the step with which a spike began, once it has lasted enough.
"""

from collections import defaultdict, deque
from statistics import fmean, median

from train.config import FaultConfig, Turn

USUAL = 64  # losses of a turn that are remembered
ENOUGH = 8  # of them, until a loss is judged by them


class LossWatch:
    """Losses of each turn apart, since encoding is not as hard as decoding; a loss of a spike is not remembered."""

    def __init__(self, config: FaultConfig) -> None:
        self._config = config
        self._forget()

    def _forget(self) -> None:
        self._usual: defaultdict[Turn, deque[float]] = defaultdict(lambda: deque(maxlen=USUAL))
        self._high: list[int] = []  # the steps in a row whose loss was high

    def spike(self, step: int, turn: Turn, loss: float) -> int | None:
        """The first step of a spike that ends here, or None. After a spike all is judged anew."""
        if self._config.spike_factor == 0:
            return None
        usual = self._usual[turn]
        if not self._is_high(usual, loss):
            if len(usual) >= ENOUGH:
                self._high.clear()
            usual.append(loss)
            return None
        self._high.append(step)
        if len(self._high) < self._config.spike_steps:
            return None
        begun = self._high[0]
        self._forget()
        return begun

    def _is_high(self, usual: deque[float], loss: float) -> bool:
        if len(usual) < ENOUGH:
            return False
        middle = median(usual)
        spread = fmean(abs(one - middle) for one in usual)
        return loss > middle + self._config.spike_factor * spread
