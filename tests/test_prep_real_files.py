"""Real recordings: what each becomes, and A2929's numbers recomputed from HDF5.

In: the folder BRAINLOOM_NWB_DIR, or ../shared/nwb; skipped where it is not. Out: nothing.
"""

import argparse
import importlib.util
import os
import pickle
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

import prep.coverage
import prep.recipe
from prep.nwb.session import plan_session
from prep.plan import PlannedStream, PrepError, SessionPlan
from prep.recipe import Recipe
from prep.settings import to_ns

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
SCORE = ROOT.parent / "shared" / "science" / "score.py"
HEAD_DIRECTION = FOLDER / "head_direction_A2929.nwb"
FILES = sorted(path for path in FOLDER.glob("*.nwb*")) if FOLDER.is_dir() else []

pytestmark = pytest.mark.skipif(not FILES, reason=f"no real recordings at {FOLDER}; set BRAINLOOM_NWB_DIR")

PLANNED = {  # file: streams
    "head_direction_A2929": {"spikes", "position_x", "position_y", "position_z"}
    | {f"compass_direction_{name}" for name in ("rx", "ry", "rz")},
    "miniscope_A0634": {"roi_response_series"},
    "motor_cortex_anm00239123": {"spikes"},
    "rat_hippocampus_stub": {"spikes"},
    "two_photon_15_rois": {"roi_response_series"},
    "two_photon_suite2p": {"fluorescence"},
}
REFUSED = {  # file: what its one line says
    "allen_layout_truncated": "the units table is broken: spike_times_index points to spike 987,786",
    "electrodes_2.6.0": "nothing to use",
    "empty": "an HDF5 file with nothing in it",
    "events_extension": "events are read in the next release",
    "fiber_photometry_extension": "It holds 1 FiberPhotometryResponseSeries (not read yet).",
    "foraging_697929": "6 TimeSeries (events are read in the next release)",
    "foraging_717121": "NWB-Zarr folders are not read yet",
    "patch_clamp": "intracellular recordings only",
    "retina_nwb1": "NWB version 1.0.6",
}


def a2929() -> SessionPlan:
    recipe = prep.recipe.load(ROOT / "prep" / "recipes" / "head_direction_A2929.yaml")
    return plan_session(HEAD_DIRECTION, recipe, "d1")


