from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from deploycc.core.spec import convert, format_spec, instantiate, parse_specs
from deploycc.errors import SpecError


@dataclass(frozen=True)
class Toy:
    name: ClassVar[str] = "toy"
    ratio: float = 0.5
    rounds: int = 3
    deep: bool = False
    kind: Literal["a", "b"] | None = None
    skip: tuple[str, ...] = ()
    note: str = "x"

    def __post_init__(self):
        if self.ratio > 1:
            raise ValueError(f"ratio is {self.ratio}: at most 1")


def build(text):
    (spec,) = parse_specs(text)
    return instantiate(Toy, spec)


@pytest.mark.parametrize(
    "value",
    [
        Toy(),
        Toy(ratio=0.25, rounds=7),
        Toy(deep=True, kind="b"),
        Toy(skip=("head", "stem")),
        Toy(skip=("one",), kind="a"),
        Toy(note='two words, a "quote", a \\ and {braces}'),
        Toy(ratio=1e-07),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_text_and_object_are_inverses(value, full):
    text = format_spec(value, full=full)
    assert build(text) == value
    assert format_spec(build(text), full=full) == text


def test_defaults_are_left_out_unless_full():
    assert format_spec(Toy(rounds=4)) == "toy{rounds=4}"
    assert format_spec(Toy(), full=True) == 'toy{ratio=0.5 rounds=3 deep=false kind=none skip="" note=x}'


def test_options_may_be_separated_by_commas_or_spaces():
    assert build("toy{ratio=0.1, rounds=2, skip=a,b}") == build("toy{ratio=0.1 rounds=2 skip=a,b}") == Toy(0.1, 2, skip=("a", "b"))


def test_a_pipeline_is_split_at_commas_outside_braces():
    assert [spec.name for spec in parse_specs(" one, two{a=1,2} ,three ")] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("text", "message", "position"),
    [
        ("one,, two", "pass name", 4),
        ("one two", "comma should stand", 4),
        ("one{a}", "key=value", 4),
        ("one{a=}", "key=value", 4),
        ("one{a=1", "never closed", 3),
        ("one{a=1 a=2}", "given twice", 8),
        ("one, 2two", "pass name", 5),
    ],
)
def test_malformed_text_points_at_the_place(text, message, position):
    with pytest.raises(SpecError, match=message) as caught:
        parse_specs(text)
    assert caught.value.position == position
    assert str(caught.value).splitlines()[2] == "    " + " " * position + "^"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("toy{ration=0.5}", "no option 'ration'", "did you mean 'ratio'"),
        ("toy{zzz=1}", "no option 'zzz'", "ratio, rounds"),
        ("toy{rounds=many}", "'many' is not a whole number", "value of that kind"),
        ("toy{ratio=many}", "'many' is not a number", "value of that kind"),
        ("toy{deep=yes}", "'yes' is not true or false", "value of that kind"),
        ("toy{kind=c}", "'c' is not one of a, b", "value of that kind"),
        ("toy{ratio=2}", "at most 1", "deploycc passes toy"),
    ],
)
def test_wrong_options_are_refused_with_the_fix(text, message, fix):
    with pytest.raises(SpecError, match=message) as caught:
        build(text)
    assert fix in caught.value.fix


def test_none_only_where_the_type_allows_it():
    assert convert(int | None, "none") is None
    with pytest.raises(ValueError, match="not a whole number"):
        convert(int, "none")
