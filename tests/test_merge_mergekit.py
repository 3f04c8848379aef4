"""Every merge method of mergekit beside ours, on whole checkpoints of three architectures."""

import pytest
import torch

from weightsmith import Memory, apply, merge
from weightsmith.core.errors import MethodError
from weightsmith.core.weights import TILE
from weightsmith.lab import models
from weightsmith.merge import (
    breadcrumbs,
    della,
    della_linear,
    karcher,
    model_stock,
    multislerp,
    nuslerp,
    ramplus_tl,
    sce,
)

ARCHITECTURES = ("llama", "bert", "vit")

THREE = {"weight": (0.7, 0.2, 0.5)}
SUM = {"weight": (0.7, 0.2, 0.5), "scale": 0.8}
MIXED = {**SUM, "density": (0.5, 0.3, 0.9), "gamma": (0.0, 0.05, 0.2)}

CASES = [
    ("linear", 3, False, THREE),
    ("linear", 3, False, {**THREE, "normalize": False}),
    ("slerp", 2, False, {"t": 0.3}),
    ("nuslerp", 2, False, {"weight": (0.7, 0.2)}),
    ("nuslerp", 2, True, {"weight": (0.7, 0.2)}),
    ("nuslerp", 2, True, {"weight": (0.7, 0.2), "axis": -1}),
    ("nuslerp", 2, False, {"weight": (0.7, 0.2), "axis": 0}),
    ("multislerp", 3, False, THREE),
    ("multislerp", 3, True, THREE),
    ("multislerp", 3, True, {**THREE, "normalize": False}),
    ("karcher", 3, False, {}),
    ("karcher", 3, False, {"steps": 1}),
    ("task_arithmetic", 3, True, SUM),
    ("task_arithmetic", 3, True, {**SUM, "normalize": True}),
    ("ties", 3, True, {**SUM, "density": (0.5, 0.3, 0.9)}),
    ("ties", 3, True, {**SUM, "density": 0.2, "normalize": False}),
    ("breadcrumbs", 3, True, MIXED),
    ("breadcrumbs", 3, True, {**SUM, "density": 0.9, "gamma": 0.5, "normalize": True}),
    ("breadcrumbs_ties", 3, True, MIXED),
    ("breadcrumbs_ties", 3, True, {**MIXED, "normalize": True}),
    ("sce", 3, True, {"density": 1.0}),
    ("sce", 3, True, {"density": 0.3}),
    ("ram", 3, True, {"epsilon": 0.02}),
    ("ramplus_tl", 3, True, {"epsilon": 0.02, "strength": 0.3, "alpha": 1.5}),
    ("model_stock", 3, True, {}),
    ("model_stock", 2, True, {"filter_wise": True}),
    ("nearswap", 1, True, {"t": 0.01}),
    ("arcee_fusion", 1, True, {}),
    ("passthrough", 1, False, {"scale": 0.5}),
]
"""Method, how many models besides the base, whether there is a base, and our hyperparameters."""

THEIRS = {"scale": "lambda", "steps": "max_iter", "strength": "r", "normalize": "normalize"}
"""Our hyperparameters that mergekit calls otherwise."""


@pytest.fixture(scope="module")
def mergekit():
    """mergekit's in-memory merge of state dicts; our hyperparameters are translated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from mergekit.merge_methods.api import merge_state_dicts

    def merged(method, states, base=None, **hyper):
        if method in ("slerp", "nearswap", "arcee_fusion") and base is None:
            base, *states = states
        named = {"base": base, **dict(enumerate(states))} if base is not None else dict(enumerate(states))
        return merge_state_dicts(
            named, method, parameters=translated(method, hyper, len(states)), base=None if base is None else "base"
        )

    return merged


def translated(method, hyper, count):
    """Our hyperparameters in mergekit's words."""
    made = {THEIRS.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in hyper.items() if k != "axis"}
    if method == "passthrough":
        return {"scale": [hyper["scale"]]}
    if "axis" in hyper:
        made |= {"nuslerp_flatten": False, "nuslerp_row_wise": hyper["axis"] == 0}
    if method == "multislerp" and "normalize" in made:
        made["normalize_weights"] = made.pop("normalize")
    if method == "sce":
        made["select_topk"] = made.pop("density")
    for name in {"density", "gamma", "epsilon"} & set(made):
        if isinstance(made[name], float) and not method.startswith("ram"):
            made[name] = [made[name]] * count
    return made


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoints(request):
    """A model with random weights, and three near it at different distances."""
    return perturbed(getattr(models, f"tiny_{request.param}")().state_dict())