def stream(session: SessionPlan, name: str) -> PlannedStream:
    return next(item for item in session.streams if item.spec.name == name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_gives_a_plan_or_a_reason_in_one_line(path: Path):
    stem = path.name.split(".nwb")[0]
    try:
        session = plan_session(path, Recipe(), "d1")
    except PrepError as error:
        assert "\n" not in str(error)
        assert REFUSED.get(stem, "") in str(error)
        assert stem not in PLANNED
        return
    assert stem not in REFUSED
    assert PLANNED.get(stem, {item.spec.name for item in session.streams}) == {s.spec.name for s in session.streams}
    assert len(pickle.dumps(session)) < 2_000_000
    for item in session.streams:
        assert item.reader.read(0, item.spec.num_tokens).shape == item.spec.shape
    paths = [row.path for row in session.coverage]
    assert len(paths) == len(set(paths))
    with h5py.File(path) as file:
        assert {row.path for row in session.coverage if row.path != "/"} == typed_objects(file)


def typed_objects(file: h5py.File) -> set[str]:
    found: set[str] = set()
    file.visititems(lambda name, item: found.add(name) if "neurodata_type" in item.attrs else None)
    return {name for name in found if not name.startswith("specifications")}


def exact_ns(time_s: float) -> int:
    """Nanoseconds by exact arithmetic, so that no edge depends on how a float was rounded."""
    return round(Fraction(float(time_s)) * 10**9)


def test_spike_counts_equal_counts_made_from_hdf5_directly():
    session = a2929()
    item = stream(session, "spikes")
    counts = item.reader.read(0, item.spec.num_tokens)
    bins = counts.transpose(1, 0, 2).reshape(item.spec.num_sources, -1)  # (S, bins)
    first_bin = int(item.start_ns[0]) // 20_000_000
    expected = np.zeros_like(bins, dtype=np.int64)
    with h5py.File(HEAD_DIRECTION) as file:
        begin = 0
        for unit, end in enumerate(file["units/spike_times_index"]):
            for time_s in file["units/spike_times"][begin:end]:
                expected[unit, exact_ns(time_s) // 20_000_000 - first_bin] += 1
            begin = end
        assert np.array_equal(bins, expected)
        assert counts.sum(dtype=np.int64) == len(file["units/spike_times"]) == 98_794


def test_head_direction_equals_cos_and_sin_made_from_hdf5_directly():
    item = stream(a2929(), "head_direction")
    tokens = item.reader.read(0, item.spec.num_tokens)
    assert item.spec.channels == ("head_direction/cos", "head_direction/sin")
    with h5py.File(HEAD_DIRECTION) as file:
        angle = file["acquisition/CompassDirection/ry/data"][()]
        time_s = file["acquisition/CompassDirection/ry/timestamps"][()]
    num_tokens = -(-len(angle) // 12)
    assert tokens.shape == (num_tokens, 2, 12)
    padded = np.concatenate([angle, np.full(num_tokens * 12 - len(angle), np.nan)]).reshape(num_tokens, 12)
    assert np.array_equal(tokens[:, 0], np.cos(padded).astype(np.float32), equal_nan=True)
    assert np.array_equal(tokens[:, 1], np.sin(padded).astype(np.float32), equal_nan=True)
    assert item.start_ns.tolist() == [exact_ns(t) for t in time_s[::12]]
    # Every sample is where the token says it is, within 1 % of a sample.
    place = item.start_ns[:, None] + np.arange(12) * item.spec.sample_ns
    assert np.abs(place.reshape(-1)[: len(time_s)] - to_ns(time_s)).max() <= 0.01 * item.spec.sample_ns


def load_score() -> ModuleType:
    spec = importlib.util.spec_from_file_location("score", SCORE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SCORE.exists(), reason=f"no {SCORE}")
def test_the_splits_of_a2929_equal_the_blocks_of_the_score():
    blocks = load_score().Rec(HEAD_DIRECTION).blocks()
    splits = a2929().splits
    assert [label for _, _, label in splits] == ["train", "valid", "test"]
    for start_ns, stop_ns, label in splits:
        ((start_s, stop_s),) = blocks[label]
        assert abs(start_ns - int(to_ns(start_s))) <= 1
        assert abs(stop_ns - int(to_ns(stop_s))) <= 1


def test_the_wrong_axis_of_suite2p_is_transposed():
    path = FOLDER / "two_photon_suite2p.nwb"
    session = plan_session(path, Recipe(), "d1")
    (item,) = session.streams
    with h5py.File(path) as file:
        data = file["processing/ophys/Fluorescence/Fluorescence/data"][()]
    assert np.array_equal(item.reader.read(0, item.spec.num_tokens)[:, :, 0], data.T)
    assert [finding.code for finding in session.findings] == ["wrong-axis"]


def test_one_of_three_series_of_15_rois_is_chosen():
    session = plan_session(FOLDER / "two_photon_15_rois.nwb", Recipe(), "d1")
    series = {row.path.rsplit("/", 1)[-1]: row for row in session.coverage if row.neurodata_type == "RoiResponseSeries"}
    assert series["RoiResponseSeries"].used_as == "roi_response_series"
    for name in ("Deconvolved", "Neuropil"):
        assert series[name].reason == "same cells as processing/ophys/Fluorescence/RoiResponseSeries"
    assert len(session.units.unit_key) == 15


def test_inspect_prints_identity_coverage_streams_and_splits(capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    prep.coverage.configure(parser)
    recipe = ROOT / "prep" / "recipes" / "head_direction_A2929.yaml"
    assert prep.coverage.main(parser.parse_args([str(HEAD_DIRECTION), "--recipe", str(recipe)])) == 0
    text = capsys.readouterr().out
    for part in (
        "session  head_direction_A2929",
        "coverage (56 objects",
        "an angle: cos and sin",
        "12,000",
        "1040.189",
    ):
        assert part in text
    assert prep.coverage.main(parser.parse_args([str(FOLDER / "patch_clamp.nwb")])) == 1
    assert "refused: intracellular recordings only" in capsys.readouterr().out
