"""A store is plain Zarr v3: three readers of other people read every array equal to ours.

In: the golden store, and a small store with every kind of stream. Out: nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.testing import assert_array_equal
from store_builders import a_recording, build_store

from prep.shards import Rows, read_array, rows_spec

GOLDEN = Path(__file__).parent / "golden" / "store-zstd"
KINDS = {"counts", "trace", "frames", "event"}
Array = np.ndarray[Any, Any]


def with_zarr(path: Path, rows: slice) -> Array:
    return np.asarray(zarr.open_array(path, mode="r", zarr_format=3)[rows])


def with_zarrs(path: Path, rows: slice) -> Array:
    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(pipeline):
        return with_zarr(path, rows)


def with_tensorstore(path: Path, rows: slice) -> Array:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, open=True).result()[rows].read().result())


def with_ours(path: Path, rows: slice) -> Array:
    meta = json.loads((path / "zarr.json").read_text())
    if meta["codecs"][0]["name"] == "sharding_indexed":
        start, stop, _ = rows.indices(meta["shape"][0])
        return Rows(path, rows_spec(path)).read(start, stop)
    return read_array(path)[rows]


READERS = {"zarr-python": with_zarr, "zarrs": with_zarrs, "tensorstore": with_tensorstore}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    recording = a_recording(folder)
    build_store(folder / "store", recording, "s1", "s2")
    return folder / "store"


@pytest.fixture(params=["golden", "small"])
def store(request: pytest.FixtureRequest, small: Path) -> Path:
    return GOLDEN if request.param == "golden" else small


def arrays(store: Path) -> list[Path]:
    """The folder of every array of a store."""
    found = [path.parent for path in sorted(store.rglob("zarr.json")) if '"node_type": "array"' in path.read_text()]
    assert len(found) > 30
    return found


@pytest.mark.parametrize("reader", READERS)
def test_every_array_reads_as_with_our_reader(reader: str, store: Path) -> None:
    read: Callable[[Path, slice], Array] = READERS[reader]
    for path in arrays(store):
        ours = np.asarray(with_ours(path, slice(None)))
        assert_array_equal(read(path, slice(None)), ours.astype(ours.dtype.newbyteorder("=")), str(path), strict=True)


@pytest.mark.parametrize("reader", READERS)
def test_rows_across_the_borders_of_chunks_and_shards_read_the_same(reader: str, store: Path) -> None:
    num_sharded = 0
    for path in arrays(store):
        meta = json.loads((path / "zarr.json").read_text())
        num_rows, shard = meta["shape"][0], meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        if meta["codecs"][0]["name"] != "sharding_indexed" or num_rows <= shard + 1:
            continue
        num_sharded += 1
        rows = slice(shard - 1, shard + 1)
        ours = np.asarray(with_ours(path, rows))
        assert_array_equal(READERS[reader](path, rows), ours, str(path), strict=True)
    assert num_sharded >= 4


@pytest.mark.parametrize("reader", READERS)
def test_a_shard_that_was_not_written_reads_as_missing(reader: str, small: Path) -> None:
    values = small / "d1" / "s1.zarr" / "streams" / "roi" / "values"
    assert not (values / "c" / "1").exists()
    assert np.isnan(READERS[reader](values, slice(40, 80))).all()
    assert not np.isnan(READERS[reader](values, slice(0, 40))).all()


def test_the_small_store_has_every_kind_of_stream(small: Path) -> None:
    attributes = [
        json.loads(path.read_text())["attributes"] for path in (small / "d1/s1.zarr/streams").glob("*/zarr.json")
    ]
    assert {stream["brainloom_stream"]["kind"] for stream in attributes} == KINDS


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_index_of_a_shard_is_refused_by_every_reader(reader: str, small: Path, tmp_path: Path) -> None:
    values = tmp_path / "values"
    source = small / "d1" / "s1.zarr" / "streams" / "spikes" / "values"
    (values / "c" / "0" / "0").mkdir(parents=True)
    (values / "zarr.json").write_bytes((source / "zarr.json").read_bytes())
    shard = bytearray((source / "c/0/0/0").read_bytes())
    READERS[reader](source, slice(0, 1))
    shard[-10] ^= 1  # inside the index, which its crc32c covers
    (values / "c/0/0/0").write_bytes(shard)
    with pytest.raises(Exception, match=r"(?i)checksum|crc32c|digest"):
        READERS[reader](values, slice(0, 1))


def test_the_catalog_and_the_seals_are_the_only_files_that_are_not_zarr(store: Path) -> None:
    """Sidecars lie in the folders of their arrays, where a Zarr reader never looks."""
    for path in store.rglob("*"):
        inside = path.relative_to(store).as_posix()
        if path.is_dir() or ".lock" in inside:
            continue
        is_zarr = path.name == "zarr.json" or "/c/" in inside or inside.endswith("/c")
        is_ours = "/digests/" in inside or inside == "catalog.json" or inside.endswith(".manifest.json")
        assert is_zarr != is_ours, inside
