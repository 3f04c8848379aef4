"""mergekit's YAML as a recipe of ours: models, slices, modules and documents; parameters, filters and gradients."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.arch import roles
from weightsmith.core.chat import check as check_template
from weightsmith.core.errors import InputError, RecipeError, nearest
from weightsmith.core.method import index
from weightsmith.core.recipe import Documents

Data = dict[str, Any]
Path = tuple[Any, ...]

KEYS = {
    "document": (
        "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "parameters", "tokenizer",
        "tokenizer_source", "chat_template", "name",
    ),
    "model": ("model", "parameters"),
    "slice": ("sources", "base_model", "residual_weight", "parameters"),
    "source": ("model", "layer_range", "parameters"),
    "module": ("models", "slices", "parameters"),
    "condition": ("filter", "value"),
    "reference": ("model", "lora", "override_architecture"),
    "path": ("path", "revision"),
    "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
    "token": ("source", "force"),
    "row": ("kind", "model", "token", "token_id"),
}  # fmt: skip
"""What each kind of map may hold."""

OTHERS = {"experts": "mergekit-moe", "gate_mode": "mergekit-moe", "genome": "mergekit-evolve"}
"""Keys of configs of mergekit's that merge no weights as these do."""

REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method of mergekit's.

    Args:
        ours: what we call it; None where it has no effect on the result.
        default: mergekit's; `REQUIRED` when there is none.
        each: one value a model, rather than one for all.
        only: the value it has to have, because there is nothing here for another one.
    """

    ours: str | None
    default: Any = REQUIRED
    each: bool = False
    only: Any = REQUIRED


@dataclass(frozen=True)
class Method:
    """A method of mergekit's.

    Args:
        ours: our name for it.
        base: what a base is: `needed`, `taken` when given, the `first` of the models, or one more `model`.
        counts: how many models it takes besides a base, at least and at most.
        parameters: by mergekit's names.
    """

    ours: str
    base: str
    counts: tuple[int, float]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


ANY = (1, float("inf"))
WEIGHT = {"weight": Parameter("weight", each=True)}
MASK = {"int8_mask": Parameter(None, False)}
FLAT = {**WEIGHT, **MASK, "lambda": Parameter("scale", 1.0)}
DENSITY = {"density": Parameter("density", 1.0, each=True)}
PLAIN = {"rescale": Parameter(None, False, only=False)}
RESCALED = {"rescale": Parameter("rescale", True)}


def _normalize(default: bool) -> dict[str, Parameter]:
    return {"normalize": Parameter("normalize", default)}


METHODS = {
    "linear": Method("merge.linear", "model", ANY, {**WEIGHT, **_normalize(True)}),
    "slerp": Method("merge.slerp", "first", (2, 2), {"t": Parameter("t")}),
    "nuslerp": Method(
        "merge.nuslerp", "taken", (2, 2),
        {**WEIGHT, "nuslerp_flatten": Parameter("axis", True), "nuslerp_row_wise": Parameter("axis", False)},
    ),
    "multislerp": Method(
        "merge.multislerp", "taken", ANY,
        {**WEIGHT, "normalize_weights": Parameter("normalize", True), "eps": Parameter(None, 1e-8)},
    ),
    "karcher": Method(
        "merge.karcher", "model", ANY, {"max_iter": Parameter("steps", 10), "tol": Parameter("tolerance", 1e-5)}
    ),
    "task_arithmetic": Method(
        "merge.task_arithmetic", "needed", ANY,
        {**FLAT, **PLAIN, **_normalize(False), "density": Parameter(None, 1.0, each=True)},
    ),
    "ties": Method("merge.ties", "needed", ANY, {**FLAT, **DENSITY, **PLAIN, **_normalize(True)}),
    "dare_linear": Method("merge.dare", "needed", ANY, {**FLAT, **DENSITY, **RESCALED, **_normalize(False)}),
    "dare_ties": Method("merge.dare_ties", "needed", ANY, {**FLAT, **DENSITY, **RESCALED, **_normalize(False)}),
    "breadcrumbs": Method(
        "merge.breadcrumbs", "needed", ANY,
        {**FLAT, **DENSITY, **PLAIN, **_normalize(False), "gamma": Parameter("gamma", 0.01, each=True)},
    ),
    "breadcrumbs_ties": Method(
        "merge.breadcrumbs_ties", "needed", ANY,
        {**FLAT, **DENSITY, **PLAIN, **_normalize(False), "gamma": Parameter("gamma", 0.01, each=True)},
    ),
    "della": Method(
        "merge.della", "needed", ANY,
        {**FLAT, **DENSITY, **RESCALED, **_normalize(True), "epsilon": Parameter("epsilon", 0.15, each=True)},
    ),
    "della_linear": Method(
        "merge.della_linear", "needed", ANY,
        {**FLAT, **DENSITY, **RESCALED, **_normalize(False), "epsilon": Parameter("epsilon", 0.15, each=True)},
    ),
    "sce": Method("merge.sce", "needed", ANY, {**MASK, "select_topk": Parameter("density", 1.0)}),
    "ram": Method("merge.ram", "needed", ANY, {"epsilon": Parameter("epsilon", 1e-5)}),
    "ramplus_tl": Method(
        "merge.ramplus_tl", "needed", ANY,
        {"r": Parameter("strength", 0.1), "alpha": Parameter("alpha", 0.2), "epsilon": Parameter("epsilon", 1e-5)},
    ),
    "model_stock": Method(
        "merge.model_stock", "needed", (2, ANY[1]), {"filter_wise": Parameter("filter_wise", False)}
    ),
    "nearswap": Method("merge.nearswap", "needed", (1, 1), {"t": Parameter("t")}),
    "arcee_fusion": Method("merge.arcee_fusion", "needed", (1, 1)),
    "passthrough": Method("merge.passthrough", "model", (1, 1), {"scale": Parameter("scale", 1.0, each=True)}),
}  # fmt: skip
"""mergekit's methods, by its names."""

