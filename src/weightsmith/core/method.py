"""Methods: the function is the thing registered; everything else about it is read off its signature and docstring.

Positional parameters are tensors, asked for by name from `UNITS` and `NEEDS`; keyword-only ones are hyperparameters.
"""

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import import_module, resources
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from weightsmith.core.errors import MethodError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

    from weightsmith.core.laws import Law

F = TypeVar("F", bound=Callable[..., Any])

UNITS = {
    "spec": "shape, dtype and role of the tensor to make",
    "w": "one tensor",
    "ws": "the same tensor of several models",
    "models": "several whole checkpoints",
    "model": "a live module",
    "weights": "all the weights a parametrization stands for, by name",
    "params": "the parameters to train, as a torch optimizer takes them",
}
"""What a method works on: the name of its first positional parameter."""

NEEDS = {
    "base": "the same tensor of the model the others were trained from",
    "rng": "a torch.Generator seeded by the seed, the method and the tensor's name",
    "act_norm": "norm of each input of the layer over the calibration data, shape (in,)",
    "gram": "mean outer product of the layer's inputs over the calibration data, shape (in, in)",
    "grad": "mean gradient of the loss, in the tensor's shape",
    "fisher": "mean squared gradient of the loss, in the tensor's shape",
    "threshold": "a number decided over all tensors together",
    "reference": "the tensor to compare with or to align to",
    "channels": "which dimensions of which tensors belong together, so that permuting them keeps the function",
    "evaluate": "a function from Weights to a score, higher being better",
    "loss": "a differentiable function from tensors by name to a number, lower being better",
    "batch": "inputs of the model",
    "sources": "whole models trained from this one for other tasks, as a list of Weights",
}
"""What else a method may ask for, by parameter name."""

Statistic = Literal["act_norm", "gram", "grad", "fisher"]
STATISTICS: tuple[str, ...] = typing.get_args(Statistic)
"""The needs that are themselves Weights, measured on calibration data or read from a file."""


@dataclass(frozen=True)
class Hyperparameter:
    """A keyword-only parameter of a method."""

    name: str
    annotation: Any
    default: Any
    help: str = ""


