"""What train relies on in a token store, on stores that prep writes: the keys of the catalog, the statistics, the keys.

In: a hand-built store, and the golden one. Out: what a reader may take for granted.
"""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from train_builders import ROOT, tiny_store

from prep.settings import COUNT_MISSING, FEATURE_NAMES, MODALITIES, SPLITS
from prep.store import Store
from train import modalities
from train.model import configuration_brainloom
from train.model.configuration_brainloom import BrainloomConfig

GOLDEN = ROOT / "tests" / "golden"
ENTRY = {"dataset_id", "session_id", "subject_id", "path", "licence", "num_units", "splits", "streams", "sources"}
STREAM = {
    *("name", "kind", "modality", "num_sources", "samples_per_token", "duration_ns", "sample_ns"),
    *("channels", "first_unit", "stimulus"),
}


def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    golden = [path.parent for path in sorted(GOLDEN.rglob("catalog.json"))] if GOLDEN.exists() else []
    return [Store(path) for path in [tiny_store(tmp_path_factory.getbasetemp()), *golden]]


def test_the_catalog_names_all_that_train_asks_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    for store in stores(tmp_path_factory):
        assert store.catalog["features"]["names"] == list(FEATURE_NAMES)
        assert len(store.digest()) == 64
        for entry in store.entries:
            assert entry.keys() >= ENTRY
            assert all(stream.keys() >= STREAM for stream in entry["streams"])
            assert all(stream["modality"] in MODALITIES for stream in entry["streams"])
            assert all(label in SPLITS and start < stop for start, stop, label in entry["splits"])
            assert all("file" in source for source in entry["sources"])


def test_a_stream_that_points_into_pixels_finds_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    for store in stores(tmp_path_factory):
        for index, entry in enumerate(store.entries):
            for description in entry["streams"]:
                if description["kind"] == "frames":
                    pixels = store.frames(description["stimulus"])
                    stream = store.session(index).stream(description["name"])
                    shown = stream.read(slice(0, description["num_tokens"]))
                    assert shown.min() >= -1 and shown.max() < pixels.spec.shape[0]
                    assert pixels.read(0, 1).dtype == np.uint8


def test_statistics_are_finite_and_a_null_rate_is_positive(tmp_path_factory: pytest.TempPathFactory) -> None:
    for store in stores(tmp_path_factory):
        for index, entry in enumerate(store.entries):
            session = store.session(index)
            if entry["num_units"]:
                features = session.array("units/features")
                assert features.shape == (entry["num_units"], len(FEATURE_NAMES)) and np.isfinite(features).all()
            for description in entry["streams"]:
                if description["kind"] == "frames":
                    continue
                stream = session.stream(description["name"])
                assert stream.mean.shape == stream.scale.shape == (description["num_sources"],)
                assert stream.mean.dtype == stream.scale.dtype == np.float32
                assert np.isfinite(stream.mean).all() and (stream.scale > 0).all()
                assert description["kind"] != "counts" or (stream.mean > 0).all()


def test_units_belong_to_streams_without_a_gap(tmp_path_factory: pytest.TempPathFactory) -> None:
    for store in stores(tmp_path_factory):
        keys: list[str] = []
        for index, entry in enumerate(store.entries):
            own = store.session(index).text("units/unit_key") if entry["num_units"] else []
            assert len(own) == entry["num_units"]
            keys += own
            for description in entry["streams"]:
                first = description["first_unit"]
                if first is not None:
                    assert description["modality"] in ("spikes", "traces")
                    assert first >= 0 and first + description["num_sources"] <= entry["num_units"]
                else:
                    assert len(description["channels"]) == description["num_sources"]
        assert len(set(keys)) == len(keys), "a unit_key is one row of the unit table"


def test_clocks_are_in_order_and_splits_do_not_overlap(tmp_path_factory: pytest.TempPathFactory) -> None:
    for store in stores(tmp_path_factory):
        for index, entry in enumerate(store.entries):
            blocks = sorted((start, stop) for start, stop, _ in entry["splits"])
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(blocks))
            for description in entry["streams"]:
                start_ns = store.session(index).stream(description["name"]).start_ns
                assert start_ns.dtype == np.int64 and (np.diff(start_ns) >= 0).all()
                assert len(start_ns) == description["num_tokens"]


def test_train_and_prep_mean_the_same_by_a_modality_and_a_missing_count() -> None:
    assert (*modalities.MODALITIES, "session") == configuration_brainloom.MODALITIES, "the last is the model's own"
    assert modalities.MODALITIES[: len(MODALITIES)] == MODALITIES, "an index of the store is one of the model"
    assert configuration_brainloom.PREDICTED == modalities.PREDICTED
    assert configuration_brainloom.COUNTED == modalities.COUNTED
    assert BrainloomConfig().num_unit_features == len(FEATURE_NAMES)
    assert COUNT_MISSING == 255, "train/export.py hands missing counts to strangers as NaN"


def test_the_store_is_read_without_zarr_or_dask() -> None:
    code = "import sys, prep.store; sys.exit(any(name in sys.modules for name in ('zarr', 'dask', 'pynwb', 'h5py')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
