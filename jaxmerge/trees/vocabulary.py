"""Vocabularies: models with different tokenizers get embedding tables over one vocabulary, matched by token.

What is done where a model lacks a token follows mergekit: the base's row, or else the mean over the models that have
the token; rules for single tokens come first. Tables of lazy tensors stay lazy: rows are read when they are asked for.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from jaxmerge.errors import CheckpointError, DTypeError, RecipeError, ShapeError
from jaxmerge.trees.lazy import ArrayTensor, Box, LazyTensor
from jaxmerge.trees.paths import Params, match_rules, named_leaves, with_leaves

MAX_FILE_BYTES = 1 << 28
"""The longest tokenizer.json that is read."""
MAX_TOKENS = 1 << 24
"""The first id that is too large to be a token's."""

TABLES = {
    r"(.*\.)?(embed_tokens|word_embeddings|tok_embeddings|wte|embed_in|shared)\.weight": 0,
    r"(.*\.)?(lm_head|embed_out)\.(weight|bias)": 0,
    r"(.*/)?(embed_tokens|token_embed\w*|word_embeddings|wte|embed|embedder|shared)/(input_)?embedding": 0,
    r"(.*/)?lm_head/kernel": -1,
    r"(.*/)?lm_head/bias": 0,
}
"""Names of tables with one row per token, and the axis of the tokens: Hugging Face names, then Flax's."""

_AGAIN = "it is corrupt, or no tokenizer: download it again"
_ZERO, _MEAN, _FILLER = -1, -2, -3  # rows that are not one row of one table


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Which token has which id. `read_vocabulary` makes one.

    Attributes:
        ids: token → id.
        added: the entries of tokens that were added to the tokenizer's own, such as `<|im_end|>`, as its file has them.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """The largest id plus 1: how many rows a table needs."""
        return max(self.ids.values(), default=-1) + 1

    def within(self, rows: int) -> Vocabulary:
        """The vocabulary without the added tokens whose ids lie beyond a table of so many rows.

        Raises:
            ShapeError: a token that was not added lies beyond it.
        """
        beyond = {token for token, i in self.ids.items() if i >= rows}
        for token in beyond - self.added.keys():
            raise ShapeError(
                f"the token {token!r:.80} has id {self.ids[token]}, and the embedding table has {rows} rows; "
                "the tokenizer does not belong to these weights"
            )
        return Vocabulary(
            {token: i for token, i in self.ids.items() if token not in beyond},
            {token: entry for token, entry in self.added.items() if token not in beyond},
        )

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.ids)} tokens, {len(self.added)} of them added, ids below {self.size})"


@dataclasses.dataclass(frozen=True)
class TokenRule:
    """Where the row of a token comes from in models that lack it.

    Attributes:
        model: the model whose row is taken; None leaves it to the general rule.
        token: the token (or id) of that model whose row is taken; None for the same token.
        zero: the row is zero.
        force: models that have the token get the row too.
    """

    model: str | None = None
    token: str | int | None = None
    zero: bool = False
    force: bool = False

    def __post_init__(self):
        if self.zero and (self.model is not None or self.token is not None):
            raise RecipeError(f"{self!r}: the row is zero, or comes from a model, not both")
        if self.token is not None and self.model is None:
            raise RecipeError(f"{self!r}: say of which model with model=")


def read_vocabulary(tokenizer: str | Path | bytes) -> Vocabulary:
    """Reads the vocabulary of a tokenizer.json (BPE, WordPiece, WordLevel or Unigram, with added tokens).

    Args:
        tokenizer: the file, the folder that it is in, or its contents.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or no tokenizer; a token has two ids or an id two tokens.
    """
    return vocabulary_of(load_tokenizer(tokenizer), _what(tokenizer))