def perturbed(state, spread=0.02):
    rng = torch.Generator().manual_seed(0)
    base = {name: t for name, t in state.items() if t.is_floating_point()}
    # the three share part of their changes, as models trained from one start do
    common = {name: torch.randn(t.shape, generator=rng) for name, t in base.items()}
    near = [
        {name: t + k * spread * (common[name] + torch.randn(t.shape, generator=rng)) for name, t in base.items()}
        for k in (0.5, 1.0, 1.5)
    ]
    return base, near


@pytest.mark.parametrize(("method", "count", "based", "hyper"), CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_every_tensor_is_mergekits(mergekit, checkpoints, method, count, based, hyper):
    base, near = checkpoints[0] if based else None, checkpoints[1][:count]
    theirs = mergekit(method, [flat(m, method) for m in near], flat(base, method) if based else None, **hyper)
    ours = apply(getattr(merge, method), list(map(Memory, near)), base=Memory(base) if based else None, **hyper)
    assert set(ours) == set(theirs)
    for name in ours:
        made, wanted = ours.read(name), theirs[name].reshape(ours.spec(name).shape)
        rounding = 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        torch.testing.assert_close(made, wanted, rtol=2e-6, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


def flat(state, method):
    """What mergekit is given: for model_stock a convolution as a matrix, since it does not know its filters."""
    reshape = method == "model_stock"
    return {name: t.flatten(1) if reshape and t.ndim > 2 else t for name, t in state.items()}


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della", "della_linear"])
def test_random_ones_have_mergekits_statistics(mergekit, checkpoints, method):
    """Both keep the same shares, of large changes and of small ones, and the same total size of the changes."""
    # mergekit's della fails on a second dimension of one, as patch embeddings of grey images have it
    base, *near = ({name: m[name] for name in m if m[name].ndim == 2} for m in (checkpoints[0], *checkpoints[1]))
    hyper = {"weight": (1.0, 0.5, 0.5), "density": 0.4, **({"epsilon": 0.2} if "della" in method else {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = mergekit("dare_linear" if method == "dare" else method, near, base, **hyper)
    ours = apply(getattr(merge, method), list(map(Memory, near)), base=Memory(base), **hyper)
    read = ({name: ours.read(name) for name in ours}, theirs, near[2])
    made, wanted, size = (torch.cat([(m[name] - base[name]).reshape(-1) for name in base]) for m in read)
    order, quarter = size.abs().argsort(), len(size) // 4
    for part in (order[:quarter], order[-quarter:]):
        kept_ours, kept_theirs = (float((m[part] != 0).float().mean()) for m in (made, wanted))
        assert kept_ours == pytest.approx(kept_theirs, abs=0.04)
    # summed over models, della's two rescalings differ a little: by each change's probability, or by the norm of all
    allowed = 0.06 if "della" in method else 0.03
    assert float(made.abs().sum()) == pytest.approx(float(wanted.abs().sum()), rel=allowed)


@pytest.mark.parametrize("sample", [della, della_linear])
def test_della_keeps_by_rank_and_keeps_the_expected_change(sample):
    base, ws = torch.zeros(2000, 5), [torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0]).expand(2000, 5).contiguous()]
    rng = torch.Generator().manual_seed(0)
    kept = (sample(ws, base, rng, density=0.5, epsilon=0.4) != 0).float().mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), rtol=0, atol=0.04)
    mean = sample(ws, base, rng, density=0.5, epsilon=0.4).mean(0)
    torch.testing.assert_close(mean, ws[0][0], rtol=0.12, atol=0)
    assert torch.equal(sample(ws, base, rng, density=1.0), ws[0])
    with pytest.raises(MethodError, match=r"density = 0\.1 and epsilon = 0\.15: shares of -0\.05 to 0\.25"):
        sample(ws, base, rng, density=0.1)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("model_stock", {}), ("multislerp", {"weight": [0.7, 0.3]}), ("karcher", {}), ("nuslerp", {"weight": [0.7, 0.3]})],
)
def test_a_light_fine_tuning_survives_bfloat16(mergekit, method, parameters):
    """Ours is the exact result rounded once; mergekit 0.1.5 adds the rounding errors of every step."""
    rng = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(128, 256, generator=rng)).bfloat16()
    common = torch.randn(128, 256, generator=rng)
    near = [(base + 4e-4 * (common + torch.randn(128, 256, generator=rng))).bfloat16() for _ in range(2)]
    based = method == "model_stock"
    hyper = {k: tuple(v) for k, v in parameters.items()}
    exact = getattr(merge, method)([w.double() for w in near], *([base.double()] if based else []), **hyper)
    models = [Memory({"w": w}) for w in near]
    ours = apply(getattr(merge, method), models, base=Memory({"w": base}) if based else None, **hyper).read("w")
    theirs = mergekit(method, [{"w": w} for w in near], {"w": base} if based else None, **hyper)["w"]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert float((ours == exact.bfloat16()).float().mean()) > 0.999
    best, found = (float((m.double() - exact).norm() / (exact - base.double()).norm()) for m in (ours, theirs))
    assert found > 1.3 * best


