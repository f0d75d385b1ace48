"""The token store: what is written is what is read, by us and by zarr-python, and damage is never read as data.

In: hand-built arrays. Out: stores in temporary folders.
"""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from store_builders import a_recording, build_store

import prep.store
from prep.disk import DigestError, ShardFormatError, StoreError
from prep.shards import (
    Rows,
    RowsSpec,
    create_rows,
    read_array,
    read_text,
    read_with_zarr,
    rows_spec,
    write_array,
    write_shard,
    write_text,
)
from prep.store import Store, StreamSpec, sanitise

LAYOUTS = {
    "counts": RowsSpec(shape=(23, 3, 5), dtype="uint8", fill=255, chunk_rows=4, shard_rows=8, codec="zstd"),
    "trace": RowsSpec(shape=(23, 3, 5), dtype="float32", fill=math.nan, chunk_rows=4, shard_rows=8, codec="raw"),
    "frames": RowsSpec(shape=(9, 6, 4, 3), dtype="uint8", fill=0, chunk_rows=2, shard_rows=4, codec="raw"),
}


def values_for(spec: RowsSpec) -> np.ndarray[Any, Any]:
    """Values (n, …) with some that are missing."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, spec.shape).astype(spec.dtype)
    values[rng.random(spec.shape) < 0.1] = spec.fill
    return values


def write_rows(path: Path, spec: RowsSpec, values: np.ndarray[Any, Any], skip: tuple[int, ...] = ()) -> None:
    """Write every shard but `skip`."""
    create_rows(path, spec)
    for shard, start in enumerate(range(0, spec.shape[0], spec.shard_rows)):
        if shard not in skip:
            write_shard(path, spec, shard, values[start : start + spec.shard_rows])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_run_of_rows_reads_back_over_shards_and_a_partial_last_chunk(kind: str, tmp_path: Path) -> None:
    spec, values = LAYOUTS[kind], values_for(LAYOUTS[kind])
    write_rows(tmp_path / "a", spec, values)
    rows = Rows(tmp_path / "a", rows_spec(tmp_path / "a"))
    assert (rows.spec.shape, rows.spec.codec, rows.spec.shard_rows) == (spec.shape, spec.codec, spec.shard_rows)
    for start in range(len(values) + 1):
        for stop in range(start, len(values) + 1):
            assert_array_equal(rows.read(start, stop), values[start:stop])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_zarr_python_reads_the_same_values(kind: str, tmp_path: Path) -> None:
    spec, values = LAYOUTS[kind], values_for(LAYOUTS[kind])
    write_rows(tmp_path / "a", spec, values)
    assert_array_equal(read_with_zarr(tmp_path / "a", 0, len(values)), values)
    assert_array_equal(read_with_zarr(tmp_path / "a", 7, 9), values[7:9])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_shard_that_was_never_written_reads_as_missing(kind: str, tmp_path: Path) -> None:
    spec, values = LAYOUTS[kind], values_for(LAYOUTS[kind])
    write_rows(tmp_path / "a", spec, values, skip=(1,))
    values[spec.shard_rows : 2 * spec.shard_rows] = spec.fill
    assert_array_equal(Rows(tmp_path / "a", spec).read(0, len(values)), values)
    assert_array_equal(read_with_zarr(tmp_path / "a", 0, len(values)), values)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_shard_of_fill_values_has_no_bytes(kind: str, tmp_path: Path) -> None:
    spec = LAYOUTS[kind]
    write_rows(tmp_path / "a", spec, np.full(spec.shape, spec.fill, spec.dtype))
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["zarr.json"]
    assert_array_equal(Rows(tmp_path / "a", spec).read(0, 5), np.full((5, *spec.shape[1:]), spec.fill, spec.dtype))


def test_a_shard_of_the_wrong_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    spec = LAYOUTS["counts"]
    with pytest.raises(StoreError, match=r"shard 2 got uint8\(8, 3, 5\), expected uint8\(7, 3, 5\)"):
        write_shard(tmp_path / "a", spec, 2, np.zeros((8, 3, 5), np.uint8))
    with pytest.raises(StoreError, match="got int64"):
        write_shard(tmp_path / "a", spec, 0, np.zeros((8, 3, 5), np.int64))


def test_rows_outside_the_array_are_refused(tmp_path: Path) -> None:
    spec = LAYOUTS["counts"]
    write_rows(tmp_path / "a", spec, values_for(spec))
    with pytest.raises(StoreError, match=r"rows \[20, 24\) are outside \[0, 23\)"):
        Rows(tmp_path / "a", spec).read(20, 24)


@pytest.mark.parametrize("num_tokens", [0, 1, 19, 20, 21, 100_000])
def test_a_streams_shards_are_whole_chunks_that_cover_its_tokens(num_tokens: int) -> None:
    spec = StreamSpec(
        name="spikes",
        kind="counts",
        modality="spikes",
        num_tokens=num_tokens,
        num_sources=700,
        samples_per_token=5,
        duration_ns=100_000_000,
        sample_ns=20_000_000,
    )
    assert spec.shard_tokens % spec.chunk_tokens == 0
    assert spec.num_shards * spec.shard_tokens >= num_tokens > (spec.num_shards - 1) * spec.shard_tokens - 1
    assert spec.shard_tokens * 3500 <= prep.store.SHARD_BYTES


@pytest.mark.parametrize("array", [np.zeros((0, 3), np.float32), np.arange(4), np.eye(3, dtype=np.float32)])
def test_small_arrays_read_back_and_zarr_python_agrees(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    write_array(tmp_path / "a", array)
    assert_array_equal(read_array(tmp_path / "a"), array)
    assert read_with_zarr(tmp_path / "a", 0, len(array)).dtype == array.dtype
    assert_array_equal(read_with_zarr(tmp_path / "a", 0, len(array)), array)


@pytest.mark.parametrize("texts", [[], ["", "a"], ["CA1", "sübiculum", ""]])
def test_text_reads_back(texts: list[str], tmp_path: Path) -> None:
    write_text(tmp_path / "t", texts)
    assert read_text(tmp_path / "t") == texts


@pytest.mark.parametrize(
    ("name", "folder"),
    [("../../etc", "etc"), ("/abs/path", "abs_path"), ("..", "unnamed"), ("", "unnamed"), ("a b\0c", "a_b_c")],
)
def test_names_on_disk_are_single_folders(name: str, folder: str) -> None:
    assert sanitise(name) == folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    recording = a_recording(tmp_path)
    build_store(tmp_path / "store", recording, "s1", "s2")
    return tmp_path / "store"


def test_an_unknown_version_is_refused_with_the_remedy(store: Path) -> None:
    catalog = json.loads((store / "catalog.json").read_text())
    (store / "catalog.json").write_text(json.dumps({**catalog, "format": 99}))
    with pytest.raises(ShardFormatError) as refusal:
        Store(store)
    assert str(refusal.value) == (
        f"{store}/catalog.json is format version 99; this code reads [2]. "
        'Update the code, or run `make prep` again (FORMAT.md, "Versions").'
    )


def test_a_folder_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"catalog\.json is missing\. Is this a token store"):
        Store(tmp_path)


def test_an_edited_catalog_is_refused(store: Path) -> None:
    text = (store / "catalog.json").read_text()
    (store / "catalog.json").write_text(text.replace('"num_units": 5', '"num_units": 6', 1))
    with pytest.raises(DigestError, match=r"catalog\.json is damaged"):
        Store(store)


def test_a_shard_that_vanished_with_its_digests_is_not_read_as_missing(store: Path) -> None:
    values = store / "d1" / "s1.zarr" / "streams" / "spikes" / "values"
    (values / "c" / "1" / "0" / "0").unlink()
    (values / "digests" / "1").unlink()
    with pytest.raises(DigestError, match="is missing"):
        Store(store).session(0).stream("spikes").read(slice(0, 130))


def test_a_shard_in_anothers_place_is_not_read(store: Path) -> None:
    values = store / "d1" / "s1.zarr" / "streams" / "spikes" / "values"
    for name in ("c/{}/0/0", "digests/{}"):
        (values / name.format(1)).write_bytes((values / name.format(0)).read_bytes())
    with pytest.raises(DigestError, match="sha256 differs from the manifest"):
        Store(store).session(0).stream("spikes").read(slice(0, 130))


def test_a_shard_cut_short_is_not_read(store: Path) -> None:
    shard = store / "d1" / "s1.zarr" / "streams" / "running" / "values" / "c" / "0" / "0" / "0"
    for size in (shard.stat().st_size - 1, 10, 0):
        shard.write_bytes(shard.read_bytes()[:size])
        with pytest.raises(DigestError, match="is damaged"):
            Store(store).session(0).stream("running").read(slice(0, 10))


def test_a_session_reads_what_its_plan_said(store: Path) -> None:
    opened = Store(store).session(0)
    assert opened.stream_names == ["licks", "movie", "roi", "running", "spikes"]
    assert opened.text("units/region") == ["CA1", "", "V1", "V1", "sübiculum"]
    assert opened.splits("valid") == [(12_000_009_000_000_000, 12_000_010_000_000_000)]
    assert opened.attributes["sources"][0]["file"] == "recording.nwb"
    roi = opened.stream("roi")
    assert roi.offset_ns is not None and roi.offset_ns.tolist() == [0, 7_000_000]
    assert roi.tokens(int(roi.start_ns[3]), int(roi.start_ns[5])) == slice(3, 5)
    licks = opened.stream("licks")
    assert (licks.spec.types, licks.spec.fields) == (("lick_left", "lick_right"), ("duration_s", "value"))
    assert licks.types is not None and licks.types.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    with pytest.raises(StoreError, match="has no stream 'nope'; it has"):
        opened.stream("nope")


def test_pixels_are_read_by_their_digest_and_checked(store: Path) -> None:
    opened = Store(store)
    digest = next(iter(opened.catalog["stimuli"]))
    assert opened.frames(digest).read(0, 7).shape == (7, 4, 3)
    with pytest.raises(StoreError, match="has no stimulus nope"):
        opened.frames("nope")
    shard = store / "stimuli" / f"{digest}.zarr" / "frames" / "c" / "0" / "0" / "0"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(DigestError):
        Store(store).frames(digest).read(0, 7)


# ---------------------------------------------------------------- stores that are not whole


def read_all(opened: Store) -> list[np.ndarray[Any, Any]]:
    """All that a reader can read of a store."""
    result = [opened.frames(digest).read(0, 7) for digest in opened.catalog["stimuli"]]
    for index in range(len(opened.entries)):
        session = opened.session(index)
        result += [session.stream(name).read(slice(0, 9)) for name in session.stream_names]
        for name in session.stream_names:
            stream = session.stream(name)
            result.append(stream.read(slice(0, stream.spec.num_tokens)))
        small = sorted(key for key in session.sealed.entries if key.endswith("zarr.json") and "values" not in key)
        groups = {"zarr.json", *(f"{part}/zarr.json" for part in ("units", "streams", "intervals", "splits"))}
        groups |= {f"streams/{name}/zarr.json" for name in session.stream_names} | {"intervals/trials/zarr.json"}
        result += [session.array(key.removesuffix("/zarr.json")) for key in small if key not in groups]
        assert session.attributes["dataset_id"] == "d1"
    return result


def refusal(store: Path) -> str:
    """What the reader says of a store."""
    with pytest.raises(StoreError) as found:
        read_all(Store(store))
    return str(found.value)


def test_a_store_without_a_catalog_that_holds_sessions_is_called_unfinished(store: Path) -> None:
    (store / "catalog.json").unlink()
    assert refusal(store) == (
        f"{store}/catalog.json is missing, but sessions are there: `make prep` has not ended, or was killed. "
        "Let it end, or run the same `make prep` again."
    )


@pytest.mark.parametrize("text", ["[]", "{}", '{"sessions": []}', '{"format": 2, "sha256": "x"}'])
def test_a_catalog_that_is_none_is_refused(text: str, store: Path) -> None:
    (store / "catalog.json").write_text(text)
    assert refusal(store) == (
        f"{store}/catalog.json is no catalog of a token store. Run `make verify STORE=…`, then `make prep` again."
    )


def test_a_catalog_cut_short_is_refused(store: Path) -> None:
    path = store / "catalog.json"
    path.write_bytes(path.read_bytes()[:100])
    assert refusal(store).startswith(f"{path} is not valid JSON (")


def test_a_session_that_was_made_again_since_the_catalog_is_refused(store: Path) -> None:
    manifest = store / "d1" / "s1.manifest.json"
    expected = (
        f"{manifest} is missing or differs from catalog.json: its session was made again, or a run was killed before "
        "it wrote the catalog. Run `make prep` again, and open the store after it has ended."
    )
    manifest.write_text(manifest.read_text() + "\n")
    assert refusal(store) == expected
    manifest.unlink()
    assert refusal(store) == expected


def test_a_session_whose_folder_is_gone_is_refused(store: Path) -> None:
    shutil.rmtree(store / "d1" / "s1.zarr")
    assert refusal(store).startswith(f"{store}/d1/s1.zarr/streams/licks/zarr.json is missing. Delete the .manifest")


def test_a_shard_that_no_manifest_lists_is_not_read(store: Path) -> None:
    values = store / "d1/s1.zarr/streams/roi/values"
    assert not (values / "c/1").exists()
    (values / "c/1/0").mkdir(parents=True)
    shutil.copy(values / "c/0/0/0", values / "c/1/0/0")
    assert refusal(store).startswith(f"{values}/c/1/0/0 is not in the manifest. Delete")


@pytest.mark.parametrize("index", [2, -1])
def test_a_session_that_is_not_there_is_named(index: int, store: Path) -> None:
    with pytest.raises(StoreError, match=f"{store} has 2 sessions; there is no session {index}."):
        Store(store).session(index)


CLOCKS = {
    "regular": 12_000_000 * 10**9 + np.arange(50) * 33_333_333,
    "late by one": np.append(np.arange(49) * 100, 4_901),
    "with a gap": np.append(np.arange(20) * 100, 5_000 + np.arange(20) * 100),
    "standing still": np.full(7, 300),
    "of one token": np.array([300]),
    "empty": np.zeros(0, np.int64),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_tokens_are_found_as_by_a_search_on_any_clock(clock: str) -> None:
    start_ns = CLOCKS[clock].astype(np.int64)
    golden = Store(Path(__file__).parent / "golden" / "store").session(0)
    stream = replace(golden.stream("spikes"), start_ns=start_ns)
    marks = np.unique(start_ns[:, None] + [-(10**10), -1, 0, 1, 10**10]).tolist() or [-1, 0, 1]
    for first, last in itertools.combinations_with_replacement(marks, 2):
        assert stream.tokens(first, last) == slice(*np.searchsorted(start_ns, (first, last)).tolist())
