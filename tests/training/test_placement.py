"""Which layer lives where: what a ds_config's block says, what `auto` chooses, and what it comes to."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.config import PRESETS
from training.errors import UserError
from training.placement import CPU, DEVICE, KINDS, NVME, Elements, Placement, Sizes, Tiers, resolve

MODEL = replace(PRESETS["m6-tiny"].config, layers=6)
ELEMENTS = Elements.of(MODEL, 2, 4)
COLD = {"parameters": CPU, "optimizer": NVME}
LAW = settings(deadline=None, derandomize=True)
BF16, FP32 = Sizes(weight=2), Sizes(weight=4)


def placed(rest=COLD, elements=ELEMENTS, sizes=BF16, **block):
    return resolve(block, rest, MODEL, elements, sizes)


def refusal(**block):
    with pytest.raises(UserError) as error:
        placed(**block)
    return str(error.value)


def test_layers_that_are_not_named_stay_where_deepspeed_has_them():
    found = placed(parameters={"device": "0-1, 4", "nvme": 5}, optimizer={"cpu": "outside"})
    assert str(found.parameters) == "device: layers 0-1,4; cpu: outside, layers 2-3; nvme: layers 5"
    assert str(found.optimizer) == "cpu: outside; nvme: layers 0-5"
    assert found.parameters.of("layers.4.moe.experts.w1") == DEVICE
    assert found.parameters.of("vocabulary.weight") == CPU
    assert set(placed().parameters) == {CPU}


def test_all_uses_of_a_shared_layer_are_where_the_first_is():
    shared = Elements.of(replace(MODEL, share_layers=True), 2, 4)
    found = placed(elements=shared, parameters={"device": "0-5"}, optimizer={"device": "3"})
    assert found.parameters.layers == (DEVICE,) and found.optimizer.layers == (NVME,)


def test_elements_are_those_of_the_model():
    one = Elements.of(MODEL, 1, 1)
    assert sum(one) == MODEL.parameter_counts().total
    many = Elements.of(MODEL, 4, 4)
    assert all(0 <= 4 * share - whole < 3 * 4 for share, whole in zip(many, one, strict=True))


@pytest.mark.parametrize("change", [{}, {"experts": 0, "k": 1}, {"share_layers": True, "bag_width": 8}])
@pytest.mark.parametrize("trained", [{"adapters"}, {"norms", "routers", "adapters"}, {"bags", "embeddings", "experts"}])
def test_elements_that_are_trained_are_those_of_the_parts(change, trained):
    model = replace(MODEL, adapter_rank=4, **change)
    elements, counts = Elements.of(model, 1, 1, trained), model.parameter_counts()
    assert (sum(elements), sum(elements.learning)) == (counts.total, counts.of(trained))
    placement = Placement(*[Tiers.all_on(CPU, len(elements.layers))] * 2)
    held = placement.bytes(elements, BF16)[CPU]
    assert held == {"parameters": 2 * counts.total, "optimizer": 16 * counts.of(trained)}


def test_bytes_by_tier():
    """By hand: 2 + 4 + 4 + 8 bytes a weight, less the master where it is the weight, and a sum of gradients more in
    memory where states are on NVMe."""
    elements = Elements(10, (100, 1000))
    on = Placement(Tiers(DEVICE, (CPU, NVME)), Tiers(DEVICE, (CPU, NVME)))
    assert {tier: sum(kinds.values()) for tier, kinds in on.bytes(elements, BF16).items()} == {
        DEVICE: 10 * 18,
        CPU: 100 * 18 + 1000 * 4,
        NVME: 1000 * 18,
    }
    assert on.bytes(elements, FP32)[CPU] == {"parameters": 400, "optimizer": 100 * 12 + 1000 * 4}
    assert on.bytes(elements, FP32)[NVME] == {"parameters": 4000, "optimizer": 16000}


def test_bytes_of_8_bit_states():
    """2 + 1 + 2 + 2; weights on another tier than their masters are copies of two of their three bytes."""
    sizes = Sizes.of(bf16=True, sums="bf16", compact=True)
    for weights in (CPU, DEVICE, NVME):
        found = Placement(Tiers.all_on(weights, 1), Tiers.all_on(CPU, 1)).bytes(Elements(10, (100,)), sizes)
        assert sum(found[CPU].values()) == 110 * 7
        assert found[weights]["parameters"] == 110 * 2
    wide = Sizes.of(bf16=True, sums="fp32", compact=True)
    assert wide.optimizer(CPU, CPU)[CPU] == 1 + 6 + 2


@LAW
@given(
    budget=st.floats(1e6, 1e9),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True),
    rest=st.fixed_dictionaries({kind: st.sampled_from((CPU, NVME)) for kind in KINDS}),
    sizes=st.sampled_from((BF16, FP32)),
)
def test_auto_keeps_to_its_budget_and_leaves_no_layer_that_would_fit(budget, kinds, rest, sizes):
    try:
        found = placed(rest, sizes=sizes, device_bytes=budget, **{kind: {"device": "auto"} for kind in kinds})
    except UserError:
        assume(False)
    used = found.device_bytes(ELEMENTS, sizes)
    assert used <= budget
    for kind in kinds:
        for layer, tier in enumerate(found.of(kind).layers):
            assert tier == DEVICE or found.put(kind, layer, DEVICE).device_bytes(ELEMENTS, sizes) > budget
    left = [layer for kind in kinds for layer, tier in enumerate(found.of(kind).layers) if tier != DEVICE]
    assert not left or budget - used < max(ELEMENTS.layers) * 18


@LAW
@given(budget=st.floats(1e6, 2e8), more=st.floats(0, 2e8))
def test_a_larger_budget_never_keeps_fewer_layers_weights(budget, more):
    auto = {"device": "auto"}
    try:
        found = placed(device_bytes=budget, parameters=auto, optimizer=auto)
    except UserError:
        assume(False)
    richer = placed(device_bytes=budget + more, parameters=auto, optimizer=auto)
    assert richer.parameters.layers.count(DEVICE) >= found.parameters.layers.count(DEVICE)


def test_auto_brings_weights_back_before_states_and_leaves_named_layers():
    layer = ELEMENTS.layers[0]
    budget = (ELEMENTS.outside + 5 * layer) * 2 + layer * 16
    auto = {"device": "auto"}
    found = placed(device_bytes=budget, parameters={**auto, "nvme": "0"}, optimizer={**auto, "cpu": "outside"})
    assert str(found.parameters) == "device: outside, layers 1-5; nvme: layers 0"
    assert found.optimizer.layers.count(DEVICE) == 1


def test_refusals():
    auto = {"device": "auto"}
    assert refusal(parameters={"device": "0-6"}).endswith("'0-6': the model has the layers 0 to 5")
    assert "layer 1 is on device and on cpu" in refusal(parameters={"device": "0-2", "cpu": "1"})
    assert refusal(parameters={"device": "3-1"}).endswith("'3-1': the first must be the lower")
    assert "must be layers such as 0-5,8 or outside" in refusal(optimizer={"cpu": "first"})
    assert "auto needs device_bytes" in refusal(parameters=auto)
    assert "take it out" in refusal(device_bytes=1e9)
    needed = ELEMENTS.layers[0] * 2
    assert refusal(device_bytes=1000, parameters=auto).endswith(f"holds no layer: {needed:,} are needed for one")
    with pytest.raises(UserError, match="no layer that is not on the device"):
        placed({kind: DEVICE for kind in KINDS}, device_bytes=1e12, parameters=auto)
