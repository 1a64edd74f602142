import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contrast import TEMPERATURE, contrastive_loss, embed

LAW = settings(deadline=None, derandomize=True, max_examples=40)


def rows(pairs, groups, concepts, seed=0, alone=2):
    """`alone` rows without a group first, then pairs of an image row and a text row."""
    x = torch.randn(alone + 2 * pairs, 8, generator=torch.Generator().manual_seed(seed))
    image = torch.tensor([True, False] * pairs, dtype=torch.bool)
    nothing = torch.full((alone,), -1)
    group = torch.cat((nothing, torch.tensor(groups, dtype=torch.int64).repeat_interleave(2)))
    concept = torch.cat((nothing, torch.tensor(concepts, dtype=torch.int64).repeat_interleave(2)))
    return x, torch.cat((torch.ones(alone, dtype=torch.bool), image)), group, concept


def by_hand(x, image, group, concept):
    """One row at a time, in fp64."""
    vectors = [v / math.sqrt(sum(u * u for u in v)) for v in x.double().numpy()]
    losses = []
    place = {True: 0, False: 0}
    order = {kind: [i for i in range(len(x)) if group[i] >= 0 and bool(image[i]) == kind] for kind in (True, False)}
    for i in range(len(x)):
        if group[i] < 0:
            losses.append(0.0)
            continue
        kind = bool(image[i])
        partner = order[not kind][place[kind]]
        place[kind] += 1
        scores = {
            j: float(vectors[i] @ vectors[j]) / TEMPERATURE
            for j in order[not kind]
            if group[j] == group[i] and (j == partner or concept[j] != concept[i])
        }
        top = max(scores.values())
        losses.append(top + math.log(sum(math.exp(s - top) for s in scores.values())) - scores[partner])
    return torch.tensor(losses, dtype=torch.float64)


@LAW
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=9), st.integers(0, 99))
def test_loss_is_that_of_finding_the_partner_in_the_group(pairs, seed):
    batch = rows(len(pairs), sorted(g for g, _ in pairs), [c for _, c in pairs], seed)
    torch.testing.assert_close(contrastive_loss(*batch), by_hand(*batch).float(), rtol=1e-5, atol=1e-5)


def test_what_stands_in_other_groups_or_alone_does_not_matter():
    x, image, group, concept = rows(6, [0, 0, 0, 1, 1, 1], range(6))
    loss = contrastive_loss(x, image, group, concept)
    changed = torch.where((group == 0)[:, None], x, x.flip(1) * 3)
    torch.testing.assert_close(contrastive_loss(changed, image, group, concept)[group == 0], loss[group == 0])


def test_a_pair_by_itself_costs_nothing():
    assert contrastive_loss(*rows(1, [0], [5])).abs().max() < 1e-6
    assert contrastive_loss(*rows(3, [0, 0, 0], [5, 5, 5])).abs().max() < 1e-6


def test_partners_are_drawn_together():
    x, image, group, concept = rows(5, [0] * 5, range(5), alone=0)
    x.requires_grad_()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(contrastive_loss(x, image, group, concept).sum(), x)
        assert gradient.isfinite().all()
        x = (x - 0.05 * gradient).detach().requires_grad_()
    cosine = embed(x[image]) @ embed(x[~image]).T
    assert (cosine.argmax(0) == torch.arange(5)).all() and (cosine.argmax(1) == torch.arange(5)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vectors_have_length_one_in_fp32(dtype):
    found = embed(torch.randn(3, 5).to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
