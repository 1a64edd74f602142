"""The recipe: what is trained, on what, for how long. Typed, checked, overridable; imports no torch.

Parallelism, precision and offload are not here but in the ds_config (`training/ds_config.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from model.config import PRESETS, ModelConfig
from model.parts import ADAPTERS, PARTS, WHOLE
from training.errors import UserError

# Said in the ds_config's "m6" block, beside the parallelism that they belong to.
DS_CONFIG_KEYS = ("capacity", "capacity_factor")
# Those of training.data.tasks, whose import would take seconds.
TASK_NAMES = (
    "ask",
    "caption",
    "contrast",
    "denoise",
    "draw",
    "image_denoise",
    "inpaint",
    "language",
    "match",
    "poem",
    "review",
)

_SHAPE = TypeAdapter(ModelConfig)
# Products of two stay positions, which are 64-bit integers.
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e9)]


def one_of(names: Collection[str]) -> AfterValidator:
    """What refuses any other name, with the nearest."""

    def known(name: str) -> str:
        if name not in names:
            raise ValueError(f"is unknown{nearest(name, names)}")
        return name

    return AfterValidator(known)


Task = Annotated[str, one_of(TASK_NAMES)]
Part = Annotated[str, one_of(PARTS)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Settings = TypeVar("Settings", bound=Section)


class Optimizer(Section):
    """AdamW."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)  # matrices only
    clip: float = Field(1.0, ge=0)  # of the global gradient norm; 0 is off


class Schedule(Section):
    """Linear warm-up, then decay to `final` of the peak at the last step."""

    warmup: int = Field(100, ge=0)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = Field(0.1, ge=0, le=1)


class Evaluation(Section):
    every: int = Field(100, ge=1)  # steps
    rows: int = Field(128, ge=1)  # validation rows a task
    samples: int = Field(8, ge=0)  # validation pictures that are captioned for the report


class Tracking(Section):
    log_every: int = Field(10, ge=1)
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "m6"
    tensorboard: bool = False  # files for it, too


class Spike(Section):
    """A loss so far over the usual that the run goes back to its last checkpoint and passes over what it saw since."""

    factor: float = Field(0.0, ge=0)  # over the median loss of the last `window` steps; 0 is off
    window: int = Field(50, ge=1)
    after: int = Field(100, ge=0)  # steps from the start, in which nothing is taken for a spike
    rollbacks: int = Field(3, ge=1)  # in a run; at the next spike it stops

    @field_validator("factor")
    @classmethod
    def _over_the_usual(cls, factor: float) -> float:
        if 0 < factor <= 1:
            raise ValueError("must be over 1, or 0 (off)")
        return factor


class Delink(Section):
    """When layers that share their weights get their own (M6-10T's Pseudo-to-Real), and how training then goes on."""

    after: int = Field(0, ge=0)  # steps; 0: not for their number
    flat: float = Field(0.0, ge=0, lt=1)  # once the mean loss falls by less than this share; 0: not for the loss
    window: int = Field(50, ge=1)  # steps, whose mean loss is compared with that of as many before
    moments: Literal["clone", "scale", "reset"] = "clone"  # Adam's
    then: dict[str, Any] = {}  # keys of the recipe that are others from then on, e.g. {global_batch: 64}

    @property
    def wanted(self) -> bool:
        return self.after > 0 or self.flat > 0


# What delinking keeps.
FIXED = ("model", "data", "seed", "delink", "start", "tune")


class Start(Section):
    """Where fine-tuning begins (`training/parent.py`)."""

    checkpoint: str  # its folder
    digest: str  # of its manifest, and so of all its files
    tasks: list[Task]  # that its model has learned


