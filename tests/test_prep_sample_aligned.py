"""A token holds exactly the recorded samples, and a query at a sample's own time returns that sample, not the last.

In: the synthetic brain, and A2929 where it is (BRAINLOOM_NWB_DIR or ../shared/nwb), ingested into a store; the same
files read by h5py. Out: nothing.
"""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from store_builders import target, write_plan

from prep import catalog, synthetic
from prep.nwb.session import plan_session
from prep.recipe import Recipe
from prep.store import Session, Store, Stream

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("BRAINLOOM_NWB_DIR", ROOT.parent / "shared" / "nwb"))
HEAD_DIRECTION = FOLDER / "head_direction_A2929.nwb"
BIN_NS = 20_000_000

Opened = tuple[Session, h5py.File]


def ingested(store: Path, recordings: list[Path]) -> Iterator[Opened]:
    """Each session of a store made of these files, beside its file."""
    for path in recordings:
        plan = plan_session(path, Recipe(), "d1")
        write_plan(plan, target(store, plan))
    catalog.write(store)
    opened = Store(store)
    by_name = {path.name: path for path in recordings}
    for number, entry in enumerate(opened.entries):
        with h5py.File(by_name[entry["sources"][0]["file"]]) as file:
            yield opened.session(number), file


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> list[Opened]:
    folder = tmp_path_factory.mktemp("aligned")
    recordings = synthetic.write_brain(folder / "nwb", None, "test", seed=0)
    return [(session, h5py.File(file.filename)) for session, file in ingested(folder / "store", recordings)]


@pytest.fixture(scope="module")
def a2929(tmp_path_factory: pytest.TempPathFactory) -> list[Opened]:
    if not HEAD_DIRECTION.exists():
        pytest.skip(f"no {HEAD_DIRECTION}; set BRAINLOOM_NWB_DIR")
    store = tmp_path_factory.mktemp("aligned") / "store"
    return [(session, h5py.File(file.filename)) for session, file in ingested(store, [HEAD_DIRECTION])]


