"""`m6 plan`: what it refuses, by-hand arithmetic, and what must hold whatever the numbers."""

import datetime
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.plan import Request, plan_search, plan_training
from launch.planner.cluster import FOLDER, Cluster, load_cluster
from launch.planner.hardware import Hardware
from launch.planner.job import Shares
from launch.planner.memory import add_device
from launch.planner.plan import Plan, as_json, make_plan
from launch.planner.search import search
from launch.planner.step import add_step
from launch.planner.terms import Terms
from launch.planner.workload import Fill, expert_rows, load_work
from model.config import PRESETS
from training.errors import UserError

V100, A100, H100 = "v100-32g-x480", "a100-80g-x512", "h100-80g-x512"
CONFIG = "ds_configs/gpu-8.json"
LAW = settings(deadline=None, derandomize=True, max_examples=60)


def plan_of(model: str, cluster: str | Cluster, *changes: str, tokens: float | None = None) -> Plan:
    found = load_cluster(cluster) if isinstance(cluster, str) else cluster
    return make_plan(load_work(model, found, CONFIG, tokens, changes, False))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from launch.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "plan", *arguments], capture_output=True, text=True, timeout=60
    )


def test_json_has_what_is_promised_and_torch_is_not_imported() -> None:
    program = (
        "import sys\nfrom launch.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    arguments = ["plan", "--model", "m6-1t", "--cluster", V100, "--ds-config", CONFIG, "--tokens", "1e10", "--json"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False"
    plan = json.loads(done.stdout)
    assert plan["parameters"]["total"] == PRESETS["m6-1t"].config.parameter_counts().total
    assert plan["fits"] is True and plan["limits"] == []
    estimates = [
        *(plan["memory"][key] for key in ("device_bytes", "host_bytes_per_node", "nvme_bytes_per_node")),
        plan["step"]["seconds"], plan["tokens_per_second"], plan["flops_utilization"], plan["days"],
        plan["energy"]["kwh"], plan["co2e_kg"], plan["cost"],
    ]  # fmt: skip
    for estimate in estimates:
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert plan["step"]["parts"]["optimizer"] > 0


def test_the_sums_come_out() -> None:
    plan = plan_of("m6-t-100b", A100, "global_batch=4096", tokens=2e9)
    value = {key: term.value for key, term in plan.terms.items()}
    cluster = load_cluster(A100)
    assert value["days"] == pytest.approx(2e9 / value["tokens_per_second"] / 86400)
    assert value["tokens_per_second"] == pytest.approx(4096 * 128 / value["step.seconds"])
    assert value["energy.joules_per_token"] * 2e9 == pytest.approx(value["energy.kwh"] * 3.6e6)
    it = sum(value[f"energy.{part}"] for part in ("compute", "host", "switches"))
    assert value["energy.kwh"] == pytest.approx(it * cluster.pue)
    assert value["cost"] == pytest.approx(512 * value["days"] * 24 * cluster.price.per_device_hour)
    assert value["co2e_kg"] == pytest.approx(value["energy.kwh"] * 0.582)


def test_states_by_hand() -> None:
    """1T on 480: 16-bit weights on the device, 16 bytes a parameter on the host."""
    plan = plan_of("m6-1t", V100, "ds.zero_optimization.offload_param.device=none")
    share = PRESETS["m6-1t"].config.parameter_counts().total / 480
    assert plan.terms["memory.device.parameters"].value == pytest.approx(2 * share, rel=1e-3)
    assert plan.terms["memory.cpu.optimizer"].value == pytest.approx(16 * share * 16, rel=1e-3)  # 16 ranks a node


@pytest.mark.parametrize(
    ("recompute", "tensors", "exchanged"), [("true", 1199.3e6, 125.8e6), ("false", 1450.6e6, 83.9e6)]
)
def test_a_rank_as_rehearsed(recompute: str, tensors: float, exchanged: float) -> None:
    """`m6 rehearse --model m6-t-1.4b --world 32`: figures and command in docs/planner.md."""
    cluster = load_cluster(V100).model_copy(update={"nodes": 2})
    changes = ["ds.bf16.enabled=false", f"ds.m6.recompute={recompute}"]
    terms = make_plan(load_work("m6-t-1.4b", cluster, "ds_configs/cpu.json", None, changes, False)).terms
    assert terms["memory.states"].value == pytest.approx(694.8e6, rel=1e-3)
    assert terms["memory.tensors"].value == pytest.approx(tensors, rel=0.06)
    assert terms["step.all_to_all_bytes"].value == pytest.approx(exchanged, rel=1e-3)


def test_tokens_of_a_rank_fewer_than_experts_still_take_a_place_each() -> None:
    model = PRESETS["m6-10t"].config
    assert expert_rows(model, 1024) == 10  # 10,240 experts, one place each
    assert expert_rows(model, 2**20) == pytest.approx(128 * 10_240 / 2**20)  # ceil(1.25 * 102.4) places
    assert expert_rows(replace(model, capacity="none"), 1024) == model.k


RATES = [
    "link", "network", "host_link", "host_links", "host_bandwidth", "disk_read", "disk_write", "device_bandwidth",
]  # fmt: skip


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("tier", ["none", "cpu", "nvme"])
def test_more_bandwidth_is_never_slower(rate: str, tier: str) -> None:
    changes = [f"ds.zero_optimization.offload_{kind}.device={tier}" for kind in ("param", "optimizer")]
    work = load_work("m6-t-100b", load_cluster(A100), CONFIG, None, ["global_batch=4096", *changes], False)
    machine = work.cluster.hardware
    seconds = [
        add_step(Terms(), work.job, replace(machine, **{rate: getattr(machine, rate) * factor})).value
        for factor in (0.1, 0.5, 1, 2, 10)
    ]
    assert seconds == sorted(seconds, reverse=True)


@LAW
@given(
    st.sampled_from(RATES), st.floats(1.01, 100), st.sampled_from(["none", "cpu", "nvme"]), st.booleans(),
    st.booleans(), st.sampled_from([1, 8, 64]),
)  # fmt: skip
def test_more_bandwidth_is_never_slower_in_any_settings(
    rate: str, factor: float, tier: str, bf16: bool, recompute: bool, nodes: int
) -> None:
    cluster = load_cluster(A100).model_copy(update={"nodes": nodes})
    changes = [f"ds.zero_optimization.offload_{kind}.device={tier}" for kind in ("param", "optimizer")]
    changes += [f"ds.bf16.enabled={str(bf16).lower()}", f"ds.m6.recompute={str(recompute).lower()}"]
    work = load_work("m6-t-1.4b", cluster, CONFIG, None, ["global_batch=4096", *changes], False)
    machine = work.cluster.hardware
    faster = replace(machine, **{rate: getattr(machine, rate) * factor})
    slower = add_step(Terms(), work.job, machine).value
    assert add_step(Terms(), work.job, faster).value <= slower * (1 + 1e-12)


def test_a_higher_peak_is_never_slower() -> None:
    work = load_work("m6-t-100b", load_cluster(A100), CONFIG, None, ["global_batch=4096"], False)
    machine = work.cluster.hardware

    def seconds(factor: float) -> float:
        peaks = {name: peak * factor for name, peak in machine.peak_flops.items()}
        return add_step(Terms(), work.job, replace(machine, peak_flops=peaks)).value

    assert seconds(1) >= seconds(2) >= seconds(4)


def test_more_nodes_take_no_longer_over_the_same_work() -> None:
    cluster = load_cluster(A100)
    rates = [
        plan_of("m6-t-100b", cluster.model_copy(update={"nodes": nodes}), "global_batch=4096").terms["days"].value
        for nodes in (16, 32, 64)
    ]
    assert rates == sorted(rates, reverse=True)


def test_more_offload_never_takes_more_of_the_device() -> None:
    """From tier to tier, and layer by layer."""
    tiers = ("none", "cpu", "nvme")
    found = [
        plan_of("m6-t-100b", A100, f"ds.zero_optimization.offload_{kind}.device={tier}", "global_batch=4096")
        for kind in ("optimizer", "param")
        for tier in tiers
    ]
    sizes = [plan.terms["memory.device_bytes"].value for plan in found]
    assert sizes[:3] == sorted(sizes[:3], reverse=True) and sizes[3:] == sorted(sizes[3:], reverse=True)
    by_layer = [
        plan_of(
            "m6-t-100b", A100, "global_batch=4096", "ds.zero_optimization.offload_optimizer.device=none",
            *([f"ds.m6.offload.optimizer.cpu=0-{layers - 1}"] if layers else []),
        ).terms["memory.device_bytes"].value
        for layers in (0, 1, 12, 24)
    ]  # fmt: skip
    assert by_layer == sorted(by_layer, reverse=True) and len(set(by_layer)) == 4


def test_fp32_moves_twice_the_bytes() -> None:
    changes = ["global_batch=4096", "ds.zero_optimization.offload_optimizer.device=none"]
    half, full = (plan_of("m6-t-100b", A100, *changes, f"ds.bf16.enabled={on}").terms for on in ("true", "false"))
    for key in ("step.activations", "step.dispatch", "step.all_to_all_bytes", "step.gathers", "step.host_weights"):
        assert full[key].value == pytest.approx(2 * half[key].value) and half[key].value > 0, key
    assert full["step.logits"].value / half["step.logits"].value == pytest.approx(12 / 10)  # beside fp32 copies
    assert full["step.weights"].value / half["step.weights"].value == pytest.approx(
        (4 * 3 + 8) / (2 * 3 + 8)
    )  # recomputed


@LAW
@given(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4]), st.booleans())
def test_parallel_parts_exchange_weights_of_their_size(tp: int, pp: int, offloaded: bool) -> None:
    work = load_work("m6-t-100b", load_cluster(A100), CONFIG, None, ["global_batch=4096"], False)

    def seconds(size: int) -> Terms:
        layout = replace(
            work.job.layout, tp=tp, pp=pp, dp=512 // (tp * pp), weight_bytes=size,
            activations=Shares.all_on("cpu" if offloaded else "device"),
        )  # fmt: skip
        terms = Terms()
        add_step(terms, replace(work.job, layout=layout), work.cluster.hardware)
        return terms

    half, full = seconds(2), seconds(4)
    for key in ("step.tensor_parallel", "step.sends", "step.host_activations"):
        assert full[key].value == pytest.approx(2 * half[key].value)
    assert (half["step.host_activations"].value > 0) == offloaded


