import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import PRESETS
from training.data.tasks import TASKS
from training.errors import UserError
from training.image_recipe import ImageTokenizerRecipe, load_image_recipe
from training.recipe import TASK_NAMES, Recipe, load_recipe, parse_recipe, read_mapping

LAW = settings(deadline=None, derandomize=True)
ROOT = Path(__file__).parents[2]
LEAST = {"model": "m6-tiny", "steps": 10, "global_batch": 8, "tasks": {"caption": 1}}


def parse(*overrides, **values):
    return parse_recipe({**LEAST, **values}, list(overrides), "r.yaml")


def refusal(*overrides, **values):
    with pytest.raises(UserError) as error:
        parse(*overrides, **values)
    message = str(error.value)
    assert "\n" not in message and message.startswith(("r.yaml: ", "override "))
    return message


def file_refusal(path):
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and len(message) < 500
    return message


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads(path):
    if path.stem.startswith("image-tokenizer"):
        assert isinstance(load_image_recipe(path), ImageTokenizerRecipe)
    elif path.stem == "finetune":  # whose model is that of the run that it starts from
        assert isinstance(load_recipe(path, ["model=m6-tiny"]), Recipe)
    else:
        assert isinstance(load_recipe(path), Recipe)


def test_every_task_has_its_name():
    assert sorted(TASKS) == sorted(TASK_NAMES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_own_shape(preset):
    assert parse(model=preset).model_shape() == PRESETS[preset].config


def test_a_model_can_be_given_without_a_preset():
    shape = parse(model={"layers": 2, "hidden": 64, "ffn": 128, "heads": 4}).model_shape()
    assert (shape.layers, shape.hidden, shape.experts) == (2, 64, 0)
    assert "model.heads is missing; name a preset" in refusal(model={"layers": 2, "hidden": 64, "ffn": 128})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"step": 3}, "step is unknown; did you mean steps?"),
        ({"zzz": 3}, "zzz is unknown; known: model"),
        ({"optimizer": {"learning": 3}}, "optimizer.learning is unknown; known: lr"),
        ({"optimizer": {"beta": 3}}, "optimizer.beta is unknown; did you mean betas?"),
        ({"evaluation": {"row": 3}}, "evaluation.row is unknown; did you mean rows?"),
        ({"tasks": {"captoin": 1}}, "captoin is unknown; did you mean caption?"),
        ({"model": "m6-tini"}, "model.preset='m6-tini' is unknown; did you mean m6-tiny?"),
        ({"model": {"preset": ["m6-tiny"]}}, "model.preset=['m6-tiny'] is unknown"),
        ({"model": {"preset": "m6-tiny", "layer": 3}}, "model.layer is unknown; did you mean layers?"),
        ({"model": {"preset": "m6-tiny", "capacity": "kx"}}, "model.capacity: capacity is set in the ds_config"),
    ],
)
def test_unknown_names_come_with_a_suggestion(values, said):
    assert said in refusal(**values)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=abc", "must be a whole number from 1 to 2147483647"),
        ("steps=2.5", "must be a whole number from 1 to 2147483647"),
        ("keep=0", "must be a whole number from 1"),
        ("optimizer.lr=.inf", "must be a finite number over 0"),
        ("schedule.final=2", "must be a finite number from 0 to 1"),
        ("optimizer.betas=[0.9]", "must be a list of 2"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1=1: must be a finite number from 0 and below 1"),
        ("tracking.wandb=maybe", "must be one of offline, online, disabled"),
        ("optimizer=3", "must be key: value pairs"),
        ("data=", "must be text"),
        ("image_tokenizer=5", "must be text"),
        ("model.share_layers=maybe", "must be true or false"),
        ("model.layers=two", "must be a whole number"),
        ("tasks.captoin=1", "tasks.captoin is unknown; did you mean caption?"),
        ("tasks.caption=-1", "must be a finite number from 0 to 1000000000.0"),
        ("steps=true", "must be a whole number from 1 to 2147483647"),
        ("text_positions=513", "text_positions=513 is more than max_positions=512"),
        ("ds={1: 2}", "ds.1 is no name: names are text"),
        ("skips=0", "must be a whole number from 1"),
        ("spike.factor=0.5", "must be over 1, or 0 (off)"),
        ("spike.rollbacks=0", "must be a whole number from 1"),
    ],
)
def test_a_wrong_override_is_named_and_told_what_it_must_be(override, said):
    assert refusal("seed=3", override, "save_every=3") == f"override {override!r}: {said}"


