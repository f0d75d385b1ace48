"""Layouts of well-known collections, written with planted truth: every number in the plan equals what was planted.

In: tests/layout_builders.py. Out: nothing.
"""

from pathlib import Path

import numpy as np
import pytest
from layout_builders import FIELD_PHASE_S, brainwide_map, functional_fields, openscope, visual_coding
from nwb_builders import stream, values

import prep.recipe
from prep.nwb.session import plan_session
from prep.plan import PlannedStream, SessionPlan
from prep.recipe import Recipe
from prep.settings import BIN_NS, COUNT_MISSING, STIMULUS_FIELDS, to_ns


def counted(item: PlannedStream) -> np.ndarray:
    """Counts (S, bins) of a stream, from its first bin on."""
    return values(item).transpose(1, 0, 2).reshape(item.spec.num_sources, -1)


def expected_counts(item: PlannedStream, spikes: list[np.ndarray]) -> np.ndarray:
    first_bin = int(item.start_ns[0]) // BIN_NS
    result = np.zeros((item.spec.num_sources, item.spec.num_tokens * item.spec.samples_per_token), np.int64)
    for unit, times_s in enumerate(spikes):
        np.add.at(result[unit], to_ns(times_s) // BIN_NS - first_bin, 1)
    return result


def fields(item: PlannedStream, name: str) -> np.ndarray:
    """One field (K,) of a stream of events."""
    return values(item)[:, 0, item.spec.fields.index(name)]


def types(item: PlannedStream) -> list[str]:
    """The word of each event."""
    assert item.types is not None
    return [item.spec.types[number] for number in item.types]


def samples(item: PlannedStream) -> np.ndarray:
    """Samples (n, S) in order of time."""
    whole = values(item).transpose(0, 2, 1).reshape(-1, item.spec.num_sources)
    return whole[~np.isnan(whole).all(1)]


def kinds(session: SessionPlan, kind: str, modality: str) -> list[PlannedStream]:
    return [item for item in session.streams if (item.spec.kind, item.spec.modality) == (kind, modality)]


# ---------------------------------------------------------------- Visual Coding, Neuropixels


@pytest.fixture(scope="module")
def visual(tmp_path_factory: pytest.TempPathFactory) -> tuple[SessionPlan, dict]:
    truth = visual_coding(tmp_path_factory.mktemp("visual"))
    return plan_session(truth.path, Recipe(), "d1"), truth.arrays


def test_visual_coding_units_have_the_region_of_their_peak_channel(visual: tuple[SessionPlan, dict]):
    session, truth = visual
    assert list(session.units.region) == ["VISam", "CA1", "LGd", "CA1"]
    assert list(session.units.quality) == ["good"] * 4
    assert session.units.unit_key[0] == "d1/760693773/951791918"
    assert session.units.waveform_ms is not None
    assert np.array_equal(session.units.waveform_ms, np.array([0.15, 0.25, 0.33, 0.41], np.float32))
    spikes = stream(session, "spikes")
    assert np.array_equal(counted(spikes), expected_counts(spikes, truth["spikes"]))


def test_visual_coding_gratings_are_typed_events_with_parsed_phases_and_blanks(visual: tuple[SessionPlan, dict]):
    session, truth = visual
    item = stream(session, "drifting_gratings")
    assert item.spec.fields == STIMULUS_FIELDS and item.spec.modality == "stimulus"
    assert types(item) == ["drifting_gratings" if np.isfinite(o) else "blank" for o in truth["orientation"]]
    assert np.array_equal(item.start_ns, to_ns(truth["onsets_s"]))
    assert np.array_equal(fields(item, "orientation_deg"), truth["orientation"].astype(np.float32), equal_nan=True)
    assert fields(item, "phase_cycles").tolist()[:2] == [0.25, 0.25] and fields(item, "phase_cycles")[4] == 0.75
    assert np.array_equal(fields(item, "spatial_frequency_cpd"), np.full(6, 0.04, np.float32))
    assert np.array_equal(fields(item, "width_deg"), np.full(6, 250, np.float32))
    assert np.array_equal(fields(item, "duration_s"), np.full(6, 2, np.float32))


def test_visual_coding_pictures_are_found_by_name_and_shown_when_the_table_says(visual: tuple[SessionPlan, dict]):
    session, truth = visual
    events = stream(session, "natural_scenes")
    words = [name if name == "omitted" else f"natural_images_lum_matched/{name}" for name in truth["names"]]
    assert [word if word != "blank" else "omitted" for word in types(events)] == words
    (frames,) = kinds(session, "frames", "stimulus")
    (pixels,) = [item for item in session.stimuli if item.digest == frames.spec.stimulus]
    shown = pixels.reader.read(0, pixels.shape[0])
    index = values(frames)[:, 0, 0]
    at = {int(start): int(number) for start, number in zip(frames.start_ns, index, strict=True)}
    for start_s, name in zip(truth["scene_s"], truth["names"], strict=True):
        number = at[int(to_ns(start_s))]
        if name == "omitted":
            assert number == -1
        else:
            assert np.array_equal(shown[number], truth["pictures"][name])
    assert index[-1] == -1 and frames.start_ns[-1] == to_ns(truth["scene_s"][-1] + 0.25)


def test_visual_coding_pupil_is_read_from_its_table(visual: tuple[SessionPlan, dict]):
    session, truth = visual
    item = stream(session, "pupil_ellipse_fits")
    names = [channel.rsplit("/", 1)[-1] for channel in item.spec.channels]
    found = samples(item)
    for name, data in truth["pupil"].items():
        assert np.array_equal(found[:, names.index(name)], data.astype(np.float32))
    assert item.start_ns[0] == to_ns(truth["pupil_s"][0])
    assert np.array_equal(samples(stream(session, "running_speed"))[:, 0], truth["speed"].astype(np.float32))


# ---------------------------------------------------------------- MICrONS


def test_eight_fields_keep_their_phases_and_movies_are_found_by_hash(tmp_path: Path):
    truth = functional_fields(tmp_path)
    session = plan_session(truth.path, prep.recipe.load(truth.arrays["recipe"]), "000402")
    planes = kinds(session, "trace", "traces")
    assert len(planes) == 8
    for number, item in enumerate(sorted(planes, key=lambda item: item.spec.origin)):
        assert np.array_equal(samples(item), truth.arrays["traces"][number])
        bounds = item.start_ns[:: max(1, 1)]
        stamps_ns = to_ns(truth.arrays["times_s"][number])
        assert np.array_equal(bounds, stamps_ns[:: item.spec.samples_per_token])
        assert item.start_ns[0] == to_ns(7.0 + number * FIELD_PHASE_S)
    assert len(set(session.units.unit_key)) == 40 and set(session.units.region) == {"VISp", "VISrl"}
    shown: dict[int, np.ndarray] = {}
    for item in kinds(session, "frames", "stimulus"):
        (pixels,) = [stimulus for stimulus in session.stimuli if stimulus.digest == item.spec.stimulus]
        frames = pixels.reader.read(0, pixels.shape[0])
        for start, number in zip(item.start_ns, values(item)[:, 0, 0], strict=True):
            if number >= 0:
                shown[int(start)] = frames[number]
    for start_s, name in zip(truth.arrays["starts_s"], truth.arrays["hashes"], strict=True):
        for frame in range(300):
            assert np.array_equal(shown[int(to_ns(start_s + frame / 30))], truth.arrays["movies"][name][frame])
    treadmill = stream(session, "treadmill_velocity")
    assert np.array_equal(samples(treadmill)[:, 0], truth.arrays["velocity"].astype(np.float32))


# ---------------------------------------------------------------- International Brain Laboratory


@pytest.fixture(scope="module")
def brainwide(tmp_path_factory: pytest.TempPathFactory) -> tuple[SessionPlan, dict]:
    truth = brainwide_map(tmp_path_factory.mktemp("brainwide"))
    return plan_session(truth.path, Recipe(), "000409"), truth.arrays


def test_brainwide_map_wheel_keeps_every_time_stamp(brainwide: tuple[SessionPlan, dict]):
    session, truth = brainwide
    item = next(item for item in session.streams if item.spec.origin.endswith("WheelPosition"))
    assert np.array_equal(item.start_ns, to_ns(truth["wheel_s"]))
    assert np.array_equal(values(item)[:, 0, 0], truth["wheel"].astype(np.float32))
    camera = stream(session, "left_camera_motion_energy")
    assert np.array_equal(samples(camera)[:, 0], truth["energy"].astype(np.float32))
    assert camera.start_ns[0] == to_ns(truth["camera_s"][0])


def test_brainwide_map_trial_columns_that_are_times_are_events(brainwide: tuple[SessionPlan, dict]):
    session, truth = brainwide
    item = stream(session, "trials_events")
    found = list(zip(types(item), item.start_ns.tolist(), strict=True))
    for word, times_s in (("stim_on_times", truth["on_s"]), ("feedback_times", truth["feedback_s"])):
        finite = times_s[np.isfinite(times_s)]
        assert [start for name, start in found if name == word] == to_ns(finite).tolist()
    assert {name for name, _ in found} == {"stim_on_times", "feedback_times"}
    table = session.intervals["trials"]
    assert np.array_equal(table.columns["choice"], truth["choice"])
    licks = stream(session, "licks")
    assert licks.spec.kind == "event" and np.array_equal(licks.start_ns, to_ns(truth["licks_s"]))


def test_brainwide_map_contrasts_are_stimuli_with_a_side(brainwide: tuple[SessionPlan, dict]):
    session, truth = brainwide
    (item,) = kinds(session, "event", "stimulus")
    contrast, x_deg = fields(item, "contrast"), fields(item, "x_deg")
    is_left = np.isfinite(truth["left"])
    assert np.array_equal(contrast, np.where(is_left, truth["left"], truth["right"]).astype(np.float32))
    assert np.array_equal(np.sign(x_deg), np.where(is_left, -1, 1))
    assert list(session.units.region) == ["VISp", "CA1", "MOs", "CP", "SCs", "root"]


# ---------------------------------------------------------------- OpenScope


def test_openscope_template_is_shown_and_unobserved_time_is_missing(tmp_path: Path):
    truth = openscope(tmp_path)
    session = plan_session(truth.path, Recipe(), "d1")
    (frames,) = kinds(session, "frames", "stimulus")
    (pixels,) = session.stimuli
    shown = pixels.reader.read(0, pixels.shape[0])[values(frames)[:360, 0, 0]]
    assert np.array_equal(shown, truth.arrays["movie"][truth.arrays["index"]])
    assert np.array_equal(frames.start_ns[:360], to_ns(truth.arrays["shown_s"]))
    spikes = stream(session, "spikes")
    counts, expected = counted(spikes), expected_counts(spikes, truth.arrays["spikes"])
    start_s = (spikes.start_ns[0] + BIN_NS * np.arange(counts.shape[1])) / 1e9
    seen = np.zeros(counts.shape[1], bool)
    for begin, end in truth.arrays["observed"]:
        seen |= (start_s >= begin - 1e-9) & (start_s + 0.02 <= end + 1e-9)
    assert (counts[:, ~seen] == COUNT_MISSING).all() and (~seen).any()
    assert np.array_equal(counts[:, seen], expected[:, seen])
    flashes = stream(session, "flash")
    assert np.array_equal(fields(flashes, "luminance"), truth.arrays["color"].astype(np.float32))
    assert types(flashes) == ["flashes"] * 12, "one word for one thing, whatever the table calls it"