def test_a_save_stalls_for_the_copy_of_states_where_they_are() -> None:
    cluster = load_cluster(V100)
    machine, total = cluster.hardware, PRESETS["m6-1t"].config.parameter_counts().total
    assert machine.busy_host_link < machine.host_link
    rates = {"none": 16 * machine.busy_host_link, "cpu": machine.host_bandwidth / 2, "nvme": machine.disk_read}
    for tier, rate in rates.items():
        plan = plan_of("m6-1t", cluster, f"ds.zero_optimization.offload_optimizer.device={tier}")
        stall = plan.terms["checkpoint.stall_seconds"].value
        assert stall == pytest.approx(12 * total / 30 / (0.8 * rate), rel=1e-3)


def test_fp32_weights_colder_than_their_states_save_nothing_and_are_told() -> None:
    """Where both are on one tier they share their memory."""
    base = ["model.share_layers=true", "ds.zero_optimization.offload_optimizer.device=none", "global_batch=4096"]

    def plan(weights: str, bf16: str) -> Plan:
        last = [f"ds.zero_optimization.offload_param.device={weights}", f"ds.bf16.enabled={bf16}"]
        return plan_of("m6-10t", A100, *base, *last)

    def told(plan: Plan) -> bool:
        return any(remark.startswith("weights colder than their fp32 states save nothing") for remark in plan.remarks)

    warm, cold = plan("none", "false"), plan("cpu", "false")
    assert cold.terms["memory.states"].value == pytest.approx(warm.terms["memory.states"].value, rel=1e-3)
    assert told(cold) and not told(warm) and not told(plan("cpu", "true"))


