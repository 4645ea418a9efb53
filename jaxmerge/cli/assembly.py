"""Running recipes whose output is put together: slices of layers from several models, one vocabulary for all of them.

Everything is arranged lazily: each slice is a merge of its own, over lazy tensors under the names that they have in the
output, and what the slices give together is saved as any lazy tree is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmerge.checkpoints.base import Checkpoint, open_checkpoint
from jaxmerge.cli.recipe import Recipe, Slice
from jaxmerge.errors import CheckpointError, MergeError
from jaxmerge.methods.lazy import as_lazy
from jaxmerge.methods.merge import merge
from jaxmerge.streaming.plan import Plan, make_plan
from jaxmerge.streaming.report import StreamReport
from jaxmerge.streaming.saving import save_lazily
from jaxmerge.streaming.sizes import parse_bytes
from jaxmerge.trees.checks import cast, is_mergeable
from jaxmerge.trees.info import Rules
from jaxmerge.trees.layers import LayeredParams
from jaxmerge.trees.paths import named_leaves
from jaxmerge.trees.vocabulary import (
    Vocabulary,
    align_vocabularies,
    load_tokenizer,
    merge_vocabularies,
    table_names,
    tokenizer_with,
    vocabulary_of,
)

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What the number of layers is called in a config.json."""

SideFiles = Mapping[str, Path | bytes]

_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\..*|"
    r".*\.(model|tiktoken))"
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_BEFORE_LAYERS = re.compile(r"(.*[./])?(\w*embed(?!_out)\w*|wte|wpe|shared)([./].*)?")


@dataclass(frozen=True)
class Assembly:
    """A recipe's output before it is saved.

    Attributes:
        params: lazily merged tensors by name.
        sources: the opened checkpoints by name.
        metadata: of the output.
        side_files: what goes beside the tensors in a folder.
    """

    params: dict[str, Any]
    sources: dict[str, Checkpoint]
    metadata: dict[str, str]
    side_files: dict[str, Path | bytes]


def assemble_to(
    recipe: Recipe, out: str | Path, *, memory_budget: int | str, overwrite: bool, progress: bool | None
) -> StreamReport:
    """Runs a recipe; arguments, result and errors are those of `Recipe.run`."""
    with assembled(recipe) as made:
        return save_lazily(
            made.params,
            out,
            metadata=made.metadata,
            side_files=None if Path(out).suffix in (".safetensors", ".npz") else made.side_files,
            memory_budget=memory_budget,
            overwrite=overwrite,
            progress=progress,
            sources=made.sources,
        )


def plan_assembly(recipe: Recipe, *, memory_budget: int | str) -> Plan:
    """Plans a recipe; arguments, result and errors are those of `Recipe.plan`."""
    with assembled(recipe) as made:
        once = {id(leaf): (name, leaf) for name, leaf in made.params.items()}
        tensors = {name: as_lazy(leaf) for name, leaf in once.values()}
        return make_plan(tensors, parse_bytes(memory_budget, "memory_budget"))


@contextlib.contextmanager
def assembled(recipe: Recipe) -> Iterator[Assembly]:
    """The output of a recipe while its checkpoints are open. No tensor has been read yet.

    Raises:
        MergeError: the models do not go together in the way that the recipe says.
    """
    names = {path: name for name, path in recipe.experts.items()}
    if recipe.base is not None:
        names.setdefault(recipe.base, "the base")
    paths = list(names) if recipe.base is None else [recipe.base, *(path for path in names if path != recipe.base)]
    everything: dict[str, tuple[int, int] | None] = {path: None for path in paths}
    slices = recipe.slices or (Slice(recipe.method, everything, recipe.base),)
    with contextlib.ExitStack() as opened:
        checkpoints = {path: opened.enter_context(open_checkpoint(path)) for path in paths}
        trees = {path: named_leaves(checkpoint.params) for path, checkpoint in checkpoints.items()}
        if recipe.dtype is not None and _other_dtypes(trees, recipe.dtype):
            wide = "float64" if recipe.dtype == "float64" else "float32"
            trees = {path: cast(tree, wide) for path, tree in trees.items()}
        side_files = functools.cache(lambda path: checkpoints[path].side_files)  # behind a URL they are fetched
        tokens = None if recipe.tokenizer is None else _Tokens(recipe, paths, side_files, trees)
        params: dict[str, Any] = {}
        layer_rules = Rules(layer=recipe.rules.layer)
        for part, tensors in zip(slices, _of_slices(slices, trees, layer_rules), strict=True):
            params |= _merged(recipe, part, tensors if tokens is None else tokens.align(tensors, part), names)
        if recipe.dtype is not None:
            params = cast(params, recipe.dtype)
        yield Assembly(
            params,
            {names[path]: checkpoint for path, checkpoint in checkpoints.items()},
            checkpoints[paths[0]].metadata,
            _side_files(recipe, paths, side_files, tokens),
        )


