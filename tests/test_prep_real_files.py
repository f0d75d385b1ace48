"""Real recordings: what each becomes, and A2929's numbers recomputed from HDF5.

In: the folder BRAINLOOM_NWB_DIR, or ../shared/nwb; skipped where it is not. Out: nothing.
"""

import argparse
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import zarr

import prep.coverage
import prep.recipe
from prep.nwb.session import UnusableFile, plan_session
from prep.plan import Found, PlannedStream, SessionPlan
from prep.recipe import Recipe
from prep.settings import to_ns
from prep.text_table import table_lines

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
SCORE = ROOT.parent / "shared" / "science" / "score.py"
HEAD_DIRECTION = FOLDER / "head_direction_A2929.nwb"
FILES = sorted(path for path in FOLDER.glob("*.nwb*")) if FOLDER.is_dir() else []

pytestmark = pytest.mark.skipif(not FILES, reason=f"no real recordings at {FOLDER}; set BRAINLOOM_NWB_DIR")

PLANNED = {  # file: streams that it gives, among others
    "allen_layout_truncated": {"running_speed", "eye_ellipse_fits"},
    "events_extension": {"events"},
    "fiber_photometry_extension": {"fiber_photometry_response_series"},
    "foraging_697929": {"left_lick_time", "right_lick_time", "left_reward_delivery_time"},
    "foraging_717121": {"left_lick_time", "right_lick_time", "left_reward_delivery_time"},
    "head_direction_A2929": {"spikes", "position_x", "position_y", "position_z"}
    | {f"compass_direction_{name}" for name in ("rx", "ry", "rz")},
    "miniscope_A0634": {"roi_response_series"},
    "motor_cortex_anm00239123": {"spikes"},
    "rat_hippocampus_stub": {"spikes"},
    "two_photon_15_rois": {"deconvolved"},
    "two_photon_suite2p": {"deconvolved"},
}
REFUSED = {  # file: what its one line says
    "electrodes_2.6.0": "nothing to use: no units",
    "empty": "an HDF5 file with nothing in it",
    "patch_clamp": "intracellular recordings only",
    "retina_nwb1": "NWB version 1.0.6, which is NWB 1; only NWB 2 is read. Convert it to NWB 2",
}
MAX_RSS_MB = 700
READ_ALL = """
import re, sys
from pathlib import Path
from prep.nwb.session import plan_session
from prep.plan import PrepError
from prep.recipe import Recipe
try:
    session = plan_session(Path(sys.argv[1]), Recipe(), "d1")
    for item in session.streams:
        item.reader.read(0, item.spec.num_tokens)
    for stimulus in session.stimuli:
        stimulus.reader.read(0, stimulus.shape[0])
except PrepError:
    pass  # a file that is refused, too, must be refused within the memory
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024)
"""


def a2929() -> SessionPlan:
    recipe = prep.recipe.load(ROOT / "prep" / "recipes" / "head_direction_A2929.yaml")
    return plan_session(HEAD_DIRECTION, recipe, "d1")


def stream(session: SessionPlan, name: str) -> PlannedStream:
    return next(item for item in session.streams if item.spec.name == name)


def stem(path: Path) -> str:
    return path.name.split(".nwb")[0]


@pytest.fixture(scope="module")
def census() -> dict[str, SessionPlan | UnusableFile]:
    """What each file becomes, by its stem."""
    outcomes: dict[str, SessionPlan | UnusableFile] = {}
    for path in FILES:
        try:
            outcomes[stem(path)] = plan_session(path, Recipe(), "d1")
        except UnusableFile as error:
            outcomes[stem(path)] = error
    return outcomes


def session_of(census: dict[str, SessionPlan | UnusableFile], name: str) -> SessionPlan:
    outcome = census[name]
    assert isinstance(outcome, SessionPlan), f"{name} is refused: {outcome}"
    return outcome


def row_of(session: SessionPlan, path: str) -> Found:
    (row,) = [row for row in session.coverage if row.path == path]
    return row


