"""Search over a recipe's numbers: the same candidates for the same seed, a log to go on from, the front, the best."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from weightsmith import cli
from weightsmith.core.errors import InputError, MethodError, RecipeError, RunError
from weightsmith.core.recipe import Span, load, parse
from weightsmith.core.search import search, search_recipe
from weightsmith.lab.experiments import Lab
from weightsmith.lab.models import tiny_llama

SPACE = {"x": Span(low=-2, high=2), "y": Span(low=0.1, high=10, log=True)}
SAMPLERS = ("tpe", "cma-es", "evolution", "greedy", "random")
RECIPE = """
# how much of each expert?
models: {base: base, math: math, code: code}
steps:
  - use: merge.linear  # the merge
    from: [math, code]
    with: {weight: [0.5, 0.5]}
    as: merged
  - {use: measure.perplexity, data: {text: text.txt, samples: 1, length: 32}, as: one}
  - {use: measure.perplexity, data: {text: other.txt, samples: 1, length: 32}, as: two}
write: {to: out}
search:
  numbers:
    merged/weight/0: {low: 0, high: 1}
    merged/normalize: {choices: [true, false]}
  minimize: [one, two]
  budget: 5
"""


def bowl(numbers):
    return {"depth": (numbers["x"] - 1) ** 2 + (numbers["y"] - 3) ** 2}


def tried(found):
    return [(c.numbers, c.scores) for c in found.candidates]


@pytest.fixture
def here(tmp_path, monkeypatch):
    for seed, name in enumerate(("base", "math", "code")):
        model, other = tiny_llama(seed=0, width=32), tiny_llama(seed=seed, width=32)
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.add_(q, alpha=0.2)
        tiny_llama(tmp_path / name, width=32)
        model.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("quick brown foxes jump over lazy dogs. " * 20)
    (tmp_path / "other.txt").write_text("for i in range(10):\n    print(i ** 2)\n" * 20)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_tries_the_same_candidates_interrupted_or_not(sampler, tmp_path):
    def run(budget, log, seed=3):
        return search(bowl, SPACE, minimize=["depth"], budget=budget, sampler=sampler, seed=seed, log=tmp_path / log)

    whole = run(14, "whole.jsonl")
    run(6, "parts.jsonl")
    assert tried(run(14, "parts.jsonl")) == tried(whole)
    if sampler != "greedy":
        assert tried(run(14, "other.jsonl", seed=4)) != tried(whole)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "random"])
def test_samplers_that_learn_find_the_bottom(sampler):
    found = search(bowl, SPACE, minimize=["depth"], budget=60, sampler=sampler, start={"x": -1.0, "y": 9.0})
    assert found.candidates[0].numbers == {"x": -1.0, "y": 9.0}
    assert found.candidates[found.best].scores["depth"] < 0.5
    assert found.front == [found.best]


def test_the_largest_is_wanted_too():
    found = search(lambda n: {"height": -bowl(n)["depth"]}, SPACE, maximize=["height"], budget=30, sampler="greedy")
    assert found.candidates[found.best].scores["height"] > -0.5


def test_the_front_holds_what_no_other_beats():
    space = {"x": Span(low=-2, high=2), "waste": Span(low=0, high=1)}

    def evaluate(n):
        return {"left": (n["x"] + 1) ** 2 + n["waste"], "right": (n["x"] - 1) ** 2 + n["waste"]}

    found = search(evaluate, space, minimize=["left", "right"], budget=60, sampler="evolution")
    scores = [c.scores for c in found.candidates]
    best = [scores[place] for place in found.front]
    for mine in scores:
        beaten = any(o["left"] <= mine["left"] and o["right"] <= mine["right"] and o != mine for o in scores)
        assert (mine in best) == (not beaten)
    assert found.best in found.front
    lefts = [scores[place]["left"] for place in found.front]
    assert lefts == sorted(lefts)


def test_whole_numbers_choices_and_what_was_tried_before():
    calls = []

    def evaluate(numbers):
        calls.append(numbers)
        return {"loss": numbers["rank"] + (numbers["kind"] == "b")}

    space = {"rank": Span(low=1, high=2), "kind": Span(choices=["a", "b"])}
    found = search(evaluate, space, minimize=["loss"], budget=20, whole=frozenset({"rank"}))
    assert found.candidates[found.best].numbers == {"rank": 1, "kind": "a"}
    assert len(calls) <= 4
    assert len(found.candidates) == 20


def test_candidates_may_fail(tmp_path):
    def evaluate(numbers):
        if numbers["x"] < 0:
            raise MethodError("not below zero")
        return {"depth": float("nan") if numbers["x"] > 1.9 else numbers["x"]}

    found = search(evaluate, SPACE, minimize=["depth"], budget=20, log=tmp_path / "log.jsonl")
    failed = [c for c in found.candidates if c.error]
    assert failed
    assert all(c.numbers["x"] < 0 or c.numbers["x"] > 1.9 for c in failed)
    assert tried(search(evaluate, SPACE, minimize=["depth"], budget=20, log=tmp_path / "log.jsonl")) == tried(found)

    def never(numbers):
        raise MethodError("never")

    with pytest.raises(RunError, match="all 3 candidates failed, the last one so: never"):
        search(never, SPACE, minimize=["depth"], budget=3)


def test_wrong_searches(tmp_path):
    log = tmp_path / "log.jsonl"
    search(bowl, SPACE, minimize=["depth"], budget=2, log=log)
    with pytest.raises(InputError, match="the log of another search"):
        search(bowl, SPACE, minimize=["depth"], budget=2, seed=9, log=log)
    with pytest.raises(InputError, match="takes one objective, 2 given"):
        search(bowl, SPACE, minimize=["depth", "width"], sampler="greedy")
    with pytest.raises(InputError, match="small or large"):
        search(bowl, SPACE)
    torn = log.read_bytes()
    log.write_bytes(torn + b'{"place": 2, "numb')
    assert len(search(bowl, SPACE, minimize=["depth"], budget=3, log=log).candidates) == 3
    assert log.read_bytes().startswith(torn)
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 4
    log.write_text("no log\n")
    with pytest.raises(InputError, match="not the log of a search"):
        search(bowl, SPACE, minimize=["depth"], log=log)


def test_a_killed_search_goes_on_to_the_same_end(tmp_path):
    code = (
        "import sys, time\n"
        "from weightsmith.core.recipe import Span\n"
        "from weightsmith.core.search import search\n"
        "space = {'x': Span(low=-2, high=2)}\n"
        "def evaluate(n):\n    time.sleep(0.05)\n    return {'depth': n['x'] ** 2}\n"
        "search(evaluate, space, minimize=['depth'], budget=40, log=sys.argv[1])\n"
    )
    log, whole = tmp_path / "log.jsonl", tmp_path / "whole.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(log)])
    limit = time.monotonic() + 60
    while time.monotonic() < limit and (not log.exists() or log.read_bytes().count(b"\n") < 6):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 6 <= log.read_bytes().count(b"\n") < 41

    def evaluate(numbers):
        return {"depth": numbers["x"] ** 2}

    space = {"x": Span(low=-2, high=2)}
    again = search(evaluate, space, minimize=["depth"], budget=40, log=log)
    assert tried(again) == tried(search(evaluate, space, minimize=["depth"], budget=40, log=whole))


def test_a_recipe_is_searched_and_its_best_runs(here, capsys):
    cli.main(["search", "r.yaml", "--format", "json"])
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "5 of 5  one " in err
    lines = [json.loads(line) for line in Path("r.search/candidates.jsonl").read_text().splitlines()[1:]]
    assert [line["place"] for line in lines] == list(range(5))
    assert lines[0]["numbers"] == {"merged/weight/0": 0.5, "merged/normalize": True}
    best = load(told["recipe"])
    assert best.search is None
    assert best.steps[0].with_["weight"] == [told["numbers"]["merged/weight/0"], 0.5]
    assert "# how much of each expert?" in Path(told["recipe"]).read_text()
    cli.main(["run", told["recipe"], "--format", "json", "-q"])
    again = json.loads(capsys.readouterr().out)
    assert {name: again[name] for name in told["scores"]} == pytest.approx(told["scores"])
    page = Path(told["report"]).read_text()
    assert "two against one" in page
    assert page.count("<svg") >= 3
    assert search_recipe("r.yaml", budget=7)["candidates"] == 7
    assert search_recipe("r.yaml", minimize=["one"], maximize=[], sampler="greedy", budget=3, out="greedy")["scores"]


def test_a_plain_run_ignores_the_search(here, capsys):
    cli.main(["run", "r.yaml", "-q"])
    assert "one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("merged/weight/0", "merged/wait", "no hyperparameter `wait`"),
        ("merged/weight/0", "murged/weight/0", "is no number of this recipe"),
        ("merged/weight/0", "merged/weight/7", "there is no `7`"),
        ("minimize: [one, two]", "minimize: [ones]", "does not measure `ones`"),
        ("{low: 0, high: 1}", "{low: 1, high: 0}", "low = 1 is not below high = 0"),
        ("{low: 0, high: 1}", "{low: 0}", "give `low` and `high`, or `choices`"),
        ("{low: 0, high: 1}", "{low: 0, high: 1, log: true}", "above zero"),
        ("{low: 0, high: 1}", "{low: 0, hi: 1}", "unknown key `hi`"),
        ("  budget: 5", "  budget: 0", "greater than or equal to 1"),
        ("  budget: 5", "  bugdet: 5", "unknown key `bugdet`"),
    ],
)
def test_wrong_sections(here, old, new, says):
    Path("r.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError, match=says):
        search_recipe("r.yaml")


def test_a_recipe_without_a_section(here):
    Path("r.yaml").write_text(RECIPE.split("search:")[0])
    with pytest.raises(RecipeError, match="no `search` section"):
        search_recipe("r.yaml")
    assert parse(RECIPE).search is not None


def test_bytes_count(here):
    text = RECIPE.replace("minimize: [one, two]", "minimize: [one, bytes]").replace(
        "write: {to: out}", "write: {to: out, dtype: bfloat16}"
    )
    Path("r.yaml").write_text(text)
    told = search_recipe("r.yaml", budget=1)
    assert told["scores"]["bytes"] == sum(p.numel() * 2 for p in tiny_llama(width=32).parameters())


def test_digits_experts_merge_better_than_at_the_default_scale():
    from weightsmith import apply
    from weightsmith.merge import task_arithmetic

    lab = Lab()
    base, experts = lab.generalist(), {task: lab.expert(task, steps=60) for task in ("turned", "negative")}

    def evaluate(numbers):
        merged = apply(task_arithmetic, list(experts.values()), base=base, **numbers)
        return {task: lab.loss(merged, task, "validation") for task in experts}

    found = search(evaluate, {"scale": Span(low=0, high=1)}, minimize=list(experts), budget=20, start={"scale": 0.1})
    best, first = found.candidates[found.best].scores, found.candidates[0].scores
    assert sum(best.values()) < sum(first.values())