@dataclass(frozen=True)
class Card:
    """All that is known of a method; only `paper`, `laws`, `roles`, `except_for` and `trains` are stated by its author.

    Args:
        kind: `op`, `measure`, `parametrization` or `optimizer`.
        function: the method itself, unchanged.
        paper: arXiv id, DOI or address; when there is none, the reason.
        laws: algebraic promises, tested in milliseconds.
        roles: glob of the roles it works on when the user names no tensors.
        aka: other names it goes by.
        except_for: conformance checks it cannot pass -> why; passing one after all is an error.
        trains: for a parametrization: `theta` alone, or `all`: the original weight if kept, and the rest of the model.
    """

    kind: str
    function: Any
    paper: str
    laws: "tuple[Law, ...]" = ()
    roles: str = "*"
    except_for: Mapping[str, str] = field(default_factory=dict)
    trains: str = "theta"
    aka: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def family(self) -> str:
        """The folder it lives in."""
        return self.function.__module__.split(".")[-2] if "." in self.function.__module__ else "local"

    @property
    def id(self) -> str:
        """`family.name`."""
        return f"{self.family}.{self.name}"

    @cached_property
    def title(self) -> str:
        """The paper's title, authors and venue: first paragraph of the module's docstring."""
        return " ".join((sys.modules[self.function.__module__].__doc__ or "").split("\n\n")[0].split())

    @cached_property
    def doc(self) -> str:
        """The docstring, dedented."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.split("\n")[0]

    @cached_property
    def _parameters(self) -> tuple[inspect.Parameter, ...]:
        return tuple(p for p in inspect.signature(self.function).parameters.values() if p.name != "self")

    @cached_property
    def positional(self) -> tuple[str, ...]:
        """Names of the tensors it asks for, in order."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if self.kind == "parametrization":
            encode = inspect.signature(self.function.encode).parameters
            return tuple(name for name in encode if name != "self")
        return tuple(p.name for p in self._parameters if p.kind in kinds)

    @property
    def unit(self) -> str:
        """What it works on: one of `UNITS`."""
        return self.positional[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """What else it asks for: some of `NEEDS`."""
        return self.positional[1:]

    @cached_property
    def optional(self) -> frozenset[str]:
        """The inputs it can do without."""
        return frozenset(
            p.name for p in self._parameters if p.name in self.positional and p.default is not inspect.Parameter.empty
        )

    @cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """Keyword-only parameters by name; for a parametrization, its dataclass fields."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        wanted = [p for p in self._parameters if self.kind == "parametrization" or p.kind == keyword]
        typed = self.function.__init__ if self.kind == "optimizer" else self.function
        hints = typing.get_type_hints(typed, include_extras=True)
        about = _arguments(self.doc)
        return {
            p.name: Hyperparameter(p.name, hints.get(p.name, Any), p.default, about.get(p.name, "")) for p in wanted
        }

    @cached_property
    def schema(self) -> "type[BaseModel]":
        """A pydantic model of the hyperparameters: it validates, and gives the JSON schema."""
        from pydantic import ConfigDict, create_model

        fields: dict[str, Any] = {
            h.name: (h.annotation, ... if h.default is inspect.Parameter.empty else h.default)
            for h in self.hyperparameters.values()
        }
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        return create_model(self.name, __config__=config, **fields)

    def validate(self, values: Mapping[str, Any], *, where: object = None) -> dict[str, Any]:
        """The hyperparameters with defaults filled in; one value where a tuple belongs is a tuple of one.

        Raises:
            MethodError: an unknown name, or a value out of its range.
        """
        from pydantic import ValidationError

        for name in values:
            if name not in self.hyperparameters:
                raise MethodError(
                    f"`{self.id}` has no hyperparameter `{name}`",
                    where=where,
                    hint=nearest(name, self.hyperparameters),
                )
        hints = {name: self.hyperparameters[name].annotation for name in values}
        lists = {name for name, hint in hints.items() if typing.get_origin(hint) is tuple}
        values = {k: (v,) if k in lists and isinstance(v, int | float | str) else v for k, v in values.items()}
        try:
            return dict(self.schema(**values))
        except ValidationError as error:
            found = error.errors()
            name = found[0]["loc"][0]
            given = values.get(str(name), "nothing")
            first = max(found, key=lambda e: len(e["loc"])) if isinstance(given, list | tuple) else found[0]
            name = f"{name}" + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
            message = first["msg"][0].lower() + first["msg"][1:]
            raise MethodError(
                f"`{name}` = {given!r}: {message}", where=where or self.id, hint=f"see `weightsmith show {self.id}`"
            ) from None

    @cached_property
    def matrix_only(self) -> bool:
        """Whether it asks for a matrix, "out in", rather than a tensor of any shape."""
        target = self.function.encode if self.kind == "parametrization" else self.function
        subject = "return" if self.unit == "spec" else self.unit
        annotation = typing.get_type_hints(target, include_extras=True).get(subject)
        if self.unit in ("ws", "weights"):
            annotation = next(reversed(typing.get_args(annotation)), annotation)
        return str(getattr(annotation, "dim_str", "")).split()[:2] == ["out", "in"]

    @cached_property
    def single(self) -> bool:
        """Whether it takes one model: a tensor's method, or one of whole models that says `MaxLen(1)`."""
        if self.unit != "models":
            return self.unit in ("w", "spec")
        hint = typing.get_type_hints(self.function, include_extras=True)["models"]
        return any(getattr(bound, "max_length", None) == 1 for bound in typing.get_args(hint)[1:])

    @cached_property
    def several(self) -> frozenset[str]:
        """Hyperparameters that may hold one value a model."""
        return frozenset(h.name for h in self.hyperparameters.values() if "tuple[" in str(h.annotation))

    @cached_property
    def whole(self) -> frozenset[str]:
        """Hyperparameters that are whole numbers."""
        kinds = {h.name: str(h.annotation) for h in self.hyperparameters.values()}
        return frozenset(n for n, k in kinds.items() if re.search(r"\bint\b", k) and not re.search("float|Literal", k))

    def shares_out(self, values: Mapping[str, Any]) -> bool:
        """Whether a fraction of `bits` is asked for, which a run shares out among the tensors."""
        bits = values.get("bits")
        return "bits" in self.whole and isinstance(bits, float) and not bits.is_integer()

    @property
    def elementwise(self) -> bool:
        """Whether its law says that pieces of the result need only the same pieces of the inputs."""
        return any(law.name == "elementwise" for law in self.laws)


_CARDS: dict[str, Card] = {}
_STREAMED: dict[str, "Streamed"] = {}


def register(card: Card) -> None:
    """Make a method known by name.

    Raises:
        MethodError: it asks for something nobody provides, or its name is taken.
    """
    if card.positional[:1] and card.unit not in UNITS:
        raise MethodError(f"unknown unit `{card.unit}`", where=card.id, hint=nearest(card.unit, UNITS))
    if not card.positional:
        raise MethodError("it takes no tensor", where=card.id, hint=f"its first parameter is one of {', '.join(UNITS)}")
    for need in card.needs:
        if need not in NEEDS:
            raise MethodError(f"unknown input `{need}`", where=card.id, hint=nearest(need, NEEDS))
    taken = _CARDS.get(card.id)
    if taken and (taken.function.__module__, card.function.__module__) != (card.function.__module__,) * 2:
        raise MethodError("the name is taken", where=card.id)
    _CARDS[card.id] = card


def op(
    *,
    paper: str,
    laws: "Iterable[Law]" = (),
    roles: str = "*",
    aka: tuple[str, ...] = (),
    except_for: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Register a function from tensors to a tensor. The decorated function is returned unchanged."""

    def decorate(function: F) -> F:
        register(Card("op", function, paper, tuple(laws), roles, except_for or {}, aka=aka))
        return function

    return decorate


def measure(*, paper: str, laws: "Iterable[Law]" = (), except_for: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Register a function from tensors to numbers or Weights; when differentiable, it serves as a regulariser."""

    def decorate(function: F) -> F:
        register(Card("measure", function, paper, tuple(laws), "*", except_for or {}))
        return function

    return decorate


def optimizer(
    *, paper: str, laws: "Iterable[Law]" = (), except_for: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Register a `torch.optim.Optimizer`, which stays what it is. Its keywords are torch's: `lr`, `betas`, `eps`, ...

    Its keyword-only parameters are the hyperparameters.
    """

    def decorate(cls: F) -> F:
        register(Card("optimizer", cls, paper, tuple(laws), "*", except_for or {}))
        return cls

    return decorate


@dataclass(frozen=True)
class Streamed:
    """A fast path: a whole-tensor op done tile by tile in bounded memory, and tested equal to the definition.

    Args:
        apply: like the op, elementwise, with one more keyword `state`.
        tally: like the op, with one more keyword `state` (None on the first pass); returns an array of counts, which
            the core adds up over tiles.
        decide: from the counts, the number of elements and the hyperparameters to the next `state`.
        passes: how many times tally and decide take turns.
        given: the hyperparameters it serves; at others the definition is used.
        rows: where a tile has to be of whole rows (rows, width), the dimension a row begins with: 1 for all inputs of
            an output, -1 for the last dimension.
    """

    apply: Callable[..., Any]
    tally: Callable[..., Any] | None = None
    decide: Callable[..., Any] | None = None
    passes: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None


def streamed(op: Callable[..., Any], fast: Streamed) -> None:
    """Give an op its fast path."""
    _STREAMED[card(op).id] = fast


def fast_path(card: Card) -> Streamed | None:
    """The op's way to work tile by tile, if it has one: the definition itself for elementwise ops."""
    if card.elementwise and card.id not in _STREAMED:
        return Streamed(card.function)
    return _STREAMED.get(card.id)


def card(method: "str | Callable[..., Any]") -> Card:
    """The card of a method, given the method itself or its name."""
    if isinstance(method, str):
        return get(method)
    target = method if hasattr(method, "__name__") else type(method)
    module = getattr(target, "__module__", "").split(".")
    key = f"{module[-2] if len(module) > 1 else 'local'}.{getattr(target, '__name__', '')}"
    if key not in _CARDS or _CARDS[key].function is not target:
        raise MethodError(
            f"{method!r} is not a registered method",
            hint="decorate it with @op, @measure, @parametrization, @optimizer",
        )
    return _CARDS[key]


@cache
def index() -> dict[str, dict[str, Any]]:
    """The generated index: card data by `family.name`, read without importing torch."""
    file = resources.files("weightsmith").joinpath("_index.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def find(name: str) -> str:
    """The `family.name` of the method called so, or called `name` alone when only one family has it.

    Raises:
        MethodError: no such method, or several.
    """
    names = {key: {key.split(".")[-1], *about.get("aka", ())} for key, about in index().items()}
    names |= {key: {card.name, *card.aka} for key, card in _CARDS.items()}
    family, _, short = name.rpartition(".")
    found = [key for key, all_names in names.items() if short in all_names and family in ("", key.split(".")[0])]
    if not found:
        full = {f"{key.split('.')[0]}.{own}" for key, all_names in names.items() for own in all_names}
        choices = full if family else set().union(*names.values())
        hint = nearest(name, choices, what="see `weightsmith ls`; there are")
        raise MethodError(f"unknown method `{name}`", hint=hint)
    if len(found) > 1:
        hint = f"say {' or '.join(f'`{key}`' for key in found)}"
        raise MethodError(f"several methods are called `{name}`", hint=hint)
    return found[0]


def get(name: str) -> Card:
    """The card of the method called `family.name`, or `name` alone when only one family has it.

    Raises:
        MethodError: no such method, or several.
    """
    key = name if name in _CARDS else find(name)
    if key not in _CARDS:
        import_module(f"weightsmith.{key}")
    return _CARDS[key]


def methods(pattern: str = "*") -> list[Card]:
    """The cards of all methods whose `family.name` or name matches a glob, imported and sorted."""
    for file in sorted(resources.files("weightsmith").iterdir(), key=lambda f: f.name):
        if file.joinpath("claims").is_dir():
            for module in sorted(file.iterdir(), key=lambda f: f.name):
                if module.name.endswith(".py") and not module.name.startswith("_"):
                    import_module(f"weightsmith.{file.name}.{module.name[:-3]}")
    return [c for key, c in sorted(_CARDS.items()) if fnmatchcase(key, pattern) or fnmatchcase(c.name, pattern)]


class Family(ModuleType):
    """A family's package: `merge.ties` is the method, although the file it lives in has the same name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{self.__name__}.{name}":
                raise
            try:
                return get(f"{self.__name__.split('.')[-1]}.{name}").function
            except MethodError:
                raise AttributeError(f"`{self.__name__}` has no method `{name}`") from None
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


def family(package: str) -> None:
    """Turn a package into a family of methods, imported on first use."""
    sys.modules[package].__class__ = Family


def _arguments(doc: str) -> dict[str, str]:
    """Name -> text of a docstring's `Args:` section."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.M)
    if not section:
        return {}
    entries = re.split(r"^ {4}(\w+): ", section.group(1), flags=re.M)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
