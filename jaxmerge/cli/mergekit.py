"""mergekit's form of a recipe, with mergekit's results: `merge_method`, `models` or `slices`, `tokenizer` and the rest.

What a parameter is for a tensor is decided as mergekit decides it: the model's own setting comes before the slice's and
that before the global one; in a setting the first filter that is part of the tensor's name wins; a gradient is
interpolated over the layers of a slice, and tensors outside the layers get its first value. Then the tensor gets the
method of ours that mergekit's method equals: trimming per tensor, task vectors weighted before the election, rescaling
by the L1 norm. Unlike mergekit, arithmetic is in float32 whatever the dtype, and entries that tie at a cut are all
kept.

Behaviour after mergekit 0.1.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxmerge.cli.nodes import Node, suggestion
from jaxmerge.cli.own_form import read_dtype
from jaxmerge.cli.recipe import Recipe, Slice, TokenizerSection, name_models
from jaxmerge.errors import RecipeError
from jaxmerge.methods.arcee_fusion import arcee_fusion
from jaxmerge.methods.averaging import linear, model_stock
from jaxmerge.methods.breadcrumbs import keep_middle
from jaxmerge.methods.choosing import passthrough
from jaxmerge.methods.dropping import drop, magprune
from jaxmerge.methods.interpolation import nearswap, slerp
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.sce import sce
from jaxmerge.methods.spherical import karcher, multislerp, nuslerp
from jaxmerge.methods.stages import Stage, chain
from jaxmerge.methods.task_arithmetic import scale, total, weigh
from jaxmerge.methods.ties import disjoint_mean, disjoint_sum, elect_sign, rescale, trim
from jaxmerge.trees.info import TensorInfo
from jaxmerge.trees.layers import renumbered
from jaxmerge.trees.vocabulary import TokenRule

KEYS = (
    *("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer", "tokenizer_source", "chat_template"),
)
NOT_YET = ("modules",)
REQUIRED = object()

Values = Mapping[str, Any]
"""Parameters of a method for one tensor; for those that belong to models a list, one value per expert."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One of mergekit's methods.

    Attributes:
        build: the method of ours with the given parameters.
        shared: its parameters that are the same for all models, with their defaults.
        per_model: its parameters that every model has, with their defaults.
        base: whether the base model is what the others are compared with (`"required"`, or `"optional"` where it may
            be missing), or one among them (`"ignored"`).
    """

    build: Callable[[Values], Method]
    shared: Values = dataclasses.field(default_factory=dict)
    per_model: Values = dataclasses.field(default_factory=dict)
    base: Literal["required", "optional", "ignored"] = "required"


def _task_vectors(
    sparsify: Callable[[Values], Stage] | None = None,
    *,
    consensus: bool,
    normalize: bool,
    rescaled: bool,
    **per_model: float,
) -> Form:
    """One of the task-vector methods, which in mergekit are one algorithm with a few switches."""

    def build(values: Values) -> Method:
        stages = [] if sparsify is None else [sparsify(values), *([rescale()] if values["rescale"] else [])]
        stages.append(weigh(values["weight"]))
        if consensus:
            stages += [elect_sign(), disjoint_mean() if values["normalize"] else disjoint_sum()]
        else:
            stages.append(total(normalize=values["normalize"]))
        return chain(*stages, scale(values["lambda"]))

    shared = {"normalize": normalize, "rescale": rescaled, "lambda": 1.0, "int8_mask": False}
    return Form(build, shared, {"weight": REQUIRED, "density": 1.0, **per_model})


def _trim(values: Values) -> Stage:
    return trim(values["density"], scope="tensor")


def _drop(values: Values) -> Stage:
    return drop(values["density"], restore=False)


def _keep_middle(values: Values) -> Stage:
    return keep_middle(values["density"], gamma=values["gamma"])


def _magprune(values: Values) -> Stage:
    return magprune(values["density"], epsilon=values["epsilon"], restore=False, axis=1)


def _fibres(values: Values) -> int | None:
    """What mergekit calls rows are columns: with `nuslerp_row_wise` a vector runs along the first axis."""
    if values["nuslerp_flatten"]:
        return None
    return 0 if values["nuslerp_row_wise"] else -1


FORMS = {
    "linear": Form(
        lambda values: linear(values["weight"], normalize=values["normalize"]),
        {"normalize": True},
        {"weight": REQUIRED},
        base="ignored",
    ),
    "slerp": Form(lambda values: slerp(values["t"]), {"t": REQUIRED}),
    "nearswap": Form(lambda values: nearswap(values["t"]), {"t": REQUIRED}),
    "nuslerp": Form(
        lambda values: nuslerp(values["weight"], axis=_fibres(values)),
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"weight": REQUIRED},
        base="optional",
    ),
    "multislerp": Form(
        lambda values: multislerp(values["weight"], normalize=values["normalize_weights"]),
        {"normalize_weights": True, "eps": 1e-8},
        {"weight": REQUIRED},
        base="optional",
    ),
    "karcher": Form(
        lambda values: karcher(iterations=int(values["max_iter"])), {"max_iter": 10, "tol": 1e-5}, base="ignored"
    ),
    "passthrough": Form(lambda values: passthrough(values["scale"][0]), {}, {"scale": 1.0}, base="ignored"),
    "arcee_fusion": Form(lambda values: arcee_fusion(axis=-1)),
    "sce": Form(lambda values: sce(values["select_topk"], min_energy=1e-6), {"select_topk": 1.0, "int8_mask": False}),
    "model_stock": Form(lambda values: model_stock(axis=-1 if values["filter_wise"] else None), {"filter_wise": False}),
    "task_arithmetic": _task_vectors(consensus=False, normalize=False, rescaled=False),
    "ties": _task_vectors(_trim, consensus=True, normalize=True, rescaled=False),
    "dare_linear": _task_vectors(_drop, consensus=False, normalize=False, rescaled=True),
    "dare_ties": _task_vectors(_drop, consensus=True, normalize=False, rescaled=True),
    "della": _task_vectors(_magprune, consensus=True, normalize=True, rescaled=True, epsilon=0.15),
    "della_linear": _task_vectors(_magprune, consensus=False, normalize=False, rescaled=True, epsilon=0.15),
    "breadcrumbs": _task_vectors(_keep_middle, consensus=False, normalize=False, rescaled=False, gamma=0.01),
    "breadcrumbs_ties": _task_vectors(_keep_middle, consensus=True, normalize=False, rescaled=False, gamma=0.01),
}
SWITCHES = (
    *("normalize", "rescale", "int8_mask", "filter_wise"),
    *("normalize_weights", "nuslerp_flatten", "nuslerp_row_wise"),
)
PARAMETERS = tuple(sorted({name for form in FORMS.values() for name in (*form.shared, *form.per_model)}))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a recipe says about a parameter in one place.

    Attributes:
        rules: filter (None: every tensor) and value, or the points of a gradient, in order.
    """

    rules: tuple[tuple[str | None, Any], ...]

    @property
    def varies(self) -> bool:
        """Whether it is not simply one value for every tensor."""
        return not (len(self.rules) == 1 and self.rules[0][0] is None and not isinstance(self.rules[0][1], list))

    def at(self, name: str, depth: float) -> Any:
        """The value for a tensor; None where nothing is said.

        Args:
            name: the tensor's name.
            depth: from 0 for the first layer to 1 for the last; 0 outside the layers.
        """
        for part, value in self.rules:
            if part is None or part in name:
                return _on_gradient(value, depth) if isinstance(value, list) else value
        return None


