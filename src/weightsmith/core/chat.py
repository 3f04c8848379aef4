"""Chat templates: how a chat becomes text, written beside a model's tokenizer."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputError, nearest
from weightsmith.core.formats.files import parse_object
from weightsmith.core.weights import View, Weights

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"

BUILT_IN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "exaone": (
        "{% for m in messages %}[|{{ m.role }}|]{{ m.content }}{% if m.role != 'user' %}[|endofturn|]{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}
"""Name -> template, for the formats that models are commonly trained on."""


def check(template: str) -> None:
    """Raise InputError unless it is `auto`, a built-in name, or looks like a Jinja template."""
    if template != "auto" and template not in BUILT_IN and "{" not in template:
        hint = nearest(template, ["auto", *BUILT_IN], what="`auto`, a Jinja template, or one of")
        raise InputError(f"`{template}` is no chat template", where="chat_template", hint=hint)


def template_of(weights: Weights) -> str | None:
    """The template that comes with a model; of several, the default one."""
    if FILE in weights.origin.assets:
        return _read(weights.origin.assets[FILE]).decode()
    if CONFIG not in weights.origin.assets:
        return None
    found = _config(weights).get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
    found = found.get("default") if isinstance(found, Mapping) else found
    return found if isinstance(found, str) else None


def with_chat_template(weights: Weights, template: str, models: Sequence[Weights]) -> Weights:
    """The same tensors with a chat template beside them.

    Args:
        weights: the tensors, with their tokenizer.
        template: `auto`, a built-in name, or a Jinja template.
        models: where `auto` looks: what most of them have, the first one's when there are as many of another.
    """
    check(template)
    if template == "auto":
        found = Counter(text.strip() for model in models if (text := template_of(model)))
        if not found:
            return weights
        template = found.most_common(1)[0][0]
    template = BUILT_IN.get(template, template)
    assets = {**weights.origin.assets, FILE: template.encode()}
    if "chat_template" in (config := _config(weights) if CONFIG in assets else {}):
        assets[CONFIG] = json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False).encode()
    view = View(weights, {name: name for name in weights})
    view.origin = replace(weights.origin, assets=assets)
    return view


def _config(weights: Weights) -> dict[str, Any]:
    return parse_object(_read(weights.origin.assets[CONFIG]), "the tokenizer's config", weights.origin.path)


def _read(asset: Path | bytes) -> bytes:
    return asset if isinstance(asset, bytes) else asset.read_bytes()
