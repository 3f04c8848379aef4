"""Vocabularies: models whose tokenizers differ, brought onto one vocabulary so that they can be merged.

A token's row moves to the token's new place. A token that a model lacks takes, in this order: what the user says; the
row of the only model that has the token; the base's row; the mean of the rows of the models that have it; zero when
none has it. Places that no token fills, as padding leaves them, hold the mean of the rows that are filled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import FormatError, InputError, MismatchError, first_few, nearest
from weightsmith.core.formats.files import assets_of, open_regular, parse_object, read_at
from weightsmith.core.weights import Origin, Spec, View, Weights

if TYPE_CHECKING:
    from torch import Tensor

FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*",
)  # fmt: skip
"""Assets that belong to the tokenizer."""

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*")
"""Those that stay true when the vocabulary grows; the others tell the old one."""

HINT = "say which tokenizer to take: `tokenizer: {source: union}` in a recipe, `--tokenizer union` in the shell"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as the data of its tokenizer.json.

    Args:
        data: the parsed file.
        where: whose it is, for errors.
    """

    data: Mapping[str, Any]
    where: str

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id, added tokens included, in the order of the ids."""
        found = self.data["model"]["vocab"]
        pairs = ((t, i) for i, (t, _) in enumerate(found)) if isinstance(found, list) else found.items()
        known = dict(pairs) | {token["content"]: token["id"] for token in self.added}
        return dict(sorted(known.items(), key=lambda pair: pair[1]))

    @property
    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in the text before anything else is."""
        return self.data.get("added_tokens") or []

    @cached_property
    def live(self) -> Any:
        """The tokenizer itself, of the `tokenizers` library, without truncation and padding."""
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(json.dumps(self.data))
        made.no_truncation()
        made.no_padding()
        return made

    @property
    def kind(self) -> str:
        """What a token's text means: tokenizers of one kind write the same text the same way."""
        byte_level = "ByteLevel" in json.dumps([self.data.get("pre_tokenizer"), self.data.get("decoder")])
        return f"{self.data['model'].get('type') or 'BPE'}{' of bytes' if byte_level else ''}"


def vocabulary(weights: Weights) -> Vocabulary | None:
    """The model's tokenizer; None when there is no tokenizer.json with it.

    Raises:
        FormatError: the file is damaged.
    """
    asset = weights.origin.assets.get("tokenizer.json")
    if asset is None:
        return None
    return _parsed(asset if isinstance(asset, bytes) else asset.read_bytes(), weights.origin.path or "a model")


def read_asset(tokenizer: str | Path | bytes) -> tuple[Vocabulary, dict[str, Path | bytes]]:
    """A tokenizer.json, or the folder it is in, with the files that belong to it."""
    if isinstance(tokenizer, bytes):
        return _parsed(tokenizer, "the new tokenizer"), {"tokenizer.json": tokenizer}
    path = Path(tokenizer)
    if path.is_dir():
        found = {name: file for name, file in assets_of(path).items() if _belongs(name)}
    else:
        found = {"tokenizer.json": path}
    if "tokenizer.json" not in found:
        raise InputError("no tokenizer.json in this folder", where=path)
    descriptor, state = open_regular(found["tokenizer.json"])
    try:
        return _parsed(read_at(descriptor, state.st_size, 0, path), str(path)), dict(found)
    finally:
        os.close(descriptor)