def load_tokenizer(tokenizer: str | Path | bytes) -> dict[str, Any]:
    """The JSON of a tokenizer.json.

    Raises:
        CheckpointError: it cannot be read, is too long or is no JSON object.
    """
    what = _what(tokenizer)
    if not isinstance(tokenizer, bytes):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            with path.open("rb") as file:
                tokenizer = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointError(
                f"{what}: the tokenizer cannot be read: {reason}; a model whose vocabulary is to be matched needs a "
                "tokenizer.json"
            ) from None
    if len(tokenizer) > MAX_FILE_BYTES:
        raise CheckpointError(f"{what} is longer than {MAX_FILE_BYTES} bytes; {_AGAIN}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise CheckpointError(f"{what} has the name {name!r:.80} twice; {_AGAIN}")
            result[name] = value
        return result

    try:
        value = json.loads(tokenizer.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {error!s:.200}; {_AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is no JSON object but a {type(value).__name__}; {_AGAIN}")
    return value


def vocabulary_of(tokenizer: Mapping[str, Any], what: str = "the tokenizer") -> Vocabulary:
    """The vocabulary in the JSON of a tokenizer.json; `what` is its name in messages.

    Raises:
        CheckpointError: it is no tokenizer; a token has two ids or an id two tokens.
    """
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: pieces with their scores, and the position is the id
        if not all(isinstance(piece, list) and piece and isinstance(piece[0], str) for piece in vocab):
            raise CheckpointError(f"{what}: model.vocab must be a list of [token, score]; {_AGAIN}")
        pairs = [(piece[0], i) for i, piece in enumerate(vocab)]
    elif isinstance(vocab, dict):
        pairs = list(vocab.items())
    else:
        raise CheckpointError(f"{what}: model.vocab must map tokens to ids, or list them; {_AGAIN}")
    entries = tokenizer.get("added_tokens") or []
    if not (isinstance(entries, list) and all(_is_entry(entry) for entry in entries)):
        raise CheckpointError(f"{what}: added_tokens must be a list of entries with content and id; {_AGAIN}")
    ids: dict[str, int] = {}
    tokens: dict[int, str] = {}
    for token, i in [*pairs, *((entry["content"], entry["id"]) for entry in entries)]:
        if type(i) is not int or not 0 <= i < MAX_TOKENS:
            raise CheckpointError(f"{what}: the token {token!r:.80} has the id {i!r:.80}, which cannot be; {_AGAIN}")
        if ids.setdefault(token, i) != i:
            raise CheckpointError(f"{what}: the token {token!r:.80} has the ids {ids[token]} and {i}; {_AGAIN}")
        if tokens.setdefault(i, token) != token:
            raise CheckpointError(f"{what}: the id {i} has the tokens {tokens[i]!r:.80} and {token!r:.80}; {_AGAIN}")
    return Vocabulary(ids, {entry["content"]: entry for entry in entries})


def merge_vocabularies(
    vocabularies: Mapping[str, Vocabulary],
    source: str = "union",
    *,
    base: str | None = None,
    extra: Iterable[str] = (),
) -> Vocabulary:
    """The vocabulary that models are to have in common.

    Args:
        vocabularies: model name → its vocabulary.
        source: `"union"`: the base's tokens with their ids (the first model's without a base), then what the others
            have besides, in their order and by id, added tokens last; `"base"`: the base's; or a model's name.
        base: name of the base.
        extra: further tokens, which are added at the end unless they are there.

    Raises:
        RecipeError: there is no model of that name, or no base.
    """
    leading = base if source in ("union", "base") else source
    if leading is None:
        if source == "base":
            raise RecipeError("the vocabulary of the base was asked for, and there is no base; name a model instead")
        leading = next(iter(vocabularies), None)
    if leading is None or leading not in vocabularies:
        raise RecipeError(f"there is no vocabulary of a model {leading!r}; there are {', '.join(vocabularies)}")
    start = vocabularies[leading]
    ids, added, size = dict(start.ids), dict(start.added), start.size
    wanted: list[tuple[str, Mapping[str, Any] | None]] = []
    if source == "union":
        ordered = [(t, v.added.get(t)) for v in vocabularies.values() for t in sorted(v.ids, key=v.ids.__getitem__)]
        wanted = sorted(ordered, key=lambda pair: pair[1] is not None)
    for token, entry in [*wanted, *((token, None) for token in extra)]:
        if token not in ids:
            ids[token] = size
            added[token] = {**(entry or _plain_entry(token)), "id": size}
            size += 1
    return Vocabulary(ids, added)


def tokenizer_with(tokenizer: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The JSON of a tokenizer.json with a vocabulary's added tokens in place of its own.

    Args:
        tokenizer: the JSON of the model's whose tokens the vocabulary starts with.
        vocabulary: made from it by `merge_vocabularies`. Tokens that other models had of their own become added
            tokens, which are found in a text as they are spelled.
    """
    entries = sorted(vocabulary.added.values(), key=lambda entry: entry["id"])
    model = tokenizer["model"]
    dropped = {entry["content"] for entry in tokenizer.get("added_tokens") or []} - vocabulary.ids.keys()
    if isinstance(model["vocab"], dict) and dropped & model["vocab"].keys():
        model = {**model, "vocab": {token: i for token, i in model["vocab"].items() if token not in dropped}}
    return {**tokenizer, "model": model, "added_tokens": [dict(entry) for entry in entries]}


def align_vocabularies(
    models: Mapping[str, Params],
    vocabularies: Mapping[str, Vocabulary],
    vocabulary: Vocabulary,
    *,
    base: str | None = None,
    tokens: Mapping[str, TokenRule] | None = None,
    pad_to_multiple_of: int | None = None,
    tables: Mapping[str, int] | None = None,
) -> dict[str, Params]:
    """Every model with embedding tables (and heads) over one vocabulary, so that their shapes agree.

    A token's row is the model's own. In models that lack the token it is what the token's rule says; else the row of
    the only model that has it; the base's; or the mean over the models that have it. A token that no model has is zero.
    Rows that belong to no token (gaps between ids, and padding) are the mean of the others.

    Args:
        models: name → parameters. Lazy tables stay lazy; tables in memory are made anew.
        vocabularies: name → the model's vocabulary.
        vocabulary: the one that they get, such as `merge_vocabularies` makes.
        base: name of the base among the models.
        tokens: token → its rule.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.
        tables: pattern of names → axis of the tokens; by default the usual names of embeddings and language-model
            heads.

    Returns:
        Name → parameters, each in its container.

    Raises:
        RecipeError: no table is found, or a rule names a model, a token or a pattern that does not exist.
        ShapeError: an id lies beyond a table, or tables differ in another axis.
        DTypeError: a table is no array of numbers.

    Source: the choice of rows is that of mergekit's `tokenizer` section, as of 0.1.5.
    """
    tokens = tokens or {}
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise RecipeError(f"pad_to_multiple_of is {pad_to_multiple_of}, expected 1 or more")
    for name in (*models, *(() if base is None else (base,))):
        if name not in vocabularies:
            raise RecipeError(f"the vocabulary of model {name!r} is not given; there are {', '.join(vocabularies)}")
    for token, rule in tokens.items():
        if token not in vocabulary.ids:
            raise RecipeError(f"there is a rule for the token {token!r:.80}, which is not in the vocabulary")
        if rule.model is not None and rule.model not in vocabularies:
            raise RecipeError(f"the rule for token {token!r:.80} names the model {rule.model!r}, which is not there")
    leaves = {model: named_leaves(params) for model, params in models.items()}
    axes = table_names(leaves.values(), tables)
    rows = vocabulary.size
    if pad_to_multiple_of is not None:
        rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
    made: dict[tuple[str, int], Any] = {}
    chosen: dict[tuple[str, ...], dict[str, tuple[Any, Any, Any]]] = {}
    for name, axis in axes.items():
        holders = tuple(model for model in models if name in leaves[model])
        if holders not in chosen:
            chosen[holders] = _choose_rows(holders, vocabularies, vocabulary, rows, base, tokens)
        sources = _tables(name, axis, {model: leaves[model][name] for model in holders}, vocabularies)
        for model in holders:
            leaf = leaves[model][name]
            if (model, id(leaf)) not in made:  # tied tables stay tied
                gathered = GatheredRows(sources, *chosen[holders][model], sources[holders.index(model)].dtype)
                made[model, id(leaf)] = _like(leaf, _moved(gathered, axis % len(leaf.shape), back=True))
            leaves[model][name] = made[model, id(leaf)]
    return {model: with_leaves(params, leaves[model]) for model, params in models.items()}


def table_names(
    models: Iterable[Mapping[str, Any]], tables: Mapping[str, int] | None = None, required: bool = True
) -> dict[str, int]:
    """The names of all tables with a row per token, and the axis of the tokens in each.

    Args:
        models: the leaves of each model, by name.
        tables: as for `align_vocabularies`.
        required: there must be one.

    Raises:
        RecipeError: there is none, or a pattern matches nothing.
    """
    names = list(dict.fromkeys(name for model in models for name in model))
    if tables is None:
        hits = {name: [axis for rule, axis in TABLES.items() if re.fullmatch(rule, name)] for name in names}
        found = {name: axes[0] for name, axes in hits.items() if axes}
    else:
        matched = match_rules(tables, names)
        found = {name: tables[rule] for name, rule in matched.items() if rule is not None}
    if required and not found:
        raise RecipeError(
            f"no embedding table is found among {len(names)} tensors ({', '.join(names[:3])}, …); "
            "name the tables with tables={pattern: axis of the tokens}"
        )
    return found


class GatheredRows(LazyTensor):
    """A table whose rows come from rows of tables.

    Attributes:
        tables: the tables, equal but for their number of rows.
        source: `[rows]`, for each row the number of its table; or -1 for zero, -2 for a mean, -3 for a filler, the mean
            of all rows that are no fillers.
        row: `[rows]`, its row there; for a mean its place in `means`.
        means: the rows of each mean, as (table, row).
    """

    def __init__(
        self,
        tables: Sequence[LazyTensor],
        source: Int[np.ndarray, " rows"],
        row: Int[np.ndarray, " rows"],
        means: Sequence[Sequence[tuple[int, int]]],
        dtype: np.dtype,
    ):
        self.tables, self.source_of, self.row_of, self.means = tables, source, row, means
        self.shape, self.dtype = (len(source), *tables[0].shape[1:]), dtype
        self.label = f"rows of {', '.join(table.label for table in tables)}"
        self._filler: Shaped[np.ndarray, "..."] | None = None
        self._lock = threading.Lock()

    def read(self, box: Box) -> Shaped[np.ndarray, "..."]:
        first, rest = box[0].start, box[1:]
        out = np.zeros([piece.stop - piece.start for piece in box], self.dtype)
        source, row = self.source_of[box[0]], self.row_of[box[0]]
        if not out.size:
            return out
        # A run of rows that follow each other in one table is read at once.
        follows = (source[1:] == source[:-1]) & ((row[1:] == row[:-1] + 1) | (source[1:] < 0)) & (source[1:] != _MEAN)
        starts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(source)]
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            table = int(source[start])
            if table >= 0:
                at = int(row[start])
                out[start:stop] = self.tables[table].read((slice(at, at + stop - start), *rest))
            elif table == _MEAN:
                parts = [(self.tables[t], i) for t, i in self.means[int(row[start])]]
                total = sum(t.read((slice(i, i + 1), *rest))[0].astype(np.float64) for t, i in parts)
                out[start] = np.asarray(total / len(parts)).astype(self.dtype)
            elif table == _FILLER:
                out[start:stop] = self._mean_of_all()[rest]
        assert first + len(source) <= self.shape[0]
        return out

    def _mean_of_all(self) -> Shaped[np.ndarray, "..."]:
        """The mean of all rows that are no fillers; read once."""
        with self._lock:
            filler = self._filler
            if filler is None:
                kept = np.flatnonzero(self.source_of != _FILLER)
                breaks = [0, *(np.flatnonzero(np.diff(kept) != 1) + 1).tolist(), len(kept)]
                whole = tuple(slice(0, n) for n in self.shape[1:])
                step = max(1, (1 << 20) // max(1, int(np.prod(self.shape[1:]))))
                total = np.zeros(self.shape[1:], np.float64)
                for start, stop in zip(breaks[:-1], breaks[1:], strict=True):
                    for at in range(start, stop, step):
                        rows = slice(int(kept[at]), int(kept[min(at + step, stop) - 1]) + 1)
                        total += self.read((rows, *whole)).astype(np.float64).sum(axis=0)
                self._filler = filler = np.asarray(total / max(1, len(kept))).astype(self.dtype)
            return filler


def _tables(
    name: str, axis: int, leaves: Mapping[str, Any], vocabularies: Mapping[str, Vocabulary]
) -> list[LazyTensor]:
    """The models' tables of one name, lazily and with the tokens along axis 0."""
    result: list[LazyTensor] = []
    for model, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise DTypeError(f"model {model!r}, tensor {name!r}: found {type(leaf).__name__}, expected an array")
        if not -len(leaf.shape) <= axis < len(leaf.shape):
            raise ShapeError(f"model {model!r}, tensor {name!r}: its shape {tuple(leaf.shape)} has no axis {axis}")
        lazy = leaf if isinstance(leaf, LazyTensor) else ArrayTensor(np.asarray(leaf), f"{model}, {name}")
        table = _moved(lazy, axis % lazy.ndim)
        size = vocabularies[model].size
        if size > table.shape[0]:
            raise ShapeError(
                f"model {model!r}, tensor {name!r}: found {table.shape[0]} rows, expected at least {size}, since its "
                f"vocabulary has ids up to {size - 1}; vocabulary.within(rows) leaves such added tokens out"
            )
        if result and table.shape[1:] != result[0].shape[1:]:
            raise ShapeError(
                f"model {model!r}, tensor {name!r}: found rows of shape {table.shape[1:]}, expected "
                f"{result[0].shape[1:]} as in model {next(iter(leaves))!r}; models of different width cannot be merged"
            )
        result.append(table)
    return result


def _choose_rows(
    models: tuple[str, ...],
    vocabularies: Mapping[str, Vocabulary],
    vocabulary: Vocabulary,
    rows: int,
    base: str | None,
    tokens: Mapping[str, TokenRule],
) -> dict[str, tuple[Any, Any, Any]]:
    """For each model what `GatheredRows` must know: sources, rows and means."""
    own = {model: np.full(rows, -1, np.int64) for model in models}
    for model in models:
        known = vocabularies[model].ids
        for token, i in vocabulary.ids.items():
            own[model][i] = known.get(token, -1)
    source, row = np.full(rows, _FILLER, np.int64), np.full(rows, -1, np.int64)
    means: list[list[tuple[int, int]]] = []
    forced = np.zeros(rows, bool)
    for token, i in vocabulary.ids.items():
        rule = tokens.get(token, TokenRule())
        forced[i] = rule.force
        having = [(m, int(own[model][i])) for m, model in enumerate(models) if own[model][i] >= 0]
        if rule.model is not None:
            source[i], row[i] = _row_of(token, rule, models, vocabularies)
        elif rule.zero or not having:
            source[i] = _ZERO
        elif len(having) == 1:
            source[i], row[i] = having[0]
        elif base in models and own[base][i] >= 0:
            source[i], row[i] = models.index(base), own[base][i]
        else:
            source[i], row[i] = _MEAN, len(means)
            means.append(having)
    return {
        model: (
            np.where((own[model] >= 0) & ~forced, m, source),
            np.where((own[model] >= 0) & ~forced, own[model], row),
            means,
        )
        for m, model in enumerate(models)
    }


def _row_of(
    token: str, rule: TokenRule, models: tuple[str, ...], vocabularies: Mapping[str, Vocabulary]
) -> tuple[int, int]:
    """Table and row that a rule names."""
    model, wanted = rule.model, token if rule.token is None else rule.token
    assert model is not None
    ids = vocabularies[model].ids
    at = wanted if isinstance(wanted, int) else ids.get(wanted)
    if model not in models or at is None or not 0 <= at < vocabularies[model].size:
        lacks = "which has no such table" if model not in models else "which has no such token"
        raise RecipeError(f"the rule for token {token!r:.80} takes {wanted!r:.80} of model {model!r}, {lacks}")
    return models.index(model), at


def _moved(table: LazyTensor, axis: int, back: bool = False) -> LazyTensor:
    """The table with the axis of the tokens first, or back in its place."""
    if axis == 0:
        return table
    order = [axis, *(i for i in range(table.ndim) if i != axis)]
    return table.transpose(*(np.argsort(order).tolist() if back else order))


def _like(leaf: Any, table: LazyTensor) -> Any:
    """The table as a leaf of the same kind."""
    if isinstance(leaf, LazyTensor):
        return table
    value = table[...]
    return jnp.array(value) if isinstance(leaf, jax.Array) else value


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and "id" in entry


def _plain_entry(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def _what(tokenizer: str | Path | bytes) -> str:
    return "tokenizer.json" if isinstance(tokenizer, bytes) else str(tokenizer)