SIDES = {
    "vision_tower": "*vision*|*visual*",
    "multi_modal_projector": "*projector*|*merger*|*connector*",
    "audio_tower": "*audio*",
    "encoder": "*encoder.*",
}
"""Module -> globs of its tensors; what none of them finds belongs to the remaining module, the text's."""

INSIDE = re.compile(r"self_attn|attn|[a-z]+_proj|input_layernorm|post_attention_layernorm|experts|mlp\.")
"""Filters that find tensors inside layers only."""

LAYERS = "*.[0-9]*.*"
"""Names of tensors in layers."""

DTYPES = ("float32", "float16", "bfloat16")


def speaks(documents: Sequence[Any]) -> bool:
    """Whether YAML documents are mergekit's."""
    foreign = {"merge_method", *OTHERS}
    return any(isinstance(node, Mapping) and foreign & set(node) and "steps" not in node for node in documents)


def translate(documents: Documents, *, out: str = "./merged") -> tuple[Data, dict[Path, str], list[str]]:
    """A recipe as plain data.

    Args:
        documents: the YAML.
        out: where the result goes.

    Returns:
        The recipe; from paths of keys in it to places in the YAML; what was left out, in words.

    Raises:
        RecipeError: a key, method, model or value that means nothing, with file, line and column.
    """
    return _Translator(documents, out).recipe()


