"""The rules of the house: who imports whom, what a module says of itself, how long a file may be.

In: every .py file of the repository, as text. Out: nothing; each problem names its file, its line and the rule.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A library, and the only modules that may import it (with all that is below them).
ONLY_IN = {
    "pynwb": {"prep.nwb", "prep.synthetic"},
    "hdmf": {"prep.nwb", "prep.synthetic"},
    "h5py": {"prep.nwb", "prep.synthetic"},
    "dask": {"prep.cluster", "prep.flow", "prep.ingest"},
    "distributed": {"prep.cluster", "prep.flow", "prep.ingest", "prep.patience", "prep.worker_jobs"},
    "zarr": {"prep.shards", "prep.nwb.zarr_file"},
    "isal": {"prep.nwb.chunks"},
    "deepspeed": {"train.engine", "train.loop"},
    "huggingface_hub": {"train.export", "train.push"},
    "jinja2": {"prep.report", "train.report"},
    "botocore": {"prep.s3"},
    "av": {"prep.nwb.assets"},
    "PIL": {"prep.nwb.assets"},
}
NEVER_IN_PREP = ("train", "torch", "deepspeed", "transformers")
OF_PREP_IN_TRAIN = ("prep.store", "prep.settings")
IN_THE_MODEL = {"torch", "transformers"}  # what the hub can load a model with
IN_PROCESSING = {"numpy", "safetensors"}

# The flow of prep: a module imports only modules that stand before it.
FLOW = [
    "settings",
    "disk",
    "urls",
    "s3",
    "remote",
    "cache",
    "mapped",
    "shards",
    "store",
    "plan",
    "looks",
    "parts",
    "frames",
    "asset_files",
    "recipe",
    "text_table",
    "tokens",
    "band_power",
    "audit",
    "clock",
    "sync",
    "statistics_pass",
    "unit_features",
    "nwb.chunks",
    "nwb.zarr_file",
    "nwb.file",
    "nwb.inventory",
    "nwb.clocks",
    "nwb.series",
    "nwb.events",
    "nwb.spikes",
    "nwb.spike_audit",
    "nwb.unit_metadata",
    "nwb.units",
    "nwb.traces",
    "nwb.signals",
    "nwb.lfp",
    "nwb.behavior",
    "nwb.behavior_tables",
    "nwb.pose",
    "nwb.intervals",
    "nwb.trial_events",
    "nwb.invalid",
    "nwb.pixels",
    "nwb.assets",
    "nwb.stimulus",
    "nwb.stimulus_words",
    "nwb.stimulus_frames",
    "nwb.stimulus_tables",
    "nwb.splits",
    "nwb.spike_features",
    "nwb.session_audit",
    "nwb.session",
    "nwb.join",
    "files",
    "suggest",
    "coverage",
    "catalog",
    "write_session",
    "runs",
    "staging",
    "mirror",
    "tasks",
    "patience",
    "flow",
    "ingest_report",
    "jobs",
    "progress",
    "cluster_config",
    "worker_jobs",
    "cluster",
    "ingest",
    "verify",
    "report_data",
    "report_stretch",
    "report_plots",
    "report_pictures",
    "report",
    "brain",
    "brain_draw",
    "ceiling",
    "synthetic",
    "__main__",
]

MAX_LINES = 450


@dataclass(frozen=True)
class Module:
    """One file: its path from the root, and its text."""

    path: str
    source: str

    @property
    def name(self) -> str:
        """Dotted, as it is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)


def modules() -> list[Module]:
    """Every Python file of the repository."""
    paths = [ROOT / "setup.py", *(path for part in ("prep", "train", "tests") for path in (ROOT / part).rglob("*.py"))]
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(paths)]


