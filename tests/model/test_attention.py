"""The mask is the law of M6: a bidirectional source, an autoregressive target, and padding that nobody sees."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import attention
from model.attention import Attention, attention_mask
from model.m6 import M6
from model.packing import Packing
from tests.model.samples import DENSE, TINY, sample_batch

KINDS = st.sampled_from(["source", "target", "padding"])


def sees(kinds: list[str], query: int, key: int) -> bool:
    if query == key:
        return True
    if kinds[query] == "padding" or kinds[key] == "padding":
        return False
    if kinds[key] == "source":
        return True
    return kinds[query] == "target" and key < query


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(KINDS, min_size=n, max_size=n), min_size=1, max_size=3)))
def test_the_mask_is_the_law(rows: list[list[str]]):
    source_BN = torch.tensor([[kind == "source" for kind in row] for row in rows])
    valid_BN = torch.tensor([[kind != "padding" for kind in row] for row in rows])
    n = len(rows[0])
    expected = [[[sees(row, query, key) for key in range(n)] for query in range(n)] for row in rows]
    assert attention_mask(source_BN, valid_BN)[:, 0].tolist() == expected


def test_padding_that_is_called_source_is_still_padding():
    source_BN, valid_BN = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert attention_mask(source_BN, valid_BN)[0, 0].tolist() == [[True, False], [False, True]]


def test_attention_equals_a_loop_over_heads_and_positions():
    layer = Attention(TINY, 0).double()
    torch.nn.init.normal_(layer.qkv.bias)
    torch.nn.init.normal_(layer.out.bias)
    x_ND = torch.randn(7, TINY.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_NN = attention_mask(torch.tensor([[True] * 3 + [False] * 4]), torch.tensor([[True] * 6 + [False]]))[0, 0]
    q_ND, k_ND, v_ND = layer.qkv(x_ND).split(TINY.hidden, -1)
    size = TINY.hidden // TINY.heads
    y_ND = torch.zeros_like(x_ND)
    for head in range(TINY.heads):
        d = slice(head * size, (head + 1) * size)
        for query in range(7):
            keys = mask_NN[query].nonzero()[:, 0]
            weight_K = (k_ND[keys, d] @ q_ND[query, d] / size**0.5).softmax(0)
            y_ND[query, d] = weight_K @ v_ND[keys, d]
    everything = Packing.of(torch.ones(1, 7, dtype=torch.bool), x_ND)
    torch.testing.assert_close(layer(x_ND, mask_NN[None, None], everything), layer.out(y_ND))


def trunk(model: M6, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels_BT"}
    return model.hidden_states(**inputs)[0]


def kinds_of_row(batch: dict[str, Tensor], row: int, patches: int) -> list[str]:
    source, length = int(batch["source_B"][row]), int(batch["length_B"][row])
    image = ["source" if batch["has_image_B"][row] else "padding"] * patches
    text = batch["tokens_BT"].shape[1]
    return image + ["source"] * source + ["target"] * (length - source) + ["padding"] * (text - length)


@pytest.mark.parametrize("config", [DENSE, TINY], ids=["dense", "experts"])
def test_gradients_flow_where_the_law_lets_them_and_nowhere_else(config):
    model = M6(config)
    rows, text = 5, 7
    batch = sample_batch(config, rows, text)
    # Each position has its own token, so that the vocabulary's gradient tells positions apart.
    batch["tokens_BT"] = torch.arange(rows * text).view(rows, text)
    batch["image_BPC"].requires_grad_()
    x_BND = trunk(model, batch)
    probe_D = torch.randn(config.hidden, generator=torch.Generator().manual_seed(0))
    for row in range(rows):
        kinds = kinds_of_row(batch, row, config.image_patches)
        for query in range(len(kinds)):
            of_table, of_image = torch.autograd.grad(
                x_BND[row, query] @ probe_D, [model.vocabulary.weight, batch["image_BPC"]], retain_graph=True
            )
            of_text = of_table[: rows * text].view(rows, text, -1)
            seen_BN = torch.cat((of_image.any(-1), of_text.any(-1)), 1)
            law = [kinds[query] != "padding" and sees(kinds, query, key) for key in range(len(kinds))]
            assert seen_BN[row].tolist() == law
            seen_BN[row] = False
            assert not seen_BN.any()


@pytest.mark.parametrize("config", [DENSE, TINY], ids=["dense", "experts"])
def test_a_changed_target_changes_nothing_before_it(config):
    model = M6(config)
    batch = sample_batch(config)
    before = trunk(model, batch)
    row, place = 0, int(batch["source_B"][0]) + 1
    changed = batch | {"tokens_BT": batch["tokens_BT"].clone()}
    changed["tokens_BT"][row, place] += 1
    after = trunk(model, changed)
    first = config.image_patches + place
    last = config.image_patches + int(batch["length_B"][row])
    same = torch.ones(before.shape[:2], dtype=torch.bool)
    same[row, first:last] = False
    # Not to the bit: an expert's rows are multiplied in another order.
    torch.testing.assert_close(after[same], before[same], rtol=0, atol=1e-5)
    assert (after - before)[row, first:last].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("capacity", ["none", "1x", "kx"])
@pytest.mark.parametrize("routing", ["prototype", "top-k"])
def test_the_content_of_padding_changes_nothing_at_all(capacity, routing):
    model = M6(dataclasses.replace(TINY, capacity=capacity, routing=routing, balance_loss=0.1, z_loss=0.1))
    batch = sample_batch(TINY)
    padding_BT = torch.arange(batch["tokens_BT"].shape[1]) >= batch["length_B"][:, None]
    changed = batch | {
        "tokens_BT": batch["tokens_BT"].masked_fill(padding_BT, 7),
        "image_BPC": torch.where(batch["has_image_B"][:, None, None], batch["image_BPC"], 1e4),
    }
    results = []
    for each in (batch, changed):
        model.zero_grad()
        out = model(each)
        (out["loss_B"].sum() + out["auxiliary"]).backward()
        results.append(out | {name: parameter.grad for name, parameter in model.named_parameters()})
    before, after = results
    assert padding_BT.any() and not batch["has_image_B"].all()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("padding", [1, 6])
def test_more_padding_changes_no_loss(padding):
    model = M6(TINY)
    batch = sample_batch(TINY)
    longer = batch | {
        "tokens_BT": torch.nn.functional.pad(batch["tokens_BT"], (0, padding)),
        "labels_BT": torch.nn.functional.pad(batch["labels_BT"], (0, padding), value=-100),
    }
    torch.testing.assert_close(model(longer)["loss_B"], model(batch)["loss_B"])


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.bfloat16, 0.05)])
def test_short_rows_attend_as_long_ones_do(dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch):
    """Outputs and gradients of plain products are those of torch's kernel."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(3, 2, 19, 8, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]
    source_BN = torch.arange(19) < torch.tensor([[5], [0], [19]])
    mask_B1NN = attention_mask(source_BN, torch.arange(19) < torch.tensor([[12], [19], [1]]))
    found = []
    for most in (0, 2**25):
        monkeypatch.setattr(attention, "MOST_SCORES", most)
        y_BHNd = attention.attend(*leaves, mask_B1NN)
        found.append((y_BHNd, *torch.autograd.grad(y_BHNd.square().sum(), leaves)))
    for kernels, products in zip(*found, strict=True):
        torch.testing.assert_close(products, kernels, rtol=rounding, atol=rounding)
