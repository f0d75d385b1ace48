"""Files of one session joined: one clock, one unit table, what stands in two files kept once.

In: files that nwb_builders writes, named as DANDI names them. Out: nothing.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, running, values, with_rois, with_units, write
from pynwb import NWBFile
from pynwb.file import Subject

from prep.disk import StoreError
from prep.files import find_files
from prep.nwb.join import part_labels, plan_sessions
from prep.nwb.session import UnusableFile, plan_session
from prep.plan import PlannedStream, PrepError, SessionPlan
from prep.recipe import Recipe, Splits

JOIN = r"^(sub-[^_]+_ses-[^_]+)_"
S = 1_000_000_000
SPIKES = ([0.5, 1.25, 60.0], [2.0, 99.0])
RUNNING = RNG.normal(size=801)
Fill = Callable[[NWBFile], None]


def both(*fills: Fill) -> Fill:
    def fill(nwb: NWBFile) -> None:
        for one in fills:
            one(nwb)

    return fill


def trials(nwb: NWBFile) -> None:
    nwb.add_trial_column("choice", "d")
    for i in range(5):
        nwb.add_trial(start_time=10.0 * i, stop_time=10.0 * i + 5, choice=np.nan if i == 2 else i / 4)


def named(subject_id: str = "", session_id: str = "", delay_s: float = 0.0) -> Fill:
    """Ids, and a clock that starts `delay_s` after the others'."""

    def fill(nwb: NWBFile) -> None:
        nwb.session_id = session_id or None
        nwb.subject = Subject(subject_id=subject_id) if subject_id else None
        start = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=delay_s)
        nwb.fields["timestamps_reference_time"] = nwb.fields["session_start_time"] = start

    return fill


ECEPHYS = both(with_units(*SPIKES), running(RUNNING, starting_time=5.0, rate=10.0), trials)
IMAGE = both(with_rois({"DfOverF/dff": RNG.normal(size=(900, 3))}, 3, rate=10.0), trials)


def pair(folder: Path, ecephys: Fill = ECEPHYS, image: Fill = IMAGE) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    return write(folder, ecephys, "sub-1_ses-2_ecephys.nwb"), write(folder, image, "sub-1_ses-2_image.nwb")


def joined(paths: tuple[Path, ...], **recipe: object) -> SessionPlan:
    return plan_sessions(paths, Recipe(join=JOIN, **recipe), "d1")


def streams(session: SessionPlan) -> dict[str, PlannedStream]:
    return {item.spec.name: item for item in session.streams}


def found(session: SessionPlan, code: str) -> list[tuple[str, str]]:
    return [(finding.path, finding.message) for finding in session.findings if finding.code == code]


