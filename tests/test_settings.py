"""typed and checked: what they let through satisfies the annotation, what they refuse is one sentence."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.errors import UserError
from prune_cli.settings import Bounds, Count, FitSettings, Fraction, Natural, Positive, Ratio, checked, nearest, typed

FIT = dict(
    epochs=1, batch_size=2, optimizer="sgd", lr=0.1, momentum=0, nesterov=False, weight_decay=0, schedule="constant"
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
HINTS = [
    int, float, bool, str, Ratio, Count, Natural, Positive, Fraction, Count | None, tuple[Fraction, ...],
    Literal["a", 1, None], dict[str, float], dict[str, Ratio] | None, FitSettings, Any,
]  # fmt: skip


@dataclass(frozen=True)
class Outer:
    fit: FitSettings
    name: str = "x"


@given(value=PLAIN, hint=st.sampled_from(HINTS))
def test_anything_is_taken_or_refused_with_a_sentence_that_names_the_setting(value, hint):
    try:
        checked(value, hint, "a.b")
    except UserError as problem:
        assert str(problem).startswith("a.b")


@given(st.integers() | st.floats())
def test_a_ratio_that_is_taken_is_a_float_in_its_range(value):
    try:
        taken = checked(value, Ratio, "ratio")
    except UserError:
        assert not 0 <= value < 1
    else:
        assert isinstance(taken, float) and 0 <= taken < 1 and taken == value


@given(st.dictionaries(st.sampled_from([*FIT, "epoch", "schedul"]), PLAIN))
def test_typed_gives_keyword_arguments_that_the_target_takes(values):
    try:
        arguments = typed(FitSettings, values, "fit")
    except UserError as problem:
        assert str(problem).startswith("fit.")
    else:
        FitSettings(**arguments)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epoch": 1}, "fit.epoch: there is no such setting; did you mean epochs?"),
        ({"epochs": True}, "fit.epochs=true: must be a whole number"),
        ({"epochs": 1.0}, "fit.epochs=1.0: must be a whole number"),
        ({"epochs": -1}, "fit.epochs=-1: must be at least 0"),
        ({"batch_size": None}, "fit.batch_size=null: must be a whole number"),
        ({"lr": 0}, "fit.lr=0: must be above 0"),
        ({"lr": math.inf}, "fit.lr=inf: must be a finite number"),
        ({"lr": 10**400}, "must be a finite number"),
        ({"momentum": 1}, "fit.momentum=1: must be at least 0 and below 1"),
        ({"nesterov": 0}, "fit.nesterov=0: must be true or false"),
        ({"optimizer": "sdg"}, "fit.optimizer=sdg: did you mean sgd? (allowed: sgd, adam)"),
        ({"milestones": 0.5}, "fit.milestones=0.5: must be a list"),
        ({"milestones": [0.5, 2]}, "fit.milestones[1]=2: must be at least 0 and at most 1"),
    ],
)
def test_sentences(values, sentence):
    with pytest.raises(UserError) as problem:
        typed(FitSettings, FIT | values, "fit")
    assert sentence in str(problem.value)


def test_a_missing_setting_is_named():
    with pytest.raises(UserError, match=r"^fit\.lr is missing and has no default$"):
        typed(FitSettings, {name: value for name, value in FIT.items() if name != "lr"}, "fit")


def test_numbers_and_lists_take_the_type_of_the_annotation():
    arguments = typed(FitSettings, FIT | {"lr": 1, "milestones": [0, 1]}, "fit")
    assert type(arguments["lr"]) is float and arguments["milestones"] == (0.0, 1.0)


def test_a_nested_dataclass_is_built_and_its_path_is_named():
    assert Outer(**typed(Outer, {"fit": FIT}, "o")).fit == FitSettings(**FIT)
    with pytest.raises(UserError, match=r"^o\.fit\.epochs=ten"):
        typed(Outer, {"fit": FIT | {"epochs": "ten"}}, "o")
    with pytest.raises(UserError, match=r"^o\.fit=5: holds several settings; allowed: epochs"):
        typed(Outer, {"fit": 5}, "o")


def test_what_the_caller_supplies_cannot_be_set():
    def network(channels: int, depth: int = 1): ...

    assert typed(network, {"depth": 2}, "model", supplied=("channels",)) == {"depth": 2}
    with pytest.raises(UserError, match=r"^model\.channels: there is no such setting; allowed: depth$"):
        typed(network, {"channels": 3}, "model", supplied=("channels",))


def test_a_path_without_parent_has_no_dot():
    with pytest.raises(UserError, match="^name=1: must be text"):
        typed(Outer, {"fit": FIT, "name": 1})


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_a_literal_is_of_its_own_type(value):
    with pytest.raises(UserError):
        checked(value, Literal[1], "x")


def test_bounds_read_as_english():
    assert str(Bounds(0, 1, low_open=True)) == "above 0 and at most 1"
    assert not Bounds(0, 1).admit(math.nan)
    assert checked(1, Annotated[int, Bounds(1)] | None, "x") == 1


def test_nearest_lists_the_closest_first():
    assert nearest("strip", ["fp", "stripe"]) == "did you mean stripe? (allowed: fp, stripe)"
    assert nearest("zzz", ["fp"]) == "allowed: fp"
    assert nearest("zzz", []) == "nothing is allowed here"
