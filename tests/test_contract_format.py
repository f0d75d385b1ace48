"""FORMAT.md and the code say the same: the array table against a real small store, both ways; the golden store.

In: FORMAT.md, tests/golden. Out: nothing.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from store_builders import a_recording, build_store, tree

import prep.write_session
from prep.settings import FEATURE_NAMES, FORMAT_VERSION
from prep.store import Store
from prep.verify import verify

FORMAT = Path(prep.__file__).parent / "FORMAT.md"
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

# What the golden store must read to, for ever.
SPIKES = [[[4, 2, 2, 0, 4], [3, 1, 1, 4, 3], [2, 0, 4, 3, 2]], [[255, 4, 3, 2, 1], [0, 3, 2, 1, 0], [3, 2, 1, 0, 4]]]
ROI = [[[5.796875, 4.078125, -1.03125], [9.5, 7.78125, 2.6875]]]
LAST_FRAME = [[[154, 191, 228], [14, 51, 88], [125, 162, 199], [236, 22, 59]]]
MEAN = [2.0227, 1.9975, 1.9722]
FEATURES = [  # the first seven; then the ones that are known of each unit
    [4.617, 0.698, 0.505, -0.013, -0.158, -0.008, 0.501],
    [4.604, 0.707, 0.431, -0.010, -0.073, 0.004, 0.401],
    [4.591, 0.713, 0.421, -0.043, -0.069, 0.017, 0.479],
    [0.0, 0.980, 0.0, -0.025, -0.299, 0.039, 0.616],
    [0.0, 0.939, 0.0, 0.022, -0.498, 0.011, 0.638],
]
KNOWN = [
    {"is_unit", "quality_good", "region_hippocampus"},
    {"is_unit", "quality_good"},
    {"is_unit", "quality_good", "region_visual"},
    {"is_roi", "quality_good", "region_visual"},
    {"is_roi", "quality_good", "region_elsewhere"},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format")
    recording = a_recording(folder)
    build_store(folder / "store", recording, "s1")
    return folder / "store"


def table() -> dict[str, tuple[str, str, str, str]]:
    """FORMAT.md's array table: path -> (shape, dtype, fill, codec)."""
    section = FORMAT.read_text().split("## Arrays")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if line[:3] == "| `"
    ]
    return {row[0].strip("`"): (row[1], row[2], row[3], row[4]) for row in rows}


def written(store: Path) -> dict[str, tuple[int, str, str, str]]:
    """What the code writes: path -> (number of axes, dtype, fill, codec), names of streams replaced by their kind."""
    session = store / "d1" / "s1.zarr"
    result = {}
    for path in sorted(store.glob("*/*.zarr/**/zarr.json")):
        meta = json.loads(path.read_text())
        if meta["node_type"] == "array":
            inside = path.parent.relative_to(session if path.is_relative_to(session) else store).as_posix()
            result[generic(session, inside, meta)] = (len(meta["shape"]), meta["data_type"], *layout(meta))
    return result


def layout(meta: dict[str, object]) -> tuple[str, str]:
    codecs = meta["codecs"]
    assert isinstance(codecs, list)
    is_sharded = codecs[0]["name"] == "sharding_indexed"
    inner = [codec["name"] for codec in codecs[0]["configuration"]["codecs"]] if is_sharded else []
    return str(meta["fill_value"]), "whole" if not is_sharded else "zstd" if "zstd" in inner else "raw"


def generic(session: Path, name: str, meta: dict[str, object]) -> str:
    top, *rest = name.split("/")
    if top == "streams":
        stream_meta = json.loads((session / top / rest[0] / "zarr.json").read_text())
        kind = stream_meta["attributes"]["brainloom_stream"]["kind"]
        return f"streams/<{kind}>/values" if rest[1] == "values" else f"streams/<any>/{rest[1]}"
    if top == "intervals":
        column = "<text>" if meta["attributes"] else "<number>"
        return f"intervals/<any>/{rest[1] if rest[1].endswith('_ns') else column}"
    return re.sub(r"stimuli/\w+\.zarr", "stimuli/<digest>.zarr", name)


def test_every_array_of_the_table_is_written_and_every_array_written_is_in_the_table(store: Path) -> None:
    promised, found = table(), written(store)
    assert set(promised) == set(found)
    for path, (shape, *rest) in promised.items():
        num_axes = 4 if "…" in shape else len([axis for axis in shape.strip("()").split(",") if axis.strip()])
        # the pixels of the small store are grey: one axis fewer than with channels
        assert (num_axes - ("…" in shape), *rest) == found[path], path


def test_the_page_names_the_version_and_the_features_of_the_code() -> None:
    text = FORMAT.read_text()
    assert text.startswith(f"# The token store, version {FORMAT_VERSION}\n")
    features = text.split("## Features")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", features, re.M)) == FEATURE_NAMES


@pytest.mark.parametrize("what", ["entry", "stream", "root"])
def test_the_page_names_every_key(what: str, store: Path) -> None:
    manifest = json.loads((store / "d1" / "s1.manifest.json").read_text())
    keys = {
        "entry": [*manifest["session"], *manifest["session"]["streams"][0]],
        "stream": json.loads((store / "d1/s1.zarr/streams/roi/zarr.json").read_text())["attributes"][
            "brainloom_stream"
        ],
        "root": json.loads((store / "d1/s1.zarr/zarr.json").read_text())["attributes"]["brainloom"],
    }[what]
    words = set(re.findall(r"\w+", FORMAT.read_text()))
    assert [key for key in keys if key not in words] == []


@pytest.mark.parametrize("golden", ["store", "store-zstd"])  # the latter with counts compressed, as the first were
def test_a_golden_store_still_reads_to_what_it_was_written_from(golden: str) -> None:
    opened = Store(GOLDEN / golden)
    session = opened.session(0)
    spikes = session.stream("spikes")
    assert spikes.read(slice(0, 2)).tolist() == SPIKES
    assert_array_equal(session.stream("roi").read(slice(60, 61)), np.full((1, 2, 3), np.nan, np.float32))
    assert session.stream("roi").read(slice(0, 1)).tolist() == ROI
    features = session.array("units/features").astype(float)
    assert features[:, :7].round(3).tolist() == FEATURES
    assert [{name for name, on in zip(FEATURE_NAMES[7:], row[7:], strict=True) if on == 1} for row in features] == KNOWN
    assert set(np.unique(features[:, 7:])) == {0.0, 1.0}
    assert session.text("units/unit_key")[4] == "d1/s1/4"
    assert opened.frames(session.stream("movie").spec.stimulus or "").read(6, 7).tolist() == LAST_FRAME
    assert spikes.mean.astype(float).round(4).tolist() == MEAN
    assert [problem for row in verify(GOLDEN / golden) for problem in row.problems] == []


def test_the_same_plan_gives_the_golden_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import build_golden

    monkeypatch.setattr(prep.write_session, "software_version", lambda: "golden")
    build_golden.build(tmp_path / "store")
    assert tree(tmp_path / "store") == tree(GOLDEN / "store")


def test_golden_stores_are_small() -> None:
    for catalog in GOLDEN.glob("*/catalog.json"):
        assert sum(path.stat().st_size for path in catalog.parent.rglob("*") if path.is_file()) < 60_000
