"""Behaviour in tables with time stamps, and pose: a channel for each column, the reason for each that is none.

In: files that nwb_builders writes, with the tables of Allen's eye tracking and ndx-pose's series. Out: nothing.
"""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, reason, stream, values, with_units, write
from pynwb import NWBFile
from pynwb.behavior import SpatialSeries
from pynwb.core import DynamicTable, VectorData

from prep.nwb.session import plan_session
from prep.plan import SessionPlan
from prep.recipe import Recipe
from prep.settings import to_ns

FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", Path(__file__).parent.parent.parent / "shared" / "nwb"))
TABLE = "processing/eye_tracking/pupil_ellipse_fits"
TIME_S = 1.2e7 + np.arange(300) / 30


def eye_table(
    folder: Path, time_s: np.ndarray = TIME_S, recipe: Recipe | None = None, **columns: object
) -> SessionPlan:
    def fill(nwb: NWBFile) -> None:
        named = {"timestamps": time_s, **columns}
        data = [VectorData(name=name, description="d", data=column) for name, column in named.items()]
        module = nwb.create_processing_module("eye_tracking", "d")
        module.add(DynamicTable(name="pupil_ellipse_fits", description="d", columns=data))
        with_units([1.2e7, 1.2e7 + 1])(nwb)

    return plan_session(write(folder, fill), recipe or Recipe(), "d1")


def test_a_table_of_samples_is_one_stream_with_a_channel_per_column(tmp_path: Path):
    x, phi, box = RNG.normal(size=300), RNG.normal(size=300), RNG.normal(size=(300, 2))
    x[7] = np.nan
    session = eye_table(
        tmp_path,
        center_x=x,
        phi=phi,
        box=box,
        likely_blink=np.arange(300) % 50 == 0,
        failed=np.full(300, np.nan),
        gain=np.ones(300),
        note=["a"] * 300,
    )
    item = stream(session, "pupil_ellipse_fits")
    own = "pupil_ellipse_fits"
    columns = (f"{own}/center_x", f"{own}/phi", f"{own}/box/0", f"{own}/box/1", f"{own}/likely_blink")
    assert item.spec.channels == columns
    expected = np.column_stack([x, phi, box, np.arange(300) % 50 == 0]).astype(np.float32)
    assert np.array_equal(values(item).transpose(0, 2, 1).reshape(300, 5), expected, equal_nan=True)
    assert np.array_equal(item.start_ns, to_ns(TIME_S[::3]))
    assert (item.spec.modality, item.spec.kind, item.spec.origin) == ("behavior", "trace", TABLE)
    assert reason(session, f"{TABLE}/failed") == reason(session, f"{TABLE}/gain")
    assert reason(session, f"{TABLE}/gain") == "all its samples are the same or missing"
    assert reason(session, f"{TABLE}/note") == "text is no signal"
    used = {row.path: row.used_as for row in session.coverage}
    assert used[TABLE] == used[f"{TABLE}/timestamps"] == used[f"{TABLE}/phi"] == own


def test_an_angle_of_a_table_is_one_where_the_recipe_says_so(tmp_path: Path):
    phi, width = RNG.uniform(0, 2 * np.pi, 300), RNG.normal(size=300)
    session = eye_table(tmp_path, recipe=Recipe(angles=("phi",)), phi=phi, width=width)
    item = stream(session, "pupil_ellipse_fits")
    assert item.spec.channels == tuple(f"pupil_ellipse_fits/{name}" for name in ("phi/cos", "phi/sin", "width"))
    flat = values(item).transpose(0, 2, 1).reshape(300, 3)
    assert np.array_equal(flat, np.column_stack([np.cos(phi), np.sin(phi), width]).astype(np.float32))


def test_rows_out_of_order_are_sorted_with_their_values(tmp_path: Path):
    order = RNG.permutation(300)
    width = RNG.normal(size=300)
    session = eye_table(tmp_path, TIME_S[order], width=width[order])
    assert np.array_equal(values(stream(session, "pupil_ellipse_fits")).ravel(), width.astype(np.float32))
    assert "unsorted" in codes(session)