@pytest.mark.parametrize(
    ("method", "based", "hyper"),
    [
        (multislerp, True, {"weight": (0.7, 0.2, 0.5)}),
        (karcher, False, {}),
        (model_stock, True, {}),
        (ramplus_tl, True, {"epsilon": 0.05}),
        (sce, True, {"density": 0.3}),
        (breadcrumbs, True, {"density": (0.5, 0.3, 0.9), "gamma": (0.0, 0.05, 0.2)}),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_tiles_give_what_the_whole_tensor_gives(method, based, hyper):
    state = {"w": torch.randn(5, TILE // 3, generator=torch.Generator().manual_seed(1))}
    base, near = perturbed(state)
    lifted = apply(method, list(map(Memory, near)), base=Memory(base) if based else None, **hyper).read("w")
    torch.testing.assert_close(lifted, method([m["w"] for m in near], *([base["w"]] if based else []), **hyper))


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_nuslerp_streams_only_the_whole_tensor(based, axis):
    base, near = perturbed({"w": torch.randn(5, TILE // 3, generator=torch.Generator().manual_seed(1))})
    made = apply(nuslerp, list(map(Memory, near[:2])), base=Memory(base) if based else None, axis=axis).read("w")
    wanted = nuslerp([m["w"] for m in near[:2]], base["w"] if based else None, axis=axis)
    torch.testing.assert_close(made, wanted)


def test_sce_weighs_light_fine_tunings_too(mergekit):
    """The heavier change counts for more however small both are; mergekit 0.1.5 then takes their mean."""
    base, near = torch.zeros(8, 8), [torch.full((8, 8), 1e-4), torch.full((8, 8), 3e-4)]
    theirs = mergekit("sce", [{"w": w} for w in near], {"w": base}, density=1.0)["w"]
    torch.testing.assert_close(theirs, torch.full((8, 8), 2e-4))
    torch.testing.assert_close(sce(near, base, density=1.0), torch.full((8, 8), 2.8e-4))


def test_tensors_nobody_changed_stay(mergekit):
    """Without a change there is no direction, and mergekit 0.1.5 refuses to average three of them."""
    base = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for method in (multislerp, model_stock, sce, nuslerp):
        assert torch.equal(method([base.clone()] * (2 if method is nuslerp else 3), base), base)
    with pytest.raises(ValueError, match="zero"):
        mergekit("multislerp", [{"w": base}] * 3, {"w": base}, weight=(1.0, 1.0, 1.0))


def test_filters_of_a_convolution_are_its_outputs():
    base, near = perturbed({"w": torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))})
    ws = [m["w"] for m in near]
    made = model_stock(ws, base["w"], filter_wise=True)
    for k in range(6):
        torch.testing.assert_close(made[k], model_stock([w[k] for w in ws], base["w"][k]))


def test_wrong_numbers_of_models_are_refused():
    w = torch.ones(2)
    for axis in (None, -1):
        with pytest.raises(MethodError, match="nuslerp takes two models, 3 given"):
            nuslerp([torch.ones(2, 2)] * 3, axis=axis)
    with pytest.raises(MethodError, match="two models or more"):
        model_stock([w], w)
    with pytest.raises(MethodError, match="2 weights for 3 models"):
        karcher([w, w, w], weight=(1.0, 2.0))
    with pytest.raises(MethodError, match="add up to zero"):
        multislerp([w, w], weight=(1.0, -1.0))
