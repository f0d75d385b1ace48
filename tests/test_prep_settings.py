"""Strict YAML into dataclasses: nothing is guessed, and every mistake is named with file, key, value and remedy.

In: YAML texts in temporary folders. Out: nothing.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from prep.settings import ConfigError, build, parse_value, read_yaml, to_ns


@dataclass(frozen=True, kw_only=True)
class Part:
    """A nested section."""

    size: int
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size = {self.size}; expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """One key of each kind that our files have."""

    name: str
    num_steps: int = 10
    lr: float = 0.1
    is_dry: bool = False
    note: str | None = None
    kind: Literal["small", "large"] = "small"
    gaps: tuple[float, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    part: Part = field(default_factory=lambda: Part(size=1))
    parts: tuple[Part, ...] = ()


def load(folder: Path, text: str) -> Whole:
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return build(Whole, read_yaml(path), "x.yaml")


@pytest.mark.parametrize(
    "text", ["000140", "20190801_1", "NO", "on", "Yes", "12:30:00", "2024-01-01", "0x1f", "0o17", "1_000"]
)
def test_what_is_no_number_in_json_stays_text(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"name: {text}").name == text == parse_value(text)
    assert load(tmp_path, f"{{name: a, words: {{{text}: {text}}}}}").words == {text: text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.50", -2.5),
        ("7.", 7.0),
        ("0", 0),
        ("-12", -12),
        ("true", True),
        ("false", False),
    ],
)
def test_numbers_and_truth_values_are_what_they_look_like(text: str, value: float | bool) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@pytest.mark.parametrize("text", ["", "~", "null"])
def test_nothing_is_none(text: str) -> None:
    assert parse_value(text) is None


def test_a_whole_file_becomes_its_dataclass(tmp_path: Path) -> None:
    text = """
name: "12"
num_steps: 5
lr: 3        # a whole number is a number
is_dry: true
note: ~
kind: large
gaps: [1, 2.5e-1]
words: {a: b}
free: {depth: 3, list: [1, x]}
part: {size: 2, rate: 1e3}
parts: [{size: 1}, {size: 4}]
"""
    assert load(tmp_path, text) == Whole(
        name="12",
        num_steps=5,
        lr=3.0,
        is_dry=True,
        kind="large",
        gaps=(1.0, 0.25),
        words={"a": "b"},
        free={"depth": 3, "list": [1, "x"]},
        part=Part(size=2, rate=1000.0),
        parts=(Part(size=1), Part(size=4)),
    )
    assert type(load(tmp_path, "{name: a, lr: 3}").lr) is float
    assert load(tmp_path, "name: a\n# nothing else\n") == Whole(name="a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, num_step: 3}", "x.yaml: num_step = 3 is not a known key. Did you mean num_steps?"),
        ("{name: a, part: {size: 1, rat: 2}}", "x.yaml: part.rat = 2 is not a known key. Did you mean part.rate?"),
        ("{name: a, part: {size: 1, zzz: 2}}", "x.yaml: part.zzz = 2 is not a known key. Valid here: rate, size."),
        ("num_steps: 3", "x.yaml: name is missing. Add it."),
        ("", "x.yaml: name is missing. Add it."),
        ("{name: a, part: {rate: 2}}", "x.yaml: part.size is missing. Add it."),
        ("name: 140", "x.yaml: name = 140 is a whole number; expected text."),
        ("name:", "x.yaml: name = None is empty; expected text."),
        ("{name: a, num_steps: 3.5}", "x.yaml: num_steps = 3.5 is a number; expected a whole number."),
        ("{name: a, num_steps: true}", "x.yaml: num_steps = True is true or false; expected a whole number."),
        ("{name: a, num_steps: 1_000}", "x.yaml: num_steps = '1_000' is text; expected a whole number."),
        ("{name: a, lr: fast}", "x.yaml: lr = 'fast' is text; expected a number."),
        ("{name: a, is_dry: NO}", "x.yaml: is_dry = 'NO' is text; expected true or false."),
        ("{name: a, note: 3}", "x.yaml: note = 3 is a whole number; expected text."),
        ("{name: a, kind: huge}", "x.yaml: kind = 'huge' is text; expected one of small, large."),
        ("{name: a, gaps: 3}", "x.yaml: gaps = 3 is a whole number; expected a list."),
        ("{name: a, gaps: [1, x]}", "x.yaml: gaps[1] = 'x' is text; expected a number."),
        ("{name: a, words: [1]}", "x.yaml: words = [1] is a list; expected `key: value` lines."),
        ("{name: a, words: {b: 1}}", "x.yaml: words.b = 1 is a whole number; expected text."),
        ("{name: a, part: 3}", "x.yaml: part = 3 is a whole number; expected `key: value` lines."),
        ("{name: a, part: {size: 0}}", "x.yaml: part.size = 0; expected at least 1."),
        ("{name: a, parts: [{size: 1}, {}]}", "x.yaml: parts[1].size is missing. Add it."),
    ],
)
def test_a_mistake_is_named_with_file_key_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b", r"is not readable as YAML: line 1: \['name'\] given twice\. Keep one of them\."),
        ("name: a\npart:\n  size: 1\n  size: 1", r"line 3: \['size'\] given twice"),
        ("- 1", r"holds a list; expected `key: value` lines"),
        ("words", r"holds text; expected `key: value` lines"),
        ("a: [1", r"is not readable as YAML: (?s:.*)expected ',' or '\]'"),
        ("a: !!python/name:os.system ''", r"is not readable as YAML: could not determine a constructor"),
        ("&a {x: *a}", r"is not readable as YAML: found unconstructable recursive node"),
        ("a: 1\n---\nb: 2", r"is not readable as YAML: expected a single document"),
    ],
)
def test_what_is_no_mapping_is_refused_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="x\\.yaml " + "(?s:.*)" + message):
        load(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'no.yaml'} does not exist. Check the path.")):
        read_yaml(tmp_path / "no.yaml")
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"x\.yaml is not readable as YAML: 'utf-8' codec"):
        read_yaml(tmp_path / "x.yaml")


def test_an_override_that_is_no_value_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^'\[1,' is not readable as a YAML value: .*$"):
        parse_value("[1,")
    with pytest.raises(ConfigError, match="given twice"):
        parse_value("{a: 1, a: 2}")


def test_nanoseconds_are_exact_far_from_zero() -> None:
    assert to_ns([1.2e7 + 0.25, -0.75, 0.1]).tolist() == [12_000_000_250_000_000, -750_000_000, 100_000_000]
