"""Blocks compiled under ZeRO-3: the losses of those that are not, and no graph break.

In: two ranks. Out: losses, and the line that a run prints about its compilation.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_builders import losses, prepare_run, tiny_run, tiny_store, train_several, with_small_threshold

from train.build import build_model
from train.compiled import compile_blocks


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_blocks_train_like_others_and_every_graph_is_whole(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    eager = with_small_threshold(tiny_run(num_steps=4, families=("encoding",)), tmp_path)
    compiled = replace(eager, train=replace(eager.train, compile=True))
    again = replace(compiled, train=replace(compiled.train, activation_checkpointing=True))
    runs = [
        prepare_run(tmp_path / name, store, run)
        for name, run in (("eager", eager), ("compiled", compiled), ("again", again))
    ]
    assert train_several(runs) == 0
    for out in runs[1:]:
        assert max(abs(a - b) for a, b in zip(losses(out), losses(runs[0]), strict=True)) < 1e-5
    log = (runs[0] / "logs" / "rank-00000.log").read_text()
    found = re.findall(r"compiled (\d+) graphs in \d+ s, \d+ of them again for other shapes; (\d+) graph breaks", log)
    assert len(found) == 2 and int(found[0][0]) >= 3 and {breaks for _, breaks in found} == {"0"}, log


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's compiler
def test_blocks_stay_what_they_are_but_for_their_class() -> None:
    run = tiny_run()
    model, plain = build_model(run), build_model(run)
    compile_blocks(model)
    changed = {
        type(new).__name__
        for new, old in zip(model.modules(), plain.modules(), strict=True)
        if type(new) is not type(old)
    }
    assert changed == set(model._no_split_modules)
    state = plain.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