@LAW
@given(
    st.sampled_from(["m6-t-1.4b", "m6-t-100b"]), st.booleans(), st.booleans(), st.sampled_from(["device", "cpu"]),
    st.integers(0, 24),
)  # fmt: skip
def test_a_layer_more_on_the_host_never_takes_more_of_the_device(
    model: str, bf16: bool, recompute: bool, weights: str, layers: int
) -> None:
    """But for weights colder than fp32 states, which the test above is about."""
    kinds = {"device": "none"}
    changes = [
        "global_batch=4096", f"ds.bf16.enabled={str(bf16).lower()}", f"ds.m6.recompute={str(recompute).lower()}",
        f"ds.zero_optimization.offload_param.device={kinds.get(weights, weights)}",
        "ds.zero_optimization.offload_optimizer.device=none",
    ]  # fmt: skip
    layers = min(layers, PRESETS[model].config.layers)
    sizes = [
        plan_of(model, A100, *changes, *([f"ds.m6.offload.optimizer.cpu=0-{count - 1}"] if count else []))
        .terms["memory.device_bytes"].value
        for count in sorted({0, layers, PRESETS[model].config.layers})
    ]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True)


@LAW
@given(st.floats(1, 1e18), st.floats(0.001, 1))
def test_the_figures_of_any_training_are_json_and_in_proportion(tokens: float, filled: float) -> None:
    work = load_work("m6-1t", load_cluster(H100), CONFIG, tokens, ["global_batch=4096"], False, Fill(filled))
    once, twice = (make_plan(replace(work, tokens=size)) for size in (tokens, 2 * tokens))
    json.dumps(as_json(once), allow_nan=False)
    for key in ("days", "energy.kwh", "co2e_kg", "cost"):
        assert twice.terms[key].value == pytest.approx(2 * once.terms[key].value)
    assert twice.terms["energy.joules_per_token"].value == pytest.approx(once.terms["energy.joules_per_token"].value)


