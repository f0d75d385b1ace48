"""The suggested recipe: one line for each thing that a file leaves open, and YAML that is read back.

In: files that nwb_builders writes, hand-made coverage. Out: nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from nwb_builders import RNG, heading, running, with_rois, with_units, write
from pynwb import NWBFile, TimeSeries

import prep.coverage
from prep.__main__ import main
from prep.nwb.session import plan_session
from prep.plan import Finding, Found, IntervalTable
from prep.recipe import Recipe, Signals, Sync, load
from prep.suggest import JOIN, Inspected, suggest

LICENCE = Recipe(licence="CC0")


def found(path: str, neurodata_type: str, used_as: str | None = None, reason: str = "") -> Found:
    return Found(path=path, neurodata_type=neurodata_type, used_as=used_as, reason=reason)


def text_of(
    *coverage: Found,
    findings: Sequence[Finding] = (),
    tables: dict[str, IntervalTable] | None = None,
    paths: tuple[Path, ...] = (Path("a.nwb"),),
    recipe: Recipe = LICENCE,
) -> str:
    one = Inspected(paths=paths, coverage=coverage, findings=findings, intervals=tables or {})
    return suggest([one], recipe)


def read_back(folder: Path, text: str) -> Recipe:
    (folder / "suggested.yaml").write_text(text, encoding="utf-8")
    return load(folder / "suggested.yaml")


def inspect(*words: str) -> int:
    parser = argparse.ArgumentParser()
    prep.coverage.configure(parser)
    return prep.coverage.main(parser.parse_args(list(words)))


def test_a_file_that_leaves_nothing_open_needs_no_recipe():
    assert text_of(found("units", "Units", "spikes")) == ""


def test_the_licence_is_asked_for_where_the_recipe_has_none(tmp_path: Path):
    text = text_of(recipe=Recipe())
    assert 'licence: ""  # NWB files do not say' in text
    assert read_back(tmp_path, text) == Recipe(folder=tmp_path)


def test_an_angle_that_is_not_certain_is_listed_with_its_values(tmp_path: Path):
    path = write(tmp_path, heading(np.linspace(0.1, 0.9, 100), "radians"))
    assert inspect(str(path), "--suggest", str(tmp_path / "r.yaml")) == 0
    text = (tmp_path / "r.yaml").read_text()
    assert "unit is radians, values 0.1 to 0.9: not taken as an angle; delete the line if it is none" in text
    recipe = load(tmp_path / "r.yaml")
    assert recipe.angles == ("acquisition/CompassDirection/heading",)
    (item,) = plan_session(path, recipe, "d1").streams
    assert item.spec.num_sources == 2


def test_the_series_that_was_chosen_is_listed_beside_the_others(tmp_path: Path):
    data = RNG.normal(size=(50, 3))
    path = write(tmp_path, with_rois({"DfOverF/dff": data, "Fluorescence/Raw": data}, 3))
    inspect(str(path), "--suggest", str(tmp_path / "r.yaml"))
    assert "of the same cells: processing/ophys/Fluorescence/Raw" in (tmp_path / "r.yaml").read_text()
    assert load(tmp_path / "r.yaml").series == ("processing/ophys/DfOverF/dff",)


def test_series_with_running_numbers_are_one_group_of_units(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        with_units([0.0, 50.0])(nwb)
        for name in ("Activity_0001", "Activity_0002", "Activity_0010", "Activity_mean", "pupil_1", "pupil_2"):
            nwb.add_acquisition(TimeSeries(name=name, data=RNG.normal(size=99), unit="a", starting_time=0.0, rate=9.0))

    path = write(tmp_path, fill)
    inspect(str(path), "--suggest", str(tmp_path / "r.yaml"))
    recipe = load(tmp_path / "r.yaml")
    assert recipe.signals == (Signals(pattern="acquisition/Activity_[0-9]*", name="activity"),)
    (activity,) = [item.spec for item in plan_session(path, recipe, "d1").streams if item.spec.name == "activity"]
    assert activity.num_sources == 3 and activity.modality == "traces"
    given = tmp_path / "given.yaml"
    (tmp_path / "r.yaml").rename(given)
    inspect(str(path), "--recipe", str(given), "--suggest", str(tmp_path / "r.yaml"))
    assert "signals" not in (tmp_path / "r.yaml").read_text()


def test_of_several_tables_of_units_the_one_that_is_read_is_listed(tmp_path: Path):
    other = found("processing/ecephys/units", "Units", None, "another table of units is read; name it in `units`")
    text = text_of(found("units", "Units", "spikes"), other)
    assert "there are others: processing/ecephys/units" in text
    assert read_back(tmp_path, text).units == ("units",)


def test_voltages_are_listed_and_raw_ones_only_where_there_is_no_lfp(tmp_path: Path):
    raw, lfp = found("acquisition/raw", "ElectricalSeries"), found("processing/ecephys/LFP/lfp", "ElectricalSeries")
    assert read_back(tmp_path, text_of(raw, lfp)).lfp.series == ("processing/ecephys/LFP/lfp",)
    assert read_back(tmp_path, text_of(raw)).lfp.series == ("acquisition/raw",)
    assert text_of(found("acquisition/raw", "ElectricalSeries", "raw")) == ""


def test_pulses_on_two_clocks_are_a_pair_of_sync(tmp_path: Path):
    message = "99 of its 100 events have the intervals of acquisition/photodiode, +30.12 ms later and on a clock that"
    finding = Finding(code="clock-drift", path="acquisition/ttl", action="noted", message=message)
    text = text_of(findings=[finding])
    assert read_back(tmp_path, text).sync == (Sync(reference="acquisition/photodiode", pulses="acquisition/ttl"),)


def test_stimuli_without_pixels_are_named_but_not_switched_on(tmp_path: Path):
    at = np.arange(3)
    named = IntervalTable(start_ns=at, stop_ns=at + 1, columns={"image_name": ["im2", "im1", ""]})
    films = IntervalTable(start_ns=at, stop_ns=at + 1, columns={"clip": ["a.mp4"] * 3})
    gratings = IntervalTable(start_ns=at, stop_ns=at + 1, columns={"stimulus_name": ["gratings"] * 3})
    movie = found("stimulus/presentation/m", "ImageSeries", None, "its pixels are in another file (m.mp4). Name that")
    text = text_of(movie, tables={"images": named, "films": films, "gratings": gratings})
    assert '#   - {match: "m", file: "m.mp4"}  # pixels of stimulus/presentation/m\n' in text
    assert "2 stimuli that the table images names (im1, im2), without pixels" in text
    assert "gratings" not in text
    assert read_back(tmp_path, text).assets == ()


def test_files_that_are_named_like_parts_of_one_session_are_joined(tmp_path: Path):
    for name in ("sub-1_ses-2_ecephys", "sub-1_ses-2_image", "sub-1_ses-3_ecephys"):
        write(tmp_path, with_units([0.0, 50.0]), f"{name}.nwb")
    for name, expected in (("sub-1_ses-2_ecephys", JOIN), ("sub-1_ses-3_ecephys", None)):
        text = text_of(paths=(tmp_path / f"{name}.nwb",))
        assert (read_back(tmp_path, text).join if text else None) == expected


def test_names_that_yaml_would_change_are_read_back_as_they_are(tmp_path: Path):
    names = ["acquisition/a: b #c", 'acquisition/"quoted"', "acquisition/ünï\\x", "NO"]
    rows = [found(name, "ElectricalSeries") for name in names]
    assert read_back(tmp_path, text_of(*rows)).lfp.series == tuple(names)


def test_a_folder_is_one_line_for_each_file_and_one_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder, heading(np.linspace(0.1, 0.9, 100), "radians"), f"{name}.nwb")
    (folder / "c.nwb").write_bytes(b"")
    assert inspect(str(folder), "--suggest", str(tmp_path / "r.yaml")) == 1
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["file", "a.nwb", "b.nwb", "c.nwb"]
    assert lines[3].endswith("refused: the file has 0 bytes. Get it again.")
    assert "delete the line if it is none (and in 1 more)" in shown
    assert load(tmp_path / "r.yaml").angles == ("acquisition/CompassDirection/heading",)


def test_paths_of_joined_files_are_suggested_without_the_files_name(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, heading(np.linspace(0.1, 0.9, 100), "radians"), "sub-1_ses-2_behavior.nwb")
    write(folder, running(RNG.normal(size=99), starting_time=0.0, rate=10.0), "sub-1_ses-2_ecephys.nwb")
    (tmp_path / "join.yaml").write_text(f"join: '{JOIN}'\nlicence: CC0\n")
    inspect(str(folder), "--recipe", str(tmp_path / "join.yaml"), "--suggest", str(tmp_path / "r.yaml"))
    assert load(tmp_path / "r.yaml") == Recipe(angles=("acquisition/CompassDirection/heading",), folder=tmp_path)


def test_a_recipe_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path, running(RNG.normal(size=99), starting_time=0.0, rate=10.0))
    (tmp_path / "r.yaml").write_text("licence: mine\n")
    assert main(["inspect", str(path), "--suggest", str(tmp_path / "r.yaml")]) == 2
    assert "r.yaml exists already. Give --suggest a new name" in capsys.readouterr().err
    assert (tmp_path / "r.yaml").read_text() == "licence: mine\n"


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect(str(tmp_path / "no.nwb")) == 1
    assert "refused: no such file" in capsys.readouterr().out