class _Translator:
    """State of a translation: models and steps so far."""

    def __init__(self, documents: Documents, out: str):
        self.documents = documents
        self.models: dict[str, Any] = {}
        self.names: dict[tuple[str, str | None, str | None, str | None], str] = {}
        self.results: dict[str, str] = {}
        self.steps: list[Data] = []
        self.places: dict[Path, str] = {}
        self.notes: dict[str, None] = {}
        self.write: Data = {"to": out}
        self.template: str | None = None

    def recipe(self) -> tuple[Data, dict[Path, str], list[str]]:
        found = [_Document(self, number) for number in range(len(self.documents.nodes))]
        named = [document.node["name"] for document in found if "name" in document.node]
        for document in found:
            if named.count(document.node.get("name")) > 1:
                raise document.wrong(("name",), f"the name `{document.node['name']}` is there twice")
            document.needs = {name for name in named if name in document.references()} - {document.node.get("name")}
        unnamed = [document for document in found if "name" not in document.node]
        if len(unnamed) > 1:
            raise unnamed[1].wrong((), "two documents without a `name`", hint="name: something, in all but the last")
        waiting = [*(document for document in found if "name" in document.node), *unnamed]
        while waiting:
            ready = next((d for d in waiting if d.needs <= self.results.keys()), None)
            if ready is None:
                raise waiting[0].wrong(("name",), "the documents need each other in a circle")
            waiting.remove(ready)
            ready.convert(final=not waiting)
        extra = {"chat_template": self.template} if self.template else {}
        return {"models": self.models, **extra, "steps": self.steps, "write": self.write}, self.places, list(self.notes)

    def call(self, wanted: str) -> str:
        """A name that is not taken yet."""
        taken = {*self.models, *(step.get("as") for step in self.steps), *self.results.values()}
        return next(n for n in (wanted, *(f"{wanted} {i}" for i in range(2, len(taken) + 3))) if n not in taken)


@dataclass(frozen=True)
class _Input:
    """A source of a merge: its name, its layers, where its own parameters are, and where it is in the YAML."""

    model: str
    layers: tuple[int, int] | None
    own: Path | None
    at: Path


@dataclass(frozen=True)
class _Frame:
    """What a merge is part of.

    Args:
        scopes: places of parameters for all its models, the closest first.
        part: what every source is cut down to, for a module.
        offset: the number of its first layer in the result.
        layers: how many layers it has, where that is known.
        at: its place in the YAML.
    """

    scopes: tuple[Path, ...]
    part: Data
    offset: int
    layers: int | None
    at: Path