@lru_cache(16)
def _parsed(raw: bytes, where: str) -> Vocabulary:
    found = Vocabulary(parse_object(raw, "the tokenizer", where), where)
    try:
        sound = all(isinstance(t, str) and isinstance(i, int) and i >= 0 for t, i in found.ids.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound or not found.ids:
        raise FormatError("its tokenizer.json has no vocabulary of tokens and ids", where=where)
    return found


def rows(weights: Weights) -> dict[str, int]:
    """The tensors with a row a token, as embeddings and heads have, and how many rows they have."""
    config = weights.origin.config
    inner = config.get("text_config")
    size = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    specs = [weights.spec(name) for name in weights]
    specs = [spec for spec in specs if spec.shape and spec.role.split(".")[0] in ("embedding", "head")]
    if size is None:
        size = max((s.shape[0] for s in specs if s.role == "embedding" and len(s.shape) == 2), default=0)
    return {spec.name: spec.shape[0] for spec in specs if spec.shape[0] == size}


def check(models: Sequence[Weights]) -> None:
    """Check that the same row means the same token in all models that come with a tokenizer.

    Raises:
        MismatchError: it does not; the first tokens that differ are listed.
    """
    known = [(model, found) for model in models if (found := vocabulary(model)) is not None]
    for model, other in known[1:]:
        mine, first = known[0]
        size, wide = (max(rows(m).values(), default=0) for m in (mine, model))
        ours, theirs = ({i: t for t, i in v.ids.items() if i < min(size, wide)} for v in (first, other))
        moved = [] if ours == theirs else [i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i)]
        if size == wide and not moved:
            continue
        told = [f"row {i}: {ours.get(i)!r} here, {theirs.get(i)!r} in {other.where}" for i in sorted(moved)]
        head = f"the tokenizers differ in {len(moved)} rows" if moved else "the vocabularies differ in size"
        sizes = "" if size == wide else f"; {size:,} rows here, {wide:,} in {other.where}"
        raise MismatchError(f"{head}{sizes}\n{first_few(told)}".rstrip(), where=first.where, hint=HINT)


def unify(
    models: Mapping[str, Weights],
    source: str = "union",
    *,
    base: str | None = None,
    tokens: Mapping[str, Any] | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Weights]:
    """The models on one vocabulary: lazy views whose embeddings, heads, config and tokenizer all agree.

    Args:
        models: name -> model, each with a tokenizer.json among its assets; one without has the base's.
        source: `union` (the base's tokenizer, and the others' tokens after it), `base`, or a model's name.
        base: name of the base; the first model's tokenizer counts as the base's when there is none.
        tokens: token -> `{source, force}`: where its row comes from in the models that lack it, and with `force` in
            all models. `source` is a model's name, `{kind: zero}` or `{kind: model_token, model, token | token_id}`.
        pad_to_multiple_of: make the number of rows a multiple of this.

    Raises:
        InputError: an unknown model or token, or no tokenizer at all.
        MismatchError: the union of tokenizers of different kinds, or rows of different widths.
    """
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise InputError(f"pad_to_multiple_of = {pad_to_multiple_of}: at least 1", hint="64 is usual; or leave it out")
    first = _known(next(iter(models)) if base is None else base, models)
    read = {name: vocabulary(model) for name, model in models.items()}
    fallback = read[first] or next(filter(None, read.values()), None)
    if fallback is None:
        hint = "save it with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"
        raise InputError("no model here has a tokenizer.json", where=models[first].origin.path, hint=hint)
    owned = {name: _usable(found or fallback, models[name]) for name, found in read.items()}
    place = first if source in ("union", "base") else _known(source, models)
    target, fresh = read[place] or fallback, {}
    if source == "union":
        for name in models:
            fresh |= _unknown(target, read[name] or fallback, owned[name], fresh)
    rules = {token: _rule(token, given, models, owned) for token, given in (tokens or {}).items()}
    lacking = [token for token in rules if token not in target.ids and token not in fresh]
    grown = _extended(target, fresh, lacking) if fresh or lacking else target
    size = max(grown.ids.values()) + 1
    size += -size % (pad_to_multiple_of or 1)
    holders = [name for name in models if rows(models[name])]
    routes: dict[str, dict[str, Route]] = {name: {} for name in models}
    for token, row in grown.ids.items():
        for name, donors in _donors(token, holders, owned, base, rules.get(token)).items():
            for donor, old in donors:
                routes[name].setdefault(donor, []).append((row, old, 1 / len(donors)))
    assets = _assets(models[place], grown, changed=grown is not target)
    filled = frozenset(grown.ids.values())
    return {
        name: Revocabulated(
            model, {donor: (models[donor], route) for donor, route in routes[name].items()}, filled, size,
            fitted(model, owned[name], grown, assets, size, keeps=name == place),
        )
        for name, model in models.items()
    }  # fmt: skip