def test_numbers_that_overflow_are_one_line() -> None:
    with pytest.raises(UserError, match=r"the plan's numbers overflow \(hours is inf\)"):
        plan_of("m6-1t", V100, tokens=1e400)


def test_parts_of_memory_add_up(tmp_path: Path) -> None:
    of_gpus = plan_of("m6-t-100b", A100, "global_batch=4096")
    of_cpus = make_plan(load_work("m6-tiny", cpus(tmp_path), "ds_configs/nvme.json", None, [], False))
    for plan in (of_gpus, of_cpus):
        parts = as_json(plan)["memory"]["parts"]
        for tier, key in (("device", "device_bytes"), ("cpu", "host_bytes_per_node"), ("nvme", "nvme_bytes_per_node")):
            assert sum(parts[tier].values()) == pytest.approx(plan.terms[f"memory.{key}"].value)


def test_disks_are_part_of_what_fits(tmp_path: Path) -> None:
    for changes in (CPUS, {}):
        cluster = load_cluster(changed(tmp_path, **changes, disks__bytes=0))
        plan = make_plan(load_work("m6-t-1.4b", cluster, "ds_configs/nvme.json", None, ["global_batch=1024"], False))
        assert any(limit.startswith("NVMe space: ") for limit in plan.limits)


def test_disks_too_small_for_checkpoints_are_told(tmp_path: Path) -> None:
    for size, told in ((0, True), (0.5e12, True), (30e12, False)):
        plan = plan_of("m6-1t", load_cluster(changed(tmp_path, disks__bytes=size)), "global_batch=4096")
        assert plan.fits
        found = [remark for remark in plan.remarks if remark.startswith("keep=2: with the one being written, ")]
        assert bool(found) == told
        assert all(f"{3 * plan.terms['checkpoint.bytes'].value / 64 / 1e9:,.1f} GB a node" in one for one in found)


def test_what_is_frozen_takes_no_states_and_is_told() -> None:
    begun = ["start.checkpoint=x", "start.digest=y", "start.tasks=[caption]"]
    whole, some = (plan_of("m6-t-100b", A100, *begun, *changes) for changes in ((), ("tune.adapter_rank=16",)))
    trained, total = (some.terms[f"parameters.{name}"].value for name in ("trained", "total"))
    assert whole.terms["parameters.trained"].value == whole.terms["parameters.total"].value < total
    assert as_json(some)["parameters"]["trained"] == trained < 0.05 * total
    assert any(f"{trained:,.0f} of {total:,.0f} parameters are trained" in remark for remark in some.remarks)
    assert not any("are trained" in remark for remark in whole.remarks)
    states = [plan.terms["memory.states"].value + plan.terms["memory.cpu.optimizer"].value for plan in (whole, some)]
    assert states[1] < states[0] / 3


