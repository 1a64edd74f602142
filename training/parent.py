"""What fine-tuning starts from: another run's checkpoint, and what a recipe takes over from it. Imports no torch.

A recipe names a run, or the folder of a run or of one checkpoint. What becomes of it, the definite checkpoint and its
digest, is in the recipe of the run that it begins, so that going on with that one asks nothing more of its parent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from training.checkpoint_files import NAME, SEAL, read_manifest
from training.errors import UserError
from training.recipe import Recipe, Start, parse_recipe, read_mapping
from training.run import RECIPE, checkpoints_of, chosen_checkpoints, home_of

INHERITED = ("model", "text_positions", "image_tokenizer")  # unless the recipe says otherwise
OF_TRAINING = ("balance_loss", "z_loss", "adapter_rank")  # fields of the model that its weights do not depend on
GIVEN = "start="
EXPORTED = "config.json"  # is in exports alone


@dataclass(frozen=True)
class Parent:
    """A checkpoint to start from."""

    path: Path
    manifest: dict[str, Any]
    recipe: Recipe

    @classmethod
    def at(cls, path: Path) -> Parent:
        """Raises UserError if there is none, or its manifest is damaged."""
        if not path.is_dir():
            raise UserError(
                f"{path}: no such checkpoint to start from; `m6 verify {home_of(path)}` shows what is there"
            )
        manifest = read_manifest(path)
        return cls(path, manifest, parse_recipe(manifest.get("recipe", {}), [], str(path)))

    @classmethod
    def of(cls, recipe: Recipe) -> Parent:
        """That of a recipe with a start. Raises UserError if it is no longer what it was."""
        assert recipe.start
        parent = cls.at(Path(recipe.start.checkpoint))
        if parent.start.digest != recipe.start.digest:
            raise UserError(f"{parent.path}: it is not the checkpoint that this run starts from; begin one by --from")
        return parent

    @classmethod
    def to_begin(cls, recipe: Recipe) -> Parent:
        """That of a recipe with whose weights training is to begin. Raises UserError if they do not fit it."""
        parent = cls.of(recipe)
        _check_shape(parent, recipe.model_shape())
        return parent

    @property
    def start(self) -> Start:
        digest = (self.path / SEAL).read_text(encoding="utf-8")
        return Start(checkpoint=str(self.path), digest=digest, tasks=sorted(self.recipe.learned))

    @property
    def home(self) -> Path:
        """The run's folder."""
        return home_of(self.path)


def load_recipe(path: str | Path, overrides: Sequence[str], resumed: Path | None = None) -> Recipe:
    """A recipe, as `training.recipe.load_recipe`, completed by what it starts from. Raises UserError.

    `resumed`: the folder of a run that is to go on; what it began with holds.
    """
    values, given = read_mapping(path), _given(read_mapping(path), overrides)
    others = [override for override in overrides if not override.startswith(GIVEN)]
    if given is None:
        named = "model" in values or any(override.partition("=")[0].split(".")[0] == "model" for override in others)
        if not named:
            raise UserError(f"{path}: model is missing; say by --from whose is to be fine-tuned, or name one")
        return parse_recipe(values, list(overrides), str(path))
    was, start = _began(resumed, given) or _from(_checkpoint(given))
    inherited = {key: was[key] for key in INHERITED if was.get(key) is not None}
    return parse_recipe(inherited | values | {"start": start}, others, str(path))


def settle(path: Path, overrides: Sequence[str], resumed: Path | None = None) -> tuple[str, ...]:
    """The overrides, with a definite checkpoint to start from in place of a run, whatever that does meanwhile."""
    given = _given(read_mapping(path), overrides)
    if given is None:
        return tuple(overrides)
    began = _began(resumed, given)
    place = began[1]["checkpoint"] if began else _checkpoint(given)
    return (*(override for override in overrides if not override.startswith(GIVEN)), f"{GIVEN}{place}")


def _check_shape(parent: Parent, shape: ModelConfig) -> None:
    """Raise UserError unless the parent's weights fit a model of this shape."""
    wanted, found = dataclasses.asdict(parent.recipe.model_shape()), dataclasses.asdict(shape)
    for name, before in wanted.items():
        if name not in OF_TRAINING and found[name] != before:
            why = f"it is {before} in {parent.path}, and fine-tuning keeps the model: leave it out"
            raise UserError(f"model.{name}={found[name]}: {why}")


def _given(values: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """The run or folder that is given as the start; None without one, and where a definite one is written out."""
    said = [override.removeprefix(GIVEN) for override in overrides if override.startswith(GIVEN)]
    start = said[-1] if said else values.get("start")
    return start if isinstance(start, str) and start else None


def _checkpoint(given: str) -> Path:
    """The newest of a run. Raises UserError."""
    if (Path(given) / EXPORTED).is_file():
        raise UserError(f"{given}: an export does not say what its model has learned; fine-tune the run that it is of")
    return chosen_checkpoints(checkpoints_of(given))[-1]


def _from(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """What is inherited from a checkpoint's recipe, and the start that it makes."""
    parent = Parent.at(path)
    return parent.recipe.model_dump(mode="json"), parent.start.model_dump()


def _began(resumed: Path | None, given: str) -> tuple[Mapping[str, Any], dict[str, Any]] | None:
    """The same of a run's own recipe, if it began with the given run, or the given checkpoint; None if it did not."""
    if resumed is None or not (resumed / RECIPE).exists():
        return None
    recipe = read_mapping(resumed / RECIPE)
    start = recipe.get("start")
    if not start:
        return None
    was, named = Path(start["checkpoint"]), Path(given)
    same = was.absolute() == named.absolute() if NAME.fullmatch(named.name) else _home(was) == _home(named)
    return (recipe, start) if same else None


def _home(place: Path) -> Path:
    return home_of(place).resolve()
