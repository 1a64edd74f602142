import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.precision_config import get_bfloat16_config
from deepspeed.runtime.swap_tensor.constants import AIO_FORMAT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import PRESETS, ModelConfig
from model.m6 import M6
from training import ds_config, machine
from training.ds_config import FOLDER, OFF_AT_ONE, REFUSED, SETTINGS, default_path, largest_partition, resolve
from training.errors import UserError
from training.recipe import load_recipe, parse_recipe

LAW = settings(deadline=None, derandomize=True)
RECIPE = {"model": "m6-tiny", "steps": 10, "global_batch": 64, "tasks": {"caption": 1}}
CPU, NVME = str(FOLDER / "cpu.json"), str(FOLDER / "nvme.json")
# Ranks, GPUs.
SHIPPED = {
    "cpu": (2, 0), "cpu-offload": (2, 0), "nvme": (2, 0), "gpu-1": (1, 1), "gpu-8": (8, 8), "m6-1t": (8, 8),
    "m6-10t": (8, 8),
}  # fmt: skip


def recipe(*overrides, ds_config=CPU):
    return parse_recipe({**RECIPE, "ds_config": ds_config}, list(overrides), "r.yaml")


def resolved(*overrides, world=2, gpus=0, file=CPU, swap=Path("swap")):
    return resolve(recipe(*overrides, ds_config=file), world, gpus, swap)


def refusal(*overrides, world=2, file=CPU, **options):
    with pytest.raises(UserError) as error:
        resolved(*overrides, world=world, file=file, **options)
    message = str(error.value)
    source, _, problem = message.partition(": ")
    assert source in (file, f"{file} with the changes of ds") and "\n" not in message
    return problem


def tiers(config):
    return str(config.placement.parameters), str(config.placement.optimizer)


def ds(key, value):
    return f"ds.{key}={value}"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_file_that_ships_is_resolved_and_deepspeed_reads_it(name, tmp_path):
    world, gpus = SHIPPED[name]
    config = resolved(world=world, gpus=gpus, file=str(FOLDER / f"{name}.json"), swap=tmp_path)
    values = json.loads(json.dumps(config.values))
    assert get_zero_config(values).stage == 3
    assert get_bfloat16_config(values).enabled == values["bf16"]["enabled"]
    assert config.micro_batch * config.accumulation * world == values["train_batch_size"] == 64


def test_no_file_that_ships_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(SHIPPED)


@pytest.mark.parametrize(("gpus", "name"), [(0, "cpu-offload"), (1, "gpu-1"), (2, "gpu-8"), (8, "gpu-8")])
def test_auto_is_by_the_machine(gpus, name):
    assert default_path(gpus) == FOLDER / f"{name}.json"


def test_known_settings_are_deepspeeds():
    fields = DeepSpeedZeroConfig.model_fields.items()
    names = {name for name, _ in fields} | {field.alias for _, field in fields}
    assert SETTINGS["zero_optimization."].keys() <= names
    for block in ("offload_param", "offload_optimizer"):
        DeepSpeedZeroConfig(**{block: dict.fromkeys(SETTINGS[f"zero_optimization.{block}."], "auto")})
    assert all(f'"{key}"' in AIO_FORMAT for key in SETTINGS["aio."])


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("value", ["true", "2", "{enabled: true}", "0.5"])
def test_what_breaks_under_deepspeed_is_refused(key, value):
    message = refusal(ds(key, value))
    assert message.startswith(f"{key}=") and REFUSED[key] in message


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("value", ["false", "null", "{enabled: false}", "1"])
def test_what_is_off_is_left_out(key, value):
    if value == "1" and key not in OFF_AT_ONE:
        assert REFUSED[key] in refusal(ds(key, value))
    else:
        assert without_empty(resolved(ds(key, value)).values) == without_empty(resolved().values)


def without_empty(block):
    """The block without blocks that have become empty."""
    kept = {key: without_empty(value) if isinstance(value, dict) else value for key, value in block.items()}
    return {key: value for key, value in kept.items() if value != {}}