def test_settings_that_no_term_stands_for_are_told() -> None:
    changes = [
        "ds.zero_optimization.stage3_param_persistence_threshold=100000", "ds.communication_data_type=fp32",
        "ds.zero_optimization.stage3_prefetch_bucket_size=5", "ds.flops_profiler.enabled=true",
        "ds.zero_optimization.offload_param.buffer_count=8", "ds.zero_optimization.reduce_bucket_size=1000000",
    ]  # fmt: skip
    [told] = [remark for remark in plan_of("m6-1t", V100, *changes).remarks if remark.startswith("not modelled: ")]
    names = told.removeprefix("not modelled: ").partition(";")[0].split(", ")
    assert sorted(names) == [
        "communication_data_type=fp32", "flops_profiler.enabled=true",
        "zero_optimization.offload_param.buffer_count=8", "zero_optimization.stage3_prefetch_bucket_size=5",
    ]  # fmt: skip
    for path in Path("ds_configs").glob("*.json"):
        work = load_work("m6-1t", load_cluster(V100), str(path), None, [], False)
        assert work.ignored == []


def test_bands_cover_what_was_measured_here(tmp_path: Path) -> None:
    page = Path("benchmarks/plan_here.md").read_text(encoding="utf-8")
    jobs = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| .* \| \d", line)]
    assert len(jobs) >= 10
    for name, *figures in jobs:
        step, step_planned, memory, memory_planned = (float(figures[place]) for place in (0, 1, 3, 4))
        ds_config = "ds_configs/nvme.json" if "NVMe" in name else "ds_configs/cpu.json"
        plan = make_plan(load_work("m6-tiny", cpus(tmp_path), ds_config, None, [], False))
        for key, measured, planned in (
            ("step.seconds", step, step_planned), ("memory.device_bytes", memory, memory_planned)
        ):  # fmt: skip
            assert max(measured / planned, planned / measured) <= 1 + plan.band(key), name


def test_larger_micro_batches_take_more_memory_and_offloaded_activations_less() -> None:
    work = load_work("m6-t-100b", load_cluster(A100), CONFIG, None, ["global_batch=16384"], False)
    job = work.job

    def size(**changes: object) -> float:
        changed = replace(job, layout=replace(job.layout, **changes))
        terms = Terms()
        return add_device(terms, changed, terms.add("memory.states", "0", "B")).value

    assert size(micro_batch=1) < size(micro_batch=2) < size(micro_batch=8)
    assert size(activations=Shares.all_on("cpu")) < size()


def test_what_is_short_is_named_with_its_size() -> None:
    plan = plan_of("m6-10t", V100, "global_batch=3840", "ds.expert_parallel.autoep_size=160")
    assert not plan.fits
    assert plan.limits[0].startswith("host memory: ") and "GB are short: take more nodes, or nvme" in plan.limits[0]
    assert as_json(plan)["fits"] is False


def test_every_term_explains_itself() -> None:
    done = command("--model", "m6-1t", "--cluster", V100, "--ds-config", CONFIG, "--explain", "days")
    assert done.returncode == 0 and "= hours / 24" in done.stdout and "step.all_to_all =" in done.stdout
    for key, term in plan_of("m6-1t", V100).terms.items():
        assert term.formula and term.unit and term.key == key


def test_search_finds_the_cheapest_that_fits_and_says_why_the_rest_lost() -> None:
    work = load_work("m6-1t", load_cluster(V100), CONFIG, None, [], False)
    found = search(work)
    assert found.best is not None and found.best.plan is not None and found.best.plan.fits
    fitting = [c for c in found.candidates if c.plan and c.plan.fits]
    assert found.best.cost == min(candidate.cost for candidate in fitting)
    assert found.best.settings["zero_optimization.offload_optimizer.device"] == "cpu"
    lost = {candidate.lost(found.best) for candidate in found.candidates}
    assert "the cheapest that fits" in lost and any(reason.startswith("device memory: ") for reason in lost)


TEN_T, ONE_T = "launch/recipes/m6-10t.yaml", "ds_configs/m6-1t.json"


@pytest.mark.parametrize(
    ("model", "cluster", "ds_config", "changes", "delinked", "filled"),
    [
        (TEN_T, H100, None, [], True, 1.0),
        (TEN_T, H100, None, ["delink.then.ds.m6.offload.parameters.device=0-2"], True, 0.5),
        ("m6-1t", V100, ONE_T, ["ds.m6.offload.optimizer.device=0-2"], False, 0.43),
    ],
)
def test_what_a_search_prints_is_what_it_promises(
    capsys: pytest.CaptureFixture[str], model: str, cluster: str, ds_config: str | None, changes: list[str],
    delinked: bool, filled: float,
) -> None:  # fmt: skip
    plan_search(Request(model, cluster, ds_config, None, changes, delinked, filled), False)
    taken = capsys.readouterr().out.partition("To take it: ")[2].split()
    assert all(word.startswith("delink.then.ds." if delinked else "ds.") for word in taken)
    promised = search(Request(model, cluster, ds_config, None, changes, delinked, filled).work()).best
    plan = make_plan(Request(model, cluster, ds_config, None, [*changes, *taken], delinked, filled).work())
    assert promised and promised.plan
    assert {key: term.value for key, term in plan.terms.items()} == {
        key: term.value for key, term in promised.plan.terms.items()
    }