class Tune(Section):
    """What is trained of a model that another run has trained."""

    parts: list[Part] = []  # of the model; none: all of it, or, with adapters, these alone
    adapter_rank: int = Field(0, ge=0, le=1024)  # of low-rank adapters (`model/adapters.py`); 0: none

    @field_validator("parts", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return list(PARTS) if value == "all" else [value] if isinstance(value, str) else value


class Recipe(Section):
    model: dict[str, Any]  # {preset: NAME, and any ModelConfig field}
    start: Start | None = None  # given as a run's name, or the folder of a run or a checkpoint; None: first weights
    tune: Tune = Tune()
    ds_config: str = "auto"  # a path, or `auto`: by what this machine has
    ds: dict[str, Any] = {}  # overrides of the ds_config, e.g. ds.expert_parallel.autoep_size=1
    data: str = "data"
    image_tokenizer: str | None = None  # folder of a trained one, for tasks `draw` and `inpaint`
    seed: int = Field(1, ge=0, lt=2**63)
    steps: Count
    global_batch: Count  # rows a step, on however many ranks
    text_positions: int = Field(96, ge=8)  # source + target tokens of a row at the most
    tasks: dict[Task, Weight]  # task: weight in the mixture
    contrast_pairs: Count = 32  # pictures and their texts that task `contrast` tells apart at once
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    save_every: int = Field(500, ge=1)
    save_buffer: int = Field(2**30, ge=2**24)  # bytes of host memory a rank that a save may take for its copy
    keep: int = Field(2, ge=1)  # newest checkpoints kept
    keep_every: int = Field(0, ge=0)  # steps: of these multiples every checkpoint is kept (0: none)
    skips: int = Field(10, ge=1)  # steps in a row, skipped for a loss or gradient that is not finite, that end a run
    spike: Spike = Spike()
    delink: Delink = Delink()

    @field_validator("model", mode="before")
    @classmethod
    def _named_preset(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _chosen(cls, tasks: dict[str, float]) -> dict[str, float]:
        chosen = {name: weight for name, weight in tasks.items() if weight > 0}
        if not chosen:
            raise ValueError("one task must have a weight over 0")
        return chosen

    @model_validator(mode="after")
    def _builds(self) -> Recipe:
        config = self.model_shape()
        self._check_tuned(config)
        if self.text_positions > config.max_positions:
            raise ValueError(f"text_positions={self.text_positions} is more than max_positions={config.max_positions}")
        if self.delink.wanted:
            if not config.share_layers:
                raise ValueError("delink: layers that have their own weights cannot be delinked (model.share_layers)")
            if self.delink.after >= self.steps:
                raise ValueError(f"delink.after={self.delink.after}: the run has ended by then (steps={self.steps})")
            try:
                self.delinked()
            except UserError as error:
                raise ValueError(str(error)) from None
        elif self.delink.then:
            raise ValueError("delink.then: it is not said when; set delink.after or delink.flat")
        return self

    def _check_tuned(self, config: ModelConfig) -> None:
        """Raises ValueError where what is to be trained is not there, or learns nothing."""
        if self.start is None and self.tune != Tune():
            raise ValueError("tune: it is of a model that a run has trained; say which by start (m6 train --from RUN)")
        counts = config.parameter_counts()
        for part in self.tune.parts:
            if not getattr(counts, part):
                raise ValueError(f"tune.parts: the model has no {part}; leave them out")
        if self.tune.adapter_rank and set(PARTS) == set(self.tune.parts):
            raise ValueError("tune.adapter_rank: all of the model is trained (tune.parts): leave one of the two out")
        if self.trained == {"bags"} and "contrast" not in self.tasks:
            raise ValueError("tune.parts: bags learn by task contrast alone: add it to the tasks, or train other parts")

    @property
    def trained(self) -> frozenset[str]:
        """The parts of the model (`model/parts.py`) that are trained; the others are frozen."""
        if not self.tune.parts and not self.tune.adapter_rank:
            return WHOLE
        return frozenset(self.tune.parts) | ({ADAPTERS} if self.tune.adapter_rank else set())

    @property
    def learned(self) -> set[str]:
        """The tasks of this training, and those that the model had learned when it began."""
        return {*self.tasks, *(self.start.tasks if self.start else ())}

    @property
    def block(self) -> int:
        """Rows that must be on one rank, in one micro-batch."""
        return 2 * self.contrast_pairs if "contrast" in self.tasks else 1

    def delinked(self) -> Recipe:
        """That of the training after the layers have got their own weights. Raises UserError."""
        then = dict(leaves(self.delink.then))
        if fixed := [key for key in then if key.split(".")[0] in FIXED]:
            raise UserError(f"delink.then.{fixed[0]}: delinking keeps it")
        values = self.model_dump(mode="json") | {"delink": {}}
        for key, value in then.items():
            _put(values, key, value, f"delink.then.{key}")
        values["model"]["share_layers"] = False
        return parse_recipe(values, [], "delink.then")

    def sha256(self) -> str:
        """The same for equal recipes, by which runs can be told apart."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def model_shape(self) -> ModelConfig:
        """The model's shape (capacity still the preset's: the ds_config decides it)."""
        fields = dict(self.model)
        preset = fields.pop("preset", None)
        if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
            raise ValueError(f"model.preset={preset!r} is unknown{nearest(str(preset), PRESETS)}")
        known = [field.name for field in dataclasses.fields(ModelConfig)]
        for name in fields:
            if name in DS_CONFIG_KEYS:
                raise ValueError(f"model.{name}: capacity is set in the ds_config (ds.m6.{name}=…)")
            if name == "adapter_rank":
                raise ValueError("model.adapter_rank: adapters are set by tune.adapter_rank")
            if name not in known:
                raise ValueError(f"model.{name} is unknown{nearest(name, known)}")
        base = dataclasses.asdict(PRESETS[preset].config) if preset else {}
        try:
            shape = _SHAPE.validate_python(base | fields | {"adapter_rank": self.tune.adapter_rank})
        except ValidationError as error:
            raise ValueError(f"model.{_first_problem(error, _SHAPE.json_schema())}") from None
        for name, value in dataclasses.asdict(shape).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"model.{name}={value}: must be a finite number")
        return shape


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply `key.sub=value` overrides, check it. Raises UserError in one line."""
    return parse_recipe(read_mapping(path), overrides or [], str(path))


def parse_recipe(values: dict[str, Any], overrides: list[str], source: str) -> Recipe:
    """A recipe out of a file's values and overrides. Raises UserError that names the file or the override."""
    return parse_settings(Recipe, values, overrides, source)


def parse_settings(kind: type[Settings], values: dict[str, Any], overrides: list[str], source: str) -> Settings:
    """A recipe of any kind, as `parse_recipe`."""
    values = copy.deepcopy(values)
    applied = [copy.deepcopy(values)]
    for override in overrides:
        _apply(values, override)
        applied.append(copy.deepcopy(values))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = _first_problem(error, kind.model_json_schema())
        raise UserError(one_line(_blame(kind, problem, applied, overrides, source))) from None


class _Yaml(yaml.SafeLoader):
    """YAML as a recipe needs it: no key twice, and no aliases, which can make a small file huge."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not read: *{self.peek_event().anchor}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _once([(self.construct_object(key, deep=True), value) for key, value in node.value])
        return super().construct_mapping(node, deep)


# 1e-3 is a number in YAML 1.2; PyYAML reads 1.1, where it is text.
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
# What reading text as YAML or JSON raises: besides their own errors, bad dates and numbers, and deep nesting.
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} is there twice")
    return dict(pairs)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML (or JSON) file that holds one mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        is_json = Path(path).suffix == ".json"
        values = json.loads(text, object_pairs_hook=_once) if is_json else yaml.load(text, _Yaml)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, *_UNREADABLE) as error:
        raise UserError(f"{path}: cannot be read ({one_line(str(error))})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold key: value lines")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {shown(override)}: must read key=value")
    try:
        value = yaml.load(text, _Yaml)
    except _UNREADABLE:
        raise UserError(f"override {shown(override)}: the value is no YAML") from None
    _put(values, key, value, f"override {shown(override)}")


def _put(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set what a key in full, such as `optimizer.lr`, names. Raises UserError, after `source`."""
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent, {})
        if parent == "model" and isinstance(child, str):
            child = {"preset": child}
        if not isinstance(child, dict):
            raise UserError(f"{source}: {parent} has no parts")
        values[parent] = child
        values = child
    values[last] = value


def leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their keys in full, such as `optimizer.lr`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _blame(kind: type[Section], problem: str, applied: list[dict[str, Any]], overrides: list[str], source: str) -> str:
    """The problem, after the last override that brought it, or else the file. `applied[n]`: n overrides are in."""
    count = len(overrides)
    while count and _problem_of(kind, applied[count - 1]) == problem:
        count -= 1
    if not count:
        return f"{source}: {problem}"
    key = overrides[count - 1].partition("=")[0]
    said = problem.partition(": ")[2] if problem.startswith(f"{key}=") else ""
    return f"override {shown(overrides[count - 1])}: {said or problem}"


def _problem_of(kind: type[Section], values: dict[str, Any]) -> str:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        return _first_problem(error, kind.model_json_schema())
    return ""


def _first_problem(error: ValidationError, schema: dict[str, Any]) -> str:
    """The first mistake, by its key and value and what the JSON schema wants there."""
    problem = error.errors()[0]
    kind, place = problem["type"], _without_branches(schema, problem["loc"])
    if kind == "missing" and isinstance(place[-1], int):
        place = place[:-1]  # a list that is too short
    elif kind == "missing":
        hint = "; name a preset or give every size" if schema["title"] == ModelConfig.__name__ else ""
        return f"{_dotted(place)} is missing{hint}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        names = _schema_at(schema, place[:-1])["properties"]
        return f"{_dotted(place)} is unknown{nearest(str(place[-1]), names)}"
    own = str(problem["ctx"]["error"]) if kind == "value_error" else ""
    if place[-1:] == ("[key]",):
        return f"{_dotted(place[:-1])} {own or 'is no name: names are text'}"
    if own and place and "properties" in _schema_at(schema, place):
        return f"{_dotted(place)}.{own}"  # of a whole section: its own words begin with the key
    reason = own or f"must be {_wanted(_schema_at(schema, place))}"
    return f"{_dotted(place)}={shown(problem['input'])}: {reason}" if place else reason