def typed_objects(path: Path) -> set[str]:
    """Every object with a neurodata_type, found without the reader: by h5py's own walk, or by the folder's files."""
    found: set[str] = set()
    if path.is_dir():
        for attributes in path.rglob(".zattrs"):
            if "neurodata_type" in json.loads(attributes.read_text()):
                found.add(attributes.parent.relative_to(path).as_posix())
        found = {"/" if name == "." else name for name in found}
    else:
        with h5py.File(path) as file:
            file.visititems(lambda name, item: found.add(name) if "neurodata_type" in item.attrs else None)
            found |= {"/"} if "neurodata_type" in file.attrs else set()
    return {name for name in found if not name.startswith("specifications")}


def test_every_file_gives_a_session_or_a_reason_and_accounts_for_all_that_is_in_it(
    census: dict[str, SessionPlan | UnusableFile], capsys: pytest.CaptureFixture[str]
):
    rows, problems = [], []
    for path in FILES:
        outcome, expected = census[stem(path)], typed_objects(path)
        is_session = isinstance(outcome, SessionPlan)
        told = ", ".join(item.spec.name for item in outcome.streams) if is_session else f"refused: {outcome}"
        objects = [row for row in outcome.coverage if row.neurodata_type != "link"]
        num_used = sum(row.used_as is not None for row in objects)
        rows.append((path.name, told[:90], str(num_used), str(len(objects) - num_used), str(len(expected))))
        if sorted(row.path for row in objects) != sorted(expected):
            problems.append(f"{path.name}: differs in {expected ^ {row.path for row in objects}}")
        problems += [
            f"{path.name}: {row.path} has no reason" for row in outcome.coverage if not (row.used_as or row.reason)
        ]
        problems += [
            f"{path.name}: {row.path} is used, but refused" for row in objects if row.used_as and not is_session
        ]
        if "\n" in str(outcome) and not is_session:
            problems.append(f"{path.name}: more than one line")
    header = ("file", "streams", "used", "skipped", "objects")
    with capsys.disabled():
        print("\n" + "\n".join(table_lines(header, rows, right={"used", "skipped", "objects"})), file=sys.stderr)
    assert not problems, "\n".join(problems)
    assert sum(isinstance(outcome, SessionPlan) for outcome in census.values()) >= min(11, len(FILES) - len(REFUSED))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_file_that_cannot_be_used_says_why_in_one_line(census: dict[str, SessionPlan | UnusableFile], name: str):
    outcome = census[name]
    assert isinstance(outcome, UnusableFile)
    assert str(outcome).startswith(REFUSED[name])


@pytest.mark.parametrize("name", sorted(PLANNED))
def test_a_session_has_its_streams_and_they_can_be_read(census: dict[str, SessionPlan | UnusableFile], name: str):
    session = session_of(census, name)
    assert session.streams
    assert {item.spec.name for item in session.streams} >= PLANNED[name]
    num_events = sum(item.spec.num_tokens for item in events_of(session))  # they travel with the plan
    assert len(pickle.dumps(session)) < 1_000_000 + 24 * num_events
    for item in session.streams:
        assert item.reader.read(0, item.spec.num_tokens).shape == item.spec.shape
        assert item.start_ns.shape == (item.spec.num_tokens,)
        assert (np.diff(item.start_ns) >= 0).all()


# Not by getrusage: a child's begins at what its parent had when it was started.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is told by Linux alone")
def test_every_file_is_read_in_little_memory(capsys: pytest.CaptureFixture[str]):
    commands = [[sys.executable, "-W", "error", "-c", READ_ALL, str(path)] for path in FILES]
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(lambda c: subprocess.run(c, capture_output=True, text=True, check=False, cwd=ROOT), commands)
        )
    assert [told.stderr for told in done if told.returncode] == []
    peaks_mb = {path.name: float(told.stdout) for path, told in zip(FILES, done, strict=True)}
    with capsys.disabled():
        rows = [(name, f"{peak_mb:.0f}") for name, peak_mb in peaks_mb.items()]
        print("\n" + "\n".join(table_lines(("file", "peak_rss_mb"), rows, right={"peak_rss_mb"})), file=sys.stderr)
    assert {name: peak_mb for name, peak_mb in peaks_mb.items() if peak_mb >= MAX_RSS_MB} == {}


