"""Windows of a store: every value is the store's own, at its own time, inside its split; shapes are large enough.

In: a tiny store. Out: windows and samples, compared with the store's arrays.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from store_builders import Values, target, write_plan
from train_builders import SESSIONS, one_window, pixels, reader_of, tiny_run, tiny_session, tiny_store

from prep import catalog
from prep.plan import PlannedStream
from prep.settings import COUNT_MISSING, MODALITIES, TOKEN_NS, ConfigError
from prep.store import Store
from train.build import model_config
from train.config import FAMILIES, DataConfig
from train.dataset import Budget, WindowReader, Windows, budget, make_sample, split_windows
from train.frames import resize_frames
from train.loader import TrainingSamples
from train.masking import Mask, draw_mask
from train.model.processing_brainloom import STANDARD_LIMIT

RUN = tiny_run()
SECOND_NS = 1_000_000_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def reader(root: Path) -> WindowReader:
    return reader_of(root, RUN)


@pytest.mark.parametrize("session_id", SESSIONS)
@pytest.mark.parametrize("at_s", [0.0, 3.3, 10.9])
def test_a_window_holds_exactly_the_stores_values(reader: WindowReader, session_id: str, at_s: float) -> None:
    window = one_window(reader, session_id, at_s)
    entry, session = reader.store.entries[window.session], reader.store.session(window.session)
    num_checked = 0
    for number, description in enumerate(entry["streams"]):
        if description["kind"] == "frames":
            continue
        stream = session.stream(description["name"])
        begin, size = stream.start_ns, description["samples_per_token"]
        inside = np.flatnonzero((begin >= window.start_ns) & (begin + TOKEN_NS <= window.start_ns + SECOND_NS))
        values = stream.read(slice(inside[0], inside[-1] + 1))  # (k, S, P)
        missing = values == COUNT_MISSING if description["kind"] == "counts" else np.isnan(values)
        own = window.sources.stream[window.tokens.source] == number
        assert own.sum() == len(inside) * description["num_sources"]
        assert_array_equal(window.observed[own, :size].reshape(values.shape), ~missing)
        assert not window.observed[own, size:].any(), "samples beyond the stream's own are padding"
        offset_ns = np.zeros(values.shape[1], np.int64) if stream.offset_ns is None else stream.offset_ns
        start_s = ((begin[inside][:, None] + offset_ns[None]) - window.start_ns) / 1e9
        assert_array_equal(window.tokens.start_s[own].reshape(start_s.shape), start_s)
        labels = window.labels[own, :size].reshape(values.shape)
        if description["kind"] == "counts":
            assert_array_equal(labels[~missing], values[~missing])
        else:
            standard = (values - stream.mean[:, None]) / stream.scale[:, None]
            assert_array_equal(labels[~missing], standard.clip(-STANDARD_LIMIT, STANDARD_LIMIT)[~missing])
        num_checked += 1
    assert num_checked == sum(description["kind"] != "frames" for description in entry["streams"])


def test_values_are_standardised_by_the_train_splits_mean_and_scale(reader: WindowReader) -> None:
    window = one_window(reader, "full")
    source = window.tokens.source
    spikes = (window.tokens.modality == 0)[:, None] & window.observed
    back = window.values * window.sources.scale[source][:, None] + window.sources.mean[source][:, None]
    np.testing.assert_allclose(back[spikes], window.labels[spikes], rtol=0, atol=1e-5)


def test_every_source_knows_its_row_features_and_statistics(reader: WindowReader) -> None:
    keys = reader.source_table.keys
    assert len(keys) == len(set(keys)) == len(reader.source_table)
    for index, entry in enumerate(reader.store.entries):
        sources, session = reader.sources(index), reader.store.session(index)
        units = sources.modality < MODALITIES.index("behavior")
        assert [keys[row] for row in sources.row[units]] == session.text("units/unit_key")
        assert_array_equal(sources.features[units], session.array("units/features"))
        assert not sources.features[~units].any()
        channels = {
            f"d1/{name}"
            for stream in entry["streams"]
            if stream["modality"] == "behavior"
            for name in stream["channels"]
        }
        origins = {f"d1/session:{entry['session_id']}", f"d1/subject:{entry['subject_id']}"}
        assert {keys[row] for row in sources.row[~units]} == channels | origins
    shared = [reader.sources(i).row[reader.sources(i).modality == 2].tolist() for i in range(4)]
    ids = [entry["session_id"] for entry in reader.store.entries]
    assert shared[ids.index("full")] == shared[ids.index("blind")], "a channel is shared by the dataset's sessions"


@pytest.mark.parametrize("session_id", SESSIONS)
def test_a_token_that_crosses_the_windows_end_is_left_out(reader: WindowReader, session_id: str) -> None:
    window = one_window(reader, session_id)
    stop_ns = window.start_ns + SECOND_NS
    assert (window.token_ns >= window.start_ns).all() and (window.token_ns + TOKEN_NS <= stop_ns).all()
    sample_s = window.tokens.start_s[:, None] + np.arange(window.values.shape[1]) * window.sample_s[:, None]
    assert (sample_s[window.observed] < 1.0).all(), "no sample is after the window, offsets included"
    if session_id == "full":
        running = window.tokens.modality == 2
        streams = window.sources.stream[window.tokens.source]
        assert {int((streams[running] == number).sum()) for number in np.unique(streams[running])} == {9, 20}


def test_absolute_time_does_not_matter(tmp_path: Path) -> None:
    recording = tmp_path / "recording.txt"
    recording.write_text("stands for an NWB file")
    samples = []
    for begin_s in (0.0, 500.0, 12_345_678.0):
        root = tmp_path / f"store-{begin_s:.0f}"
        plan = tiny_session(recording, "full", 0, begin_s)
        write_plan(plan, target(root, plan))
        catalog.write(root)
        reader = reader_of(root, RUN)
        window = one_window(reader, "full", 4.2)
        mask = draw_mask("inpainting", window.tokens, 1.0, np.random.default_rng(0))
        samples.append(make_sample(window, mask, budget(reader.store, RUN.data, "inpainting")))
    for later in samples[1:]:
        for name, array in samples[0].items():
            assert_array_equal(later[name], array, err_msg=name)


@pytest.mark.parametrize("at_s", [3.0, 3.08, 5.3])
def test_frames_are_the_stores_pixels_at_their_times(at_s: float, reader: WindowReader) -> None:
    """The tiny film has a frame each 133 ms, and a tenth of them are blanks."""
    roomy = WindowReader(reader.store, model_config(RUN), 100)
    window = one_window(roomy, "full", at_s)
    stream = reader.store.session(window.session).stream("movie")
    index, times_s = stream.read(slice(0, len(stream.start_ns)))[:, 0, 0], (stream.start_ns - window.start_ns) / 1e9
    inside = (times_s >= 0) & (times_s < 1)
    first = int(np.flatnonzero(inside)[0])
    if times_s[first] > 0.1:
        inside[first - 1] = True
    inside &= (index >= 0) | ((times_s >= 0) & (np.roll(index, 1) >= 0))  # of blanks, those with which a frame goes
    expected = resize_frames(pixels()[np.maximum(index[inside], 0)], (24, 24))
    expected[index[inside] < 0] = 0
    assert_array_equal(window.frame_time_s, times_s[inside].astype(np.float32))
    assert_array_equal(window.pixels, expected)
    few = one_window(reader, "full", at_s)
    assert len(few.pixels) == min(len(window.pixels), RUN.data.max_frames)
    assert np.isin(few.frame_time_s, window.frame_time_s).all()
    assert len(one_window(reader, "blind").pixels) == 0


@pytest.mark.parametrize(
    ("at_s", "times_s", "indices"),
    [
        (0.0, [0.0], [0]),
        (1.5, [-1.0], [0]),  # on since 1.5 s, which counts as 1
        (2.5, [-1.0, 0.5], [0, 1]),
        (2.95, [0.05], [1]),  # it will be gone in 50 ms
        (4.0, [-1.0, 0.5], [1, -1]),  # and then nothing is shown
        (5.0, [], []),  # it has gone before
        (5.5, [0.5], [2]),
        (8.0, [], []),  # nothing follows for 14 s
        (20.5, [0.5], [3]),
        (21.5, [], []),  # nothing follows at all
    ],
)
def test_what_is_on_the_screen_when_a_window_starts_is_seen_and_where_it_goes(
    at_s: float, times_s: list[float], indices: list[int], tmp_path: Path
) -> None:
    (tmp_path / "recording.txt").write_text("stands for an NWB file")
    plan = tiny_session(tmp_path / "recording.txt", "full", 0)
    shown = {0.0: 0, 3.0: 1, 4.5: -1, 6.0: 2, 21.0: 3}
    begun_ns = plan.splits[0][0] + np.array([round(start * SECOND_NS) for start in shown])

    def held(stream: PlannedStream) -> PlannedStream:
        if stream.spec.name != "movie":
            return stream
        spec = replace(stream.spec, num_tokens=len(shown), duration_ns=3 * SECOND_NS, sample_ns=3 * SECOND_NS)
        return replace(stream, spec=spec, start_ns=begun_ns, reader=Given(np.array([*shown.values()], np.int32)))

    plan = replace(plan, streams=tuple(map(held, plan.streams)))
    write_plan(plan, target(tmp_path / "store", plan))
    catalog.write(tmp_path / "store")
    reader = reader_of(tmp_path / "store", RUN)
    window = one_window(reader, "full", at_s)
    assert window.frame_time_s.tolist() == pytest.approx(times_s)
    frames = [np.zeros((24, 24)) if i < 0 else resize_frames(pixels()[[i]], (24, 24))[0] for i in indices]
    assert_array_equal(window.pixels, np.array(frames).reshape(-1, 24, 24).astype(np.float32))
    mask = draw_mask("encoding", window.tokens, 1.0, np.random.default_rng(1))
    sample = make_sample(window, replace(mask, frames=True), budget(reader.store, RUN.data, "encoding"))
    assert sample["frame_mask"].sum() == len(indices), "the budget holds them"


@dataclass(frozen=True)
class Given:
    """Reads tokens of one source and one sample that are given."""

    values: np.ndarray

    def read(self, first: int, stop: int) -> np.ndarray:
        return self.values[first:stop, None, None]


def test_frames_of_another_size_keep_their_mean_grey() -> None:
    frames = np.arange(2 * 12 * 8, dtype=np.uint8).reshape(2, 12, 8)
    resized = resize_frames(frames, (6, 4))
    assert resized.shape == (2, 6, 4)
    np.testing.assert_allclose(resized.mean((1, 2)), (frames.mean((1, 2)) - 127.5) / 64, rtol=1e-6)
    assert_array_equal(resize_frames(frames, (12, 8)), ((frames.astype(np.float32) - 127.5) / 64).astype(np.float32))
    colour = np.repeat(frames[..., None], 3, -1)
    assert_array_equal(resize_frames(colour, (6, 4)), resized)


@pytest.mark.parametrize("label", ["train", "valid", "test"])
@pytest.mark.parametrize("stride_s", [0.5, 1.0, 0.25])
def test_no_window_leaves_its_split(reader: WindowReader, label: str, stride_s: float) -> None:
    windows = split_windows(reader.store, label, 1.0, stride_s)
    assert len(windows) > 0
    seen: set[int] = set()
    for index in range(len(windows)):
        for jitter in (0.0, 0.5, 0.999):
            session, start_ns = windows.locate(index, jitter)
            seen.add(session)
            blocks = [(a, b) for a, b, name in reader.store.entries[session]["splits"] if name == label]
            assert any(a <= start_ns and start_ns + SECOND_NS <= b for a, b in blocks)
            assert start_ns % TOKEN_NS == 0
    assert seen == set(range(4))


def test_windows_cover_their_split_from_end_to_end(reader: WindowReader) -> None:
    windows = split_windows(reader.store, "train", 1.0, 0.5)
    starts = [windows.locate(index) for index in range(len(windows))]
    assert len(set(starts)) == len(windows)
    begin_ns = reader.store.entries[0]["splits"][0][0]
    assert [s for session, s in starts if session == 0] == [begin_ns + i * SECOND_NS // 2 for i in range(23)]
    reached = {windows.locate(index, jitter) for index in range(len(windows)) for jitter in np.arange(5) / 5}
    first = {s for session, s in reached if session == 0}
    assert first == set(range(begin_ns, begin_ns + 11 * SECOND_NS + 1, TOKEN_NS)), "every token can begin a window"


def test_a_split_too_short_for_a_window_has_none(reader: WindowReader) -> None:
    assert len(split_windows(reader.store, "valid", 4.0, 1.0)) == 0
    empty = Windows(*[np.zeros(0, np.int64)] * 4, stride_ns=1, context_ns=1)
    assert len(empty) == 0


@pytest.mark.parametrize("family", [*FAMILIES, "co_smoothing+decoding", "forecasting+decoding", "encoding+inpainting"])
def test_budgets_are_enough_and_shapes_are_fixed(reader: WindowReader, family: str) -> None:
    data = replace(RUN.data, max_units=100, max_queries=10**6, max_frames=100)
    roomy = WindowReader(reader.store, model_config(RUN), data.max_frames)
    shape = budget(reader.store, data, family)
    shapes = set()
    for session_id in SESSIONS:
        window = one_window(roomy, session_id)
        for seed in range(4):
            mask = draw_mask(family, window.tokens, 1.0, np.random.default_rng(seed))
            sample = make_sample(window, mask, shape)
            assert sample["input_mask"].sum() == mask.visible.sum()
            assert sample["label_mask"].sum() == window.observed[mask.asked].sum()
            assert sample["frame_mask"].sum() == len(window.pixels) * mask.frames
            assert (sample["unit_rows"] >= 0).sum() == len(window.sources.row)
            shapes.add(tuple((name, array.shape, array.dtype.str) for name, array in sample.items()))
    assert len(shapes) == 1


def test_what_exceeds_the_budget_is_left_out_by_the_samples_own_chance(reader: WindowReader) -> None:
    window = one_window(reader, "full")
    everything = np.ones(len(window.values), np.bool_)
    shape = Budget(16, 20, 10, 4)
    drawn = [
        make_sample(window, Mask(everything, everything, False), shape, np.random.default_rng(s)) for s in (0, 0, 1)
    ]
    assert all(sample["input_mask"].sum() == 20 for sample in drawn)
    assert_array_equal(drawn[0]["query_time_s"], drawn[1]["query_time_s"])
    assert (drawn[0]["query_time_s"] != drawn[2]["query_time_s"]).any()


def test_a_draw_of_units_keeps_whole_units_and_all_behaviour(reader: WindowReader) -> None:
    whole = one_window(reader, "full")
    window = reader.read(whole.session, whole.start_ns, SECOND_NS, max_units=4, chance=np.random.default_rng(1))
    assert (window.sources.modality == 0).sum() == 4 and (window.sources.modality == 2).sum() == 3
    for source, (row, stream) in enumerate(zip(window.sources.row, window.sources.stream, strict=True)):
        same = int(np.flatnonzero((whole.sources.row == row) & (whole.sources.stream == stream))[0])
        assert_array_equal(window.labels[window.tokens.source == source], whole.labels[whole.tokens.source == same])


def test_a_stream_with_more_samples_than_the_model_reads_is_refused(root: Path) -> None:
    run = replace(RUN, model=replace(RUN.model, overrides={**RUN.model.overrides, "samples_per_token": 4}))
    with pytest.raises(ConfigError, match=r"stream heading has 5 samples per token; the model reads 4\. Set") as error:
        reader_of(root, run)
    assert "model.overrides.samples_per_token" in str(error.value)


def test_a_store_without_a_window_is_refused(root: Path) -> None:
    run = replace(RUN, data=DataConfig(context_s=30.0))
    with pytest.raises(
        ConfigError, match=r"has no window of 30.0 s in the train split whose .* Shorten data.context_s"
    ):
        TrainingSamples(root, run, model_config(run))


def test_a_session_of_pixels_alone_and_of_two_stimuli_can_be_read(tmp_path: Path) -> None:
    recording = tmp_path / "recording.txt"
    recording.write_text("stands for an NWB file")
    plan = tiny_session(recording, "still", 0)
    movie = next(stream for stream in plan.streams if stream.spec.name == "movie")
    units = replace(plan.units, unit_key=[], kind=[], region=[], quality=[], xyz_um=np.zeros((0, 3), np.float32))
    twice = replace(movie, spec=replace(movie.spec, name="again"), reader=Values("frames", movie.spec.shape, 9))
    alone = replace(plan, streams=(movie, twice), units=units)
    write_plan(alone, target(tmp_path / "store", alone))
    catalog.write(tmp_path / "store")
    reader = reader_of(tmp_path / "store", RUN)
    window = one_window(reader, "still")
    assert len(window.sources.row) == len(window.tokens.source) == 0
    assert len(window.pixels) == len(window.frame_time_s) == RUN.data.max_frames
    mask = draw_mask("encoding", window.tokens, 1.0, np.random.default_rng(0))
    assert not make_sample(window, mask, budget(Store(tmp_path / "store"), RUN.data, "encoding"))["label_mask"].any()
