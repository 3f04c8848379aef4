"""Cards, the registry, validation and families."""

import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import pytest
import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Generator, Tensor

import weightsmith
from weightsmith.core import method as registry
from weightsmith.core.errors import MethodError, nearest
from weightsmith.core.laws import elementwise
from weightsmith.core.method import card, get, measure, methods, op
from weightsmith.core.parametrization import parametrization


@pytest.fixture(autouse=True)
def registry_of_its_own(monkeypatch):
    registry.methods()
    monkeypatch.setattr(registry, "_CARDS", dict(registry._CARDS))


def blend(
    ws: list[Float[Tensor, "out in"]],
    base: Float[Tensor, "out in"],
    rng: Generator,
    grad: Tensor | None = None,
    *,
    scale: Annotated[float, Interval(ge=-2, le=2)] = 0.3,
    kind: Literal["sum", "mean"] = "sum",
    steps: int = 3,
) -> Tensor:
    """Blend models.

    More about it.

    Args:
        scale: how much: a sentence
            over two lines.
        kind: which way.
        steps: how often.

    Raises:
        ValueError: never.
    """
    return base


@pytest.fixture
def blended():
    return card(op(paper="arXiv:2212.04089", laws=[elementwise()])(blend))


def message(do: Callable[[], object]) -> str:
    with pytest.raises(MethodError) as caught:
        do()
    return str(caught.value)


# Cards


def test_a_card_is_read_off_the_function(blended):
    assert (blended.id, blended.family, blended.name, blended.kind) == ("local.blend", "local", "blend", "op")
    assert blended.summary == "Blend models."
    assert blended.unit == "ws"
    assert blended.needs == ("base", "rng", "grad")
    assert blended.optional == {"grad"}
    assert blended.matrix_only
    assert blended.elementwise


def test_hyperparameters_are_the_keyword_only_parameters(blended):
    assert {n: h.default for n, h in blended.hyperparameters.items()} == {"scale": 0.3, "kind": "sum", "steps": 3}
    assert blended.hyperparameters["scale"].help == "how much: a sentence over two lines."
    assert blended.hyperparameters["steps"].help == "how often."


def test_bounds_reach_the_json_schema(blended):
    properties = blended.schema.model_json_schema()["properties"]
    assert (properties["scale"]["minimum"], properties["scale"]["maximum"]) == (-2, 2)
    assert properties["kind"]["enum"] == ["sum", "mean"]


def test_decorators_return_the_function_itself():
    assert op(paper="-")(blend) is blend
    assert measure(paper="-")(blend) is blend


def test_a_title_may_take_several_lines(blended, monkeypatch):
    monkeypatch.setitem(globals(), "__doc__", "A long\n  title (A, B 2020).\n\nMore.")
    assert blended.title == "A long title (A, B 2020)."


def test_the_fields_of_a_parametrization_are_its_hyperparameters():
    class thin:
        """Train.

        Args:
            rank: of the change.
        """

        rank: int = 4

        def encode(self, w: Tensor, rng: Generator) -> dict[str, Tensor]:
            return {}

        def decode(self, w: Tensor) -> Tensor:
            return w

    about = card(parametrization(paper="-", trains="all")(thin))
    assert (about.unit, about.needs, about.trains) == ("w", ("rng",), "all")
    assert about.hyperparameters["rank"].help == "of the change."
    assert thin(rank=2).rank == 2
    assert card(thin(rank=2)) == about


# Registry


def test_unknown_inputs_are_refused_with_a_suggestion():
    def typo(wss):
        pass

    def typo_in_a_need(w, act_nrm):
        pass

    def nothing(*, scale=1.0):
        pass

    assert message(lambda: op(paper="-")(typo)) == "local.typo: unknown unit `wss`\n\nhint: did you mean `ws`?"
    assert message(lambda: op(paper="-")(typo_in_a_need)) == (
        "local.typo_in_a_need: unknown input `act_nrm`\n\nhint: did you mean `act_norm`?"
    )
    assert message(lambda: op(paper="-")(nothing)) == (
        "local.nothing: it takes no tensor\n\n"
        "hint: its first parameter is one of spec, w, ws, models, model, weights, params"
    )


def test_a_name_belongs_to_one_module(blended):
    def other(w):
        pass

    other.__name__, other.__module__ = "blend", "elsewhere"
    assert message(lambda: op(paper="-")(other)) == "local.blend: the name is taken"
    assert op(paper="-")(blend) is blend, "defining it again in its own module, as a notebook does, is fine"


def test_methods_are_found_by_either_name():
    assert get("merge.ties") is get("ties") is card(weightsmith.merge.ties)


def test_a_mistyped_method_gets_a_suggestion():
    assert message(lambda: get("tiess")) == "unknown method `tiess`\n\nhint: did you mean `ties`?"
    assert message(lambda: get("merge.task_aritmetic")) == (
        "unknown method `merge.task_aritmetic`\n\nhint: did you mean `merge.task_arithmetic`?"
    )