def test_the_broken_units_of_the_allen_layout_are_named_and_the_rest_is_kept(
    census: dict[str, SessionPlan | UnusableFile],
):
    session = session_of(census, "allen_layout_truncated")
    assert "units" in {finding.path for finding in session.refused}
    told = row_of(session, "units")
    assert told.used_as is None
    assert "spike_times_index points to spike 987,786" in told.reason
    assert "get the whole recording" in told.reason
    tables = [row for row in session.coverage if row.path.startswith("intervals/") and row.path.count("/") == 1]
    presentations = [row for row in tables if row.path.endswith("_presentations")]
    assert len(presentations) == 8
    assert all(row.used_as for row in presentations), [row for row in presentations if not row.used_as]


def events_of(session: SessionPlan) -> list[PlannedStream]:
    return [item for item in session.streams if item.spec.kind == "event"]


@pytest.mark.parametrize("name", ["left_lick_time", "right_lick_time", "left_reward_delivery_time"])
@pytest.mark.parametrize("recording", ["foraging_697929.nwb", "foraging_717121.nwb.zarr"])
def test_events_on_a_far_clock_are_exact_to_the_nanosecond(
    census: dict[str, SessionPlan | UnusableFile], recording: str, name: str
):
    path = FOLDER / recording
    session = session_of(census, stem(path))
    if path.is_dir():
        time_s = zarr.open_array(path / "acquisition" / name / "timestamps", mode="r", zarr_format=2)[:]
    else:
        with h5py.File(path) as file:
            time_s = file[f"acquisition/{name}/timestamps"][()]
    assert time_s[0] > 4e5
    planted = sorted(exact_ns(t) for t in time_s)
    (found,) = [
        item.start_ns[item.types == item.spec.types.index(kind)].tolist()
        for item in events_of(session)
        for kind in item.spec.types
        if item.types is not None and kind in (name, name.removesuffix("_time"))
    ]
    assert found == planted


@pytest.mark.parametrize(
    ("name", "told"),
    [("foraging_697929", "its only time stamp is not a number"), ("foraging_717121", "its data are empty")],
)
def test_a_stream_without_a_time_is_skipped(census: dict[str, SessionPlan | UnusableFile], name: str, told: str):
    row = row_of(session_of(census, name), "acquisition/optogenetics_time")
    assert (row.used_as, row.reason) == (None, told)


def test_the_events_of_an_extension_are_events(census: dict[str, SessionPlan | UnusableFile]):
    (item,) = events_of(session_of(census, "events_extension"))
    assert item.types is not None
    assert len(item.types) == item.spec.num_tokens > 0


def test_fibre_photometry_is_a_trace_of_its_fibres(census: dict[str, SessionPlan | UnusableFile]):
    session = session_of(census, "fiber_photometry_extension")
    (item,) = session.streams
    assert (item.spec.kind, item.spec.modality) == ("trace", "traces")
    assert item.spec.num_sources == len(session.units.unit_key) > 0
    assert set(session.units.kind) == {"fiber"}


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


@pytest.mark.parametrize(
    ("series", "name"), [((), "Deconvolved"), (("processing/ophys/Fluorescence/Fluorescence",), "Fluorescence")]
)
def test_the_wrong_axis_of_suite2p_is_transposed(series: tuple[str, ...], name: str):
    path = FOLDER / "two_photon_suite2p.nwb"
    session = plan_session(path, Recipe(series=series), "d1")
    (item,) = session.streams
    assert item.spec.origin.endswith(f"/{name}")
    with h5py.File(path) as file:
        data = file[f"{item.spec.origin}/data"][()]
    assert data.shape == (219, 2000)
    assert np.array_equal(item.reader.read(0, item.spec.num_tokens)[:, :, 0], data.T)
    assert [finding.code for finding in session.findings] == ["wrong-axis"]


def test_one_of_three_series_of_15_rois_is_chosen():
    session = plan_session(FOLDER / "two_photon_15_rois.nwb", Recipe(), "d1")
    series = {row.path.rsplit("/", 1)[-1]: row for row in session.coverage if row.neurodata_type == "RoiResponseSeries"}
    assert series["Deconvolved"].used_as == "deconvolved"
    for name in ("RoiResponseSeries", "Neuropil"):
        assert series[name].reason == "same cells as processing/ophys/Fluorescence/Deconvolved"
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