def _of_slices(
    slices: Sequence[Slice], trees: Mapping[str, Mapping[str, Any]], rules: Rules
) -> Iterator[dict[str, dict[str, Any]]]:
    """For each slice the tensors of each model by their names in the output."""
    layered: dict[str, LayeredParams] = {}
    first = 0
    for i, part in enumerate(slices):
        tensors: dict[str, dict[str, Any]] = {}
        count = 0
        for path, layers in part.layers.items():
            if layers is None:
                tensors[path] = dict(trees[path])
                continue
            if path not in layered:
                layered[path] = LayeredParams(trees[path], rules, f"model {path!r}")
            model = layered[path]
            numbers = model.numbers(layers)
            count = len(numbers)
            tensors[path] = {name: leaf for name, (_, leaf) in model.numbered(numbers, first).items()}
            for name, leaf in model.outside.items():
                before = _BEFORE_LAYERS.fullmatch(name) is not None
                if i == 0 if before else i == len(slices) - 1:
                    tensors[path][name] = leaf
        first += count
        yield tensors


def _merged(
    recipe: Recipe, part: Slice, tensors: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, Any]:
    experts = {names[path]: dict(tree) for path, tree in tensors.items() if path != part.base}
    base = None if part.base is None else dict(tensors[part.base])
    return merge(part.method, experts, base=base, key=recipe.seed, rules=recipe.rules)


def _other_dtypes(trees: Mapping[str, Mapping[str, Any]], dtype: str) -> bool:
    leaves = [leaf for tree in trees.values() for leaf in tree.values()]
    return any(is_mergeable(leaf) and leaf.dtype.name != dtype for leaf in leaves)