def test_an_ambiguous_name_asks_for_the_family(monkeypatch, blended):
    monkeypatch.setitem(registry._CARDS, "here.blend", blended)
    assert message(lambda: get("blend")) == (
        "several methods are called `blend`\n\nhint: say `local.blend` or `here.blend`"
    )


def test_what_is_not_a_method_has_no_card():
    assert "is not a registered method" in message(lambda: card(len))


def test_methods_lists_by_glob():
    assert [c.id for c in methods("t*s")] == ["merge.ties"]
    assert {c.family for c in methods("prune.*")} == {"prune"}
    ids = [c.id for c in methods()]
    assert ids == sorted(ids)


# Validation


def test_defaults_are_filled_in(blended):
    assert blended.validate({"scale": 1}) == {"scale": 1.0, "kind": "sum", "steps": 3}


def test_a_mistyped_hyperparameter_gets_a_suggestion(blended):
    assert message(lambda: blended.validate({"scal": 1.0}, where="r.yaml:3:5")) == (
        "r.yaml:3:5: `local.blend` has no hyperparameter `scal`\n\nhint: did you mean `scale`?"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale": 3.0}, "local.blend: `scale` = 3.0: input should be less than or equal to 2"),
        ({"scale": "much"}, "local.blend: `scale` = 'much': input should be a valid number"),
        ({"kind": "men"}, "local.blend: `kind` = 'men': input should be 'sum' or 'mean'"),
        ({"steps": 1.5}, "local.blend: `steps` = 1.5: input should be a valid integer"),
        ({"scale": float("nan")}, "local.blend: `scale` = nan: input should be "),
    ],
)
def test_a_value_out_of_range_is_named(blended, values, said):
    lines = message(lambda: blended.validate(values)).split("\n")
    assert lines[0].startswith(said)
    assert lines[2] == "hint: see `weightsmith show local.blend`"


def test_a_value_of_one_model_out_of_range_is_named():
    from weightsmith.core.method import get

    said = message(lambda: get("merge.ties").validate({"density": [0.5, 1.5]}))
    assert said.startswith("merge.ties: `density[1]` = [0.5, 1.5]: input should be less than or equal to 1")
    said = message(lambda: get("merge.ties").validate({"density": 1.5}))
    assert said.startswith("merge.ties: `density` = 1.5: input should be less than or equal to 1")


def test_one_value_where_a_tuple_belongs_is_a_tuple_of_one():
    from weightsmith.core.method import get

    assert get("adapt.mola").validate({"experts": 2})["experts"] == (2,)


def test_a_hint_lists_what_there_is_when_nothing_is_close():
    assert nearest("zzz", ["a", "b"]) == "it has: `a`, `b`"
    assert nearest("*.q_prj*|*.up", ["0.q_proj.weight", "1.up"]) == "did you mean `*.q_proj*|*.up`?"
    assert nearest("*.zzz", ["a.b"]) == "it has: `a.b`"
    assert nearest("zzz", map(str, range(14))).endswith("and 2 more")
    assert nearest("zzz", []) == "it has none"


# Families


def test_a_family_holds_its_methods_not_their_modules():
    code = (
        "import weightsmith.merge.ties, sys\n"
        "from weightsmith.merge import ties\n"
        "from weightsmith.merge.ties import ties as same\n"
        "import weightsmith.merge as merge\n"
        "assert merge.ties is ties is same and callable(ties), ties\n"
        "assert sys.modules['weightsmith.merge.ties'].ties is ties\n"
        "assert weightsmith.prune.magnitude.__name__ == 'magnitude' and callable(weightsmith.prune.magnitude)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_family_without_the_method_says_so():
    with pytest.raises(AttributeError, match=r"`weightsmith\.merge` has no method `tieses`"):
        _ = weightsmith.merge.tieses
    with pytest.raises(ImportError):
        importlib.import_module("weightsmith.merge.tieses")


def test_the_package_names_what_it_lacks():
    with pytest.raises(AttributeError, match="has no attribute `nonsense`"):
        _ = weightsmith.nonsense
    assert {"open", "apply", "save", "merge"} <= set(dir(weightsmith))
    for name in dir(weightsmith):
        assert getattr(weightsmith, name) is not None


@pytest.mark.parametrize("name", ["merge.ties", "prune.wanda", "adapt.lora"])
def test_methods_can_be_pickled(name):
    function = get(name).function
    assert pickle.loads(pickle.dumps(function)) is function


def test_a_parametrization_with_values_can_be_pickled():
    form = weightsmith.adapt.lora(rank=3)
    assert pickle.loads(pickle.dumps(form)) == form


def test_methods_work_on_bare_tensors():
    merged = weightsmith.merge.task_arithmetic([torch.tensor([3.0])], torch.tensor([1.0]), scale=0.5)
    assert merged.tolist() == [2.0]