@pytest.mark.parametrize(
    ("time_s", "columns", "message"),
    [
        (
            TIME_S,
            {"a": np.full(300, np.nan), "b": np.ones(300)},
            "signal: a, b: all its samples are the same or missing",
        ),
        (TIME_S, {}, "none of its columns is a signal: it has time stamps only"),
        (TIME_S[:1], {"a": [1.0]}, "it has a single row"),
        (TIME_S[:0], {"a": np.zeros(0)}, "it has no rows"),
        (np.full(300, np.nan), {"a": RNG.normal(size=300)}, "none of its 300 time stamps is a number"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path: Path, time_s: np.ndarray, columns: dict, message: str):
    session = eye_table(tmp_path, time_s, **columns)
    assert message in reason(session, TABLE)
    assert [item.spec.name for item in session.streams] == ["spikes"]


def test_a_column_that_is_too_short_is_left_out_with_the_reason(tmp_path: Path):
    path = write(tmp_path, lambda nwb: None)
    with h5py.File(path, "r+") as file:
        table = file.create_group("processing/eye_tracking/fits")
        table.attrs.update({"neurodata_type": "DynamicTable", "colnames": ["timestamps", "x", "y"]})
        for name, data in {"timestamps": TIME_S, "x": RNG.normal(size=300), "y": RNG.normal(size=10)}.items():
            table[name] = data
            table[name].attrs["neurodata_type"] = "VectorData"
    session = plan_session(path, Recipe(), "d1")
    assert stream(session, "fits").spec.channels == ("fits/x",)
    assert reason(session, "processing/eye_tracking/fits/y") == "not one value for each of the 300 time stamps"


@pytest.mark.skipif(not FOLDER.exists(), reason="no shared recordings here")
def test_eye_tables_of_the_allen_layout_are_read_and_the_empty_one_says_why():
    path = FOLDER / "allen_layout_truncated.nwb"
    session = plan_session(path, Recipe(), "d1")
    for name in ("cr_ellipse_fits", "eye_ellipse_fits"):
        item = stream(session, name)
        with h5py.File(path) as file:
            table = file[f"processing/eye_tracking/{name}"]
            columns = np.column_stack([table[c][()] for c in ("center_x", "center_y", "height", "phi", "width")])
            time_s = table["timestamps"][()]
        assert np.array_equal(values(item)[:, :, 0], columns.astype(np.float32))
        assert np.array_equal(item.start_ns, to_ns(time_s))
    message = reason(session, "processing/eye_tracking/pupil_ellipse_fits")
    assert "center_x, center_y, height, phi, width: all its samples are the same or missing" in message
    assert "running_speed" in [item.spec.name for item in session.streams]


# ---------------------------------------------------------------- pose


def pose(folder: Path, points: np.ndarray, confidence: np.ndarray | None) -> SessionPlan:
    """A key point as ndx-pose writes it."""

    def fill(nwb: NWBFile) -> None:
        module = nwb.create_processing_module("behavior", "d")
        module.add(
            SpatialSeries(name="Snout", data=points, unit="pixels", rate=20.0, reference_frame="r", conversion=2.0)
        )
        with_units([1.0, 2.0])(nwb)

    path = write(folder, fill)
    with h5py.File(path, "r+") as file:
        group = file["processing/behavior"]
        group.create_group("Camera").attrs["neurodata_type"] = "PoseEstimation"
        group.move("Snout", "Camera/Snout")
        group["Camera/Snout"].attrs["neurodata_type"] = "PoseEstimationSeries"
        if confidence is not None:
            group["Camera/Snout/confidence"] = confidence
    return plan_session(path, Recipe(), "d1")


@pytest.mark.parametrize(("axes", "shape"), [("xy", (100,)), ("xyz", (100,)), ("xy", (100, 1))])
def test_a_key_point_has_its_place_and_the_confidence_as_the_tracker_gave_them(
    tmp_path: Path, axes: str, shape: tuple[int, ...]
):
    points, confidence = RNG.normal(size=(100, len(axes))), RNG.uniform(size=100)
    confidence[5] = 0.0
    session = pose(tmp_path, points, confidence.reshape(shape))
    item = stream(session, "snout")
    assert item.spec.channels == tuple(f"snout/{name}" for name in (*axes, "confidence"))
    expected = np.column_stack([points * 2.0, confidence]).astype(np.float32)
    assert np.array_equal(values(item).transpose(0, 2, 1).reshape(100, -1), expected)
    assert item.spec.modality == "behavior"
    used = {row.path: row.used_as for row in session.coverage}
    assert (used["processing/behavior/Camera"], used["processing/behavior/Camera/Snout"]) == ("container", "snout")


@pytest.mark.parametrize("confidence", [None, np.ones(99)])
def test_a_key_point_without_a_confidence_for_each_sample_keeps_its_place(
    tmp_path: Path, confidence: np.ndarray | None
):
    session = pose(tmp_path, RNG.normal(size=(100, 2)), confidence)
    assert stream(session, "snout").spec.channels == ("snout/x", "snout/y")
    (row,) = [row for row in session.coverage if row.path == "processing/behavior/Camera/Snout"]
    assert row.reason == "it has no confidence of each sample"


def test_key_points_that_cannot_be_read_say_why(tmp_path: Path):
    path = "processing/behavior/Camera/Snout"
    assert "it has 4 columns; a key point has x, y" in reason(pose(tmp_path, RNG.normal(size=(100, 4)), None), path)
    assert reason(pose(tmp_path, np.ones((100, 2)), None), path) == "all its samples are the same or missing"
