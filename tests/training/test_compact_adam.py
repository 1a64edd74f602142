"""8-bit moments and 24-bit weights: how they round, that AdamW works with them, and that they survive a checkpoint."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.training import engine_ranks as ranks
from training.compact_adam import BLOCK, CompactAdamW
from training.data.corpus import Corpus
from training.states import MASTER, MOMENTS, Partition

FIRST, SECOND = MOMENTS
RULE = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SMALL = {"model": ranks.MODEL | {"ffn": 256}}
COMPACT = {"bf16": True, "optimizer_states": "8-bit"}
STEP, LAST = 3, 6


class Compact:
    """A tensor of `numel` elements under the optimizer, as partitions that are cut at `cuts`."""

    def __init__(self, numel: int, cuts: tuple[int, ...] = (), seed: int = 1, **rule: Any):
        bounds = (0, *cuts, numel)
        self.parts = [Partition("w", b - a, a, numel, group=0, start=a) for a, b in itertools.pairwise(bounds)]
        self.flat = torch.zeros(numel, dtype=torch.bfloat16)
        self.adam = CompactAdamW([RULE | rule | {"params": [self.flat]}], [self.flat], {0: self.parts}, seed)

    def __getitem__(self, kind: str) -> Tensor:
        return torch.cat([self.adam.read(self.flat, part, kind, 0, part.numel) for part in self.parts])

    def __setitem__(self, kind: str, values: Tensor) -> None:
        for part in self.parts:
            self.adam.write(self.flat, part, kind, values[part.start : part.start + part.numel].contiguous())

    def step(self, gradient: Tensor) -> None:
        self.flat.grad = gradient.bfloat16()
        self.adam.step()


def spread(numel: int, octaves: float, seed: int = 3) -> Tensor:
    """Positive numbers, even over so many octaves below 1."""
    return torch.exp2(-octaves * torch.rand(numel, generator=torch.Generator().manual_seed(seed)))


def signs(numel: int) -> Tensor:
    return torch.where(torch.rand(numel, generator=torch.Generator().manual_seed(5)) < 0.5, -1.0, 1.0)


def grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours of positive numbers on the grid of three mantissa bits: at most, and above."""
    mantissa, exponent = torch.frexp(values.double())
    below = torch.ldexp((mantissa * 16).floor(), exponent - 4)
    return below, below + torch.ldexp(torch.ones_like(below), exponent - 4)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_moment_is_within_half_a_step_of_the_grid(scale: float) -> None:
    states = Compact(1000, (300, 600))
    for kind, octaves, sign in ((FIRST, 15, signs(1000)), (SECOND, 31, torch.ones(1000))):
        values = spread(1000, octaves) * scale
        states[kind] = values * sign
        below, above = grid(values)
        nearest = torch.where(values - below < above - values, below, above)
        torch.testing.assert_close(states[kind].double(), nearest * sign, rtol=0, atol=0)


def test_what_is_far_below_its_block_is_0_in_the_first_moment_and_positive_in_the_second() -> None:
    states = Compact(4 * BLOCK)
    values = spread(4 * BLOCK, 100)
    values[0], values[1], values[-BLOCK:] = 1.0, 0.0, 0.0
    states[FIRST], states[SECOND] = values * signs(4 * BLOCK), values
    assert (states[FIRST].abs() - values).abs().max() <= 2**-4
    assert (states[FIRST][values < 2**-17] == 0).all()
    assert (states[SECOND][values > 0] > 0).all() and states[SECOND][values < 2**-33].max() < 2**-31
    assert (states[SECOND][-BLOCK:] == 0).all()


@pytest.mark.parametrize("cuts", [(), (BLOCK,), (100, 333)])
def test_what_was_read_is_written_to_the_bit_however_it_is_cut(cuts: tuple[int, ...]) -> None:
    states, other = Compact(1000), Compact(1000, cuts)
    for kind, octaves in ((MASTER, 40), (FIRST, 15), (SECOND, 31)):
        states[kind] = spread(1000, octaves) * (1 if kind is SECOND else signs(1000))
        other[kind] = states[kind]
        assert torch.equal(other[kind], states[kind])
    assert torch.equal(other.flat, states.flat)


def test_a_weight_has_24_bits_and_its_working_copy_is_the_nearest_bf16() -> None:
    states = Compact(1000)
    values = spread(1000, 40) * signs(1000)
    states[MASTER] = values
    torch.testing.assert_close(states[MASTER], values, rtol=2**-16, atol=0)
    distance = (states.flat.double() - states[MASTER].double()).abs()
    nearest = (states[MASTER].bfloat16().double() - states[MASTER].double()).abs()
    assert torch.equal(distance, nearest)


def updated(numel: int, seed: int = 1, steps: int = 1) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """One step from values on the grid: what is stored, and its neighbours if it were not rounded; by kind."""
    generator = torch.Generator().manual_seed(11)
    states = Compact(numel, seed=seed, lr=1e-5, weight_decay=0.0)
    states[MASTER], states[FIRST], states[SECOND] = torch.full((3, numel), 0.75).unbind()
    gradient = (torch.rand(numel, generator=generator) + 0.5).bfloat16().float()
    for _ in range(steps):
        states.step(gradient)
    if steps > 1:
        return {}
    exact = {FIRST: 0.9 * 0.75 + 0.1 * gradient.double(), SECOND: 0.999 * 0.75 + 0.001 * gradient.double() ** 2}
    unbiased = exact[SECOND] / (1 - 0.999)
    exact[MASTER] = 0.75 - 1e-5 * (exact[FIRST] / (1 - 0.9)) / (unbiased.sqrt() + 1e-8)
    return {kind: (states[kind].double(), exact[kind], step_of(kind, exact[kind])) for kind in exact}


