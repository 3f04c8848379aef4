"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, read and written.

PEFT's LORA is read and written: pairs of factors, also of embeddings, convolutions and transformers' Conv1D. The
parametrization it belongs to says so itself: `peft = "LORA"`, hyperparameters `rank` and `alpha`, theta `a` and `b`.
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsmith.core.arch import describe
from weightsmith.core.errors import FormatError, InputError, MethodError, RunError, first_few
from weightsmith.core.formats.files import listing, parse_object, read_json, resolve_inside
from weightsmith.core.weights import Memory, Origin, Spec, Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

_READ = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias",
    "init_lora_weights", "base_model_name_or_path",
))  # fmt: skip
_HARMLESS = frozenset((
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
))  # fmt: skip
"""Fields that say how an adapter was trained, or where; what it computes does not depend on them."""

_STARTS = (True, False, "true", "false", "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base model as it is."""

_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


class Stored(NamedTuple):
    """Where a tensor is in the file, and whether it is transposed there."""

    name: str
    transposed: bool


def open_adapter(path: str | Path) -> Weights:
    """The adapter in a folder that PEFT or Weightsmith wrote, as Weights named `<weight>.<theta key>`.

    Raises:
        FormatError: the folder is damaged, or its tensors are not those the config speaks of.
        MethodError: PEFT's method, or an option of it, has no counterpart here.
    """
    from weightsmith.core.formats.safetensors import SafetensorsFile

    folder = Path(path)
    if TENSORS not in listing(folder):
        hint = "if there is a pickled adapter_model.bin, load it with PEFT and save it again"
        raise FormatError(f"no {TENSORS} in this folder", where=folder, hint=hint)
    config = read_json(resolve_inside(folder, CONFIG), "the adapter's config")
    return PeftAdapter(folder, config, SafetensorsFile(resolve_inside(folder, TENSORS)))


class PeftAdapter(Weights):
    """An adapter's folder, read lazily. Made by `open_adapter`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], file: Weights):
        from weightsmith.core.adapter import BASE, KEY, described
        from weightsmith.core.method import card

        method = _method(config.get("peft_type"), folder)
        _refuse(config, folder)
        self.file, (self._stored, modules) = file, _stored(file, config, folder)
        shapes = {name: (_shape(file.spec(at.name).shape, at.transposed)) for name, at in self._stored.items()}
        self._specs = describe({n: (s, file.spec(self._stored[n].name).dtype) for n, s in shapes.items()}, {})
        made = {}
        for weight in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
            values = _values(weight.removesuffix(".weight"), config, folder)
            values = card(method).validate(values, where=folder / CONFIG)
            if (rank := shapes.get(f"{weight}.a", (0,))[0]) != values["rank"]:
                raise FormatError(f"`{weight}` has rank {rank}, the config says {values['rank']}", where=folder)
            if config.get("use_rslora"):
                values["alpha"] *= rank**0.5
            made[weight] = method(**values)
        ours = parse_object(file.origin.metadata.get(KEY, "{}").encode(), "the adapter's description", folder)
        seed = ours["seed"] if isinstance(ours.get("seed"), int) else 0
        kept = {k: v for k, v in file.origin.metadata.items() if k.startswith("weightsmith.") and k != KEY}
        hashes = ours["base"].get("sha256") if isinstance(ours.get("base"), dict) else None
        base = {"path": config.get("base_model_name_or_path"), "sha256": hashes or {}}
        metadata = {**kept, BASE: json.dumps(base), **described(made, seed=seed, modules=modules).metadata}
        self.origin = Origin(str(folder), (str(folder / CONFIG), *file.origin.files), metadata=metadata, format="peft")

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str) -> "Tensor":
        at = self._stored[name]
        tensor = self.file.read(at.name).flatten(1)
        return tensor.T.contiguous() if at.transposed else tensor


def save_adapter(
    adapter: "nn.Module | Weights",
    path: str | Path,
    *,
    base: "str | Path | Weights | None" = None,
    overwrite: bool = False,
) -> Path:
    """Write what is attached to a live model, or its theta, as a folder that PEFT loads.

    Args:
        adapter: the live model, or what `theta` or `open` returned.
        path: the folder to make.
        base: the model it was trained on, or its path; by default the name the live model knows itself by.
        overwrite: replace the folder if it is there.

    Raises:
        InputError: the folder is there already.
        MethodError: PEFT has no format for the method.
    """
    from weightsmith.core.adapter import BASE, KEY, description, forms
    from weightsmith.core.formats.safetensors import content_hash

    out, model = Path(path), None
    if out.exists() and not overwrite:
        raise InputError("the output exists", where=out, hint="choose another, or overwrite=True (`--overwrite`)")
    if not isinstance(adapter, Weights):
        from weightsmith.core.parametrization import theta

        model, adapter = adapter, theta(adapter)
    made, about = forms(adapter), description(adapter)
    known = base.origin.path if isinstance(base, Weights) else base
    told = json.loads(adapter.origin.metadata.get(BASE, "{}"))
    known = known or getattr(getattr(model, "config", None), "name_or_path", None)
    hashed = {Path(f).name: content_hash(f) for f in (base.origin.files if isinstance(base, Weights) else ())}
    hashed = hashed or (told.get("sha256") if not known or str(known) == told.get("path") else None) or {}
    known = known or told.get("path")
    about["base"] = {"path": str(known) if known else None, "sha256": hashed}
    tensors, transposed = _packed(adapter, about.get("modules") or {})
    classes = (
        [type(model).__name__]
        if model
        else base.origin.config.get("architectures")
        if isinstance(base, Weights)
        else None
    )
    task = next((t for end, t in _TASKS.items() for name in classes or () if str(name).endswith(end)), None)
    config = {
        **_config(made),
        "fan_in_fan_out": transposed,
        "target_modules": _targets(made, model),
        "base_model_name_or_path": str(known) if known else None,
        "task_type": task,
    }
    try:
        more = {k: v for k, v in adapter.origin.metadata.items() if k.startswith("weightsmith.") and k != BASE}
        metadata = {"format": "pt", **more, KEY: json.dumps(about)}
        _write(out, tensors, metadata, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise RunError(error.strerror or str(error), where=error.filename or out, hint="give another output") from error
    return out


def _method(kind: object, folder: Path) -> Any:
    """The parametrization of that name which says that PEFT's `kind` is its home."""
    name = kind.lower() if isinstance(kind, str) and re.fullmatch(r"[A-Z][A-Z0-9]*", kind) else "unknown"
    method = getattr(import_module("weightsmith.adapt"), name, None)
    if kind is None or getattr(method, "peft", None) != kind:
        raise MethodError(
            f"PEFT's {kind!r} adapters are not read",
            where=folder,
            hint="LORA is; PEFT makes that of many others: peft.convert_to_lora(model)",
        )
    return method


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse whatever would make the adapter compute something else than its factors say."""
    odd = {key: value for key, value in config.items() if value and key not in _READ and key not in _HARMLESS}
    if config.get("bias", "none") != "none":
        odd["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in _STARTS:
        odd["init_lora_weights"] = config["init_lora_weights"]
    for key, value in odd.items():
        raise MethodError(
            f"the adapter uses `{key}` = {value!r}, which is not read",
            where=folder / CONFIG,
            hint="merge it with PEFT: model.merge_and_unload()",
        )


def _stored(file: Weights, config: Mapping[str, Any], folder: Path) -> tuple[dict[str, Stored], dict[str, list[Any]]]:
    """Our names -> where they are in the file; and of modules that are not Linear, the class and the kernel."""
    found: dict[str, Stored] = {}
    modules: dict[str, list[Any]] = {}
    strange = []
    for name in file:
        match, shape = _KEY.fullmatch(name), file.spec(name).shape
        if match and 2 <= len(shape) <= 5:
            weight, embedding = f"{match[1]}.weight", "embedding" in match[2]
            turned = embedding or (bool(config.get("fan_in_fan_out")) and len(shape) == 2)
            ours = f"{weight}.{'a' if ('A' in match[2]) != turned else 'b'}"
            if ours in found:
                strange.append(f"`{name}` and `{found[ours].name}`")
            found[ours] = Stored(name, turned)
            if turned:
                modules[weight] = ["Embedding" if embedding else "Conv1D"]
            elif len(shape) > 2 and "A" in match[2]:
                modules[weight] = [f"Conv{len(shape) - 2}d", *shape[2:]]
        elif not name.endswith(".base_layer.weight"):  # the base's own embedding, which PEFT saves along
            strange.append(f"`{name}` {list(shape)}")
    weights = dict.fromkeys(name.rpartition(".")[0] for name in found)
    strange += [f"no `{weight}.{key}`" for weight in weights for key in "ab" if f"{weight}.{key}" not in found]
    if strange or not found:
        raise FormatError(f"not the factors of a LoRA\n{first_few(strange)}", where=folder / TENSORS)
    return dict(sorted(found.items())), modules


def _shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    rows, columns = shape[0], 1
    for size in shape[1:]:
        columns *= size
    return (columns, rows) if transposed else (rows, columns)


def _values(module: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Rank and alpha of one module, the config's patterns resolved."""
    values = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    for key, patterns in (("rank", config.get("rank_pattern") or {}), ("alpha", config.get("alpha_pattern") or {})):
        if not isinstance(patterns, dict):
            raise FormatError(f"{key}_pattern is no mapping", where=folder / CONFIG)
        for pattern, value in patterns.items():
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.-]+", name):
                raise MethodError(
                    f"the pattern {pattern!r} is not the name of a module",
                    where=folder / CONFIG,
                    hint="write the modules' names out",
                )
            if f".{module}".endswith(f".{name}"):
                values[key] = value
                break
    return values


