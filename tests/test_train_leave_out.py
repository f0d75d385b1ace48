"""Leave-out: a whole population asked for in one pass, each unit read from those of other folds.

In: windows of a tiny store, models that are moved from their start. Out: what a unit's own fold does changes nothing
of it, what the others do is what co-smoothing would show, and the audit catches a model that forgets the folds.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from train_builders import SESSIONS, moved_model, moved_trained, one_window, tiny_run, tiny_store

from prep.settings import ConfigError
from train import audit
from train.config import OptimConfig, RunConfig
from train.dataset import Window, collate_windows
from train.loader import TrainingSamples
from train.masking import BEHAVIOR, Mask, draw_mask, is_activity, num_folds
from train.model.decoder_brainloom import NUM_FOLDS
from train.model.modeling_brainloom import BrainloomPreTrainingOutput
from train.model.readout_brainloom import BrainloomReadout
from train.trained import Trained

RUN = tiny_run()
ACTIVE = ("full", "still")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return moved_trained(tiny_store(tmp_path_factory.getbasetemp()), RUN)


def drawn(window: Window, mix: str = "leave_out", seed: int = 0) -> Mask:
    return draw_mask(mix, window.tokens, 1.0, np.random.default_rng(seed))


def answers(trained: Trained, window: Window, mask: Mask) -> BrainloomPreTrainingOutput:
    with torch.inference_mode():
        output: BrainloomPreTrainingOutput = trained.model(**trained.batch([window], [mask]))
    return output


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("session", SESSIONS)
def test_all_activity_is_seen_and_asked_and_every_unit_has_one_fold(trained: Trained, session: str) -> None:
    tokens = one_window(trained.reader, session).tokens
    for seed in range(4):
        mask = drawn(one_window(trained.reader, session), seed=seed)
        assert (mask.visible == is_activity(tokens)).all() and (mask.asked == mask.visible).all() and not mask.frames
        assert mask.folds is not None and ((mask.folds >= 0) == mask.visible).all()
        units = np.unique(tokens.source[mask.visible])
        each = [np.unique(mask.folds[tokens.source == unit]) for unit in units]
        assert all(len(fold) == 1 for fold in each)
        sizes = np.bincount(np.concatenate([*each, np.zeros(0, np.int64)]), minlength=NUM_FOLDS)
        assert sizes.sum() == len(units) and np.ptp(sizes) <= 1, "as large as each other"


def test_folds_are_the_samples_own_draw(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    one, same, other = (drawn(window, seed=seed).folds for seed in (0, 0, 1))
    assert one is not None and same is not None and other is not None
    assert (one == same).all() and (one != other).any()


def test_a_mix_with_decoding_asks_for_behaviour_without_folds(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    mask, alone = drawn(window, "leave_out+decoding"), drawn(window)
    assert mask.folds is not None and alone.folds is not None
    np.testing.assert_array_equal(mask.folds, alone.folds)
    np.testing.assert_array_equal(mask.asked, alone.asked | (window.tokens.modality == BEHAVIOR))
    np.testing.assert_array_equal(mask.visible, alone.visible)
    assert num_folds("leave_out+decoding") == NUM_FOLDS and num_folds("co_smoothing+decoding") == 0


def test_the_family_is_known_by_name_and_is_none_of_the_usual() -> None:
    assert "leave_out" not in OptimConfig().families
    RunConfig(train=OptimConfig(families=("encoding", "leave_out+decoding@0.5")))
    with pytest.raises(ConfigError, match="leave_out"):
        RunConfig(train=OptimConfig(families=("leave_uot",)))


# ---------------------------------------------------------------- what a unit is read from


@pytest.mark.parametrize("session", ACTIVE)
def test_what_the_own_fold_does_changes_nothing_and_what_others_do_changes_something(
    trained: Trained, session: str
) -> None:
    window = one_window(trained.reader, session)
    mask = drawn(window)
    assert mask.folds is not None
    before = answers(trained, window, mask).predictions
    asked_fold = mask.folds[mask.asked]
    for fold in np.unique(asked_fold):
        values = window.values.copy()
        own = mask.folds == fold
        values[own] = 1 - 2 * values[own]
        after = answers(trained, replace(window, values=values), mask).predictions
        assert before is not None and after is not None
        changed = (before != after)[0].any(-1).numpy()[: len(asked_fold)]
        assert not changed[asked_fold == fold].any()
        assert changed[asked_fold != fold].any() or (asked_fold == fold).all()


def test_a_unit_reads_of_the_population_what_co_smoothing_shows_of_it(trained: Trained) -> None:
    """Features without a fold are those of a pass in which that fold is hidden."""
    window = one_window(trained.reader, "full")
    mask = drawn(window)
    assert mask.folds is not None
    left_out = answers(trained, window, mask).left_out
    assert left_out is not None and left_out.shape[1] == NUM_FOLDS
    for fold in range(NUM_FOLDS):
        hidden = mask.folds == fold
        output = answers(trained, window, Mask(is_activity(window.tokens) & ~hidden, hidden, frames=False))
        assert output.features is not None and output.left_out is None
        torch.testing.assert_close(left_out[:, fold], output.features[..., -left_out.shape[-1] :], rtol=1e-5, atol=1e-5)


def test_the_answer_is_the_readout_of_those_features_alone(trained: Trained) -> None:
    """No latents, no stimulus, nothing that the unit says of itself."""
    window = one_window(trained.reader, "full")
    mask = drawn(window)
    batch = trained.batch([window], [mask])
    fold = batch["source_fold"]
    with torch.inference_mode():
        output = trained.model(**batch)
        identity = trained.model.model.identity(batch["unit_embeds"], batch["unit_features"], batch["source_modality"])
        for source in torch.nonzero(fold[0] >= 0)[:, 0].tolist():
            alone = torch.zeros_like(output.features)
            alone[..., -output.left_out.shape[-1] :] = output.left_out[:, fold[0, source]]
            names = ("source_modality", "source_null", "query_source", "query_time_s", "query_sample_s")
            said = trained.model.answer(alone, identity, **{name: batch[name] for name in names})
            own = batch["query_source"] == source
            torch.testing.assert_close(output.predictions[own], said.predictions[own], rtol=1e-5, atol=1e-5)


def test_behaviour_is_decoded_from_the_whole_population_beside_it(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    mix, alone = drawn(window, "leave_out+decoding"), drawn(window, "decoding")
    one, other = answers(trained, window, mix).predictions, answers(trained, window, alone).predictions
    assert one is not None and other is not None
    behaviour = (window.tokens.modality == BEHAVIOR)[mix.asked]
    torch.testing.assert_close(
        one[0, : len(behaviour)][torch.from_numpy(behaviour)], other[0, : int(behaviour.sum())], rtol=1e-5, atol=1e-5
    )


def test_sources_in_another_order_say_the_same(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    mask = drawn(window)
    other, shuffled, order = audit.shuffle(window, mask, np.random.default_rng(3))
    before, after = answers(trained, window, mask).predictions, answers(trained, other, shuffled).predictions
    assert before is not None and after is not None
    back = audit.unshuffle(after[0, : int(mask.asked.sum())].numpy(), shuffled, order)
    np.testing.assert_allclose(before[0, : int(mask.asked.sum())].numpy(), back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("session", SESSIONS)
def test_loss_and_gradients_are_finite_whatever_a_session_has(trained: Trained, session: str) -> None:
    window, model = one_window(trained.reader, session), moved_model(RUN).train()
    for unit in (None, 0):
        mask = drawn(window, "leave_out+decoding")
        if unit is not None:  # a session of one unit: there is nobody else to read it from
            only = (window.tokens.source == unit) | ~is_activity(window.tokens)
            mask = replace(mask, visible=mask.visible & only, asked=mask.asked & only)
        batch = trained.batch([window], [mask])
        output = model(**batch)
        assert torch.isfinite(output.loss) and torch.isfinite(output.predictions).all()
        output.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_loader_gives_every_sample_folds_of_its_own(trained: Trained) -> None:
    run = replace(RUN, train=replace(RUN.train, families=("leave_out+decoding",)))
    samples = TrainingSamples(trained.store.address, run, trained.model.config)
    batch, _ = samples.batch(range(6))
    again, _ = samples.batch(range(6))
    assert torch.equal(batch["source_fold"], again["source_fold"])
    assert len({tuple(row) for row in batch["source_fold"].tolist()}) > 1
    is_unit = batch["source_modality"] < BEHAVIOR
    assert not (batch["source_fold"][~is_unit] >= 0).any()


def test_other_families_have_no_folds(trained: Trained) -> None:
    window = one_window(trained.reader, "full")
    assert "source_fold" not in collate_windows([window], [drawn(window, "co_smoothing+decoding")])


# ---------------------------------------------------------------- the audit


def test_a_model_that_forgets_the_folds_is_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = BrainloomReadout.forward

    def forgetful(self: BrainloomReadout, *given: Tensor | None) -> Tensor:
        return forward(self, *given[:4])  # type: ignore[arg-type]  # the first three are never None

    monkeypatch.setattr(BrainloomReadout, "forward", forgetful)
    rows = list(audit.audit_training(trained, ["leave_out"]))
    assert {row.check for row in rows if row.failed} == {"noise", "other"}
    assert "LEAK training leave_out: predictions follow hidden values" in audit.failures(rows)[0]


def test_behaviour_that_is_shown_beside_it_is_caught(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(mix: str, tokens: object, context_s: float, chance: np.random.Generator) -> Mask:
        mask = draw_mask(mix, tokens, context_s, chance)  # type: ignore[arg-type]  # a table of tokens
        return replace(mask, visible=np.ones_like(mask.visible))

    monkeypatch.setattr("train.loader.draw_mask", shown)
    rows = list(audit.audit_training(trained, ["leave_out"]))
    assert [row.check for row in rows if row.failed] == ["mask"]