def test_every_refusal_has_a_way_out():
    ways = ("take it out", ": use ", "set it to")
    assert all(any(way in reason for way in ways) for reason in REFUSED.values())


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("zero_optimisation", "did you mean zero_optimization?"),
        ("zero_optimization.overlap_com", "did you mean zero_optimization.overlap_comm?"),
        ("zero_optimization.offload_param.devcie", "did you mean zero_optimization.offload_param.device?"),
        ("expert_parallel.autoep", "did you mean expert_parallel.autoep_size?"),
        ("aio.block_sise", "did you mean aio.block_size?"),
        ("bf16.enable", "did you mean bf16.enabled?"),
        ("m6.capasity", "did you mean m6.capacity?"),
        ("data_types.zzz", "known: grad_accum_dtype"),
        ("zzz", "known: aio"),
    ],
)
def test_unknown_keys_come_with_a_suggestion(key, said):
    message = refusal(ds(key, 1))
    assert message.startswith(f"{key} is unknown") and said in message


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("zero_optimization", "true", "a block of settings"), ("m6", "5", "a block of settings"),
        ("zero_optimization.offload_param", "cpu", "a block of settings"), ("m6.recompute", "1", "true or false"),
        ("m6.recompute", "'yes'", "true or false"), ("bf16.enabled", "'on'", "true or false or auto"),
        ("train_micro_batch_size_per_gpu", "true", "a whole number from 1 to 1e12 or auto"),
        ("train_micro_batch_size_per_gpu", "'32'", "a whole number from 1 to 1e12 or auto"),
        ("train_micro_batch_size_per_gpu", "0", "a whole number from 1 to 1e12 or auto"),
        ("train_micro_batch_size_per_gpu", "1.5", "a whole number from 1 to 1e12 or auto"),
        ("expert_parallel.autoep_size", "true", "a whole number from 1 to 1e12 or auto"),
        ("expert_parallel.autoep_size", "-1", "a whole number from 1 to 1e12 or auto"),
        ("zero_optimization.sub_group_size", "'1e9'", "a whole number from 0 to 1e12"),
        ("zero_optimization.sub_group_size", ".inf", "a whole number from 0 to 1e12"),
        ("zero_optimization.sub_group_size", ".nan", "a whole number from 0 to 1e12"),
        ("zero_optimization.offload_param.device", "disk", "none, cpu, nvme"),
        ("zero_optimization.offload_param.buffer_count", "3", "a whole number from 4 to 4096"),
        ("zero_optimization.offload_optimizer.buffer_count", "3", "a whole number from 4 to 4096"),
        ("zero_optimization.offload_param.nvme_path", "5", "text or auto"),
        ("data_types.grad_accum_dtype", "fp16", "fp32 or bf16 or auto"),
        ("communication_data_type", "fp16", "fp32 or bf16"),
        ("m6.capacity", "2x", "1x, kx, none"), ("m6.capacity", "[1x]", "1x, kx, none"),
        ("m6.optimizer_states", "4-bit", "fp32 or 8-bit"), ("m6.optimizer_states", "8", "fp32 or 8-bit"),
        ("m6.capacity_factor", ".inf", "a number from 0"), ("m6.capacity_factor", "much", "a number from 0"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(key, value, must):
    message = refusal(ds(key, value))
    assert message.startswith(f"{key}=") and message.endswith(f": must be {must}")


def test_only_stage_3():
    assert refusal(ds("zero_optimization.stage", 2)).startswith("zero_optimization.stage=2: only 3")
    assert refusal(ds("zero_optimization", "null")).startswith("zero_optimization.stage=None: only 3")


def test_a_file_that_is_no_ds_config(tmp_path):
    path = tmp_path / "mine.json"
    with pytest.raises(UserError, match=r"mine\.json: no such file"):
        resolved(file=str(path))
    path.write_text('{"m6": {}, "m6": {}}')
    with pytest.raises(UserError, match=r"mine\.json: cannot be read \(m6 is there twice\)"):
        resolved(file=str(path))


def test_whole_numbers_may_be_written_with_an_exponent():
    value = resolved(ds("zero_optimization.sub_group_size", "1e9")).values["zero_optimization"]["sub_group_size"]
    assert value == 10**9 and isinstance(value, int)


def test_overrides_leave_the_rest_of_a_block():
    zero = resolved(ds("zero_optimization.overlap_comm", "true")).values["zero_optimization"]
    assert zero["overlap_comm"] is True and zero["stage"] == 3


@pytest.mark.parametrize("settings", [None, "null", "{device: none}"])
def test_without_offload_torch_steps(settings):
    overrides = [ds("zero_optimization.offload_optimizer", settings)] if settings else []
    config = resolved(*overrides)
    assert tiers(config) == ("device", "device")
    assert config.values["optimizer"]["params"]["torch_adam"] is True


def test_with_offload_deepspeed_steps():
    config = resolved("optimizer.lr=5e-4", file=str(FOLDER / "cpu-offload.json"))
    assert tiers(config) == ("cpu", "cpu")
    assert config.values["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01},
    }


@pytest.mark.parametrize(("flags", "fast"), [({"amx_bf16"}, True), ({"avx512_bf16"}, True), ({"avx512f"}, False)])
def test_bf16_auto_on_the_cpu_is_by_its_instructions(monkeypatch, flags, fast):
    monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
    assert resolved().values["bf16"]["enabled"] is fast
    assert resolved(ds("bf16", "null")).values["bf16"]["enabled"] is fast
    assert resolved(ds("bf16.enabled", "false")).values["bf16"]["enabled"] is False
    assert resolved(ds("bf16.enabled", "true")).values["bf16"]["enabled"] is True


def test_bf16_auto_on_a_gpu_is_on():
    config = resolved(world=1, gpus=1, file=str(FOLDER / "gpu-1.json"))
    assert config.values["bf16"]["enabled"] is True and config.precision == "bf16, fp32 masters"


OFFLOAD, COMPACT = str(FOLDER / "cpu-offload.json"), ds("m6.optimizer_states", "8-bit")


def test_8_bit_states_are_a_matter_of_the_ds_config():
    config = resolved(COMPACT, ds("bf16.enabled", True), file=OFFLOAD)
    assert config.precision == "bf16, 24-bit masters, 8-bit moments"
    bf16 = get_bfloat16_config(json.loads(json.dumps(config.values)))
    assert bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states
    assert config.values["data_types"]["grad_accum_dtype"] == "bf16"
    wide = resolved(COMPACT, ds("bf16.enabled", True), ds("data_types.grad_accum_dtype", "fp32"), file=OFFLOAD)
    assert wide.values["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("file", "enabled", "said"),
    [
        (OFFLOAD, False, "its weights are bf16, which is off here: set bf16.enabled=true"),
        (CPU, True, "with the optimizer on device: set zero_optimization.offload_optimizer.device=cpu"),
        (NVME, True, "with the optimizer on nvme: set zero_optimization.offload_optimizer.device=cpu"),
    ],
)
def test_8_bit_states_are_refused_where_they_cannot_be(file, enabled, said, tmp_path):
    message = refusal(COMPACT, ds("bf16.enabled", enabled), file=file, swap=tmp_path)
    assert message == f"m6.optimizer_states=8-bit: {said}, or use fp32"


@LAW
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 512))
def test_batch_arithmetic(micro, world, batch):
    overrides = (
        f"global_batch={batch}",
        ds("train_micro_batch_size_per_gpu", micro),
        ds("expert_parallel.autoep_size", 1),
    )
    if batch % (micro * world):
        message = refusal(*overrides, world=world)
        assert f"train_micro_batch_size_per_gpu={micro} times {world} rank(s)" in message
        assert f"global_batch={batch}" in message
    else:
        config = resolved(*overrides, world=world)
        assert config.values["gradient_accumulation_steps"] == config.accumulation == batch // (micro * world)
        assert config.values["train_micro_batch_size_per_gpu"] == config.micro_batch == micro


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [("train_batch_size", 32, 64), ("gradient_accumulation_steps", 4, 1), ("gradient_clipping", 0.5, 1)],
)
def test_what_the_recipe_decides_may_be_repeated_but_not_contradicted(key, wrong, right):
    message = refusal(ds(key, wrong))
    assert message.startswith(f"{key}={wrong} disagrees with the recipe") and message.endswith("take it out")
    assert resolved(ds(key, right)).values == resolved(ds(key, "auto")).values == resolved().values