def _config(made: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config of these forms: the commonest rank and alpha, and patterns for the others."""
    kinds = {getattr(type(form), "peft", type(form).__name__) for form in made.values()}
    if any(not hasattr(form, "peft") for form in made.values()) or len(kinds) > 1:
        raise MethodError(f"PEFT has no format for {' and '.join(sorted(kinds))}", hint="bake(model), and save that")
    rank = Counter(form.rank for form in made.values()).most_common(1)[0][0]
    alpha = Counter(_tidy(form.alpha) for form in made.values()).most_common(1)[0][0]
    modules = {name.removesuffix(".weight"): form for name, form in made.items()}
    return {
        "peft_type": kinds.pop(),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: form.rank for name, form in modules.items() if form.rank != rank},
        "alpha_pattern": {name: _tidy(form.alpha) for name, form in modules.items() if form.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _tidy(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _packed(adapter: Weights, modules: Mapping[str, list[Any]]) -> tuple[Memory, bool]:
    """The tensors under PEFT's names and in its layouts, and whether a Conv1D is among them."""
    tensors = {}
    for name in adapter:
        weight, _, key = name.rpartition(".")
        if not weight.endswith(".weight"):
            hint = "bake(model), and save that"
            raise MethodError(f"`{weight}`: PEFT keeps LoRA for weights of modules only", hint=hint)
        kind, *kernel = modules.get(weight, ["Linear"])
        tensor, turned = adapter.read(name).detach().cpu(), kind in ("Embedding", "Conv1D")
        tensor, letter = (tensor.T, "AB"[key == "a"]) if turned else (tensor, "AB"[key == "b"])
        if kernel:
            tensor = tensor.unflatten(1, (-1, *(kernel if key == "a" else [1] * len(kernel))))
        part = f"lora_embedding_{letter}" if kind == "Embedding" else f"lora_{letter}.weight"
        tensors[f"{PREFIX}{weight.removesuffix('weight')}{part}"] = tensor.contiguous()
    return Memory(tensors), any(kind[0] == "Conv1D" for kind in modules.values())


def _targets(made: Mapping[str, Any], model: "nn.Module | None") -> list[str]:
    """Names of the adapted modules: their last parts where these mean no other module, else in full."""
    names = [name.removesuffix(".weight") for name in made]
    ends = sorted({name.rpartition(".")[2] for name in names})
    if model is None:
        return names
    others = {name for name, _ in model.named_modules() if "parametrizations" not in name.split(".")} - set(names)
    return names if any(name.rpartition(".")[2] in ends for name in others) else ends


def _write(out: Path, tensors: Weights, metadata: Mapping[str, str], config: str) -> None:
    """Make the folder beside its place and move it there when it is whole."""
    import torch

    from weightsmith.core.formats.safetensors import header
    from weightsmith.core.run import sync_folder

    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        made = stage / "new"
        made.mkdir()
        start, _ = header([tensors.spec(name) for name in tensors], metadata)
        pieces = (tensors.read(name).reshape(-1).view(torch.uint8).numpy().data for name in tensors)
        for name, parts in ((TENSORS, (start, *pieces)), (CONFIG, (config.encode(),))):
            with (made / name).open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
        if out.exists():
            os.replace(out, stage / "old")
        sync_folder(made)
        os.replace(made, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