def is_within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of these packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(module: Module) -> Iterator[tuple[int, str, int]]:
    """Line, dotted name and number of leading dots of each import, wherever it stands in the file."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            yield from ((node.lineno, f"{base}{alias.name}", node.level) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, str(name), 0) for name in names)


# ---------------------------------------------------------------- the rules


def import_problems(module: Module) -> Iterator[str]:
    """What a module imports and may not."""
    for line, name, dots in imports(module):
        where = f"{module.path}:{line}: imports {'.' * dots}{name}; "
        library = name.split(".")[0]
        if not is_within(module.name, "prep", "train"):
            continue
        if dots and not is_within(module.name, "train.model"):
            yield f"{where}only the model files import their siblings by a dot"
        if not dots and not is_within(module.name, *ONLY_IN.get(library, {module.name})):
            yield f"{where}{library} is for {', '.join(sorted(ONLY_IN[library]))} alone"
        if is_within(module.name, "prep") and not dots and library in NEVER_IN_PREP:
            yield f"{where}prep never imports {', '.join(NEVER_IN_PREP)}"
        if is_within(module.name, "train") and is_within(name, "prep") and not is_within(name, *OF_PREP_IN_TRAIN):
            yield f"{where}of prep, train imports {' and '.join(OF_PREP_IN_TRAIN)} alone"
        if is_within(module.name, "train.model"):
            yield from (f"{where}{problem}" for problem in _model_problems(module, name, dots))


def _model_problems(module: Module, name: str, dots: int) -> Iterator[str]:
    """The model's files are copied to the hub, where nothing else of ours is."""
    is_processing = module.name.rsplit(".", 1)[-1].startswith("processing_")
    known = IN_THE_MODEL | (IN_PROCESSING if is_processing else set()) | sys.stdlib_module_names
    if dots > 1 or (dots == 1 and name.count(".") != 1):
        yield "a model file imports its siblings by one dot, as in `from .configuration_x import X`"
    if not dots and name.split(".")[0] not in known:
        yield f"a model file imports the standard library, {', '.join(sorted(known - sys.stdlib_module_names))}"


def flow_problems(module: Module) -> Iterator[str]:
    """Imports against the flow of prep."""
    if not is_within(module.name, "prep") or module.path.endswith("__init__.py"):
        return
    own = module.name.removeprefix("prep.")
    if own not in FLOW:
        yield f"{module.path}: has no place in the flow of prep (FLOW in tests/test_architecture.py)"
        return
    for line, name, dots in imports(module):
        target = next((other for other in FLOW if is_within(name, f"prep.{other}")), None)
        if not dots and target is not None and FLOW.index(target) >= FLOW.index(own):
            yield f"{module.path}:{line}: imports {name}; {target} comes after {own} in the flow of prep"


def text_problems(module: Module) -> Iterator[str]:
    """Docstring, name and length of a file."""
    text = ast.get_docstring(module.tree) or ""
    stem = module.name.rsplit(".", 1)[-1]
    if not text:
        yield f"{module.path}: has no docstring"
    elif not ("In:" in text and "Out:" in text) and not module.path.endswith(("__init__.py", "setup.py")):
        yield f"{module.path}: its docstring lacks `In:` or `Out:`"
    if stem in sys.stdlib_module_names and stem != "__main__":
        yield f"{module.path}: is named like a module of the standard library, which it would hide"
    if len(module.name.split(".")) > 1 and stem in module.name.split(".")[:-1]:
        yield f"{module.path}: is named like its package"
    num_lines = len(module.source.splitlines())
    if num_lines > MAX_LINES:
        yield f"{module.path}: has {num_lines} lines, more than {MAX_LINES}; cut it along a seam"
    if module.path.count("/") > 2 and module.path.startswith("train/model/"):
        yield f"{module.path}: the hub copies train/model without sub-packages"


RULES = (import_problems, flow_problems, text_problems)


def problems(module: Module) -> list[str]:
    return [problem for rule in RULES for problem in rule(module)]


# ---------------------------------------------------------------- the tests


def test_the_house_keeps_its_rules() -> None:
    found = [problem for module in modules() for problem in problems(module)]
    assert not found, "\n" + "\n".join(found)


def test_every_place_in_the_flow_and_every_exception_is_a_module() -> None:
    names = {module.name for module in modules()}
    assert {f"prep.{name}" for name in FLOW} <= names
    allowed = {place for places in ONLY_IN.values() for place in places} | set(OF_PREP_IN_TRAIN)
    assert {place for place in allowed if place not in names} == set()