def test_files_of_one_group_in_one_folder_are_one_input(tmp_path: Path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        for name in ("sub-1_ses-2_image", "sub-1_ses-2_ecephys", "sub-1_ses-3_ecephys", "notes"):
            (folder / f"{name}.nwb").write_text("")
    files = find_files([tmp_path], None, join=JOIN)
    assert [file.label for file in files] == [
        f"{folder}/{name}"
        for folder in "ab"
        for name in ("notes.nwb", "sub-1_ses-2_ecephys.nwb + sub-1_ses-2_image.nwb", "sub-1_ses-3_ecephys.nwb")
    ]
    assert [len(file.paths) for file in files] == [1, 2, 1] * 2
    assert [len(file.paths) for file in find_files([tmp_path], None)] == [1] * 8
    with pytest.raises(StoreError, match="does not exist"):
        find_files([tmp_path / "c"], None, join=JOIN)


@pytest.mark.parametrize(
    ("stems", "labels"),
    [
        (("sub-1_ses-2_ecephys", "sub-1_ses-2_image"), ["ecephys", "image"]),
        (("a_probe-1", "a_probe-10_lfp"), ["probe_1", "probe_10_lfp"]),
        (("a", "a_b"), ["1", "2"]),
        (("a_x-y", "a_x.y"), ["1", "2"]),
    ],
)
def test_a_part_is_called_by_what_its_name_has_that_the_others_have_not(stems: tuple[str, ...], labels: list[str]):
    assert part_labels(stems) == labels


def test_two_files_become_one_session_with_all_streams_and_units(tmp_path: Path):
    paths = pair(tmp_path)
    session = joined(paths)
    alone = [plan_session(path, Recipe(), "d1") for path in paths]
    assert set(streams(session)) == {"spikes", "running", "dff"} and session.session_id == "sub-1_ses-2"
    for plan in alone:
        for item in plan.streams:
            got = streams(session)[item.spec.name]
            assert np.array_equal(got.start_ns, item.start_ns)
            assert np.array_equal(values(got), values(item), equal_nan=True)
    assert [(item.spec.name, item.spec.first_unit) for item in session.streams] == [
        ("spikes", 0),
        ("running", None),
        ("dff", 2),
    ]
    expected = [f"d1/sub-1_ses-2/{key.split('/', 2)[2]}" for plan in alone for key in plan.units.unit_key]
    assert list(session.units.unit_key) == expected and len(set(expected)) == 5
    assert session.splits == alone[0].splits
    assert session.source == paths[0]


def test_what_stands_in_both_files_is_kept_once_and_said(tmp_path: Path):
    session = joined(pair(tmp_path))
    assert list(session.intervals) == ["trials"]
    ((path, message),) = found(session, "joined-twice")
    assert path == "sub-1_ses-2_image.nwb"
    assert message.startswith("trials") and message.endswith(
        "the same times and values as in an earlier file; kept once"
    )
    rows = {row.path: row for row in session.coverage}
    assert rows["sub-1_ses-2_ecephys.nwb/intervals/trials"].used_as == "trials"
    twin = rows["sub-1_ses-2_image.nwb/intervals/trials"]
    assert (twin.used_as, twin.reason) == (None, "the same as in an earlier file of the session")


def test_every_object_of_every_file_is_in_the_coverage_table_once(tmp_path: Path):
    paths = pair(tmp_path)
    rows = [row.path for row in joined(paths).coverage]
    alone = [plan_session(path, Recipe(), "d1").coverage for path in paths]
    expected = [
        path.name if row.path == "/" else f"{path.name}/{row.path}"
        for path, coverage in zip(paths, alone, strict=True)
        for row in coverage
    ]
    assert rows == expected


def test_other_values_under_the_same_name_get_a_name_of_their_own(tmp_path: Path):
    other = both(with_units([3.0, 4.0]), running(RUNNING + 1, starting_time=5.0, rate=10.0))
    session = joined(pair(tmp_path, image=other))
    assert set(streams(session)) >= {"spikes", "running", "spikes_image", "running_image"}
    assert streams(session)["running_image"].spec.channels == ("running_image",)
    assert streams(session)["running_image"].spec.origin == "sub-1_ses-2_image.nwb/acquisition/running"
    assert list(session.units.unit_key) == [f"d1/sub-1_ses-2/{unit}" for unit in ("0", "1", "image-0")]
    assert streams(session)["spikes_image"].spec.first_unit == 2
    assert found(session, "joined-twice") == []


@pytest.mark.parametrize("delay_s", [3600.25, -12_000_000.0])
def test_a_file_that_counts_from_another_moment_is_shifted_to_the_first_files_clock(tmp_path: Path, delay_s: float):
    paths = pair(tmp_path, image=both(IMAGE, named(delay_s=delay_s)))
    shift_ns = round(delay_s * 4) * S // 4
    session = joined(paths)
    alone = plan_session(paths[1], Recipe(), "d1")
    assert np.array_equal(streams(session)["dff"].start_ns, alone.streams[0].start_ns + shift_ns)
    assert np.array_equal(session.intervals["trials_image"].start_ns, session.intervals["trials"].start_ns + shift_ns)
    ((path, message),) = found(session, "joined-clock")
    assert path == "sub-1_ses-2_image.nwb"
    assert message == f"its times count from {delay_s:+.6f} s on the first file's clock; they are shifted"
    (finding,) = [finding for finding in session.findings if finding.code == "joined-clock"]
    assert finding.numbers == {"shift_s": delay_s}


def test_files_that_do_not_say_what_they_count_from_are_taken_to_be_on_one_clock(tmp_path: Path):
    paths = pair(tmp_path)
    with h5py.File(paths[1], "r+") as file:
        del file["timestamps_reference_time"], file["session_start_time"]
    session = joined(paths)
    assert [path for path, _ in found(session, "joined-clock")] == ["sub-1_ses-2_image.nwb"]
    assert int(streams(session)["dff"].start_ns[0]) == 0


@pytest.mark.parametrize("key", ["session_id", "subject_id"])
def test_ids_that_contradict_each_other_are_an_error(tmp_path: Path, key: str):
    fills = (both(ECEPHYS, named(**{key: "a"})), both(IMAGE, named(**{key: "b"})))
    message = rf"have {key} 'a' in sub-1_ses-2_ecephys\.nwb and 'b' in sub-1_ses-2_image\.nwb\. Correct `join`"
    with pytest.raises(PrepError, match=message):
        joined(pair(tmp_path, *fills))


def test_an_id_that_one_file_gives_is_the_sessions(tmp_path: Path):
    session = joined(pair(tmp_path, image=both(IMAGE, named(subject_id="m1", session_id="tuesday"))))
    assert (session.subject_id, session.session_id) == ("m1", "tuesday")
    assert all(key.startswith("d1/tuesday/") for key in session.units.unit_key)


def test_a_file_without_use_is_named_and_the_others_go_on(tmp_path: Path):
    paths = pair(tmp_path)
    paths[1].write_bytes(b"")
    session = joined(paths)
    assert set(streams(session)) == {"spikes", "running"}
    ((path, message),) = [(finding.path, finding.message) for finding in session.refused]
    assert path == "sub-1_ses-2_image.nwb" and message.startswith("nothing of this file is used: the file has 0 bytes")
    paths[0].write_bytes(b"")
    both_files = r"sub-1_ses-2_ecephys\.nwb: the file has 0 bytes.*; sub-1_ses-2_image\.nwb: the file has 0 bytes"
    with pytest.raises(UnusableFile, match=both_files):
        joined(paths)


def test_the_reference_of_the_splits_may_be_in_any_of_the_files(tmp_path: Path):
    paths = pair(tmp_path)
    for name, path in (("running", paths[0]), ("dff", paths[1]), ("acquisition/running", paths[0])):
        splits = Splits(reference=name, gap_s=1.0)
        assert joined(paths, splits=splits).splits == plan_session(path, Recipe(splits=splits), "d1").splits
    with pytest.raises(UnusableFile, match=r"`splits\.reference` is 'hd', but .* streams are spikes, running"):
        joined(paths, splits=Splits(reference="hd"))


def test_activity_is_the_reference_even_where_it_is_in_the_second_file(tmp_path: Path):
    paths = pair(tmp_path, ecephys=running(RUNNING, starting_time=5.0, rate=10.0), image=with_units(*SPIKES))
    assert joined(paths).splits == plan_session(paths[1], Recipe(), "d1").splits


def test_a_joined_session_is_split_by_the_trials_of_one_file(tmp_path: Path):
    splits = Splits(by="trial", gap_s=1.0, fractions=(0.5, 0.0, 0.5))
    paths = pair(tmp_path, ecephys=both(with_units(*SPIKES), named(session_id="s")), image=both(IMAGE, named()))
    session = joined(paths, splits=splits)
    assert (
        session.splits
        == plan_session(
            write(tmp_path, both(ECEPHYS, named(session_id="s")), "one.nwb"), Recipe(splits=splits), "d1"
        ).splits
    )


def test_a_name_of_the_recipe_need_not_be_in_every_file(tmp_path: Path):
    session = joined(pair(tmp_path), not_angles=("running",), angles=("heading",))
    assert [path for path, _ in found(session, "recipe-unmatched")] == ["heading"]


def test_one_file_is_planned_as_ever(tmp_path: Path):
    path, _ = pair(tmp_path)
    one, other = plan_sessions([path], Recipe(join=JOIN), "d1"), plan_session(path, Recipe(), "d1")
    assert (one.session_id, one.splits, one.coverage) == (other.session_id, other.splits, other.coverage)