def step_of(kind: str, exact: Tensor) -> Tensor:
    """The distance of neighbours on the grid."""
    below, above = grid(exact)
    return (above - below) * (2.0**-12 if kind == MASTER else 1)


def test_rounding_is_random_unbiased_and_independent() -> None:
    """In units of the grid's steps; bounds of five standard deviations of what is true chance."""
    numel = 2**18
    errors = {}
    for seed in (1, 2):
        for kind, (found, exact, step) in updated(numel, seed).items():
            error = errors[kind, seed] = ((found - exact) / step).numpy()
            assert np.abs(error).max() <= 1.001, kind
            place = np.mod(exact.numpy() / step.numpy(), 1)
            assert abs(error.mean()) < 5 * np.sqrt((place * (1 - place)).mean() / numel), kind
            assert np.isclose((error**2).mean(), (place * (1 - place)).mean(), rtol=0.05), kind
    pairs = [(errors[a], errors[b]) for a in errors for b in errors if a < b]
    pairs += [(error[shift:], error[:-shift]) for error in errors.values() for shift in (1, 2, BLOCK)]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))


def test_a_second_moment_follows_what_changes_by_a_thousandth_a_step() -> None:
    states = Compact(2**14)
    for _ in range(2000):
        states.step(torch.full((2**14,), 0.5))
    expected = 0.25 * (1 - 0.999**2000)
    assert states[SECOND].mean() == pytest.approx(expected, rel=0.01)
    assert states[SECOND].std() < 0.3 * expected
    assert states[FIRST].mean() == pytest.approx(0.5, rel=0.01)


def test_the_bits_are_those_of_seed_step_tensor_and_element() -> None:
    """However the tensor is cut; another seed gives others."""
    gradients = [torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    found = []
    for cuts, seed in (((), 1), ((BLOCK, 600), 1), ((), 2)):
        states = Compact(1000, cuts, seed)
        for gradient in gradients:
            states.step(gradient)
        found.append(torch.stack([states[kind] for kind in (MASTER, FIRST, SECOND)]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_descends_as_adamw_does() -> None:
    """Noisy squares of very different sizes, against torch's AdamW in fp64: the same way down, and as near the end."""
    numel, generator = 4096, torch.Generator().manual_seed(2)
    start, size = torch.randn(numel, generator=generator), spread(numel, 12)
    states, plain = Compact(numel, lr=3e-3), start.double().requires_grad_()
    states[MASTER] = start
    adam = torch.optim.AdamW([plain], **(RULE | {"lr": 3e-3}))
    ways = []
    for step in range(600):
        noise = torch.randn(numel, generator=generator)
        states.step(size * (states[MASTER] + noise))
        plain.grad = size * (plain.detach() + noise)
        adam.step()
        if step % 50 == 49:
            ways.append((states[MASTER].square().mean().item(), plain.detach().square().mean().item()))
    for ours, theirs in ways:
        assert ours == pytest.approx(theirs, rel=0.03)


@pytest.fixture(scope="module")
def saved(sample_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint that two ranks wrote at STEP, and how they went on to LAST."""
    folder, swap = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("swap")
    ds = ranks.settings(ranks.CPU, 2, **COMPACT)
    return folder, run_ranks(2, ranks.save_at, sample_corpus.folder.parent, swap, ds, folder, STEP, LAST)


def test_resume_on_the_same_layout_is_equal_to_the_bit(sample_corpus: Corpus, saved: Any, tmp_path: Path) -> None:
    ds, data = ranks.settings(ranks.CPU, 2, **COMPACT), sample_corpus.folder.parent
    results = run_ranks(2, ranks.load_and_train, data, tmp_path, ds, saved[0], STEP, LAST)
    for mine, theirs in zip(results, saved[1], strict=True):
        assert mine["losses"] == theirs["losses"] and mine["digests"] == theirs["digests"]
        # bf16 weights and gradients, a byte below the weights, two of moments, and four for a block of 256
        numel = sum(
            len(part) // 4 for key, own in mine["digests"].items() if key.endswith(MASTER) for part in own.values()
        )
        assert 7 < sum(mine["bytes"]["cpu"].values()) / numel < 7.1


def whole(results: list[dict[str, Any]], moment: str) -> dict[str, np.ndarray]:
    parts: dict[str, dict[int, bytes]] = {}
    for result in results:
        for key, found in result[moment].items():
            parts.setdefault(key, {}).update(found)
    return {key: np.frombuffer(b"".join(p for _, p in sorted(own.items())), np.float32) for key, own in parts.items()}


def test_a_run_goes_on_with_fp32_states_on_one_rank_and_comes_back(
    sample_corpus: Corpus, saved: Any, tmp_path: Path
) -> None:
    """fp32 holds every state to the bit; back, a state is the nearest that its code can say."""
    folder, data = tmp_path / "checkpoints", sample_corpus.folder.parent
    shutil.copytree(saved[0], folder)
    there = run_ranks(1, ranks.go_on, data, tmp_path, ranks.settings(ranks.CPU, 1, bf16=True), folder, LAST, {})
    before, arrived = whole(saved[1], "digests"), whole(there, "arrived")
    assert before.keys() == arrived.keys()
    assert all(np.array_equal(before[key], arrived[key]) for key in before)
    back = run_ranks(1, ranks.load_and_train, data, tmp_path, ranks.settings(ranks.CPU, 1, **COMPACT), folder, LAST, 8)
    left, read = whole(there, "left"), whole(back, "digests")
    for key, values in left.items():
        bound = 2**-16 if key.endswith(MASTER) else 2**-4
        assert np.allclose(read[key], values, rtol=bound, atol=np.abs(values).max(initial=0) * 1e-4), key
    assert all(np.isfinite(loss) and loss < 7.5 for loss, _ in back[0]["losses"])
