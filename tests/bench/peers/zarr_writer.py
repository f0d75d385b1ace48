"""zarr-python's sharded writer, alone or with the codec pipeline of zarrs: the arrays of the limit, written by them.

In: a recording, a folder, `zarr` or `zarrs`. Out: a Zarr v3 group; the cost on stdout. What is read and binned is the
limit's own code, and nothing is digested: this is what the choice of the writer costs.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).parents[1]))
import limit
from measure import measured


class ZarrWriter(limit.Writer):
    """Writes by zarr-python, one assignment per array."""

    def file(self, name: str, *parts: Any) -> None:
        """No digests, so no list of them."""

    def whole(self, name: str, values: limit.Array) -> None:
        """A small array in one chunk."""
        array = zarr.create_array(
            self.root / name, shape=values.shape, dtype=values.dtype, chunks=values.shape, compressors=None
        )
        array[...] = values

    def sharded(self, name: str, values: limit.Array, chunk: int, fill: Any) -> None:
        """The same shards and codecs as the limit's."""
        num_chunks = min(max(1, limit.SHARD_BYTES // (values[0].nbytes * chunk)), -(-len(values) // chunk))
        shape = (chunk * num_chunks, *values.shape[1:])
        array = zarr.create_array(
            self.root / name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(chunk, *values.shape[1:]),
            shards=shape,
            compressors=None,
            fill_value=fill,
        )
        for first in range(0, len(values), shape[0]):
            array[first : first + shape[0]] = np.ascontiguousarray(values[first : first + shape[0]])


if __name__ == "__main__":
    threads: dict[str, Any] = {"async.concurrency": 1, "threading.max_workers": 1}
    if sys.argv[3] == "zarrs":
        threads |= {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    limit.Writer = ZarrWriter
    with zarr.config.set(threads), measured():
        limit.write(Path(sys.argv[1]), Path(sys.argv[2]))