def exact_ns(times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Nanoseconds by exact arithmetic."""
    return np.array([round(Fraction(float(time_s)) * 10**9) for time_s in times], np.int64)


def recorded(file: h5py.File, stream: Stream) -> tuple[NDArray[np.int64], NDArray[np.generic]]:
    """Times (n,) in ns and samples (n, S) of a stream's object, as the file has them, converted to what is stored."""
    group = file[stream.spec.origin]
    data = group["data"]
    samples = data[()].reshape(len(data), -1)
    if stream.spec.kind == "frames":
        return exact_ns(group["timestamps"][()]), samples.astype(np.int32)
    values = samples.astype(np.float64) * data.attrs.get("conversion", 1.0) + data.attrs.get("offset", 0.0)
    if any(channel.endswith("/cos") for channel in stream.spec.channels):
        values = np.concatenate([np.cos(values), np.sin(values)], axis=1)
    return exact_ns(group["timestamps"][()]), values.astype(np.float32)


def of_kind(opened: list[Opened], *kinds: str) -> Iterator[tuple[Session, h5py.File, Stream]]:
    for session, file in opened:
        for name in session.stream_names:
            if session.stream(name).spec.kind in kinds:
                yield session, file, session.stream(name)


def check_samples(file: h5py.File, stream: Stream) -> None:
    """Token k holds the samples k * P .. k * P + P - 1 and starts at the first one's time stamp."""
    time_ns, samples = recorded(file, stream)
    num_tokens, num_sources, num_samples = stream.spec.shape
    assert num_tokens == -(-len(samples) // num_samples)
    fill = -1 if stream.spec.kind == "frames" else np.nan
    padded = np.full((num_tokens * num_samples, num_sources), fill, samples.dtype)
    padded[: len(samples)] = samples
    expected = padded.reshape(num_tokens, num_samples, num_sources).transpose(0, 2, 1)
    assert np.array_equal(stream.read(slice(0, num_tokens)), expected, equal_nan=stream.spec.kind == "trace")
    assert np.array_equal(stream.start_ns, time_ns[::num_samples])


def check_queries(file: h5py.File, stream: Stream) -> None:
    """A query that begins at a sample's own time begins with it; one nanosecond later it does not."""
    time_ns, samples = recorded(file, stream)
    num_samples, sample_ns = stream.spec.samples_per_token, stream.spec.sample_ns
    values = stream.read(slice(0, stream.spec.num_tokens))
    for k in range(0, stream.spec.num_tokens, 37):
        at_ns = int(time_ns[k * num_samples])
        assert stream.tokens(at_ns, at_ns + 1) == slice(k, k + 1)
        assert np.array_equal(stream.read(stream.tokens(at_ns, at_ns + 1))[0, :, 0], samples[k * num_samples])
        assert stream.tokens(at_ns + 1, at_ns + 2) == slice(k + 1, k + 1)
        assert stream.tokens(at_ns - 1, at_ns) == slice(k, k)
    # Any sample, by arithmetic on what the store says alone: the token that holds its time, and its place in there.
    token = np.searchsorted(stream.start_ns, time_ns, side="right") - 1
    place = np.rint((time_ns - stream.start_ns[token]) / sample_ns).astype(np.int64)
    assert np.array_equal(values[token, :, place], samples)


def test_tokens_of_the_synthetic_brain_hold_the_recorded_samples(brain: list[Opened]) -> None:
    streams = list(of_kind(brain, "trace", "frames"))
    assert len(streams) == 12
    for _, file, stream in streams:
        check_samples(file, stream)


def test_a_query_at_a_samples_own_time_returns_it_in_the_synthetic_brain(brain: list[Opened]) -> None:
    for _, file, stream in of_kind(brain, "trace", "frames"):
        check_queries(file, stream)


def test_every_stream_is_checked_by_one_of_these_tests(brain: list[Opened], a2929: list[Opened]) -> None:
    for opened in (brain, a2929):
        checked = list(of_kind(opened, "trace", "frames", "counts", "event"))
        assert len(checked) == sum(len(session.stream_names) for session, _ in opened)


def check_counts(file: h5py.File, stream: Stream) -> None:
    """Each spike is in the bin of its own time: on an edge, in the later one. Missing: bins not wholly observed."""
    values = stream.read(slice(0, stream.spec.num_tokens))
    bins = values.transpose(1, 0, 2).reshape(stream.spec.num_sources, -1).astype(np.int64)
    expected = np.zeros_like(bins)
    spike_ns = exact_ns(file["units/spike_times"][()])
    unit = np.repeat(np.arange(len(bins)), np.diff(file["units/spike_times_index"][()].astype(np.int64), prepend=0))
    np.add.at(expected, (unit, (spike_ns - stream.start_ns[0]) // BIN_NS), 1)
    is_observed = np.ones_like(bins, dtype=bool)
    if "obs_intervals" in file["units"]:
        begin_ns = stream.start_ns[0] + np.arange(bins.shape[1]) * BIN_NS
        first_ns, last_ns = (exact_ns(file["units/obs_intervals"][:, edge])[:, None] for edge in (0, 1))
        is_observed = (begin_ns >= first_ns) & (begin_ns + BIN_NS <= last_ns)
    assert np.array_equal(bins, np.where(is_observed, expected, 255))


def test_spikes_of_the_synthetic_brain_are_in_the_bin_of_their_time(brain: list[Opened]) -> None:
    streams = list(of_kind(brain, "counts"))
    assert len(streams) == 2
    for _, file, stream in streams:
        check_counts(file, stream)


def test_tokens_of_a2929_hold_the_recorded_samples(a2929: list[Opened]) -> None:
    streams = list(of_kind(a2929, "trace"))
    assert len(streams) == 6
    for _, file, stream in streams:
        check_samples(file, stream)


def test_a_query_at_a_samples_own_time_returns_it_in_a2929(a2929: list[Opened]) -> None:
    for _, file, stream in of_kind(a2929, "trace"):
        check_queries(file, stream)


def test_spikes_of_a2929_are_in_the_bin_of_their_time(a2929: list[Opened]) -> None:
    ((_, file, stream),) = of_kind(a2929, "counts")
    check_counts(file, stream)


def test_a_query_at_an_events_own_time_returns_that_event_in_a2929(a2929: list[Opened]) -> None:
    for _, file, stream in of_kind(a2929, "event"):
        stamps = exact_ns(np.sort(file[stream.spec.origin]["timestamps"][()]))
        assert np.isin(stream.start_ns, stamps).all()
        for k, at_ns in enumerate(stream.start_ns.tolist()):
            found = stream.tokens(at_ns, at_ns + 1)
            assert found.start <= k < found.stop and (stream.start_ns[found] == at_ns).all()