Route = list[tuple[int, int, float]]
"""Rows taken from one model: where to, where from, and the share of the result."""

Rule = tuple[bool, list[tuple[str, int]] | None]
"""What the user says of a token: whether in all models, and which rows of which models it is the mean of."""


class Revocabulated(View):
    """A model whose rows are those of another vocabulary, computed when read. Made by `unify`.

    Args:
        source: the model.
        routes: name -> a model, perhaps the same, and the rows taken from it.
        filled: the rows that a token has; the others hold their mean.
        size: rows of the result.
        origin: config and tokenizer of the result.
    """

    def __init__(
        self,
        source: Weights,
        routes: Mapping[str, tuple[Weights, Route]],
        filled: frozenset[int],
        size: int,
        origin: Origin,
    ):
        super().__init__(source, {name: name for name in source})
        self.donors, self.filled, self.size, self.origin = dict(routes), filled, size, origin
        stays = len(routes) == 1 and all(new == old and share == 1 for _, r in routes.values() for new, old, share in r)
        stays = stays and len(filled) == size and next(iter(routes.values()))[0] is source
        self.moved = {name for name, count in rows(source).items() if not (stays and count == size)}
        if not self.moved:
            self.donors = {}
        for name in self.moved:
            shape = source.spec(name).shape
            for donor, _ in self.donors.values():
                theirs = donor.spec(_held(donor, name)).shape
                if shape[1:] != theirs[1:]:
                    raise MismatchError(
                        f"`{name}` is {list(shape)} here and {list(theirs)} in {donor.origin.path}: one vocabulary "
                        "does not make their rows fit",
                        where=source.origin.path,
                        hint="merge models of one width",
                    )

    def spec(self, name: str) -> Spec:
        spec = self.source.spec(name)
        return replace(spec, shape=(self.size, *spec.shape[1:])) if name in self.moved else spec

    def tiles(self, name: str) -> Iterator["Tensor"]:
        return Weights.tiles(self, name) if name in self.moved else self.source.tiles(name)

    def read(self, name: str) -> "Tensor":
        if name not in self.moved:
            return self.source.read(name)
        import torch

        spec = self.spec(name)
        result = torch.zeros(spec.shape, dtype=spec.torch_dtype)
        blended = sorted({new for _, route in self.donors.values() for new, _, share in route if share < 1})
        sums, at = torch.zeros(len(blended), *spec.shape[1:]), {row: i for i, row in enumerate(blended)}
        for donor, route in self.donors.values():
            theirs = donor.read(_held(donor, name))
            whole = torch.tensor([(new, old) for new, old, share in route if share == 1]).view(-1, 2)
            result[whole[:, 0]] = theirs[whole[:, 1]].to(result.dtype)
            if part := [(at[new], old, share) for new, old, share in route if share < 1]:
                to, rows_of, shares = (torch.tensor(column) for column in zip(*part, strict=True))
                scale = shares.view(-1, *[1] * (theirs.ndim - 1))
                sums.index_add_(0, to, theirs[rows_of].float() * scale)
        result[torch.tensor(blended, dtype=torch.long)] = sums.to(result.dtype)
        if empty := sorted(set(range(self.size)) - self.filled):
            result[empty] = (result.sum(0, dtype=torch.float32) / len(self.filled)).to(result.dtype)
        return result

    def inputs(self) -> tuple[Weights, ...]:
        return (self.source, *(donor for donor, _ in self.donors.values() if donor is not self.source))

    def lineage(self, identify: Callable[[str], Any]) -> dict[str, Any]:
        told = [sorted(self.filled), self.size, [(name, route) for name, (_, route) in self.donors.items()]]
        digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()
        others = {name: donor.lineage(identify) for name, (donor, _) in self.donors.items() if donor is not self.source}
        return {"vocabulary": digest, "rows": self.size, "from": [self.source.lineage(identify)], "tokens_of": others}


def _known(name: str, models: Mapping[str, Weights]) -> str:
    if name not in models:
        raise InputError(f"no model `{name}` to take a tokenizer or token from", hint=nearest(name, models))
    return name


