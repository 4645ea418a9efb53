"""mergekit's form of a recipe (`merge_method`, `models`, `base_model`, `parameters`, `dtype`), with mergekit's results.

What a parameter is for a tensor is decided as mergekit decides it: the model's own setting comes before the global one;
in a setting the first filter that is part of the tensor's name wins; a gradient is interpolated over the layers, and
tensors outside the layers get its first value. Then the tensor gets the method of ours that mergekit's method equals:
trimming per tensor, task vectors weighted before the election, rescaling by the L1 norm. Unlike mergekit, arithmetic is
in float32 whatever the dtype, and entries that tie at a cut are all kept.

Behaviour after mergekit 0.1.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmerge.cli.nodes import Node, suggestion
from jaxmerge.cli.own_form import read_dtype
from jaxmerge.cli.recipe import Recipe, name_models
from jaxmerge.errors import RecipeError
from jaxmerge.methods.averaging import linear, model_stock
from jaxmerge.methods.breadcrumbs import keep_middle
from jaxmerge.methods.choosing import passthrough
from jaxmerge.methods.dropping import drop, magprune
from jaxmerge.methods.interpolation import nearswap, slerp
from jaxmerge.methods.method import Method, pytree, static
from jaxmerge.methods.stages import Stage, chain
from jaxmerge.methods.task_arithmetic import scale, total, weigh
from jaxmerge.methods.ties import disjoint_mean, disjoint_sum, elect_sign, rescale, trim
from jaxmerge.trees.info import TensorInfo

KEYS = ("merge_method", "models", "base_model", "parameters", "dtype")
NOT_YET = ("slices", "modules", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")
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
        relative: the base model is what the others are compared with, not one among them.
    """

    build: Callable[[Values], Method]
    shared: Values = dataclasses.field(default_factory=dict)
    per_model: Values = dataclasses.field(default_factory=dict)
    relative: bool = True


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


FORMS = {
    "linear": Form(
        lambda values: linear(values["weight"], normalize=values["normalize"]),
        {"normalize": True},
        {"weight": REQUIRED},
        relative=False,
    ),
    "slerp": Form(lambda values: slerp(values["t"]), {"t": REQUIRED}),
    "nearswap": Form(lambda values: nearswap(values["t"]), {"t": REQUIRED}),
    "passthrough": Form(lambda values: passthrough(values["scale"][0]), {}, {"scale": 1.0}, relative=False),
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
SWITCHES = ("normalize", "rescale", "int8_mask", "filter_wise")
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

    def at(self, info: TensorInfo) -> Any:
        """The value for a tensor; None where nothing is said."""
        for part, value in self.rules:
            if part is None or part in info.name:
                return _on_gradient(value, info) if isinstance(value, list) else value
        return None


def _on_gradient(points: list[Any], info: TensorInfo) -> Any:
    if not points:
        return None
    depth = 0.0 if info.layer is None else 1.0 if info.num_layers == 1 else info.layer / (info.num_layers - 1)
    place = depth * (len(points) - 1)
    low = int(place)
    if isinstance(points[0], bool):  # a switch cannot be half on
        return points[low]
    share = place - low
    return points[low] if share == 0 else (1 - share) * points[low] + share * points[low + 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """All that a recipe says about the parameters of its method.

    Attributes:
        node: the recipe, for messages.
        form: mergekit's method.
        everywhere: parameter → setting for all models.
        of_models: the experts' own settings, in the experts' order, each parameter → setting.
        experts: paths of the experts.
    """

    node: Node
    form: Form
    everywhere: Mapping[str, Setting]
    of_models: Sequence[Mapping[str, Setting]]
    experts: Sequence[str]

    @property
    def vary(self) -> bool:
        """Whether tensors may get different parameters."""
        known = {*self.form.shared, *self.form.per_model}
        places = (self.everywhere, *self.of_models)
        return any(setting.varies for place in places for name, setting in place.items() if name in known)

    def method(self, info: TensorInfo) -> Method:
        """The method for one tensor.

        Raises:
            RecipeError: a parameter has no value there, or one that is out of range.
        """
        values: dict[str, Any] = {}
        for name, default in self.form.shared.items():
            values[name] = self._value([self.everywhere], name, default, info, "")
        for name, default in self.form.per_model.items():
            values[name] = [
                self._value([own, self.everywhere], name, default, info, f" of model {model!r}")
                for model, own in zip(self.experts, self.of_models, strict=True)
            ]
        try:
            return self.form.build(values)
        except RecipeError as error:
            raise self._error(str(error), info) from None

    def _value(
        self, places: Sequence[Mapping[str, Setting]], name: str, default: Any, info: TensorInfo, of: str
    ) -> Any:
        for settings in places:
            if name in settings and (value := settings[name].at(info)) is not None:
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
        return f"{self.settings.node.value['merge_method'].value}(parameters by tensor)"


def read_mergekit(root: Node) -> Recipe:
    """Reads a recipe in mergekit's form.

    Raises:
        RecipeError: it is not one that can work, or asks for what is not supported; the message points at the line.
    """
    for key, node in root.entries().items():
        if key in NOT_YET:
            raise node.error(f"{key!r} of mergekit is not supported yet; supported are {', '.join(KEYS)}")
    entries = root.entries(KEYS)
    for key in ("merge_method", "models"):
        if key not in entries:
            raise root.error(f"the recipe has no {key!r}")
    name = entries["merge_method"].text()
    if name not in FORMS:
        raise entries["merge_method"].error(f"unknown merge_method {name!r}{suggestion(name, list(FORMS))}")
    form = FORMS[name]
    models: dict[str, Mapping[str, Setting]] = {}
    for node in entries["models"].items():
        model = node.entries(("model", "parameters"))
        if "model" not in model:
            raise node.error("this entry has no 'model'; give a path or URL")
        path = model["model"].text()
        if path in models:
            raise model["model"].error(f"the model {path!r} is there twice; remove one")
        models[path] = _settings(model["parameters"]) if "parameters" in model else {}
    base = entries["base_model"].text() if "base_model" in entries else None
    if form.relative:
        if base is None:
            raise root.error(f"{name} compares models with a base; add 'base_model'")
        models.pop(base, None)  # its parameters mean nothing then
    elif base is not None:
        # One model among others, and an expert even if it is not listed. First, since the first gives the side files.
        models = {base: models.pop(base, {}), **models}
    if not models:
        raise entries["models"].error("there are no models to merge; give at least one besides the base")
    everywhere = _settings(entries["parameters"]) if "parameters" in entries else {}
    settings = Settings(root, form, everywhere, list(models.values()), list(models))
    return Recipe(
        source=root.source,
        method=ByTensor(settings) if settings.vary else settings.method(TensorInfo("", ())),
        experts=name_models(list(models)),
        base=base if form.relative else None,
        dtype=read_dtype(entries["dtype"]) if "dtype" in entries else None,
    )


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
