"""The feature vector of units: 28 numbers, finite, 0 where nothing is known; classes of regions and words of sorters.

In: unit tables made up here. Out: nothing.
"""

from typing import Any

import numpy as np
import pytest

from prep.plan import Units
from prep.settings import FEATURE_NAMES, QUALITIES, REGIONS, STREAM_FEATURES
from prep.unit_features import quality_class, region_class, unit_features

NUM_STREAM = len(STREAM_FEATURES)


def units(num_units: int, **known: Any) -> Units:
    given = {
        "unit_key": [f"d/s/{unit}" for unit in range(num_units)],
        "kind": ["unit"] * num_units,
        "region": [""] * num_units,
        "quality": [""] * num_units,
        "xyz_um": np.full((num_units, 3), np.nan, np.float32),
    }
    return Units(**{**given, **known})


def column(features: np.ndarray, name: str) -> list[float]:
    return features[:, FEATURE_NAMES.index(name)].tolist()


def test_a_unit_of_which_nothing_is_known_has_zeros_but_for_its_kind() -> None:
    features = unit_features(units(2), np.zeros((2, NUM_STREAM), np.float32))
    assert features.shape == (2, 28) and features.dtype == np.float32
    assert features.sum(axis=1).tolist() == [1, 1]
    assert column(features, "is_unit") == [1, 1]


def test_the_features_of_streams_and_spikes_come_first() -> None:
    measured = np.arange(2 * NUM_STREAM, dtype=np.float32).reshape(2, NUM_STREAM) / 10
    spikes = np.array([[0.9, 0.1], [np.nan, np.nan]], np.float32)
    features = unit_features(units(2, spike_features=spikes), measured)
    assert np.array_equal(features[:, :NUM_STREAM], measured)
    assert column(features, "cv_isi") == [np.float32(0.9), 0]
    assert column(features, "burst_index") == [np.float32(0.1), 0]


def test_depth_and_width_are_zero_where_they_are_not_known() -> None:
    known = {
        "depth_um": np.array([1500, np.nan, -250, 0], np.float32),
        "waveform_ms": np.array([0.5, np.nan, 0, 1], np.float32),
    }
    features = unit_features(units(4, **known), np.zeros((4, NUM_STREAM), np.float32))
    assert column(features, "depth_mm") == [1.5, 0, -0.25, 0]
    assert column(features, "has_depth") == [1, 0, 1, 1]
    assert column(features, "log_waveform_ms") == [np.log(np.float32(0.5)), 0, 0, 0]


def test_kinds_qualities_and_regions_are_one_hot() -> None:
    known = {
        "kind": ["roi", "lfp", "fiber"],
        "quality": ["SUA", "mua", "noise"],
        "region": ["VISp", "nothing known", ""],
    }
    features = unit_features(units(3, **known), np.zeros((3, NUM_STREAM), np.float32))
    for name, expected in (
        ("is_unit", [0, 0, 0]),
        ("is_roi", [1, 0, 0]),
        ("is_lfp", [0, 1, 0]),
        ("is_fiber", [0, 0, 1]),
        ("quality_good", [1, 0, 0]),
        ("quality_mua", [0, 1, 0]),
        ("quality_noise", [0, 0, 1]),
        ("region_visual", [1, 0, 0]),
        ("region_elsewhere", [0, 1, 0]),
    ):
        assert column(features, name) == expected, name
    regions = [FEATURE_NAMES.index(f"region_{name}") for name in REGIONS]
    assert features[:, regions].sum(axis=1).tolist() == [1, 1, 0]


def test_all_features_are_finite_and_within_ten() -> None:
    measured = np.full((1, NUM_STREAM), np.inf, np.float32)
    measured[0, :3] = [np.nan, 1e6, -1e6]
    known = {"depth_um": np.array([1e9], np.float32), "waveform_ms": np.array([1e-30], np.float32)}
    features = unit_features(units(1, **known), measured)
    assert features[0, :4].tolist() == [0, 10, -10, 0]
    assert (column(features, "depth_mm"), column(features, "log_waveform_ms")) == ([10], [-10])


def test_a_session_without_units_has_no_rows() -> None:
    assert unit_features(units(0), np.zeros((0, NUM_STREAM), np.float32)).shape == (0, 28)