def _dotted(place: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in place)


def _without_branches(schema: dict[str, Any], place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place without the names that pydantic gives to the types of a key that may hold several."""
    kept: tuple[int | str, ...] = ()
    for part in place:
        if part == "[key]" or "anyOf" not in _schema_at(schema, kept):
            kept += (part,)
    return kept


def _schema_at(schema: dict[str, Any], place: tuple[int | str, ...]) -> dict[str, Any]:
    """The part of a JSON schema that is about a place; of what may be null, that of the rest."""
    node = schema
    for part in place:
        if "prefixItems" in node:
            node = node["prefixItems"][part]
        elif "items" in node:
            node = node["items"]
        else:
            node = node.get("properties", {}).get(part) or node["additionalProperties"]
        if len(branches := _branches(node)) == 1:
            node = branches[0]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _branches(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The types of a key that may hold several, besides null."""
    return [branch for branch in node.get("anyOf", []) if branch.get("type") != "null"]


def _wanted(node: dict[str, Any]) -> str:
    """What a part of a JSON schema asks for, in words."""
    if branches := _branches(node):
        return " or ".join(dict.fromkeys(map(_wanted, branches)))
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    if node["type"] == "array":
        return f"a list of {node['minItems']}" if "minItems" in node else "a list"
    noun = {
        "integer": "a whole number", "number": "a finite number", "boolean": "true or false", "string": "text",
        "object": "key: value pairs",
    }[node["type"]]  # fmt: skip
    if node["type"] == "integer" and "exclusiveMaximum" in node:
        node = node | {"maximum": node["exclusiveMaximum"] - 1}
        del node["exclusiveMaximum"]
    bounds = {
        "minimum": "from {}", "exclusiveMinimum": "over {}", "maximum": "to {}", "exclusiveMaximum": "and below {}"
    }  # fmt: skip
    return " ".join([noun, *(words.format(node[bound]) for bound, words in bounds.items() if bound in node)])


def one_line(text: str) -> str:
    return " ".join(text.split())


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
