"""The recipe: its defaults, and each mistake in it.

In: YAML texts in temporary folders. Out: nothing.
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import prep.recipe
from prep.recipe import Recipe, RecipeError, Span, load
from prep.settings import read_yaml


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_the_default_recipe_states_the_defaults():
    assert load() == Recipe()


def keys(cls: Any, prefix: str = "") -> set[str]:
    """Every key of a recipe, dotted, but for those that loading sets."""
    found: set[str] = set()
    hints = get_type_hints(cls)
    for item in fields(cls):
        own = f"{prefix}{item.name}"
        found |= keys(hints[item.name], f"{own}.") if is_dataclass(hints[item.name]) else {own}
    return found - {"folder"}


def written(content: dict[str, Any], prefix: str = "") -> set[str]:
    nested = [written(value, f"{prefix}{key}.") for key, value in content.items() if isinstance(value, dict) and value]
    plain = {f"{prefix}{key}" for key, value in content.items() if not (isinstance(value, dict) and value)}
    return plain.union(*nested)


def test_the_default_recipe_has_every_key_and_says_what_it_is():
    assert written(read_yaml(prep.recipe.DEFAULT_RECIPE)) == keys(Recipe)
    lines = prep.recipe.DEFAULT_RECIPE.read_text().splitlines()
    of_keys = [line for line in lines if re.match(r" *[a-z_]+: *[^ ]", line)]
    assert len(of_keys) == len(keys(Recipe)) and all(" # " in line for line in of_keys)


def test_every_example_in_the_default_recipe_is_valid(tmp_path: Path):
    for line in prep.recipe.DEFAULT_RECIPE.read_text().splitlines():
        example = re.search(r"^ *([a-z_]+): \[\] .*(\[\{.*), …\]$", line)
        if example and example[1] != "assets":  # of assets the files must be there
            text = f"{example[1]}: {example[2]}]"
            load(write(tmp_path, f"splits: {{{text}}}" if example[1] == "explicit" else text))


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
        (
            "splits: {by: trial, explicit: [{label: test, start_s: 0, stop_s: 2}]}",
            r"splits\.by = 'trial' beside explicit pieces; expected one of the two",
        ),
        ("splits: {by: trials}", r"splits\.by = 'trials' is text; expected one of time, trial, session, subject"),
        (
            "splits: {assign: {m1: tests}}",
            r"splits\.assign = {'m1': 'tests'}; expected labels among train",
        ),
        ("lfp: {bands_hz: [[8, 4]]}", r"lfp\.bands_hz has \[8\.0, 4\.0\]; expected \[low, high\] with 0 < low < high"),
        ("lfp: {rate_hz: 0}", r"lfp\.rate_hz = 0\.0; expected 1 to 1000 Hz"),
        ("signals: [{pattern: a}]", r"signals\[0\]\.name is missing"),
        ("sync: [{reference: a, pulse: b}]", r"sync\[0\]\.pulse = 'b' is not a known key\. Did you mean sync\[0\]"),
        ("join: '^sub-[0-9]+'", r"join = '\^sub-\[0-9\]\+' has 0 groups; expected one, around what the files"),
        ("join: '(a)(b)'", r"join = '\(a\)\(b\)' has 2 groups; expected one"),
        ("join: '(a'", r"join = '\(a' is no regular expression"),
        ("folder: x", r"folder = 'x' is not a known key\. Assets lie beside the recipe"),
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