def _held(model: Weights, name: str) -> str:
    """The tensor's name, or that of the one it is tied to."""
    found = name if name in model else model.origin.ties.get(name, name)
    if found not in model:
        raise MismatchError(f"no `{name}`, which other models take tokens' rows from", where=model.origin.path,
                            hint="merge models of one architecture")  # fmt: skip
    return found


def _usable(found: Vocabulary, model: Weights) -> dict[str, int]:
    """The tokens that have a row in the model: a tokenizer may tell of more."""
    count = max(rows(model).values(), default=0)
    return {token: row for token, row in found.ids.items() if row < count or not count}


def _unknown(
    target: Vocabulary, other: Vocabulary, usable: Mapping[str, int], seen: Mapping[str, Vocabulary]
) -> dict[str, Vocabulary]:
    """The tokens of a model that the target lacks -> the vocabulary they come from."""
    found = {token: other for token in usable if token not in target.ids and token not in seen}
    if found and other.kind != target.kind:
        raise MismatchError(
            f"its tokenizer is {target.kind}, that of {other.where} is {other.kind}: they write the same text "
            "differently, so their tokens have no union",
            where=target.where,
            hint="take the tokenizer of one model: `source: MODEL`; or `weightsmith transplant` first",
        )
    return found


def _rule(token: str, given: Any, models: Mapping[str, Weights], owned: Mapping[str, Mapping[str, int]]) -> Rule:
    """What `tokens` says of one token, checked."""
    given = given if isinstance(given, Mapping) else {"source": given}
    source, force = given.get("source"), bool(given.get("force", False))
    if strange := given.keys() - {"source", "force"}:
        raise InputError(f"unknown key `{min(strange)}`", where=f"tokens: {token}", hint="`source` and `force`")
    if source is None:
        return force, None
    if isinstance(source, str):
        source = {"kind": "model_token", "model": source, "token": token}
    if source.get("kind") == "zero":
        return force, []
    known = {"kind", "model", "token", "token_id"}
    if source.get("kind") != "model_token" or source.keys() - known or ("token" in source) == ("token_id" in source):
        raise InputError(f"source = {dict(source)!r} says no row", where=f"tokens: {token}",
                         hint="a model's name, {kind: zero} or {kind: model_token, model: M, token: T}")  # fmt: skip
    model = _known(str(source.get("model")), models)
    row = source["token_id"] if "token_id" in source else owned[model].get(source["token"])
    count = max(rows(models[model]).values(), default=0)
    if not isinstance(row, int) or not 0 <= row < count:
        said = f"`{model}` has no token {source.get('token', row)!r}"
        hint = nearest(str(source["token"]), owned[model]) if "token" in source else f"it has {count} rows"
        raise InputError(said, where=f"tokens: {token}", hint=hint)
    return force, [(model, row)]


def _donors(
    token: str, holders: Sequence[str], owned: Mapping[str, Mapping[str, int]], base: str | None, rule: Rule | None
) -> dict[str, list[tuple[str, int]]]:
    """Model -> the rows, of which models, that a token's row there is the mean of; none of them means zero."""
    force, said = rule or (False, None)
    having = [(name, owned[name][token]) for name in holders if token in owned[name]]
    fallback = having if said is None else said
    if said is None and len(having) > 1 and base in holders and token in owned[base or ""]:
        fallback = [(base or "", owned[base or ""][token])]
    own = {} if force and said is not None else dict(having)
    return {name: [(name, own[name])] if name in own else fallback for name in holders}