DOC = '"""One sentence.\n\nIn: this. Out: that.\n"""\n'


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("prep/store.py", "import train.config", "prep never imports"),
        ("prep/plan.py", "def f():\n    from torch import nn", "prep/plan.py:6: imports torch.nn; prep never imports"),
        ("prep/plan.py", "import importlib\nimportlib.import_module('deepspeed')", "prep never imports"),
        ("train/loop.py", "from prep import verify", "imports prep.verify; of prep, train imports prep.store and"),
        ("train/loop.py", "import prep.shards", "of prep, train imports prep.store and prep.settings alone"),
        ("train/loop.py", "import prep", "of prep, train imports"),
        ("prep/clock.py", "import h5py", "h5py is for prep.nwb, prep.synthetic alone"),
        ("prep/brain.py", "from pynwb import NWBFile", "pynwb is for"),
        ("prep/tasks.py", "import dask.array", "dask is for prep.cluster, prep.flow, prep.ingest alone"),
        ("prep/write_session.py", "import distributed", "distributed is for prep.cluster, prep.flow, prep.ingest"),
        ("prep/store.py", "import zarr", "zarr is for prep.nwb.zarr_file, prep.shards alone"),
        ("train/dataset.py", "import deepspeed.comm", "deepspeed is for"),
        ("train/demo.py", "from huggingface_hub import HfApi", "huggingface_hub is for train.export, train.push alone"),
        ("train/model/modeling_x.py", "import numpy", "a model file imports the standard library, torch, transformers"),
        ("train/model/modeling_x.py", "from train.model.configuration_x import X", "a model file imports the standard"),
        ("train/model/modeling_x.py", "from ..unit_table import UnitTable", "siblings by one dot"),
        ("train/model/modeling_x.py", "from .sub.part import Y", "siblings by one dot"),
        ("train/model/modeling_x.py", "from . import part", "siblings by one dot"),
        ("train/model/processing_x.py", "import pandas", "numpy, safetensors, torch, transformers"),
        ("train/loop.py", "from .config import X", "only the model files import their siblings by a dot"),
        ("prep/nwb/units.py", "from prep.write_session import Target", "write_session comes after nwb.units"),
        ("prep/nwb/session.py", "from prep import ingest", "ingest comes after nwb.session in the flow of prep"),
        ("prep/nwb/inventory.py", "from prep.nwb.session import plan_session", "nwb.session comes after nwb.inventory"),
        ("prep/disk.py", "def f():\n    import prep.store", "store comes after disk"),
        ("prep/novelty.py", "", "prep/novelty.py: has no place in the flow of prep"),
        ("prep/tokenize.py", "", "is named like a module of the standard library"),
        ("train/train.py", "", "is named like its package"),
        ("train/model/layers/attention.py", "", "the hub copies train/model without sub-packages"),
        ("train/loop.py", "x = 1\n" * 450, "has 454 lines, more than 450; cut it along a seam"),
    ],
)
def test_a_module_that_breaks_a_rule_is_named(path: str, code: str, message: str) -> None:
    found = problems(Module(path, DOC + code))
    assert len([problem for problem in found if message in problem]) == 1, found
    assert all(problem.startswith(path) for problem in found)


@pytest.mark.parametrize(
    ("source", "message"),
    [("x = 1\n", "has no docstring"), ('"""One sentence.\n\nIn: this.\n"""\n', "its docstring lacks `In:` or `Out:`")],
)
def test_a_module_that_does_not_say_what_flows_is_named(source: str, message: str) -> None:
    assert problems(Module("train/loop.py", source)) == [f"train/loop.py: {message}"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("prep/ingest.py", "import dask\nfrom distributed import Client\nfrom prep.store import manifest_path"),
        ("prep/nwb/units.py", "import h5py\nfrom prep.nwb.inventory import Survey\nfrom prep import settings"),
        ("prep/synthetic.py", "from pynwb import NWBFile"),
        ("prep/shards.py", "def f():\n    import zarr"),
        (
            "train/loop.py",
            "import deepspeed\nfrom prep.store import Store\nfrom prep import settings\nimport train.engine",
        ),
        ("train/model/modeling_x.py", "import math\nimport torch.nn\nfrom .configuration_x import X"),
        ("train/model/processing_x.py", "import numpy\nfrom safetensors.torch import load_file"),
        ("train/loop.py", "x = 1\n" * 440),
        ("tests/test_x.py", "import h5py, torch, zarr\nfrom prep import verify"),
    ],
)
def test_what_is_allowed_is_not_named(path: str, code: str) -> None:
    assert problems(Module(path, DOC + code)) == []
