"""The demo, small: every station runs, and the summary can be recomputed from the predictions.

In: the synthetic brain's test preset, a handful of steps. Out: pass or fail.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.metrics import deviance_explained

ROOT = Path(__file__).parent.parent
ROW_KEYS = {"modality", "task", "visible", "deviance_explained", "ceiling", "ceiling_kind", "fraction_of_ceiling"}


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train", "demo", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    done = demo(out, "--preset", "test", "train.num_steps=4", "checkpoint_every=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_the_summary_has_what_checks_rely_on(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    assert {"tasks", "world_size", "tokens_per_s", "data_wait_share", "seconds", "export"} <= set(summary)
    assert summary["world_size"] == 2
    assert {"synthesize", "ingest", "train", "evaluate", "export"} <= set(summary["seconds"])
    assert summary["export"]["max_abs_difference"] < 1e-5
    assert Path(summary["export"]["folder"]).is_dir()
    assert all(set(row) >= ROW_KEYS for row in summary["tasks"])
    assert {row["modality"] for row in summary["tasks"]} == {"spikes", "traces", "behavior"}
    assert {row["ceiling_kind"] for row in summary["tasks"]} == {"exact", "bound", "null"}


def test_the_table_can_be_recomputed_from_the_predictions(made: Path) -> None:
    rows = json.loads((made / "summary.json").read_text())["tasks"]
    with np.load(made / "predictions.npz") as file:
        for i, row in enumerate(rows):
            truth, null = file[f"truth_{i}"], file[f"null_{i}"]
            again = deviance_explained(row["modality"], truth, file[f"prediction_{i}"], null)
            assert again == pytest.approx(row["deviance_explained"], abs=1e-6)
            if row["ceiling"] is not None:
                ceiling = deviance_explained(row["modality"], truth, file[f"reference_{i}"], null)
                assert ceiling == pytest.approx(row["ceiling"], abs=1e-6)
                assert row["fraction_of_ceiling"] == pytest.approx(again / ceiling, abs=1e-6)


def test_the_catalog_lists_sessions_and_the_picture_is_drawn(made: Path) -> None:
    catalog = json.loads((made / "store" / "catalog.json").read_text())
    assert len(catalog["sessions"]) == len(list((made / "nwb").glob("*.nwb")))
    assert (made / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = demo(tmp_path)
    assert done.returncode == 2
    assert "was not made by the demo" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
