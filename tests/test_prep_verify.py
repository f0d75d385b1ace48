"""`verify` finds every damaged, missing and foreign file; the reader never takes damage for data.

In: small hand-built stores, damaged on purpose. Out: nothing.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_builders import a_recording, build_store, tree

from prep.__main__ import main
from prep.disk import StoreError
from prep.store import Store
from prep.verify import verify

NUM_FLIPS = 100


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    recording = a_recording(folder)
    build_store(folder / "store", recording, "s1", "s2")
    return folder / "store"


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "store")
    return tmp_path / "store"


def problems(store: Path) -> list[str]:
    """All that verify finds."""
    return [problem for row in verify(store) for problem in row.problems]


def read_everything(store: Path) -> dict[str, Any]:
    """All data of a store, through the reader."""
    opened = Store(store)
    result: dict[str, Any] = {"catalog": opened.entries, "features": opened.catalog["features"]}
    for index, entry in enumerate(opened.entries):
        session = opened.session(index)
        result[f"{index}/attributes"] = session.attributes
        result[f"{index}/features"] = session.array("units/features").tobytes()
        result[f"{index}/text"] = [session.text(f"units/{n}") for n in ("unit_key", "kind", "region", "quality")]
        result[f"{index}/xyz"] = session.array("units/xyz_um").tobytes()
        result[f"{index}/splits"] = [session.splits(label) for label in entry["split_labels"]]
        for name in ("start_ns", "stop_ns", "contrast"):
            result[f"{index}/trials/{name}"] = session.array(f"intervals/trials/{name}").tobytes()
        result[f"{index}/phase"] = session.text("intervals/trials/phase")
        for name in session.stream_names:
            stream = session.stream(name)
            arrays = (stream.read(slice(0, stream.spec.num_tokens)), stream.start_ns, stream.mean, stream.scale)
            result[f"{index}/{name}"] = (
                stream.spec,
                [a.tobytes() for a in arrays],
                str(stream.offset_ns),
                str(stream.types),
            )
    for digest, entry in opened.catalog["stimuli"].items():
        result[digest] = opened.frames(digest).read(0, entry["shape"][0]).tobytes()
    return result


def test_a_sound_store_passes_and_says_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "d1/s1.zarr" in shown and "all is as it was written" in shown


def test_one_flipped_byte_anywhere_is_found_and_never_read_as_data(tmp_path: Path) -> None:
    store, rng = tmp_path / "store", np.random.default_rng(1)
    build_store(store, a_recording(tmp_path), "s1")
    truth = read_everything(store)
    files = [name for name in tree(store) if (store / name).stat().st_size]
    data = [name for name in files if "/values/" in name or "/frames/" in name or "digests" in name]
    chosen = [*rng.choice(files, NUM_FLIPS // 2, replace=False), *rng.choice(data, NUM_FLIPS // 2)]
    num_refused = 0
    for name in ["catalog.json", *(name for name in files if ".manifest." in name), *map(str, chosen)]:
        path = store / name
        good = path.read_bytes()
        place = int(rng.integers(len(good)))
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << int(rng.integers(8)))]) + good[place + 1 :])
        assert any(name in problem for problem in problems(store)), f"byte {place} of {name}"
        try:
            read = read_everything(store)
        except StoreError:
            read, num_refused = truth, num_refused + 1
        assert read == truth, f"byte {place} of {name} was read as data"
        path.write_bytes(good)
    assert num_refused > NUM_FLIPS / 2
    assert problems(store) == []


def test_a_missing_a_foreign_and_a_longer_file_are_named(store: Path) -> None:
    session = store / "d1" / "s1.zarr"
    (session / "units" / "region" / "c" / "0" / "0").unlink()
    (session / "notes.txt").write_text("mine")
    with open(session / "splits" / "label" / "c" / "0", "ab") as file:
        file.write(b"\0")
    (store / "d1" / "s3.zarr").mkdir()
    (store / "readme.txt").write_text("hello")
    assert problems(store) == [
        "d1/s3.zarr: not sealed by a manifest; run the same `make prep` again",
        "readme.txt: is no part of a store",
        "d1/s1.zarr/notes.txt: not in the manifest",
        "d1/s1.zarr/splits/label/c/0: 4 bytes, the manifest says 3",
        "d1/s1.zarr/units/region/c/0/0: missing",
    ]


def test_a_catalog_that_lacks_a_session_is_found(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(store / "d1" / "s2.zarr")
    (store / "d1" / "s2.manifest.json").unlink()
    assert main(["verify", str(store)]) == 1
    shown = capsys.readouterr().out
    assert "catalog.json: its entry of d1/s2.zarr differs from d1/s2.manifest.json, or one is missing" in shown


def test_what_runs_leave_behind_is_no_problem(store: Path) -> None:
    (store / "d1" / ".s9.0123456789ab.partial.zarr").mkdir()
    (store / ".runs").mkdir()
    assert problems(store) == []


def test_a_folder_that_is_no_store_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "is no token store" in capsys.readouterr().err