WORDS = {
    "good": ("good", "Good", "sua", "SU", "single", "single unit", "single-unit", "single_unit", "well isolated"),
    "mua": ("mua", "MUA", "multi", "multi-unit", "multiunit", "multi_unit"),
    "noise": ("noise", "unsorted", "artifact", "bad"),
    "": ("", "3", "fair", "goodish", "unknown"),
}


@pytest.mark.parametrize(("quality", "word"), [(quality, word) for quality, words in WORDS.items() for word in words])
def test_words_of_sorters_are_mapped(quality: str, word: str) -> None:
    assert quality_class(word) == quality
    assert quality in (*QUALITIES, "")


# Acronyms are the Allen Mouse Brain Atlas', with and without layers, and those in common use; names are English.
CLASSES = {
    "visual": "VIS VISp VISl VISal VISrl VISam VISpm VISli VISpor VISpl VISa VISp2/3 VISp6a VISpm5 VISrl4 V1 V2 V4 MT"
    "|visual cortex|Primary visual area|left V1|area V4",
    "motor": "MO MOp MOs MOp5 MOs6a MOp2/3 ALM M1 M2 PMd PMv SMA"
    "|primary motor cortex|left ALM|Motor area|premotor cortex"
    "|rostral M1",
    "somatosensory": "SS SSp SSs SSp-bfd SSp-bfd4 SSp-ll SSp-ul5 SSp-m SSp-n SSp-tr SSp-un SSs2/3 S1 S2 wS1 vS1 S1BF"
    "|barrel cortex|somatosensory cortex|barrel field",
    "cortex": "AUD AUDp AUDd AUDv AUDpo5 A1 ACA ACAd ACAv ACAd6a PL PL5 ILA ORB ORBl ORBm ORBvl2/3 AId AIv AIp RSP RSPd"
    " RSPv RSPagl6a TEa ECT PERI GU VISC VISC5 FRP FRP1 PTLp PFC mPFC ACC OFC RSC PPC CTX|auditory cortex"
    "|medial prefrontal cortex|posterior parietal cortex|cortex|insula|retrosplenial area",
    "hippocampus": "CA CA1 CA2 CA3 CA1sp CA1so CA1slm CA3sr dCA1 vCA1 DG DG-mo DG-sg DGpo SUB SUBd ProS HPF HPC ENT"
    " ENTl"
    " ENTm MEC LEC|hippocampus|Hippocampal formation|dorsal hippocampus|dentate gyrus|entorhinal cortex|dorsal CA1",
    "thalamus": "TH LGd LGd-sh LGd-co LGd-ip LGv dLGN LP LD MD VPM VPL PO POm AD ADN adn AV AM RT TRN RE MGv MGd MGB"
    " VAL"
    " VM CL CM PF PVT LH MH IGL|thalamus|Thalamus|anterodorsal nucleus of the thalamus|lateral geniculate nucleus"
    "|visual thalamus",
    "striatum": "CP CPu ACB NAc STR STRd STRv DMS DLS|striatum|caudoputamen|caudate putamen|nucleus accumbens",
    "midbrain": "SC SCs SCm SCig SCsg SCop IC ICc ICe SNr SNc VTA MB MRN PAG RN APN NOT PPN CUN DR"
    "|midbrain|superior colliculus|substantia nigra|ventral tegmental area|motor layers of the superior colliculus",
    "elsewhere": "root grey ZI BLA CEA LS MS MOB AON PIR HY LHA CB P MY OLF PAL GPe void ccg"
    "|fiber tracts|hypothalamus|subthalamic nucleus|cerebellar cortex|piriform cortex"
    "|lateral septum|brain area|olfactory bulb",
    "": "|, |-",
}


def named() -> list[tuple[str, str]]:
    rows = []
    for region, texts in CLASSES.items():
        acronyms, *names = texts.split("|")
        rows += [(region, text) for text in (*acronyms.split(), *names)]
    return rows


@pytest.mark.parametrize(("region", "text"), named())
def test_each_region_has_its_class(region: str, text: str) -> None:
    assert region_class(text) == region
    assert region in (*REGIONS, "")


def test_acronyms_count_in_short_texts_only() -> None:
    assert region_class("recorded in SC") == "midbrain"
    assert region_class("as in md notes of the second day") == "elsewhere"