class _Document:
    """One document, one merge."""

    def __init__(self, to: _Translator, number: int):
        self.to, self.number, self.node = to, number, to.documents.data[number]
        self.needs: set[str] = set()
        if not isinstance(self.node, Mapping):
            raise self.wrong((), "a document is a map with `merge_method` and `models`, `slices` or `modules`")
        for key, tool in OTHERS.items():
            if key in self.node:
                raise self.wrong((key,), f"this is a config of {tool}, which does more than merge weights",
                                 hint="configs of mergekit-yaml, -multi and -pytorch are understood")  # fmt: skip
        self.keys((), "document")
        if "merge_method" not in self.node:
            raise self.wrong((), "`merge_method` is missing", hint="merge_method: linear")
        name = str(self.node["merge_method"])
        if name not in METHODS:
            raise self.wrong(
                ("merge_method",), f"unknown method `{name}`", hint=nearest(name, METHODS, what="there are")
            )
        self.name, self.method = name, METHODS[name]

    # Reading

    def wrong(self, path: Path, said: str, hint: str | None = None) -> RecipeError:
        """An error at a place of this document."""
        return RecipeError(said, where=self.place(path), hint=hint)

    def place(self, path: Path) -> str:
        return self.to.documents.place(self.number, path)

    def at(self, path: Path) -> Any:
        node = self.node
        for key in path:
            node = node[key]
        return node

    def keys(self, path: Path, kind: str) -> Any:
        """The map at a path, after a look at its keys."""
        node = self.at(path)
        if not isinstance(node, Mapping):
            raise self.wrong(path, f"a {kind} is a map of {', '.join(f'`{key}`' for key in KEYS[kind])}")
        for key in node:
            if key not in KEYS[kind]:
                raise self.wrong(
                    (*path, key), f"unknown key `{key}`", hint=nearest(str(key), KEYS[kind], what="there are")
                )
        return node

    def keys_of(self, path: Path) -> Mapping[str, Any]:
        """The map at a path, whatever its keys."""
        node = self.at(path)
        if not isinstance(node, Mapping):
            raise self.wrong(path, f"`{path[-1]}` is a map")
        return node

    def many(self, path: Path) -> range:
        """The indices of the list at a path."""
        node = self.at(path)
        if not isinstance(node, list) or not node:
            raise self.wrong(path, f"`{path[-1]}` is a list of at least one")
        return range(len(node))

    def references(self) -> set[str]:
        """All words that may name another document."""
        found, stack = set(), [value for key, value in self.node.items() if key != "name"]
        while stack:
            value = stack.pop()
            stack += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []
            found |= {re.split(r"[@+]", value)[0]} if isinstance(value, str) else set()
        return found

    def model(self, path: Path) -> str:
        """Our name for the model at a path; it becomes one of the recipe's."""
        node = self.at(path)
        if isinstance(node, Mapping):
            self.keys(path, "reference")
            if "model" not in node:
                raise self.wrong(path, "`model` is missing", hint="model: path or hub id")
            if "override_architecture" in node:
                self.to.notes["`override_architecture` is not needed: tensors go by their names"] = None
            parts = [self.located((*path, key)) for key in ("model", "lora") if node.get(key) is not None]
        elif isinstance(node, str) and node and node.count("+") <= 1 and node.count("@") <= 2:
            parts = [self.split(part, path) for part in node.split("+")]
        else:
            raise self.wrong(path, f"{node!r} names no model", hint="model: path@revision+adapter")
        (place, revision), (adapter, its) = (*parts, (None, None))[:2]
        if place in self.to.results and not revision and not adapter:
            return self.to.results[place]
        key = (place, revision, adapter, its)
        if key not in self.to.names:
            short = [re.sub(r"\.(safetensors|gguf|pth?|bin|ckpt)$", "", p.rstrip("/").split("/")[-1]) or p
                     for p in (place, adapter) if p]  # fmt: skip
            self.to.names[key] = name = self.to.call(" with ".join(short))
            told = {"path": adapter, "revision": its} if its else adapter
            more = {k: v for k, v in {"revision": revision, "adapter": told}.items() if v}
            self.to.models[name] = {"path": place, **more} if more else place
            self.to.places[("models", name)] = self.place(path)
        return self.to.names[key]

    def split(self, text: str, path: Path) -> tuple[str, str | None]:
        place, _, revision = text.partition("@")
        if not place or "@" in revision:
            raise self.wrong(path, f"{text!r} names no model", hint="model: path@revision+adapter")
        return place, revision or None

    def located(self, path: Path) -> tuple[str, str | None]:
        node = self.at(path)
        if isinstance(node, str):
            return self.split(node, path)
        self.keys(path, "path")
        if "path" not in node:
            raise self.wrong(path, "`path` is missing", hint="path: ./model")
        return str(node["path"]), node.get("revision")

    # Converting

    def convert(self, *, final: bool) -> None:
        """Add this document's models and steps to the recipe; the last step makes its result."""
        forms = [key for key in ("models", "slices", "modules") if self.node.get(key)]
        if len(forms) != 1:
            said = f"both {' and '.join(f'`{f}`' for f in forms)}" if forms else "no `models`, `slices` or `modules`"
            raise self.wrong((forms[1],) if forms else (), said, hint="a merge has exactly one of them")
        self.base = self.model(("base_model",)) if self.node.get("base_model") is not None else None
        self.donors: list[str] = []
        self.dtype, self.tokenizer = self._dtype(), self._tokenizer()
        self.trunk: str | None = None
        first, own = len(self.to.steps), (("parameters",),) if "parameters" in self.node else ()
        if forms[0] == "modules":
            self._modules(own)
        else:
            self._module((), own, {})
        step = self.to.steps[-1]
        if final:
            step.pop("as")
            self._finish()
        else:
            step["as"] = self.to.results[self.node["name"]] = self.to.call(str(self.node["name"]))
        if self.tokenizer:
            self._vocabulary(self.to.steps[first:])

    def _modules(self, scopes: tuple[Path, ...]) -> None:
        names = list(self.keys_of(("modules",)))
        if len(names) == 1:
            self._module(("modules", names[0]), scopes, {})
            return
        rest = [name for name in names if name not in SIDES]
        if len(rest) != 1:
            said = f"{' and '.join(f'`{name}`' for name in rest) or 'no module'} for the text"
            raise self.wrong(("modules",), said, hint=f"one module besides {', '.join(f'`{name}`' for name in SIDES)}")
        sides = {name: globs for name, globs in SIDES.items() if name in names}
        parts = []
        for name in names:
            before = [globs for other, globs in SIDES.items() if other != name and _first(other, name)]
            part = {"where": SIDES[name], "exclude": before} if name in SIDES else {"exclude": list(sides.values())}
            parts.append(self._module(("modules", name), scopes, {k: v for k, v in part.items() if v}))
        self._step({"stack": parts}, ("modules",), "joined")

    def _module(self, path: Path, scopes: tuple[Path, ...], part: Data) -> str:
        """The steps of one module, or of the whole model; the name of the result."""
        if path:
            node = self.keys(path, "module")
            if bool(node.get("models")) == bool(node.get("slices")):
                raise self.wrong(path, "a module has either `models` or `slices`")
            scopes = self._scopes(path, scopes)
        if self.at(path).get("slices"):
            return self._slices((*path, "slices"), scopes, part)
        inputs = []
        for i in self.many((*path, "models")):
            at = (*path, "models", i)
            self.keys(at, "model")
            inputs.append(_Input(self._named(at), None, self._own(at), at))
        if self.base and self.base not in [one.model for one in inputs]:
            inputs.append(_Input(self.base, None, None, ("base_model",)))
        return self._merge(inputs, self.base, _Frame(scopes, part, 0, None, path or ("merge_method",)))

    def _slices(self, path: Path, scopes: tuple[Path, ...], part: Data) -> str:
        parts, offset = [], 0
        for i in self.many(path):
            at = (*path, i)
            node = self.keys(at, "slice")
            if "residual_weight" in node:
                self.to.notes["`residual_weight` has no effect, in mergekit either"] = None
            inputs = [self._source((*at, "sources", j)) for j in self.many((*at, "sources"))]
            lengths = {one.layers[1] - one.layers[0] for one in inputs}
            if len(lengths) > 1:
                told = ", ".join(f"{n} layers" for n in sorted(lengths))
                raise self.wrong((*at, "sources"), f"the sources of a slice have {told}", hint="as many of each")
            base = self.model((*at, "base_model")) if node.get("base_model") is not None else self.base
            frame = _Frame(self._scopes(at, scopes), part, offset, min(lengths), at)
            parts.append(self._merge(inputs, base, frame))
            offset += min(lengths)
        if len(parts) == 1 and isinstance(parts[0], str):
            return parts[0]
        return self._step({"stack": parts}, path, "stacked")

    def _source(self, at: Path) -> _Input:
        node = self.keys(at, "source")
        layers = node.get("layer_range")
        whole = isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
        if not whole or not 0 <= layers[0] < layers[1]:
            where = (*at, "layer_range") if "layer_range" in node else at
            raise self.wrong(where, f"`layer_range` is {list(layers) if isinstance(layers, list) else layers}",
                             hint="layer_range: [0, 16] is the first 16 layers")  # fmt: skip
        return _Input(self._named(at), (layers[0], layers[1]), self._own(at), at)

    def _named(self, at: Path) -> str:
        if self.at(at).get("model") is None:
            raise self.wrong(at, "`model` is missing", hint="model: path or hub id")
        return self.model((*at, "model"))

    def _own(self, at: Path) -> Path | None:
        return (*at, "parameters") if self.at(at).get("parameters") else None

    def _scopes(self, at: Path, outer: tuple[Path, ...]) -> tuple[Path, ...]:
        own = self._own(at)
        return (own, *outer) if own else outer

    def _part(self, one: _Input, frame: _Frame, own: Data) -> Any:
        """A source as a recipe names it."""
        more = {**frame.part, **({"layers": list(one.layers)} if one.layers else {}), **({"with": own} if own else {})}
        return {"model": one.model, **more} if more else one.model

    def _counted(self, models: Sequence[_Input], at: Path) -> None:
        """Raise unless the method takes as many models."""
        least, most = self.method.counts
        if not least <= len(models) <= most:
            wants = f"{least}" if least == most else f"at least {least}"
            besides = " besides the base" if self.method.base in ("needed", "taken") else ""
            raise self.wrong(at, f"`{self.name}` takes {wants}{besides}, {len(models)} given")

    def _merge(self, inputs: list[_Input], base: str | None, frame: _Frame) -> Any:
        """One step, and the name of its result; or the source itself, where there is nothing to compute."""
        method, origin = self.method, None
        if method.base != "model":
            if base is None and method.base != "taken":
                raise self.wrong(("merge_method",), f"`{self.name}` needs a base", hint="base_model: path or hub id")
            origin = next((one for one in inputs if one.model == base), None)
            if base is not None and origin is None:
                raise self.wrong(frame.at, f"the base `{base}` is not among the sources", hint="name it among them")
            inputs = [one for one in inputs if one is not origin]
            if method.base == "first" and origin:
                inputs, origin = [origin, *inputs], None
        self._counted(inputs, frame.at)
        common, each = self._values(inputs, frame)
        if self.name == "passthrough" and frame.layers and not common and not self.tokenizer:
            self.trunk = self.trunk or inputs[0].model
            return self._part(inputs[0], frame, {})
        step: Data = {"use": method.ours, "from": [
            self._part(one, frame, own) for one, own in zip(inputs, each, strict=True)
        ]}  # fmt: skip
        if origin:
            step["base"] = self._part(origin, frame, {})
        keeps = origin if origin and index().get(method.ours, {}).get("unit") != "w" else inputs[0]
        self.trunk = self.trunk or keeps.model
        name = self._step(step | ({"with": common} if common else {}), frame.at, "slice" if frame.layers else "merged")
        return name

    def _step(self, step: Data, at: Path, name: str) -> str:
        """Add a step; the name of its result."""
        called = self.to.call(f"{self.node['name']} {name}" if "name" in self.node else name)
        self.to.places[("steps", len(self.to.steps))] = self.place(at)
        self.to.steps.append(step | ({"dtype": self.dtype} if self.dtype else {}) | {"as": called})
        return called

    # Parameters

    def _values(self, inputs: Sequence[_Input], frame: _Frame) -> tuple[Data, list[Data]]:
        """The step's hyperparameters, and those of each model."""
        common: Data = {}
        each: list[Data] = [{} for _ in inputs]
        for scope in (*frame.scopes, *(one.own for one in inputs if one.own)):
            self._known(scope, all_models=scope in frame.scopes)
        hyper = index().get(self.method.ours, {}).get("hyperparameters", {})
        number = len(self.to.steps)
        for key, parameter in self.method.parameters.items():
            scopes = [((one.own,) if one.own and parameter.each else ()) + frame.scopes for one in inputs]
            shifts = [one.layers[0] if one.layers and parameter.each else frame.offset for one in inputs]
            found = [self._setting(key, s, n, frame, one) for s, n, one in zip(scopes, shifts, inputs, strict=True)]
            given = [next(((*s, key) for s in own if key in self.at(s)), frame.at) for own in scopes]
            if parameter.ours is None:
                self._without(key, parameter, found, given)
                continue
            if parameter.ours == "axis":
                common |= self._axis(key, found[0], given[0], common)
                continue
            ours, same = parameter.ours, all(value == found[0] for value in found)
            several, default = "array" in str(hyper.get(ours, {}).get("type")), hyper.get(ours, {}).get("default")
            if same and not (several and isinstance(found[0], list | dict)):
                if found[0] != default:
                    common[ours] = found[0]
                    self.to.places[("steps", number, "with", ours)] = self.place(given[0])
            elif several:
                for i, (own, value) in enumerate(zip(each, found, strict=True)):
                    if value == default:
                        continue
                    own[ours] = value
                    self.to.places[("steps", number, "from", i, "with", ours)] = self.place(given[i])
            else:
                raise self.wrong(given[-1], f"`{self.method.ours}` has one `{ours}` for all models",
                                 hint="give all models the same")  # fmt: skip
        return common, each

    def _known(self, scope: Path, *, all_models: bool) -> None:
        """The method knows the parameters at a place, and they may stand there."""
        node = self.at(scope)
        if not isinstance(node, Mapping):
            raise self.wrong(scope, "`parameters` is a map", hint="parameters: {weight: 0.5}")
        for key in node:
            if key not in self.method.parameters:
                hint = nearest(str(key), self.method.parameters, what="it knows")
                raise self.wrong((*scope, key), f"`{self.name}` has no parameter `{key}`", hint=hint)
            if not all_models and not self.method.parameters[key].each:
                raise self.wrong((*scope, key), f"`{key}` is one for all models",
                                 hint="move it to the `parameters` of the merge or of the slice")  # fmt: skip

    def _setting(self, key: str, scopes: tuple[Path, ...], shift: int, frame: _Frame, one: _Input) -> Any:
        """A parameter's value as ours: the closest scope counts first, and in it the first filter that matches."""
        parameter, globs = self.method.parameters[key], {}
        for scope in scopes:
            if key not in self.at(scope):
                continue
            path = (*scope, key)
            for name, value in self._conditions(path):
                glob = "*" if name is None else self._glob(name, shift, path)
                if glob is not None:
                    globs.setdefault(glob, self._gradient(value, name, frame.layers, path))
                if name is None:
                    return globs if len(globs) > 1 else globs["*"]
        if parameter.default is not REQUIRED:
            globs["*"] = parameter.default
        elif not globs:
            raise self.wrong(one.at if parameter.each else frame.at, f"`{self.name}` needs `{key}` for `{one.model}`",
                             hint=f"parameters: {{{key}: 0.5}}")  # fmt: skip
        return globs if len(globs) > 1 or "*" not in globs else globs["*"]

    def _conditions(self, path: Path) -> Iterator[tuple[str | None, Any]]:
        """Filters, None for none, and their values, in order."""
        node = self.at(path)
        if isinstance(node, list) and any(isinstance(entry, Mapping) for entry in node):
            places = [(*path, i) for i in range(len(node))]
        else:
            places = [path]
        for place in places:
            entry = self.at(place)
            if not isinstance(entry, Mapping):
                if len(places) > 1:
                    raise self.wrong(place, "a plain value among filters", hint="- value: 0.5")
                yield from [] if entry == [] else [(None, entry)]
                continue
            self.keys(place, "condition")
            if "value" not in entry:
                raise self.wrong(place, "`value` is missing", hint="- {filter: mlp, value: 0.5}")
            name = entry.get("filter")
            if entry["value"] != []:
                yield None if name in (None, "*") else str(name), entry["value"]

    def _gradient(self, value: Any, name: str | None, layers: int | None, path: Path) -> Any:
        """A value, or a list over depth that gives tensors outside the layers its first entry, as mergekit does."""
        if value is None:
            return self.method.parameters[path[-1]].default
        if not isinstance(value, list):
            return _plain(value)
        numbers = [_plain(entry) for entry in value]
        if not all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in numbers):
            raise self.wrong(path, f"a gradient of {value[0]!r} and the like", hint="a gradient is a list of numbers")
        if len(set(numbers)) == 1:
            return numbers[0]
        inside = numbers[-1] if layers == 1 else numbers
        return inside if name and INSIDE.search(name) else {LAYERS: inside, "*": numbers[0]}

    def _glob(self, name: str, shift: int, path: Path) -> str | None:
        """A filter as a glob: part of the name. Layers' numbers are a slice's own, so those in a filter move."""
        if shift and (found := re.search(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(.?)", name)):
            if found[2] != ".":
                raise self.wrong(path, f"the filter `{name}` ends in the middle of a layer's number",
                                 hint=f"close it with a dot: `{name}.`")  # fmt: skip
            if (number := int(found[1]) - shift) < 0:
                return None
            name = f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"
        glob = "*" + re.sub(r"([*?\[])", r"[\1]", name) + "*"
        return f"name:{glob}" if any(name in role for role in roles()) else glob

    def _without(self, key: str, parameter: Parameter, found: list[Any], given: list[Path]) -> None:
        """A parameter that has no effect here."""
        for value, at in zip(found, given, strict=True):
            if parameter.only is not REQUIRED and value != parameter.only:
                raise self.wrong(at, f"there is no `{key}: {_shown(value)}` here",
                                 hint=f"leave it out: it is {_shown(parameter.only)} then")  # fmt: skip
            if value != parameter.default:
                self.to.notes[f"`{key}` has no effect on the result"] = None

    def _axis(self, key: str, value: Any, at: Path, before: Data) -> Data:
        """nuslerp's two flags as one axis."""
        if not isinstance(value, bool):
            raise self.wrong(at, f"`{key}` is {_shown(value)}", hint=f"{key}: true or false")
        flat = key == "nuslerp_flatten"
        if flat:
            return {} if value else {"axis": -1}
        return {"axis": 0} if value and before.get("axis") else {}

    # What goes along

    def _dtype(self) -> str | None:
        """The dtype of the result; arithmetic is in float32 whatever `dtype` says."""
        for key in ("out_dtype", "dtype"):
            given = self.node.get(key)
            if given is None:
                continue
            name = str(given).removeprefix("torch.")
            if name not in DTYPES:
                raise self.wrong((key,), f"`{name}` is no dtype to store weights in", hint=nearest(name, DTYPES))
            return name
        return None

    def _tokenizer(self) -> Data | None:
        """The tokenizer's section as ours."""
        source = self.node.get("tokenizer_source")
        if source is not None and self.node.get("tokenizer") is not None:
            raise self.wrong(("tokenizer",), "both `tokenizer_source` and `tokenizer`", hint="keep `tokenizer`")
        if source is not None:
            return {"source": self._vocabulary_of(("tokenizer_source",))}
        if self.node.get("tokenizer") is None:
            return None
        node = self.keys(("tokenizer",), "tokenizer")
        made: Data = {"source": self._vocabulary_of(("tokenizer", "source")) if node.get("source") else "union"}
        if node.get("tokens"):
            made["tokens"] = {str(token): self._token(("tokenizer", "tokens", token)) for token in node["tokens"]}
        if node.get("pad_to_multiple_of") is not None:
            made["pad_to_multiple_of"] = node["pad_to_multiple_of"]
        return made

    def _vocabulary_of(self, path: Path) -> str:
        given = self.at(path)
        return given if given in ("union", "base") else self._donor(path)

    def _donor(self, path: Path) -> str:
        """A model that tokens come from."""
        self.donors.append(self.model(path))
        return self.donors[-1]

    def _token(self, path: Path) -> Data:
        node = self.keys(path, "token")
        source, place = node.get("source"), (*path, "source")
        if isinstance(source, Mapping) and "kind" in source:
            row = self.keys(place, "row")
            source = row | ({"model": self._donor((*place, "model"))} if "model" in row else {})
        elif source is not None:
            source = self._donor(place)
        return {k: v for k, v in {"source": source, "force": bool(node.get("force"))}.items() if v}

    def _vocabulary(self, steps: list[Data]) -> None:
        """Say of every step that takes models which vocabulary they are brought to."""
        made = {step["as"] for step in steps if "as" in step}
        own = [[s if isinstance(s, str) else s["model"] for s in _sources(step)] for step in steps]
        first = [self.base] if self.base else []
        read = [name for names in own for name in names if name not in made]
        wanted = list(dict.fromkeys([*first, *read, *self.donors]))
        for step, names in zip(steps, own, strict=True):
            if not made & set(names):
                step["tokenizer"] = self.tokenizer | ({} if set(names) == set(wanted) else {"models": wanted})

    def _finish(self) -> None:
        """What goes beside the weights: the base's config, and a chat template."""
        if self.base and self.base != self.trunk:
            self.to.write["config_from"] = self.base
        template = self.node.get("chat_template")
        if template is not None:
            try:
                check_template(str(template))
            except InputError as error:
                raise self.wrong(("chat_template",), error.message, hint=error.hint) from None
            self.to.template = str(template)


def _sources(step: Data) -> list[Any]:
    """All that a step takes."""
    return [*step.get("stack", []), *step.get("from", []), *([step["base"]] if "base" in step else [])]


def _first(a: str, b: str) -> bool:
    """Whether the globs of side `a` count before those of `b`: a projector may stand inside a tower."""
    order = ["multi_modal_projector", *SIDES]
    return b in SIDES and order.index(a) < order.index(b)


def _plain(value: Any) -> Any:
    """A scalar of the YAML; mergekit reads `yes` and `off` as YAML 1.1 does."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    if isinstance(value, str):
        return words.get(value.lower(), value)
    return next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
