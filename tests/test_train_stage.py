"""Code onto hosts that share no disk: what the other side's shell does with it, and what is said of each host.

In: this project's code, folders that stand for those of another host. Out: files there, lines of `ok` and `FAIL`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import comes_true
from test_architecture import ROOT

from train import stage
from train.doctor_checks import Line
from train.doctor_probe import code_digest
from train.hostfile import Host
from train.on_hosts import Answer, Words

ODD = 'it\'s; $(touch x) "q" `id`\n*'


def _there(root: Path, content: bytes, config: Path | str = "", marker: str = ".stage-1") -> Line:
    """The other side, and what is made of its answer."""
    words = [stage.MARK, str(root), str(config), str(root.parent / marker), sys.executable, *stage.PARTS]
    done = subprocess.run(["sh", "-c", stage.UNPACK, "sh", *words], input=content, capture_output=True, check=False)
    answer = Answer(done.returncode, done.stdout.decode(), done.stderr.decode(), 0.0, 0.0)
    return stage.told(Host("n2", 1), answer, root)


@pytest.fixture(scope="module")
def content() -> bytes:
    return stage.packed(ROOT, None)


def test_all_code_arrives_in_a_folder_of_any_name_and_old_modules_go(tmp_path: Path, content: bytes) -> None:
    root = tmp_path / ODD / "code"
    assert str(_there(root, content)).split() == ["n2", "code", "ok", "staged"]
    assert code_digest(root) == code_digest(ROOT) and not list(root.rglob("__pycache__"))
    (root / "prep" / "gone.py").touch()
    (root / "runs").mkdir()
    assert not _there(root, content, marker=".stage-2").fix
    assert code_digest(root) == code_digest(ROOT) and (root / "runs").is_dir() and not (root / ".staging").exists()
    assert [path.name for path in tmp_path.iterdir()] == [ODD]


def test_code_that_was_not_staged_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "code" / "train").mkdir(parents=True)
    line = _there(tmp_path / "code", content)
    assert (
        "code/train is there, and was not put there by this command" in line.text and "or remove setup.py" in line.fix
    )
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["train"]


def test_a_folder_that_is_shared_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".stage-1").touch()
    assert _there(tmp_path / "code", content).text == "sees this folder" and not (tmp_path / "code").exists()
    assert _there(tmp_path / "code", content, marker=".stage-2").text == "staged"
    (tmp_path / "code" / "prep" / "mine.py").touch()
    assert _there(tmp_path / "code", content, marker=".stage-2").text == "sees this folder"  # another host's, of now
    assert (tmp_path / "code" / "prep" / "mine.py").exists()


def test_a_yaml_outside_of_the_code_travels_and_what_stood_there_is_kept(tmp_path: Path) -> None:
    run = ROOT / "train" / "configs" / "debug.yaml"
    assert stage.outside(run, ROOT) is None and stage.outside(run, tmp_path) == run
    target = tmp_path / "there" / "a b" / "run.yaml"
    for text, before in ((None, None), ("seed: 3\n", "seed: 3\n"), (None, "seed: 3\n")):
        if text:
            target.write_text(text)
        assert not _there(tmp_path / "code", stage.packed(ROOT, run), target, marker=f".stage-{text}{before}").fix
        assert target.read_bytes() == run.read_bytes()
        kept = target.with_name("run.yaml.before")
        assert (kept.read_text() if kept.exists() else None) == before


def test_what_goes_wrong_is_said(tmp_path: Path, content: bytes) -> None:
    line = _there(tmp_path / "code", content[:1000])
    assert (line.fix and "gzip" in line.text.lower() + line.fix.lower()) or "tar" in line.text
    assert not (tmp_path / "code" / "prep").exists()
    late = stage.told(Host("n2", 1), Answer(None, "", "", 0.0, 0.0), tmp_path)
    assert late.text == "no answer in 120 s" and "ssh -o BatchMode=yes" in late.fix
    bare = stage.told(Host("n2", 1), Answer(0, "hello\nbrainloom-stage staged none\n", "", 0.0, 0.0), tmp_path)
    assert bare.check == "python" and bare.fix.endswith("make stage ARGS=--install")


def test_python_is_made_there_by_make_install(tmp_path: Path) -> None:
    def words(root: Path) -> Words:
        return lambda host, command: ["env", "-C", str(root), *command]

    (tmp_path / "Makefile").write_text("install:\n\t@touch installed\n")
    assert stage.installed(Host("n2", 1), words(tmp_path)) == Line("n2", "code", "staged and installed")
    assert comes_true((tmp_path / "installed").exists, 1.0)
    (tmp_path / "Makefile").write_text("install:\n\t@echo no network >&2; exit 1\n")
    assert stage.installed(Host("n2", 1), words(tmp_path)).fix