def _on_gradient(points: list[Any], depth: float) -> Any:
    if not points:
        return None
    place = depth * (len(points) - 1)
    low = int(place)
    if isinstance(points[0], bool):  # a switch cannot be half on
        return points[low]
    share = place - low
    return points[low] if share == 0 else (1 - share) * points[low] + share * points[low + 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """All that a recipe says about the parameters of its method, for one slice of the output.

    Attributes:
        node: the recipe or the slice, for messages.
        merge_method: mergekit's name of the method.
        form: the method.
        shared: settings for all models, those that come first first; each parameter → setting.
        of_models: the experts' own settings, in the experts' order, each parameter → setting.
        experts: paths of the experts.
        first: the number that the slice's first layer has in the output.
        count: the slice's number of layers; None: those of the model, from 0.
        starts: the number that the slice's first layer has in each expert.
    """

    node: Node
    merge_method: str
    form: Form
    shared: Sequence[Mapping[str, Setting]]
    of_models: Sequence[Mapping[str, Setting]]
    experts: Sequence[str]
    first: int = 0
    count: int | None = None
    starts: Sequence[int] = ()

    @property
    def vary(self) -> bool:
        """Whether tensors may get different parameters."""
        known = {*self.form.shared, *self.form.per_model}
        places = (*self.shared, *self.of_models)
        return any(setting.varies for place in places for name, setting in place.items() if name in known)

    def method(self, info: TensorInfo) -> Method:
        """The method for one tensor.

        Raises:
            RecipeError: a parameter has no value there, or one that is out of range.
        """
        depth, values = self._depth(info), {}
        for name, default in self.form.shared.items():
            values[name] = self._value(self.shared, name, default, info.name, depth, info, "")
        for name, default in self.form.per_model.items():
            values[name] = [
                self._value(
                    [own, *self.shared], name, default, self._name_in(i, info), depth, info, f" of model {path!r}"
                )
                for i, (path, own) in enumerate(zip(self.experts, self.of_models, strict=True))
            ]
        try:
            return self.form.build(values)
        except RecipeError as error:
            raise self._error(str(error), info) from None

    def _depth(self, info: TensorInfo) -> float:
        if info.layer is None:
            return 0.0
        count = info.num_layers if self.count is None else self.count
        return 1.0 if count == 1 else (info.layer - self.first) / (count - 1)

    def _name_in(self, expert: int, info: TensorInfo) -> str:
        """The tensor's name in an expert, which is what filters of parameters of models look at."""
        if info.layer is None or not self.starts:
            return info.name
        return renumbered(info.name, info.layer - self.first + self.starts[expert])

    def _value(
        self,
        places: Sequence[Mapping[str, Setting]],
        name: str,
        default: Any,
        tensor: str,
        depth: float,
        info: TensorInfo,
        of: str,
    ) -> Any:
        for settings in places:
            if name in settings and (value := settings[name].at(tensor, depth)) is not None:
                return value
        if default is REQUIRED:
            raise self._error(f"the parameter {name!r}{of} has no value; add one under 'parameters'", info)
        return default

    def _error(self, message: str, info: TensorInfo) -> RecipeError:
        return self.node.error(f"tensor {info.name!r}: {message}" if info.name else message)


@pytree
class ByTensor(Method):
    """A method of mergekit's whose parameters have filters or gradients: other parameters for other tensors."""

    settings: Settings = static(None)

    def check(self, experts: tuple[str, ...], has_base: bool, tensors: Sequence[str]) -> None:
        for name in tensors[:1]:
            self.for_tensor(TensorInfo(name, ())).check(experts, has_base, tensors)

    def for_tensor(self, info: TensorInfo) -> Method:
        return self.settings.method(info)

    def __repr__(self) -> str:
        return f"{self.settings.merge_method}(parameters by tensor)"


def read_mergekit(root: Node) -> Recipe:
    """Reads a recipe in mergekit's form.

    Raises:
        RecipeError: it is not one that can work, or asks for what is not supported; the message points at the line.
    """
    for key, node in root.entries().items():
        if key in NOT_YET:
            raise node.error(f"{key!r} of mergekit is not supported yet; supported are {', '.join(KEYS)}")
    entries = root.entries(KEYS)
    if "merge_method" not in entries:
        raise root.error("the recipe has no 'merge_method'")
    if "models" not in entries and "slices" not in entries:
        raise root.error("the recipe has no 'models' and no 'slices'")
    if "models" in entries and "slices" in entries:
        raise entries["slices"].error("the recipe has 'models' and 'slices'; mergekit takes one of them")
    name = entries["merge_method"].text()
    if name not in FORMS:
        raise entries["merge_method"].error(f"unknown merge_method {name!r}{suggestion(name, list(FORMS))}")
    base = entries["base_model"].text() if "base_model" in entries else None
    everywhere = _settings(entries["parameters"]) if "parameters" in entries else {}
    reader = _slices if "slices" in entries else _models
    slices, paths = reader(root, entries, name, base, everywhere)
    tokenizer = _tokenizer(entries, paths, base)
    chat_template = _chat_template(entries["chat_template"]) if "chat_template" in entries else None
    dtype = next((read_dtype(entries[key]) for key in ("out_dtype", "dtype") if key in entries), None)
    relative = base if FORMS[name].base != "ignored" else None
    whole = "slices" not in entries
    return Recipe(
        source=root.source,
        method=slices[0].method,
        experts=name_models([path for path in paths if not (whole and path == relative)]),
        base=relative,
        dtype=dtype,
        slices=() if whole else tuple(slices),
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


def _models(
    root: Node, entries: Mapping[str, Node], name: str, base: str | None, everywhere: Mapping[str, Setting]
) -> tuple[list[Slice], list[str]]:
    """The whole output as one slice, and the paths of all models."""
    form = FORMS[name]
    models: dict[str, Mapping[str, Setting]] = {}
    for node in entries["models"].items():
        model = node.entries(("model", "parameters"))
        path = _new_path(node, model, models)
        models[path] = _settings(model["parameters"]) if "parameters" in model else {}
    if form.base == "required" and base is None:
        raise root.error(f"{name} compares models with a base; add 'base_model'")
    if form.base == "ignored" and base is not None:
        # One model among others, and an expert even if it is not listed. First, since the first gives the side files.
        models = {base: models.pop(base, {}), **models}
    if form.base != "ignored" and base is not None:
        models.pop(base, None)  # its parameters mean nothing then
    if not models:
        raise entries["models"].error("there are no models to merge; give at least one besides the base")
    settings = Settings(root, name, form, [everywhere], list(models.values()), list(models))
    relative = base if form.base != "ignored" else None
    paths = [*models, *([] if relative is None else [relative])]
    return [Slice(_method(settings), dict.fromkeys(paths), relative)], paths


def _slices(
    root: Node, entries: Mapping[str, Node], name: str, base: str | None, everywhere: Mapping[str, Setting]
) -> tuple[list[Slice], list[str]]:
    """The slices of the output, and the paths of all models; the first gives the side files."""
    form = FORMS[name]
    slices: list[Slice] = []
    first = 0
    for node in entries["slices"].items():
        entry = node.entries(("sources", "base_model", "parameters"))
        if "sources" not in entry:
            raise node.error("this slice has no 'sources'")
        slice_base = entry["base_model"].text() if "base_model" in entry else base
        ranges: dict[str, tuple[int, int] | None] = {}
        own: dict[str, Mapping[str, Setting]] = {}
        count: int | None = None
        for source_node in entry["sources"].items():
            source = source_node.entries(("model", "layer_range", "parameters"))
            path = _new_path(source_node, source, own)
            start, stop = _layer_range(source_node, source)
            if count is not None and count != stop - start:
                raise source_node.error(
                    f"found {stop - start} layers, expected {count} as in the slice's other sources"
                )
            count, ranges[path] = stop - start, (start, stop)
            own[path] = _settings(source["parameters"]) if "parameters" in source else {}
        relative = None if form.base == "ignored" else slice_base
        if relative is None and form.base == "required":
            raise node.error(f"{name} compares models with a base; add 'base_model'")
        if relative is not None and relative not in own:
            raise node.error(f"the base {relative!r} is not among the slice's sources; add it with its layer_range")
        experts = [path for path in own if path != relative]
        if count is None or not experts:
            raise node.error("there are no models to merge; give at least one besides the base")
        of_slice = _settings(entry["parameters"]) if "parameters" in entry else {}
        starts = [span[0] for path in experts if (span := ranges[path]) is not None]
        settings = Settings(
            node, name, form, [of_slice, everywhere], [own[path] for path in experts], experts, first, count, starts
        )
        slices.append(Slice(_method(settings), ranges, relative))
        first += count
    if not slices:
        raise entries["slices"].error("there are no slices; give at least one")
    found = ([] if base is None else [base]) + [path for part in slices for path in part.layers]
    return slices, list(dict.fromkeys(found))


def _method(settings: Settings) -> Method:
    return ByTensor(settings) if settings.vary else settings.method(TensorInfo("", ()))


def _new_path(node: Node, entry: Mapping[str, Node], known: Mapping[str, Any]) -> str:
    if "model" not in entry:
        raise node.error("this entry has no 'model'; give a path or URL")
    path = entry["model"].text()
    if path in known:
        raise entry["model"].error(f"the model {path!r} is there twice; remove one")
    return path


def _layer_range(node: Node, source: Mapping[str, Node]) -> tuple[int, int]:
    if "layer_range" not in source:
        raise node.error("this source has no 'layer_range'; give [start, stop]")
    ends = source["layer_range"]
    numbers = [_whole(item) for item in ends.items()]
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise ends.error(f"the layer_range is {numbers}, expected [start, stop] with 0 <= start < stop")
    return numbers[0], numbers[1]


def _whole(node: Node) -> int:
    number = node.number()
    if number != int(number):
        raise node.error(f"found {node}, expected a whole number")
    return int(number)


def _tokenizer(entries: Mapping[str, Node], paths: Sequence[str], base: str | None) -> TokenizerSection | None:
    """What the recipe says about the vocabulary of the output."""
    if "tokenizer" in entries and "tokenizer_source" in entries:
        raise entries["tokenizer_source"].error("'tokenizer' and 'tokenizer_source' say the same; remove one")
    if "tokenizer_source" in entries:
        source = entries["tokenizer_source"]
        return None if source.value is None else TokenizerSection(_tokenizer_source(source, paths, base), base=base)
    if "tokenizer" not in entries or entries["tokenizer"].value is None:
        return None
    section = entries["tokenizer"].entries(("source", "tokens", "pad_to_multiple_of"))
    pad = section.get("pad_to_multiple_of")
    if pad is not None and pad.value is not None and not 1 <= _whole(pad) <= 1 << 20:
        raise pad.error(f"found {pad}, expected a whole number from 1 to {1 << 20}")
    tokens = section.get("tokens")
    return TokenizerSection(
        source=_tokenizer_source(section["source"], paths, base) if "source" in section else "union",
        tokens={}
        if tokens is None or tokens.value is None
        else {token: _token_rule(node, paths) for token, node in tokens.entries().items()},
        pad_to_multiple_of=None if pad is None or pad.value is None else _whole(pad),
        base=base,
    )


def _tokenizer_source(node: Node, paths: Sequence[str], base: str | None) -> str:
    source = node.text()
    if source == "base" and base is None:
        raise node.error("there is no base_model whose tokenizer could be taken; name a model instead")
    return source if source in ("union", "base") else _known(node, source, paths)


def _token_rule(node: Node, paths: Sequence[str]) -> TokenRule:
    entry = node.entries(("source", "force"))
    force = entry.get("force")
    if force is not None and force.value not in (True, False):
        raise force.error(f"found {force}, expected true or false")
    forced = bool(force is not None and force.value)
    source = entry.get("source")
    if source is None or source.value is None:
        return TokenRule(force=forced)
    if isinstance(source.value, str):
        return TokenRule(model=_known(source, source.text(), paths), force=forced)
    kind = source.entries(("kind", "model", "token", "token_id"))
    if "kind" not in kind or kind["kind"].value not in ("zero", "model_token"):
        raise source.error("a source is the path of a model, or has the kind 'zero' or 'model_token'")
    if kind["kind"].value == "zero":
        return TokenRule(zero=True, force=forced)
    if "model" not in kind or ("token" in kind) == ("token_id" in kind):
        raise source.error("a source of kind 'model_token' needs a 'model', and a 'token' or a 'token_id'")
    token = kind["token"].text() if "token" in kind else _whole(kind["token_id"])
    return TokenRule(model=_known(kind["model"], kind["model"].text(), paths), token=token, force=forced)


def _known(node: Node, path: str, paths: Sequence[str]) -> str:
    if path not in paths:
        raise node.error(f"the model {path!r} takes no part in this merge{suggestion(path, paths)}")
    return path


def _chat_template(node: Node) -> str | None:
    if node.value is None:
        return None
    if node.text() != "auto" and "{" not in node.value:
        raise node.error(
            f"'chat_template' by name ({node.value!r:.40}) is not supported; give the template itself, or 'auto'"
        )
    return node.value


def _settings(node: Node) -> dict[str, Setting]:
    """Settings by parameter. Those that another method has are let pass, as mergekit does; others are errors."""
    if node.value is None:
        return {}
    return {name: _setting(value, name in SWITCHES) for name, value in node.entries(PARAMETERS).items()}


def _setting(node: Node, switch: bool) -> Setting:
    if isinstance(node.value, dict):
        return Setting((_rule(node, switch),))
    if isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value):
        return Setting(tuple(_rule(item, switch) for item in node.value))
    return Setting(((None, _scalar_or_gradient(node, switch)),))


def _rule(node: Node, switch: bool) -> tuple[str | None, Any]:
    entries = node.entries(("filter", "value"))
    if "value" not in entries:
        raise node.error("a filter needs a 'value'")
    part = entries["filter"].text() if "filter" in entries and entries["filter"].value is not None else "*"
    return None if part == "*" else part, _scalar_or_gradient(entries["value"], switch)


def _scalar_or_gradient(node: Node, switch: bool) -> Any:
    return [_scalar(item, switch) for item in node.value] if isinstance(node.value, list) else _scalar(node, switch)


def _scalar(node: Node, switch: bool) -> float | bool:
    if not switch:
        return node.number()
    if node.value not in (True, False):
        raise node.error(f"found {node}, expected true or false")
    return bool(node.value)