class _Tokens:
    """The vocabularies of a recipe's models, and the one of its output.

    Attributes:
        donor: path of the model that gives the tokenizer's files.
        tokenizer: the tokenizer.json of the output.
        vocabulary: the vocabulary of the output.
        own: path → the model's vocabulary.
        rows: how many rows the tables of the output have.
    """

    def __init__(
        self,
        recipe: Recipe,
        paths: Sequence[str],
        side_files: Callable[[str], SideFiles],
        trees: Mapping[str, Mapping[str, Any]],
    ):
        section = recipe.tokenizer
        assert section is not None
        self._section, self.own = section, {}
        raw = {path: _tokenizer_json(path, side_files(path)) for path in paths}
        for path, tokenizer in raw.items():
            rows = [trees[path][name].shape[axis] for name, axis in table_names([trees[path]]).items()]
            self.own[path] = vocabulary_of(tokenizer, f"{path}/tokenizer.json").within(min(rows))
        first = paths[0]
        self.donor = first if section.source in ("union", "base") else section.source
        self.vocabulary: Vocabulary = merge_vocabularies(self.own, section.source, base=first, extra=section.tokens)
        self.tokenizer = tokenizer_with(raw[self.donor], self.vocabulary)
        multiple = section.pad_to_multiple_of or 1
        self.rows = -(-self.vocabulary.size // multiple) * multiple

    def align(self, tensors: Mapping[str, Mapping[str, Any]], part: Slice) -> Mapping[str, Mapping[str, Any]]:
        """The tensors of a slice with tables over the output's vocabulary, if there are any among them."""
        if not table_names(tensors.values(), required=False):
            return tensors
        return align_vocabularies(
            dict(tensors),
            self.own,
            self.vocabulary,
            base=part.base or self._section.base,
            tokens=self._section.tokens,
            pad_to_multiple_of=self._section.pad_to_multiple_of,
        )

    def moved(self, path: str) -> dict[int, int]:
        """Old id → new id of a model's tokens."""
        return {i: self.vocabulary.ids[t] for t, i in self.own[path].ids.items() if t in self.vocabulary.ids}


def _tokenizer_json(path: str, side_files: SideFiles) -> dict[str, Any]:
    file = side_files.get("tokenizer.json")
    if file is None:
        raise CheckpointError(
            f"{path}: found no tokenizer.json, expected one, since the recipe matches vocabularies; "
            "copy the model's tokenizer.json into its folder"
        )
    return load_tokenizer(file)


def _side_files(
    recipe: Recipe, paths: Sequence[str], side_files: Callable[[str], SideFiles], tokens: _Tokens | None
) -> dict[str, Path | bytes]:
    """The first model's side files; what they tell about layers, dtype, tokens and template is brought up to date."""
    files = dict(side_files(paths[0]))
    if tokens is not None:
        donor = side_files(tokens.donor)
        files = {name: file for name, file in files.items() if not _TOKENIZER_FILES.fullmatch(name)}
        files |= {name: file for name, file in donor.items() if _TOKENIZER_FILES.fullmatch(name)}
        files["tokenizer.json"] = json.dumps(tokens.tokenizer, ensure_ascii=False).encode()
        added = {str(entry["id"]): entry for entry in tokens.vocabulary.added.values()}
        for name, entry in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", None)):
            told = _json_of(files.get(name))
            if entry is None and told is not None:
                files[name] = _json_bytes({entry["content"]: entry["id"] for entry in added.values()})
            elif told is not None and entry in told:
                plain = {i: {k: v for k, v in e.items() if k != "id"} for i, e in added.items()}
                files[name] = _json_bytes({**told, entry: plain})
    for name in ("config.json", "generation_config.json"):
        told = _json_of(files.get(name))
        if told is not None and (changed := _told_anew(told, recipe, paths[0], tokens)) != told:
            files[name] = _json_bytes(changed)
    template = recipe.chat_template
    if template == "auto":
        template = _most_frequent_template([side_files(path) for path in paths])
    if template is not None:
        config = _json_of(files.get("tokenizer_config.json")) or {}
        files["tokenizer_config.json"] = _json_bytes({**config, "chat_template": template})
        files.pop("chat_template.jinja", None)
    return files


def _told_anew(told: dict[str, Any], recipe: Recipe, path: str, tokens: _Tokens | None) -> dict[str, Any]:
    """A config.json with what has changed; in nested ones, that of the text model too."""
    new = dict(told)
    if recipe.dtype is not None:
        new |= {key: recipe.dtype for key in ("dtype", "torch_dtype") if key in told}
    numbers = _source_layers(recipe.slices)
    if numbers is not None:
        new |= {key: len(numbers) for key in COUNT_KEYS if type(told.get(key)) is int}
        kinds = told.get("layer_types")  # some models list the kind of attention of every layer
        if isinstance(kinds, list) and max(numbers) < len(kinds):
            new["layer_types"] = [kinds[number] for number in numbers]
    if tokens is not None:
        if type(told.get("vocab_size")) is int:
            new["vocab_size"] = tokens.rows
        moved = tokens.moved(path)
        for key in _TOKEN_IDS:
            ids = told.get(key)
            if isinstance(ids, list):
                new[key] = [moved.get(i, i) if type(i) is int else i for i in ids]
            elif type(ids) is int:
                new[key] = moved.get(ids, ids)
    if isinstance(told.get("text_config"), dict):
        new["text_config"] = _told_anew(told["text_config"], recipe, path, tokens)
    return new


def _source_layers(slices: Sequence[Slice]) -> list[int] | None:
    """For each layer of the output its number in the first of its sources."""
    if not slices:
        return None
    first = [next(iter(part.layers.values())) for part in slices]
    return [number for layers in first if layers is not None for number in range(*layers)]


def _most_frequent_template(models: Sequence[SideFiles]) -> str | None:
    """The chat template that most models have; the first of those that are equally frequent."""
    found = []
    for files in models:
        jinja = files.get("chat_template.jinja")
        if jinja is not None:
            found.append((jinja if isinstance(jinja, bytes) else jinja.read_bytes()).decode(errors="replace").strip())
        elif isinstance(text := (_json_of(files.get("tokenizer_config.json")) or {}).get("chat_template"), str):
            found.append(text.strip())
    return Counter(found).most_common(1)[0][0] if found else None


def _json_of(file: Path | bytes | None) -> dict[str, Any] | None:
    """A side file's JSON object; None if there is none, or what is in it cannot be understood (it is then copied)."""
    if file is None:
        return None
    with contextlib.suppress(MergeError, ValueError, OSError):
        value = json.loads(file if isinstance(file, bytes) else file.read_bytes())
        return value if isinstance(value, dict) else None
    return None


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