def _extended(target: Vocabulary, fresh: Mapping[str, Vocabulary], named: Iterable[str]) -> Vocabulary:
    """The target with more tokens: words of others' vocabularies as such, with their merges; added tokens as added."""
    data = json.loads(json.dumps(target.data))
    model, ids = data["model"], dict(target.ids)
    added = {token["content"]: token for token in target.added}
    for token in (*fresh, *named):
        ids[token] = max(ids.values(), default=-1) + 1 if token not in ids else ids[token]
    for token, owner in fresh.items():
        added |= {t["content"]: t for t in owner.added if t["content"] == token}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added |= {token: {"content": token, **flags} for token in named}
    data["added_tokens"] = sorted(({**t, "id": ids[c]} for c, t in added.items()), key=lambda token: token["id"])
    if isinstance(model["vocab"], list):
        scores = dict(map(tuple, model["vocab"]))
        for owner in {id(owner): owner for owner in fresh.values()}.values():
            scores = dict(map(tuple, owner.data["model"]["vocab"])) | scores
        lowest = min(scores.values()) - 10
        model["vocab"] = [[token, scores.get(token, lowest)] for token in ids]
    else:
        model["vocab"] = ids
    if "merges" in model:
        merges = dict.fromkeys(map(_pair, model["merges"]))
        for owner in {id(owner): owner for owner in fresh.values()}.values():
            merges |= dict.fromkeys(p for p in map(_pair, owner.data["model"]["merges"]) if "".join(p) in fresh)
        model["merges"] = [list(pair) for pair in merges if all(part in ids for part in (*pair, "".join(pair)))]
    return _checked(Vocabulary(data, target.where), ids)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _checked(made: Vocabulary, ids: Mapping[str, int]) -> Vocabulary:
    """A tokenizer that the `tokenizers` library reads as it is meant."""
    from tokenizers import Tokenizer

    try:
        read = Tokenizer.from_str(json.dumps(made.data)).get_vocab()
    except Exception as error:  # the library raises Exception itself
        raise FormatError(f"its tokenizer cannot take more tokens: {error}", where=made.where) from None
    if read != dict(ids):
        raise FormatError("its tokenizer cannot take more tokens: their ids would move", where=made.where,
                          hint="take it as it is: `source: base`")  # fmt: skip
    return made


def _belongs(name: str) -> bool:
    """Whether a file is the tokenizer's."""
    return any(fnmatchcase(name, glob) for glob in FILES)


def _assets(model: Weights, grown: Vocabulary, *, changed: bool) -> dict[str, Path | bytes]:
    """The tokenizer's files for the result."""
    found = {name: file for name, file in model.origin.assets.items() if _belongs(name)}
    if not changed and "tokenizer.json" in found:
        return found
    found = {name: file for name, file in found.items() if any(fnmatchcase(name, glob) for glob in KEPT)}
    found["tokenizer.json"] = json.dumps(grown.data, ensure_ascii=False).encode()
    if (config := found.get("tokenizer_config.json")) is not None:
        told = parse_object(
            config if isinstance(config, bytes) else config.read_bytes(), "the tokenizer's config", model
        )
        if "added_tokens_decoder" in told:
            about = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in grown.added}
            told["added_tokens_decoder"] = about | told["added_tokens_decoder"]
        found["tokenizer_config.json"] = json.dumps(told, indent=2, ensure_ascii=False).encode()
    return found


def fitted(
    model: Weights,
    owned: Mapping[str, int],
    grown: Vocabulary,
    assets: Mapping[str, Path | bytes],
    size: int,
    *,
    keeps: bool = False,
) -> Origin:
    """Where the result comes from: the model's own, with the common tokenizer and the ids it gives."""
    tokens = {row: token for token, row in owned.items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value if keeps or isinstance(value, bool) or value not in tokens else grown.ids.get(tokens[value])

    def told(config: Mapping[str, Any]) -> dict[str, Any]:
        made = {key: moved(value) if key.endswith("_token_id") else value for key, value in config.items()}
        if "vocab_size" in made:
            made["vocab_size"] = size
        if isinstance(made.get("text_config"), Mapping):
            made["text_config"] = told(made["text_config"])
        return made

    others = {n: a for n, a in model.origin.assets.items() if not _belongs(n)}
    if (raw := others.get("generation_config.json")) is not None:
        plain = parse_object(raw if isinstance(raw, bytes) else raw.read_bytes(), "the generation config", model)
        others["generation_config.json"] = json.dumps(told(plain), indent=2).encode()
    return replace(model.origin, config=told(model.origin.config), assets={**others, **assets})