def test_the_file_is_blamed_for_what_is_in_the_file():
    wanted = "must be a whole number from 1 to 2147483647"
    assert refusal("keep=3", steps="x") == f"r.yaml: steps='x': {wanted}"
    assert refusal("steps=y", steps="x") == f"override 'steps=y': {wanted}"
    assert refusal("text_positions=400", model={"preset": "m6-tiny", "max_positions": 300}).startswith("override ")
    assert refusal("keep=3", text_positions=400, model={"preset": "m6-tiny", "max_positions": 300}) == (
        "r.yaml: text_positions=400 is more than max_positions=300"
    )


def test_missing_keys_are_named():
    with pytest.raises(UserError, match=r"^r.yaml: steps is missing$"):
        parse_recipe({key: value for key, value in LEAST.items() if key != "steps"}, [], "r.yaml")


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "x", "[]", "{a: 1}", "-1"])
@pytest.mark.parametrize(
    "key", ["optimizer.lr", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip", "schedule.final",
            "tasks.caption", "seed", "steps", "global_batch", "save_every"],
)  # fmt: skip
def test_numbers_must_be_finite_and_in_range(key, number):
    assert key.split(".")[0] in refusal(f"{key}={number}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.layers", "two"), ("model.layers", "2.5"), ("model.layers", ""), ("model.share_layers", "maybe"),
        ("model.init_std", ".nan"), ("model.z_loss", ".inf"), ("model.hidden", "0"), ("model.heads", "3"),
        ("model.routing", "best"), ("model.k", "3"), ("steps", "1" + "0" * 30), ("seed", str(2**63)),
        ("optimizer.betas", "[0.9, 1]"), ("optimizer.betas", "[0.9]"), ("text_positions", "513"), ("tasks", "{}"),
        ("tasks", "{caption: 0}"), ("ds", "5"), ("tracking.wandb", "yes"),
    ],
)  # fmt: skip
def test_each_bad_value_is_one_line_with_its_key(key, value):
    assert key.split(".")[-1] in refusal(f"{key}={value}")


def test_keys_that_are_no_text():
    assert "1" in refusal(**{"model": {1: 2}})
    with pytest.raises(UserError, match=r"^r\.yaml: "):
        parse_recipe({**LEAST, 1: 2}, [], "r.yaml")


def test_a_long_value_is_cut():
    assert len(refusal(seed="x" * 10_000)) < 300
    assert refusal("seed=" + "x" * 10_000).startswith("override 'seed=xxx")
    assert len(refusal("seed=" + "x" * 10_000)) < 300


def test_a_task_of_no_weight_is_left_out():
    assert parse("tasks.caption=0", "tasks.poem=2").tasks == {"poem": 2.0}


@LAW
@given(st.floats(1e-12, 1e3))
def test_a_float_override_is_that_float(lr):
    assert parse(f"optimizer.lr={lr!r}").optimizer.lr == lr
    assert parse(f"optimizer.lr={lr:e}").optimizer.lr == float(f"{lr:e}")


def test_overrides_reach_every_depth():
    recipe = parse(
        "optimizer.lr=1e-3", "model.layers=2", "ds.zero_optimization.sub_group_size=1e6", "data=other",
        "optimizer.betas=[0.8, 0.9]", "tasks={poem: 1, review: 2}",
    )  # fmt: skip
    assert recipe.optimizer.lr == 1e-3 and recipe.optimizer.betas == (0.8, 0.9) and recipe.data == "other"
    assert recipe.model == {"preset": "m6-tiny", "layers": 2} and recipe.model_shape().layers == 2
    assert recipe.ds == {"zero_optimization": {"sub_group_size": 1e6}}
    assert recipe.tasks == {"poem": 1.0, "review": 2.0}


