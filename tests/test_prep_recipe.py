"""The recipe: its defaults, and each mistake in it.

In: YAML texts in temporary folders. Out: nothing.
"""

from pathlib import Path

import pytest

import prep.recipe
from prep.recipe import Recipe, RecipeError, Span, load


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_the_default_recipe_states_the_defaults():
    assert load() == Recipe()


def test_every_recipe_of_the_repository_is_valid():
    for path in prep.recipe.DEFAULT_RECIPE.parent.glob("*.yaml"):
        load(path)


@pytest.mark.parametrize("text", ["000140", '"000140"'])
def test_an_id_with_leading_zeros_stays_text(tmp_path: Path, text: str):
    assert load(write(tmp_path, f"dataset_id: {text}")).dataset_id == "000140"


@pytest.mark.parametrize("text", ["NO", "yes", "on", "12:30:00", "20190801_1"])
def test_words_that_yaml_would_change_stay_text(tmp_path: Path, text: str):
    assert load(write(tmp_path, f"licence: {text}")).licence == text


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path):
    assert load(write(tmp_path, "splits: {gap_s: 3e-4}")).splits.gap_s == 3e-4


def test_explicit_splits_are_read(tmp_path: Path):
    recipe = load(write(tmp_path, "splits: {explicit: [{label: train, start_s: 0, stop_s: 2.5}]}"))
    assert recipe.splits.explicit == (Span(label="train", start_s=0.0, stop_s=2.5),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spilts: {}", r"r\.yaml: spilts = {} is not a known key\. Did you mean splits\?"),
        ("splits: {gap: 2}", r"splits\.gap = 2 is not a known key\. Did you mean splits\.gap_s\?"),
        ("angles: ry", r"angles = 'ry' is text; expected a list"),
        ("licence: MIT\nlicence: CC0", r"r\.yaml .*\['licence'\] given twice"),
        ("splits: {fractions: [0.7, 0.1]}", r"splits\.fractions = \[0\.7, 0\.1\]; expected three"),
        ("splits: {gap_s: -1}", r"splits\.gap_s = -1\.0; expected zero or more"),
        ("splits: {explicit: [{label: tain, start_s: 0, stop_s: 1}]}", r"label = 'tain'; expected one of train"),
        ("splits: {explicit: [{label: test, start_s: 1, stop_s: 1}]}", r"stop_s = 1\.0; expected more than"),
        (
            "splits: {explicit: [{label: test, start_s: 0, stop_s: 2}, {label: train, start_s: 1, stop_s: 3}]}",
            r"explicit has test until 2\.0 s and train from 1\.0 s; expected pieces that do not overlap",
        ),
        ("counts: {bin_ms: 10}", r"counts\.bin_ms = 10; expected 20"),
    ],
)
def test_a_mistake_is_an_error_that_names_file_key_and_value(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, text))


def test_the_digest_is_of_what_the_recipe_says_not_of_its_text(tmp_path: Path):
    plain = load(write(tmp_path, "licence: MIT\nsplits: {gap_s: 2}")).digest()
    assert load(write(tmp_path, "# a comment\nsplits:\n  gap_s: 2.0\nlicence: 'MIT'\n")).digest() == plain
    assert load(write(tmp_path, "licence: MIT\nsplits: {gap_s: 3}")).digest() != plain
