import json
import os

import pytest

from training import run
from training.errors import UserError
from training.recipe import parse_recipe
from training.run import home_of, lock_run, open_run, read_settings, record_settings, tell_changes

RECIPE = {"model": "m6-tiny", "steps": 10, "global_batch": 32, "tasks": {"caption": 1, "poem": 2}}


def recipe(*overrides):
    return parse_recipe(dict(RECIPE), list(overrides), "r.yaml")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def started(root, tmp_path):
    """A run of RECIPE, as training writes it."""
    from training.ds_config import resolve

    folder = open_run("first", recipe(), resume=False, root=root)
    record_settings(folder, recipe(), resolve(recipe(), 2, 0, tmp_path))
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_writes_nothing_until_it_is_recorded(root):
    assert open_run("new", recipe(), resume=False, root=root) == root / "new"
    assert not root.exists()


def test_settings_come_back(started):
    again, ds = read_settings(started)
    assert again == recipe()
    assert ds["zero_optimization"]["stage"] == 3 and ds == json.loads((started / run.DS_CONFIG).read_text())


def test_a_resumed_run_says_what_changed(started, tmp_path, capsys):
    from training.ds_config import resolve

    tell_changes(started, resolve(recipe(), 2, 0, tmp_path))
    assert capsys.readouterr().out == ""
    bf16 = json.loads((started / run.DS_CONFIG).read_text())["bf16"]["enabled"]
    changes = [
        f"ds.bf16.enabled={str(not bf16).lower()}", "ds.m6.capacity=kx", "ds.train_micro_batch_size_per_gpu=8",
        "ds.expert_parallel.autoep_size=1", "ds.zero_optimization.offload_param.device=none",
    ]  # fmt: skip
    tell_changes(started, resolve(recipe(*changes), 2, 0, tmp_path))
    precision = "bf16 -> fp32" if bf16 else "fp32 -> bf16"
    assert capsys.readouterr().out == (
        f"resumed with other settings: precision {precision}, capacity 1x -> kx, micro-batch 16 -> 8, "
        "expert parallelism 2 -> 1, parameters on cpu -> none\n"
    )


