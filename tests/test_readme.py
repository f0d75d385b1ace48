"""README.md is true: its commands run, its targets exist, its file map names what is there.

In: README.md, Makefile. Out: pass or fail.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_make_target_of_the_readme_exists_and_every_target_is_printed() -> None:
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([a-z-]+)", printed, re.MULTILINE))
    declared = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets == declared
    assert set(re.findall(r"make ([a-z-]+)(?= |`|$)", README, re.MULTILINE)) <= targets


def test_the_file_map_names_every_module_and_nothing_that_is_not_there() -> None:
    file_map = README.split("## File map")[1]
    named = set(re.findall(r"[\w]+\.py", file_map))
    folders = ("prep", "prep/nwb", "train")
    there = {path.name for folder in folders for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert named - {"build_golden.py"} == there


def test_the_commands_by_hand_run_as_they_stand(tmp_path: Path) -> None:
    block = README.split("```sh\n")[1].split("```")[0]
    tour = tmp_path / "tour"
    synthesize = [sys.executable, "-m", "prep", "synthesize", "--preset", "test", "--out", str(tour / "recordings")]
    subprocess.run(synthesize, cwd=ROOT, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of an outer make
    for line in block.splitlines():
        command = shlex.split(line.replace("runs/tour", str(tour)))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (tour / "hub" / "model.safetensors").exists()
    assert (tour / "run" / "evaluation.json").exists() and (tour / "run" / "report.html").exists()