def test_a_search_says_which_settings_were_refused_and_which_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    plan_search(Request("m6-1t", V100, CONFIG, None, ["ds.bf16.enabled=false"], False), False)
    said = capsys.readouterr().out.splitlines()
    found = search(load_work("m6-1t", load_cluster(V100), CONFIG, None, ["ds.bf16.enabled=false"], False))
    [refusal] = {candidate.refused for candidate in found.candidates if candidate.refused}
    assert [line for line in said if "m6.optimizer_states=8-bit" in line and refusal in line]
    lost = [line.partition(", at the least: ")[0] for line in said if ", at the least: " in line]
    fitting = [candidate.settings for candidate in found.candidates if candidate.fits]
    assert lost == ["weights none, fp32 optimizer none"]
    assert not any(one["zero_optimization.offload_optimizer.device"] == "none" for one in fitting)


def test_a_search_tells_what_its_choice_takes_for_granted(capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("m6-1t", V100, CONFIG, None, [], False)
    plan_search(request, False)
    assert "Note: V100-SXM3-32GB has no bf16: " in capsys.readouterr().out
    plan_search(request, True)
    found = json.loads(capsys.readouterr().out)
    assert any(remark.startswith("V100-SXM3-32GB has no bf16: ") for remark in found["remarks"])


def test_a_search_keeps_contrastive_groups_whole(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"model": "m6-t-1.4b", "steps": 9, "global_batch": 512 * 128, "tasks": {"contrast": 1}})
    )
    for pairs, rows in ((8, {16, 32}), (32, {64})):
        work = load_work(str(recipe), load_cluster(A100), CONFIG, None, [f"contrast_pairs={pairs}"], False)
        found = search(work)
        tried = {candidate.settings["train_micro_batch_size_per_gpu"] for candidate in found.candidates}
        assert found.best and tried == rows


