"""What the model calls what it reads: the store's modalities, and typed events, which the store has in two of them.

In: nothing. Out: names; the model has the same (train/model/configuration_brainloom.py), here they come without torch.
"""

from typing import Literal

from prep.settings import MODALITIES as STORED
from prep.settings import Modality as Stored

Modality = Stored | Literal["events"]
MODALITIES: tuple[Modality, ...] = (*STORED, "events")
PREDICTED: tuple[Modality, ...] = tuple(name for name in MODALITIES if name != "stimulus")  # that is only seen
COUNTED: tuple[Modality, ...] = ("spikes", "events")  # their values are counts in bins