def test_a_new_run_has_nothing_to_say(root, tmp_path, capsys):
    from training.ds_config import resolve

    tell_changes(root / "new", resolve(recipe(), 2, 0, tmp_path))
    assert capsys.readouterr().out == ""


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    """Parents that are files: modes alone do not stop root."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"file/runs/new: cannot be written to"):
        open_run("new", recipe(), resume=False, root=file / "runs")
    with pytest.raises(UserError, match=r"file/runs/new: cannot be written to \(Not a directory\)"):
        lock_run(file / "runs" / "new")


def test_a_second_run_on_a_name_is_refused_and_changes_nothing(started, root):
    before = contents(root)
    with pytest.raises(UserError, match=r"first exists: choose another --name, or --resume"):
        open_run("first", recipe(), resume=False, root=root)
    assert contents(root) == before


def test_an_empty_folder_is_no_run(root):
    """As a mount point is made beforehand."""
    (root / "empty").mkdir(parents=True)
    assert open_run("empty", recipe(), resume=False, root=root) == root / "empty"


def test_who_holds_a_run_is_told(root):
    told = rf"held: another process is training there \({os.getpid()} on .*kill -TERM"
    with lock_run(root / "held"), pytest.raises(UserError, match=told):
        lock_run(root / "held")
    lock_run(root / "held").close()


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(root):
    (root / "lost").mkdir(parents=True)
    metrics = root / "lost" / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n')
    run.check_nothing_lost(root / "lost")
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "event": "saved", "text": ""}\n')
    with pytest.raises(
        UserError, match="lost/checkpoints: no checkpoint there, and the run has saved some; bring them"
    ):
        run.check_nothing_lost(root / "lost")


def test_resume_needs_a_run(root):
    with pytest.raises(UserError, match="none: no such run to resume"):
        open_run("none", recipe(), resume=True, root=root)
    (root / "other").mkdir(parents=True)
    (root / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="no run there"):
        open_run("other", recipe(), resume=True, root=root)


@pytest.mark.parametrize(
    "override",
    ["steps=20", "ds_config=other.json", "ds.m6.recompute=true", "data=elsewhere", "evaluation.every=7",
     "tracking.wandb=disabled", "save_every=3", "keep=5", "skips=3", "spike.factor=2"],
)  # fmt: skip
def test_what_a_resumed_run_may_change(started, root, override):
    assert open_run("first", recipe(override), resume=True, root=root) == started


@pytest.mark.parametrize(
    "override",
    ["model=m6-small", "model.layers=2", "seed=2", "global_batch=64", "text_positions=64", "tasks.poem=1",
     "tasks.review=1", "optimizer.lr=1e-4", "schedule.warmup=3"],
)  # fmt: skip
def test_what_a_resumed_run_may_not_change(started, root, override):
    before = contents(root)
    key = "model.preset" if override == "model=m6-small" else override.split("=")[0]
    with pytest.raises(UserError) as error:
        open_run("first", recipe(override), resume=True, root=root)
    assert f"first has another recipe ({key}: was " in str(error.value)
    assert str(error.value).endswith(f"give it as it was, or --allow-change {key}")
    assert "\n" not in str(error.value) and contents(root) == before
    for allowed in (key, key.split(".")[0]):
        assert open_run("first", recipe(override), resume=True, allowed=[allowed], root=root) == started


def test_all_that_changed_is_told_at_once_but_for_what_may(started, root):
    other = recipe("seed=2", "tasks.poem=0", "steps=20", "optimizer.betas=[0.9, 0.95]")
    with pytest.raises(UserError) as error:
        open_run("first", other, resume=True, allowed=["seed"], root=root)
    assert str(error.value) == (
        f"{started} has another recipe (tasks.poem: was 2.0, now not there; optimizer.betas: was (0.9, 0.98), "
        "now (0.9, 0.95)): give it as it was, or --allow-change tasks.poem --allow-change optimizer.betas"
    )
    assert open_run("first", other, resume=True, allowed=["seed", "tasks.poem", "optimizer"], root=root) == started


def test_a_change_of_what_is_not_there_is_a_mistake(started, root):
    with pytest.raises(UserError, match=r"--allow-change optimizer.l: the recipe has no such key; did you mean"):
        open_run("first", recipe(), resume=True, allowed=["optimizer.l"], root=root)
    with pytest.raises(UserError, match=r"--allow-change seed: only a resumed run has something to change"):
        open_run("new", recipe(), resume=False, allowed=["seed"], root=root)


def test_the_same_tasks_in_another_order_are_the_same_run(started, root):
    other = parse_recipe({**RECIPE, "tasks": {"poem": 2, "caption": 1}}, [], "r.yaml")
    assert open_run("first", other, resume=True, root=root) == started


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", ".hidden", "-x", "a b", "a\n", "a\0b", "x" * 61, "名" * 61],
)
@pytest.mark.parametrize("resume", [False, True])
def test_names_that_are_no_plain_folder(root, name, resume):
    with pytest.raises(UserError, match=r"--name .*: must be a plain folder name"):
        open_run(name, recipe(), resume=resume, root=root)
    assert not root.exists()


@pytest.mark.parametrize("name", ["run", "v1.2_b-3", "lr=1e-3", "第一次", "x" * 60])
def test_plain_names(root, name):
    assert open_run(name, recipe(), resume=False, root=root) == root / name


def test_a_damaged_recipe_is_named(started, root):
    (started / run.RECIPE).write_bytes(b"model: [")
    with pytest.raises(UserError, match=r"recipe.yaml: cannot be read"):
        open_run("first", recipe(), resume=True, root=root)


def test_what_a_run_leaves_that_was_killed_as_it_started_is_no_run(root):
    with lock_run(root / "killed"):
        (root / "killed" / run.RANKS).mkdir()
    (root / "killed" / f".{run.RECIPE}.partial").write_text("model: m6-ti")
    (root / "killed" / run.INCIDENTS).mkdir()
    assert open_run("killed", recipe(), resume=False, root=root) == root / "killed"
    with pytest.raises(UserError, match="killed: no such run to resume"):
        open_run("killed", recipe(), resume=True, root=root)
    (root / "killed" / "notes.txt").touch()
    with pytest.raises(UserError, match="killed exists: choose another"):
        open_run("killed", recipe(), resume=False, root=root)


def test_what_belongs_to_a_run_is_kept_in_its_folder(root, monkeypatch):
    home = root / "first"
    (home / "checkpoints" / "step-5").mkdir(parents=True)
    (home / "exports" / "step-5").mkdir(parents=True)
    monkeypatch.chdir(root.parent)
    for named in ("first", home, home / "checkpoints", home / "checkpoints" / "step-5"):
        assert home_of(named).resolve() == home
    monkeypatch.chdir(home / "checkpoints")
    assert home_of("step-5").resolve() == home
    assert home_of(home / "exports" / "step-5") == home / "exports" / "step-5"