@LAW
@given(st.integers(1, 16), st.integers(1, 512))
def test_an_automatic_micro_batch_is_the_largest_up_to_32_that_divides(world, batch):
    overrides = f"global_batch={batch}", "tasks={caption: 1}", ds("expert_parallel.autoep_size", 1)
    if batch % world:
        assert f"global_batch={batch} does not divide among {world} ranks" in refusal(*overrides, world=world)
        return
    config = resolved(*overrides, world=world)
    assert config.micro_batch * config.accumulation * world == batch
    assert not any(batch // world % rows == 0 for rows in range(config.micro_batch + 1, 33))


def test_a_missing_micro_batch_is_named():
    assert refusal(ds("train_micro_batch_size_per_gpu", "null")).startswith("train_micro_batch_size_per_gpu is missing")


@pytest.mark.parametrize(
    ("parallel", "world", "overrides", "said"),
    [
        (2, 1, (), "does not divide the 1 rank(s) of this job; set ds.expert_parallel.autoep_size"),
        (3, 3, ("global_batch=48",), "does not divide the model's 16 experts"),
        (2, 2, ("model=m6-base",), "the model has no experts; set it to 1"),
    ],
)
def test_expert_parallel_must_divide(parallel, world, overrides, said):
    message = refusal(ds("expert_parallel.autoep_size", parallel), *overrides, world=world)
    assert message == f"expert_parallel.autoep_size={parallel} {said}" or said in message


def test_capacity_comes_from_the_ds_config():
    config = resolved(ds("m6.capacity", "kx"), ds("m6.capacity_factor", 2))
    assert (config.model.capacity, config.model.capacity_factor) == ("kx", 2)
    assert "m6.capacity_factor=0: must be over 0" in refusal(ds("m6.capacity_factor", 0))
    assert resolved(ds("m6", "null")).model == recipe().model_shape()


@pytest.mark.parametrize("file", [NVME, str(FOLDER / "cpu-offload.json")])
def test_offload_without_a_compiler(file, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    machine.has_libaio.cache_clear()
    try:
        message = refusal(file=file, swap=tmp_path)
    finally:
        machine.has_libaio.cache_clear()
    assert message.startswith("zero_optimization.offload_") and "g++" in message and "install" in message


def test_nvme_fills_in_paths_and_buffers(tmp_path):
    config = resolved(file=NVME, swap=tmp_path / "not" / "yet")
    zero = config.values["zero_optimization"]
    assert tiers(config) == ("nvme", "nvme")
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == str(tmp_path / "not" / "yet")
    assert zero["offload_param"]["buffer_size"] == largest_partition(config.model, 2, 2)
    assert not any(tmp_path.iterdir())


def test_adapters_have_buffers_on_nvme(tmp_path):
    begun = ("start.checkpoint=x", "start.digest=y", "start.tasks=[caption]", "tune.adapter_rank=4")
    zero = resolved(*begun, file=NVME, swap=tmp_path).values["zero_optimization"]
    assert zero["offload_param"]["buffer_count"] == 9
    few = ds("zero_optimization.offload_param.buffer_count", 5)
    assert "with their adapters take 9: raise it" in refusal(*begun, few, file=NVME, swap=tmp_path)


@pytest.mark.parametrize(("block", "elements"), [(2**16, 2**18), (2**22, 2**20)])
def test_an_optimizer_on_nvme_is_updated_a_weight_at_a_time(tmp_path, block, elements):
    zero = resolved(ds("aio.block_size", block), file=NVME, swap=tmp_path).values["zero_optimization"]
    assert zero["sub_group_size"] == elements
    # Norms are summed by sub-groups, and the two tiers agree to the bit.
    assert resolved(file=str(FOLDER / "cpu-offload.json")).values["zero_optimization"]["sub_group_size"] == 2**18
    assert "sub_group_size" not in resolved().values["zero_optimization"]


def test_nvme_without_a_path_is_auto(tmp_path):
    config = resolved(ds("zero_optimization.offload_optimizer.device", "nvme"), swap=tmp_path)
    assert config.values["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path)


def test_a_path_of_ones_own(tmp_path):
    """Runs that share it have each a folder of its own there: DeepSpeed's files have the same names in all runs."""
    own = ds("zero_optimization.offload_param.nvme_path", tmp_path / "own")
    first, again, other = (resolved(own, file=NVME, swap=tmp_path / name / "swap") for name in ("a", "a", "b"))
    folders = [Path(c.values["zero_optimization"]["offload_param"]["nvme_path"]) for c in (first, again, other)]
    assert folders[0] == folders[1] != folders[2]
    assert all(folder.parent == tmp_path / "own" for folder in folders)
    assert first.swap_folders == {folders[0], tmp_path / "a" / "swap"}


@pytest.mark.parametrize("shape", ["model.layers=1", "model.share_layers=true"])
def test_one_physical_layer_on_one_rank_is_not_swapped(shape, tmp_path):
    assert "cannot swap one physical layer on one rank" in refusal(shape, file=NVME, swap=tmp_path, world=1)
    assert resolved(shape, file=NVME, swap=tmp_path, world=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("aio.queue_depth", 10**9), ("aio.block_size", 1e12), ("zero_optimization.reduce_bucket_size", 1e30),
        ("zero_optimization.offload_param.buffer_count", 1e30), ("zero_optimization.offload_param.nvme_path", "a\0b"),
        ("zero_optimization.offload_param.nvme_path", ""), ("m6.capacity_factor", 1e20),
    ],
)  # fmt: skip
def test_what_would_take_all_memory_or_crash_is_refused(key, value, tmp_path):
    text = json.dumps(value) if isinstance(value, str) else value
    assert key.rpartition(".")[2] in refusal(ds(key, text), file=NVME, swap=tmp_path)


def test_a_model_without_patches_is_refused():
    assert refusal("model.image_patches=0").startswith("model.image_patches=0: DeepSpeed cannot shard")


def test_a_buffer_that_is_too_small(tmp_path):
    key = "zero_optimization.offload_param.buffer_size"
    largest = largest_partition(recipe().model_shape(), 2, 2)
    message = refusal(ds(key, largest - 1), file=NVME, swap=tmp_path)
    assert message.startswith(f"{key}={largest - 1} is less") and "raise it, or say auto" in message
    zero = resolved(ds(key, largest), file=NVME, swap=tmp_path).values["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] == largest


def test_no_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    needed = recipe().model_shape().parameter_counts().total * 18
    bf16 = ds("bf16.enabled", True)  # 16 bytes of optimizer state and 2 of working weights a parameter
    for free, enough in ((needed, True), (needed - 10**6, False)):
        monkeypatch.setattr(ds_config.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if enough:
            assert resolved(bf16, file=NVME, swap=tmp_path)
        else:
            message = refusal(bf16, file=NVME, swap=tmp_path)
            assert f"nvme_path={tmp_path}: " in message and "GB free" in message and "GB needed on this node" in message


def test_a_node_needs_its_own_share_of_space_only(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    half = recipe().model_shape().parameter_counts().total * 18 // 2
    monkeypatch.setattr(ds_config.shutil, "disk_usage", lambda _: usage._replace(free=half + 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert resolved(ds("bf16.enabled", True), file=NVME, swap=tmp_path)


@pytest.mark.parametrize(("world", "experts", "found"), [(1, 16, 1), (2, 16, 2), (3, 16, 1), (6, 16, 2), (4, 0, 1)])
def test_auto_expert_parallelism_means_the_fewest_copies(world, experts, found):
    changes = [ds("train_micro_batch_size_per_gpu", 1), "global_batch=12", f"model.experts={experts}"]
    assert resolved(*changes, world=world).expert_parallel == found


@pytest.mark.parametrize("place", ["/proc/swap", "/dev/null/swap", "/sys", "x" * 300])
def test_a_place_that_cannot_be_written(place, tmp_path):
    path = place if place.startswith("/") else str(tmp_path / place)
    message = refusal(file=NVME, swap=Path(path))
    assert "nvme_path=" in message and "give a folder on a disk" in message


@pytest.mark.parametrize(
    "shape",
    [
        PRESETS["m6-tiny"].config,
        ModelConfig(layers=2, hidden=64, ffn=512, heads=4, text_vocab=100, image_codes=0, image_channels=12),
        ModelConfig(layers=2, hidden=64, ffn=512, heads=4, text_vocab=100, image_codes=0, gated_experts=True),
        ModelConfig(layers=2, hidden=64, ffn=8, heads=4, experts=8, gated_experts=True, text_vocab=100, image_codes=0),
        ModelConfig(layers=1, hidden=16, ffn=1, heads=2, experts=4096, text_vocab=10, image_codes=0, image_channels=3),
        ModelConfig(layers=1, hidden=16, ffn=8, heads=2, text_vocab=10, image_codes=0, image_channels=3),
        ModelConfig(layers=1, hidden=256, ffn=8, heads=2, text_vocab=10, image_codes=0, image_channels=3),
        ModelConfig(layers=1, hidden=8, ffn=8, heads=2, text_vocab=10, max_positions=8, image_codes=0,
                    image_channels=3, image_patches=900),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("parallel", "world"), [(1, 1), (1, 4), (2, 4), (4, 4)])
def test_the_largest_partition_is_the_built_models(shape, parallel, world):
    parallel = parallel if shape.experts else 1
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in M6(shape).named_parameters()}
    experts = [size for name, size in sizes.items() if ".experts." in name]
    others = [size for name, size in sizes.items() if ".experts." not in name]
    assert bool(experts) == bool(shape.experts)
    largest = max(math.ceil(max(others) / world), math.ceil(max(experts, default=0) / parallel / (world // parallel)))
    assert largest_partition(shape, parallel, world) == largest


def test_micro_batches_hold_whole_contrastive_groups():
    groups = ["tasks={caption: 1, contrast: 1}", "contrast_pairs=8"]
    auto = ds("train_micro_batch_size_per_gpu", "auto")
    assert resolved(*groups, auto).micro_batch == 32  # of 64 rows on two ranks
    assert resolved(*groups, "contrast_pairs=16", auto).micro_batch == 32
    problem = refusal(*groups, "contrast_pairs=32", auto)
    assert "share of 32 rows" in problem and "groups of 64: change contrast_pairs=32" in problem
    problem = refusal(*groups, ds("train_micro_batch_size_per_gpu", 8))
    assert "train_micro_batch_size_per_gpu=8 is not divisible by the 16 rows" in problem


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_emoji_recipe_runs_on_one_rank_as_it_is(gpus, tmp_path):
    recipe = load_recipe(FOLDER.parent / "launch" / "recipes" / "emoji.yaml")
    assert resolve(recipe, 1, gpus, tmp_path).micro_batch == 128


def test_deepspeed_is_set_up_for_the_coldest_tier_of_a_granular_policy(tmp_path):
    config = resolved(
        ds("m6.offload.parameters.nvme", "2-3"), ds("m6.offload.optimizer.device", "0-3,outside"), swap=tmp_path
    )
    zero = config.values["zero_optimization"]
    assert zero["offload_param"]["device"] == "nvme" and "offload_optimizer" not in zero
    assert tiers(config) == ("device: outside, layers 0-1; nvme: layers 2-3", "device")
    assert config.swap_folders == {tmp_path}


def test_a_granular_policy_and_max_in_cpu_exclude_each_other(tmp_path):
    problem = refusal(ds("m6.offload.parameters.cpu", "1"), file=NVME, swap=tmp_path)
    assert problem.startswith("zero_optimization.offload_param.max_in_cpu: m6.offload.parameters says what is where")


@pytest.mark.parametrize(
    ("key", "value"), [("m6.offload.parameters.device", "{}"), ("m6.offload.device_bytes", "much"), ("m6.offload.x", 1)]
)
def test_what_a_granular_policy_cannot_hold_is_refused(key, value):
    assert refusal(ds(key, value)).startswith(f"{key}=" if "x" not in key else key)
