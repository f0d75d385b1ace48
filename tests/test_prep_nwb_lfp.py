"""Band-limited power of voltages: the planted power in its band, nothing of the future, the same bits in every part.

In: files that nwb_builders writes, with voltages of known power. Out: nothing.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from nwb_builders import RNG, codes, plan, reason, replace, running, stream, values, with_units, write
from pynwb import NWBFile
from pynwb.ecephys import ElectricalSeries
from scipy.signal import sosfilt, sosfilt_zi, sosfreqz

import prep.nwb.lfp
from prep.band_power import FLOOR_UV2, band_power, design
from prep.nwb.lfp import SEGMENT_BYTES, SEGMENT_NS, cut_bins, cut_segments
from prep.nwb.session import plan_session
from prep.plan import PrepError
from prep.recipe import Lfp, Recipe

RATE_HZ = 1000.0
BANDS_HZ = ((4.0, 8.0), (13.0, 30.0))
LFP = Lfp(series=("lfp",), bands_hz=BANDS_HZ, rate_hz=20.0)


def voltages(*series: tuple[str, np.ndarray], rows: tuple[int, ...] = (1, 0), **given: object) -> Callable:
    """A file with three electrodes, whose series are of the electrodes in `rows`."""

    def fill(nwb: NWBFile) -> None:
        group = nwb.create_electrode_group("g", "d", "CA1", nwb.create_device("probe"))
        for row in range(3):
            nwb.add_electrode(x=1.0, y=10.0 * row, z=2.0, location=f"area {row}", group=group, id=70 + row)
        region = nwb.create_electrode_table_region(region=list(rows), description="d")
        for name, data in series:
            clock = given if "timestamps" in given else {"rate": RATE_HZ, "starting_time": 0.0, **given}
            nwb.add_acquisition(ElectricalSeries(name=name, data=data, electrodes=region, **clock))
        with_units([1.0, 2.0])(nwb)

    return fill


def noise(num_samples: int, num_channels: int = 2) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(num_samples, num_channels)) * 1e-4


def bins_of(item: object) -> np.ndarray:
    """Values (bins, S) of a stream without gaps."""
    return values(item).transpose(0, 2, 1).reshape(-1, item.spec.num_sources)


def test_a_planted_sine_has_its_power_in_its_own_band_with_conversion_and_offset_once(tmp_path: Path):
    time_s = np.arange(10_000) / RATE_HZ
    sine = np.sin(2 * np.pi * 20.0 * time_s)
    data = np.rint(np.stack([3e8 * sine, 1e8 * sine], axis=1)).astype(np.int32)
    fill = voltages(("lfp", data), conversion=2e-12, offset=0.5, channel_conversion=[1.0, 3.0])
    item = stream(plan(tmp_path, fill, lfp=LFP), "lfp")
    power = bins_of(item)
    band = design(*BANDS_HZ[1], RATE_HZ)
    _, response = sosfreqz(band.sections, [20.0], fs=RATE_HZ)
    expected = np.log10(600.0**2 / 2 * abs(response[0]) ** 2)  # uV^2; a bin of 50 ms holds one cycle
    assert np.abs(power[40:, [1, 3]] - expected).max() < 1e-6  # float32
    assert (power[40:, [0, 2]] < expected - 2).all()
    assert (item.spec.kind, item.spec.modality, item.spec.unit) == ("trace", "traces", "log10(uV^2)")
    assert (item.spec.samples_per_token, item.spec.sample_ns, item.spec.duration_ns) == (2, 50_000_000, 100_000_000)


def test_units_are_electrodes_and_bands_with_the_place_of_the_electrode(tmp_path: Path):
    session = plan(tmp_path, voltages(("lfp", noise(5000))), lfp=LFP)
    bands = ("4-8hz", "13-30hz")
    assert list(session.units.unit_key) == ["d1/s1/0", *(f"d1/s1/lfp-{i}-{band}" for i in (71, 70) for band in bands)]
    assert list(session.units.region)[1:] == ["area 1", "area 1", "area 0", "area 0"]
    assert session.units.xyz_um[1:].tolist() == [[1, 10, 2], [1, 10, 2], [1, 0, 2], [1, 0, 2]]
    assert list(session.units.kind)[1:] == ["lfp"] * 4
    assert stream(session, "lfp").spec.first_unit == 1
    used = {row.path: row.used_as for row in session.coverage}
    assert used["acquisition/lfp"] == "lfp"
    assert used["acquisition/lfp/electrodes"] == used["general/extracellular_ephys/electrodes/location"] == "units"


def test_parts_equal_the_whole_and_segments_equal_one_long_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prep.nwb.lfp, "SEGMENT_NS", 3_000_000_000)
    data = noise(20_000)
    item = stream(plan(tmp_path, voltages(("lfp", data)), lfp=LFP), "lfp")
    power = bins_of(item)
    assert len(item.reader.segments) == 8
    for i, (low, high) in enumerate(BANDS_HZ):
        sections = design(low, high, RATE_HZ).sections
        filtered, _ = sosfilt(sections, data, axis=0, zi=sosfilt_zi(sections)[:, :, None] * data[0])
        whole = np.log10((filtered**2).reshape(-1, 50, 2).mean(axis=1) * 1e12 + FLOOR_UV2)
        given = np.isfinite(power[:, i])
        assert np.abs(power[given, i] - whole[given, 0]).max() < 2e-6  # float32
        assert given.argmax() == np.ceil(design(low, high, RATE_HZ).settle_samples / 50)


def test_a_bin_holds_nothing_of_its_future(tmp_path: Path):
    data = noise(10_000)
    before = bins_of(stream(plan(tmp_path, voltages(("lfp", data)), lfp=LFP), "lfp"))
    data[5000:] *= 50
    after = bins_of(stream(plan(tmp_path, voltages(("lfp", data)), lfp=LFP), "lfp"))
    assert np.array_equal(before[:100], after[:100], equal_nan=True)
    assert (before[100] != after[100]).all()


def test_the_filter_starts_anew_after_a_gap_and_bins_are_missing_until_it_has_settled(tmp_path: Path):
    time_s = np.concatenate([np.arange(3010), 7000 + np.arange(4000), 20_000 + np.arange(30)]) / RATE_HZ
    data = noise(len(time_s))
    item = stream(plan(tmp_path, voltages(("lfp", data), timestamps=time_s), lfp=LFP), "lfp")
    tokens = values(item)
    assert item.start_ns[[0, 29, 30, 69]].tolist() == [0, 2_900_000_000, 7_000_000_000, 10_900_000_000]
    assert len(tokens) == 70  # the last run is shorter than a bin, and so is the first run's rest of 10 ms
    alone = stream(plan(tmp_path, voltages(("lfp", data[3010:7010])), lfp=LFP), "lfp")
    assert np.array_equal(tokens[30:], values(alone), equal_nan=True)
    settled = int(np.ceil(design(4.0, 8.0, RATE_HZ).settle_samples / 100))
    assert np.isnan(tokens[30 : 30 + settled - 1, 0]).all() and np.isfinite(tokens[30 + settled :, 0]).all()


def test_a_missing_sample_makes_the_bins_behind_it_missing_and_no_others(tmp_path: Path):
    data = noise(10_000)
    data[6025, 1] = np.nan
    power = bins_of(stream(plan(tmp_path, voltages(("lfp", data)), lfp=LFP), "lfp"))
    for source, (low, high) in ((2, BANDS_HZ[0]), (3, BANDS_HZ[1])):
        settle = design(low, high, RATE_HZ).settle_samples
        missing = np.flatnonzero(np.isnan(power[60:, source])) + 60
        assert missing.tolist() == list(range(120, int(np.ceil((6026 + settle) / 50))))
    assert np.isfinite(power[60:, :2]).all()


def test_the_wrong_axis_is_told_by_the_number_of_electrodes(tmp_path: Path):
    data = noise(5000)
    expected = values(stream(plan(tmp_path, voltages(("lfp", data)), lfp=LFP), "lfp"))
    path = write(tmp_path, voltages(("lfp", data)))
    replace(path, "acquisition/lfp/data", data.T)
    session = plan_session(path, Recipe(lfp=LFP), "d1")
    assert np.array_equal(values(stream(session, "lfp")), expected, equal_nan=True)
    assert "wrong-axis" in codes(session)


@pytest.mark.parametrize(
    ("num_samples", "clock", "lfp", "message"),
    [
        (
            5000,
            {"rate": 55.0},
            {},
            "sampled at 55 Hz, and a band up to 30 Hz needs more than 60 Hz. Take the band out of",
        ),
        (5000, {"rate": 10.0}, {}, "sampled at 10 Hz, less than `lfp.rate_hz` 20. Lower `lfp.rate_hz`"),
        (300, {}, {}, "longest stretch without a gap is 0.3 s, and power from 4 to 8 Hz needs 0.7"),
        (5000, {"timestamps": np.cumsum(RNG.uniform(1e-4, 2e-3, 5000))}, {}, "differ by more than 20 %"),
        (5000, {}, {"series": ("other",)}, "where the recipe asks for it (`lfp`)"),
        (0, {}, {}, "its data are empty"),
    ],
)
def test_voltages_that_cannot_be_read_say_why(tmp_path: Path, num_samples: int, clock: dict, lfp: dict, message: str):
    recipe = Lfp(**{"series": ("lfp",), "bands_hz": BANDS_HZ, "rate_hz": 20.0, **lfp})
    session = plan(tmp_path, voltages(("lfp", noise(num_samples)), **clock), lfp=recipe)
    assert message in reason(session, "acquisition/lfp")
    assert [item.spec.name for item in session.streams] == ["spikes"]


def test_a_recipe_that_names_no_series_of_the_file_is_noted(tmp_path: Path):
    session = plan(tmp_path, with_units([1.0, 2.0]), lfp=Lfp(series=("lfp*",)))
    (found,) = [finding for finding in session.findings if finding.code == "recipe-unmatched"]
    assert (found.path, "no such ElectricalSeries" in found.message) == ("lfp*", True)


def test_a_recipe_may_name_the_container(tmp_path: Path):
    path = write(tmp_path, voltages(("lfp", noise(5000))))
    with h5py.File(path, "r+") as file:
        file.create_group("processing/ecephys/probe_0").attrs["neurodata_type"] = "LFP"
        file.move("acquisition/lfp", "processing/ecephys/probe_0/ElectricalSeries")
    session = plan_session(path, Recipe(lfp=Lfp(series=("probe_?",))), "d1")
    assert stream(session, "electrical_series").spec.num_sources == 8
    assert "recipe-unmatched" not in codes(session)


def test_electrodes_are_read_from_one_series_alone(tmp_path: Path):
    session = plan(tmp_path, voltages(("a_lfp", noise(5000)), ("b_raw", noise(5000))), lfp=Lfp(series=("*",)))
    assert reason(session, "acquisition/b_raw") == "some of its electrodes are in acquisition/a_lfp, which is read"


def test_a_series_whose_electrodes_are_unknown_is_named_by_its_columns(tmp_path: Path):
    path = write(tmp_path, voltages(("lfp", noise(5000))))
    with h5py.File(path, "r+") as file:
        del file["acquisition/lfp/electrodes"]
    session = plan_session(path, Recipe(lfp=LFP), "d1")
    assert list(session.units.unit_key)[1:3] == ["d1/s1/lfp-lfp-0-4-8hz", "d1/s1/lfp-lfp-0-13-30hz"]
    assert set(session.units.region) == {""}


@pytest.mark.parametrize("rate_hz", [1000.0, 1249.9987, 2500.0, 30_000.123])
def test_each_sample_is_in_the_bin_of_its_time(rate_hz: float):
    num_samples = 20_011
    bins = cut_bins([(100, 100 + num_samples, np.array([5.0]))], rate_hz, 50.0, 5)
    time_s = np.arange(num_samples) / rate_hz
    bin_of_sample = np.floor(time_s * 50.0 + 1e-9).astype(int)
    whole = int(np.floor(num_samples / rate_hz * 50.0 + 1e-6))
    counts = np.bincount(bin_of_sample, minlength=whole)[:whole]
    starts, stops = bins.starts.ravel(), bins.stops.ravel()
    assert np.array_equal((stops - starts)[:whole], counts) and (stops == starts)[whole:].all()
    assert starts[0] == 100 and np.array_equal(starts[1:], stops[:-1])
    stamped = cut_bins([(100, 100 + num_samples, 5.0 + time_s)], rate_hz, 50.0, 5)
    assert np.array_equal(stamped.starts.ravel()[:whole], starts[:whole])
    assert bins.time_s[:2].tolist() == [5.0, 5.1]


def test_hours_of_many_channels_are_read_in_segments_of_bounded_size():
    rate_hz, row_bytes = 30_000.0, 384 * 2
    bins = cut_bins([(0, 3 * 3600 * 30_000, np.array([0.0]))], rate_hz, 50.0, 5)
    segments = cut_segments(bins, 100_000_000, rate_hz, row_bytes)
    assert np.diff(segments).max() * 3000 * row_bytes <= SEGMENT_BYTES
    assert segments[0] == 0 and segments[-1] == 108_000
    slow = cut_segments(bins, 100_000_000, 1250.0, 8)
    assert np.diff(slow).max() * 100_000_000 == SEGMENT_NS


def test_silence_is_the_floor_and_a_band_needs_its_rate():
    band = design(4.0, 8.0, RATE_HZ)
    starts = np.arange(0, 1000, 50)
    power = band_power(np.full((1000, 1), 0.3), (band,), starts, starts + 50, 10_000)
    assert np.abs(power - np.log10(FLOOR_UV2)).max() < 1e-3  # an offset of 0.3 V is no power
    with pytest.raises(PrepError, match="a band up to 600 Hz needs more than 1200 Hz"):
        design(300.0, 600.0, RATE_HZ)


def test_a_stream_of_another_clock_does_not_hinder(tmp_path: Path):
    def fill(nwb: NWBFile) -> None:
        voltages(("lfp", noise(5000)))(nwb)
        running(RNG.normal(size=100), starting_time=0.0, rate=20.0)(nwb)

    names = [item.spec.name for item in plan(tmp_path, fill, lfp=LFP).streams]
    assert names == ["spikes", "lfp", "running"]