def changed(tmp_path: Path, **values: object) -> str:
    """A cluster file with keys (`a__b` for a.b) set, taken out where None, or left empty where `...`."""
    cluster = yaml.safe_load((FOLDER / f"{H100}.yaml").read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        block = cluster
        for parent in parents:
            block = block[parent]
        if value is None:
            del block[last]
        else:
            block[last] = None if value is ... else value
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return str(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"host__memory_bytes": None}, "host.memory_bytes is missing"),
        ({"links__between_nodes": -1}, "links.between_nodes=-1: must be a finite number from 1 to 1e+21"),
        ({"links__host_to_devices": "x"}, "links.host_to_devices='x': must be a finite number from 1 to 1e+21"),
        ({"links__host_to_devices": 0}, "links.host_to_devices=0: must be a finite number from 1 to 1e+21"),
        ({"links__host_to_device": 1e-300}, "links.host_to_device=1e-300: must be a finite number from 1 to 1e+21"),
        ({"links__inside_node": True}, "links.inside_node=True: must be a finite number from 1 to 1e+21"),
        ({"disks__read_bytes_per_second": -1}, "disks.read_bytes_per_second=-1: must be a finite number from 1"),
        ({"device__process_bytes": "x"}, "device.process_bytes='x': must be a finite number from 1"),
        ({"device__peak_flops": {"bf16": 1e12, "bf61": 1e12}}, "device.peak_flops.bf61 is unknown; did you mean bf16?"),
        ({"price__date": ...}, "price.date=None: must be a whole number or text"),
        ({"price__date": [2026]}, "price.date=[2026]: must be a whole number or text"),
        ({"nodes": 0}, "nodes=0: must be a whole number from 1 to 1000000"),
        ({"pue": 0.5}, "pue=0.5: must be a finite number from 1 to 5"),
        ({"device__memory_bytes": float("inf")}, "device.memory_bytes=inf: must be a finite number from 1"),
        ({"power__watts": 5}, "power.watts is unknown; did you mean"),
        ({"power__node_watts": 100}, "power.node_watts=100: is less than one device's 700"),
        ({"power__node_watts": 800}, "power.node_watts=800: its 8 devices alone draw 5040 while they compute"),
    ],
)
def test_a_wrong_cluster_file_is_one_line(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_cluster(changed(tmp_path, **values))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m6-1t"], "m6: --cluster is missing: a plan needs a model, a cluster and a ds_config"),
        (["--model", "m6-1t", "--cluster", "moon"], "m6: --cluster moon: no such cluster; known: a100-80g-x512, "),
        (["--model", "m7", "--cluster", V100], "m6: --model m7: is no preset and no recipe (.yaml); "),
        (
            ["--model", "m6-1t", "--cluster", V100, "--ds-config", CONFIG, "ds.zero_optimization.offload_params={}"],
            "zero_optimization.offload_params is unknown or untried; did you mean zero_optimization.offload_param?",
        ),
        (["--model", "m6-1t", "--cluster", V100, "--ds-config", CONFIG, "--explain", "dais"], "did you mean days"),
        (["--validate", "nowhere.csv"], "m6: --validate nowhere.csv: cannot be read"),
        (["--validate", "nowhere.csv", "--model", "m6-1t"], "m6: --model says nothing beside --validate: leave one"),
        (["--validate", "nowhere.csv", "steps=5"], "m6: KEY=VALUE says nothing beside --validate: leave one"),
        (["--search", "--explain", "days"], "m6: --explain says nothing beside --search: leave one"),
        (["--json", "--explain", "days"], "m6: --json says nothing beside --explain: leave one"),
        (["--tokens", "nan"], "m6: Invalid value for '--tokens': nan is no number"),
        (["--tokens", "1e400"], "m6: Invalid value for '--tokens': inf is not in the range"),
        (["--filled", "nan"], "m6: Invalid value for '--filled': nan is no number"),
        (["--filled", "1e-300"], "m6: Invalid value for '--filled': 1e-300 is not in the range"),
        (
            ["--model", "m6-1t", "--cluster", V100, "--filled", "auto"],
            "m6: --filled auto: m6-1t has no data to look at; give a recipe, or a share",
        ),
        (["--model", "m6-1t", "--cluster", V100, "steps=5"], "m6: steps=…: a preset has no steps; say --tokens"),
        (
            ["--model", "m6-1t", "--cluster", V100, "model.layers=100000000000"],
            "m6: model.layers=100000000000: is too much to plan; take at most 10000",
        ),
        (
            ["--model", "m6-1t", "--cluster", V100, "--ds-config", CONFIG, "ds.m6=null", "--search"],
            "m6: --search: no settings fit: override 'ds.m6.optimizer_states=fp32': m6 has no parts",
        ),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_line(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(tmp_path, device__name="H100 [/b] [v4] :smile:", price__currency="[/]")
    request = Request("m6-1t", path, CONFIG, None, ["global_batch=4096"], False)
    plan_training(request, False, None)
    shown = capsys.readouterr().out
    assert "512 x H100 [/b] [v4] :smile:" in shown and "  [/]" in shown
    plan_search(request, False)
    assert "To take it: " in capsys.readouterr().out


@pytest.mark.parametrize("date", [2026, "2026-07", datetime.date(2026, 7, 1)])
def test_a_price_is_of_any_date(tmp_path: Path, date: object) -> None:
    assert load_cluster(changed(tmp_path, price__date=date)).price.date == date


def test_an_unknown_rate_of_a_precision_is_one_line(tmp_path: Path) -> None:
    cluster = load_cluster(changed(tmp_path, device__peak_flops={"bf16": 989e12}))
    with pytest.raises(UserError, match=r"device\.peak_flops\.fp32 is missing: the job computes in fp32; say how fast"):
        plan_of("m6-1t", cluster, "ds.bf16.enabled=false", "global_batch=4096")


CPUS: dict[str, object] = {"device__kind": "cpu", "device__name": "CPU", "nodes": 1, "devices_per_node": 2}


def cpus(tmp_path: Path) -> Cluster:
    return load_cluster(changed(tmp_path, **CPUS))


@pytest.mark.parametrize("this_one", [False, True])
def test_this_machine_has_no_say_in_the_precision_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, this_one: bool
) -> None:
    monkeypatch.setattr("training.ds_config.multiplies_bf16", lambda: this_one)
    for peaks, precision in (({"bf16": 2e11, "fp32": 1e11}, "bf16"), ({"fp32": 1e11}, "fp32")):
        cluster = load_cluster(changed(tmp_path, **CPUS, device__peak_flops=peaks))
        work = load_work("m6-tiny", cluster, "ds_configs/cpu.json", None, [], False)
        assert work.job.layout.precision == precision


def test_clusters_are_complete() -> None:
    for path in FOLDER.glob("*.yaml"):
        machine = load_cluster(str(path)).hardware
        assert isinstance(machine, Hardware)
        assert f"x{machine.devices}" in path.stem and machine.family.fitted_by


REACHED = {
    "precision": "bf16", "products": 0.9, "passes": 0.2, "weights": 0.3, "states": 0.8, "gathers": 0.8,
    "layer_seconds": 0.008, "expert_seconds": 3e-4,
}  # fmt: skip


@pytest.mark.parametrize("share", [name for name in REACHED if name != "precision"])
def test_a_cpu_that_reaches_more_is_never_slower(tmp_path: Path, share: str) -> None:
    def seconds(value: float) -> float:
        cluster = load_cluster(changed(tmp_path, **CPUS, device__reached=REACHED | {share: value}))
        ds = ["ds.expert_parallel.autoep_size=1"]
        plan = make_plan(load_work("m6-tiny", cluster, "ds_configs/cpu-offload.json", None, ds, False))
        return plan.terms["step.seconds"].value

    slow, fast = (seconds(factor * REACHED[share]) for factor in (1, 2))
    assert slow < fast if share.endswith("seconds") else slow > fast


def test_what_was_reached_in_another_precision_is_told(tmp_path: Path) -> None:
    for precision, told in (("bf16", False), ("fp32", True)):
        cluster = load_cluster(changed(tmp_path, **CPUS, device__reached=REACHED | {"precision": precision}))
        plan = make_plan(load_work("m6-tiny", cluster, "ds_configs/cpu.json", None, ["ds.bf16.enabled=true"], False))
        assert any("was measured in fp32, the job trains in bf16" in remark for remark in plan.remarks) == told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"products": 0}, "device.reached.products=0: must be a finite number from"),
        ({"layer_seconds": -1}, "device.reached.layer_seconds=-1: must be a finite number from 0"),
        ({"precision": "bf61"}, "device.reached.precision"),
        ({"product": 1}, "device.reached.product is unknown; did you mean"),
    ],
)
def test_what_no_cpu_reaches_is_one_line(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_cluster(changed(tmp_path, **CPUS, device__reached=REACHED | values))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_attention_of_a_cpu_is_never_cheaper_where_it_keeps_no_scores(tmp_path: Path) -> None:
    """Beyond MOST_SCORES it takes less memory, and as much time a row."""
    rows = int((2**25 / (4 * 128**2)) // 2)
    seconds = []
    for micro in (rows // 8, rows // 4, rows // 2, rows, 2 * rows, 4 * rows):
        batch = [f"global_batch={4 * rows * 2}", f"ds.train_micro_batch_size_per_gpu={micro}"]
        plan = make_plan(load_work("m6-tiny", cpus(tmp_path), "ds_configs/cpu.json", None, batch, False))
        seconds.append(plan.terms["step.activations"].value / micro)
    assert seconds == pytest.approx([seconds[0]] * len(seconds))


def test_a_machine_that_costs_nothing_is_searched_for_the_quickest(tmp_path: Path) -> None:
    cluster = load_cluster(changed(tmp_path, **CPUS, price__per_device_hour=0))
    found = search(load_work("m6-tiny", cluster, None, None, ["global_batch=64"], False))
    assert found.best and found.best.plan
    fitting = [candidate for candidate in found.candidates if candidate.fits]
    assert found.best.seconds == min(candidate.seconds for candidate in fitting)
    assert fitting[-1].lost(found.best) == f"{fitting[-1].seconds / found.best.seconds:.2f} times the cost"


def test_a_cpu_is_one_whatever_its_name(tmp_path: Path) -> None:
    named = changed(tmp_path, **CPUS | {"device__name": "host of an A100 node"})
    assert load_cluster(named).hardware.family == cpus(tmp_path).hardware.family
    Path(named).rename(tmp_path / "here")
    assert load_cluster(str(tmp_path / "here")).hardware.is_cpu