def test_overrides_leave_what_they_are_given():
    given = {**LEAST, "optimizer": {"lr": 1e-4}}
    parse_recipe(given, ["optimizer.lr=1", "tasks.poem=1"], "r.yaml")
    assert given["optimizer"] == {"lr": 1e-4} and given["tasks"] == {"caption": 1}


def test_later_overrides_win():
    assert parse("steps=3", "steps=4").steps == 4
    assert parse("model.layers=2", "model=m6-small").model == {"preset": "m6-small"}


@pytest.mark.parametrize("override", ["steps", "=3", "", ".steps=3", "optimizer.=3", "optimizer..lr=3"])
def test_an_override_must_read_key_value(override):
    assert refusal(override) == f"override {override!r}: must read key=value"


@pytest.mark.parametrize(
    "override", ["steps=[1", "steps={a: 1, a: 2}", "steps=*a", "steps=" + "[" * 5000, "data=2024-13-45"]
)
def test_an_override_must_be_yaml(override):
    assert refusal(override).endswith("the value is no YAML")


def test_an_override_goes_into_no_scalar():
    assert refusal("optimizer.lr.x=1", optimizer={"lr": 1}) == "override 'optimizer.lr.x=1': lr has no parts"
    assert refusal("steps.x=1") == "override 'steps.x=1': steps has no parts"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin", "data: caf\xe9".encode("latin-1"), "cannot be read"),
        ("empty", b"", "must hold key: value lines"),
        ("list", b"- steps\n- 3\n", "must hold key: value lines"),
        ("scalar", b"steps", "must hold key: value lines"),
        ("broken", b"steps: [1\ndata: {", "cannot be read"),
        ("twice", b"steps: 3\nsteps: 4\n", "steps is there twice"),
        ("twice_inside", b"optimizer: {lr: 1, lr: 2}\n", "lr is there twice"),
        ("alias", b"a: &x [1]\nb: *x\n", "aliases are not read: *x"),
        ("bomb", b"a: &a [1,1]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 121)),
         "aliases are not read"),
        ("deep", b"[" * 100_000, "cannot be read"),
        ("object", b"steps: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("digits", b"steps: " + b"9" * 10_000, "cannot be read"),
        ("binary", bytes(range(256)), "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(tmp_path, name, content, said):
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(content)
    assert said in file_refusal(path)


def test_files_that_are_not_there(tmp_path):
    assert file_refusal(tmp_path / "none.yaml").endswith("no such file")
    assert "cannot be read" in file_refusal(tmp_path)


def test_json_with_tabs_marks_and_repeats(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('\ufeff{\n\t"a": 1e3,\n\t"b": {"c": null}\n}', encoding="utf-8")
    assert read_mapping(path) == {"a": 1000.0, "b": {"c": None}}
    path.write_text('{"a": 1, "b": {"c": 1, "c": 2}}', encoding="utf-8")
    with pytest.raises(UserError, match="c is there twice"):
        read_mapping(path)


@LAW
@given(st.dictionaries(st.sampled_from([*LEAST, "optimizer", "ds", "seed"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab\n.=", max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab\n", max_size=4), inner, max_size=2),
    max_leaves=4,
)))  # fmt: skip
def test_any_values_give_a_recipe_or_one_line(values):
    try:
        parse_recipe({**LEAST, **values}, [], "r.yaml")
    except UserError as error:
        assert len(str(error).splitlines()) == 1


def test_a_recipe_survives_its_own_file(tmp_path):
    recipe = parse("optimizer.lr=1e-5", "model.init_std=1e-3", "ds.m6.capacity=kx", "seed=9007199254740993")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_planning_imports_no_torch():
    program = "import sys, training.recipe, training.ds_config, training.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
