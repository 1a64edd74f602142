import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bags import ABSENT, ASKED_TEMPERATURE, Bags, spread_words, words_loss
from model.contrast import WORTH, contrastive_loss, embed, finding_loss
from model.m6 import M6, last_positions
from tests.model.samples import TINY

LAW = settings(deadline=None, derandomize=True, max_examples=30)
CONFIG = dataclasses.replace(TINY, bag_width=12)


@pytest.fixture(scope="module")
def bags() -> Bags:
    found = Bags(CONFIG, 3)
    torch.nn.init.normal_(found.image.bias)
    return found


def rows_of(lengths, seed=0):
    """Text rows of these source lengths, each third a picture's, and targets after each source."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, CONFIG.vocab, (len(lengths), 9), generator=generator)
    image_BPC = torch.randn(len(lengths), CONFIG.image_patches, CONFIG.image_channels, generator=generator)
    return tokens_BT, torch.tensor(lengths), image_BPC, torch.arange(len(lengths)) % 3 == 0


@LAW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 99))
def test_a_bag_is_the_sum_of_the_sources_pieces_or_the_map_of_the_mean_patch(bags, lengths, seed):
    tokens_BT, source_B, image_BPC, has_image_B = rows_of(lengths, seed)
    found = bags(tokens_BT, source_B, image_BPC, has_image_B)
    for row, length in enumerate(lengths):
        if has_image_B[row]:
            expected = bags.image.weight @ image_BPC[row].mean(0) + bags.image.bias
        else:
            pieces = [token for token in tokens_BT[row, :length].tolist() if token < CONFIG.text_vocab]
            expected = sum((bags.words.weight[piece] for piece in pieces), torch.zeros(CONFIG.bag_width))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_pieces_and_of_patches_does_not_matter(bags):
    tokens_BT, source_B, image_BPC, has_image_B = rows_of([9] * 6)
    turned = bags(tokens_BT.flip(1), source_B, image_BPC.flip(1), has_image_B)
    torch.testing.assert_close(turned, bags(tokens_BT, source_B, image_BPC, has_image_B))


def test_what_words_cost_is_the_mean_over_those_that_there_are():
    logs_BV = torch.randn(3, 10).log_softmax(-1)
    words_BW = torch.tensor([[1, 9, 4], [0, ABSENT, ABSENT], [ABSENT] * 3])
    found = words_loss(logs_BV, words_BW)
    torch.testing.assert_close(found[0], -(logs_BV[0, 1] + logs_BV[0, 9] + logs_BV[0, 4]) / 3)
    torch.testing.assert_close(found[1], -logs_BV[1, 0])
    assert found[2] == 0


def grouped_batch():
    tokens_BT, _, image_BPC, _ = rows_of([5] * 6, seed=5)
    words_BW = torch.full((6, 4), ABSENT)
    words_BW[1, :2], words_BW[3, :4] = torch.tensor([7, 8]), torch.tensor([1, 2, 3, 4])
    words_BW[0, :2], words_BW[2, :3] = torch.tensor([8, 7]), torch.tensor([3, 9, 1])
    weights_BW = torch.zeros(6, 4)
    weights_BW[0, :2], weights_BW[2, :3] = torch.tensor([0.6, 0.8]), torch.tensor([2, 3, 6]) / 7
    return {
        "tokens_BT": tokens_BT % CONFIG.text_vocab, "labels_BT": torch.full_like(tokens_BT, -100),
        "source_B": torch.tensor([5, 0, 5, 0, 5, 5]), "length_B": torch.tensor([6, 1, 6, 1, 6, 6]),
        "image_BPC": image_BPC, "has_image_B": torch.tensor([False, True, False, True, False, False]),
        "group_B": torch.tensor([0, 0, 0, 0, -1, -1]), "concept_B": torch.tensor([4, 4, 6, 6, -1, -1]),
        "words_BW": words_BW, "weights_BW": weights_BW,
    }  # fmt: skip


def test_a_rows_loss_is_the_sum_of_its_parts():
    batch = grouped_batch()
    model = M6(CONFIG, seed=2)
    own = [batch[name] for name in ("tokens_BT", "source_B", "length_B", "image_BPC", "has_image_B")]
    trunk_BD = last_positions(model.hidden_states(*own)[0][:, CONFIG.image_patches :], batch["length_B"])
    bag_BS = model.bags(*(batch[name] for name in ("tokens_BT", "source_B", "image_BPC", "has_image_B")))
    group = [batch[name] for name in ("has_image_B", "group_B", "concept_B")]
    words_B = words_loss((bag_BS @ model.bags.words.weight.T).log_softmax(-1), batch["words_BW"])
    words_B = torch.where(batch["has_image_B"], words_B, 0)
    mean_2C = batch["image_BPC"][[1, 3]].mean(1)
    asked_2V = embed(model.bags.asked_image(mean_2C) @ model.bags.asked_words.weight.T)
    asked_22 = torch.stack(
        (asked_2V[:, [8, 7]] @ torch.tensor([0.6, 0.8]), asked_2V[:, [3, 9, 1]] @ torch.tensor([2.0, 3, 6]) / 7), 1
    )
    asked_B = finding_loss(asked_22 / ASKED_TEMPERATURE, *group)
    parts = contrastive_loss(trunk_BD, *group), contrastive_loss(bag_BS, *group), words_B, asked_B
    torch.testing.assert_close(model(batch)["loss_B"], WORTH * sum(parts))
    for part_B, count in zip(parts, (4, 4, 2, 4), strict=True):
        assert part_B[:4].count_nonzero() == count and (part_B[4:] == 0).all()


def test_words_are_spread_over_the_vocabulary():
    words_BW = torch.tensor([[0, 3, ABSENT], [ABSENT] * 3, [2, 0, 1]])
    weights_BW = torch.tensor([[0.6, 0.8, 0], [0, 0, 0], [0.5, 0.1, -1]])
    expected = torch.tensor([[0.6, 0, 0, 0.8, 0], [0] * 5, [0.1, -1, 0.5, 0, 0]])
    torch.testing.assert_close(spread_words(words_BW, weights_BW, 5), expected)


def test_bags_and_trunk_teach_each_other_nothing():
    """The trunk's gradient is that of a model without bags."""
    batch = grouped_batch()
    plain, model = M6(TINY, seed=2), M6(CONFIG, seed=2)
    for each in (plain, model):
        each(batch)["loss_B"].sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    for name in ("words", "image", "asked_words", "asked_image"):
        assert gradients[f"bags.{name}.weight"].abs().sum() > 0, name


def test_a_batch_without_groups_leaves_bags_a_gradient_of_zero():
    """Every rank runs the same modules and has the same gradients to reduce."""
    batch = grouped_batch()
    batch["labels_BT"][:, 2] = 5
    batch["group_B"].fill_(-1)
    batch["words_BW"], batch["weights_BW"] = batch["words_BW"][:, :0], batch["weights_BW"][:, :0]
    model = M6(CONFIG, seed=2)
    model(batch)["loss_B"].sum().backward()
    for parameter in model.bags.parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all()


def test_a_picture_calls_for_what_it_makes_likelier_than_usual(bags):
    with torch.no_grad():
        usual = bags(
            *rows_of([0])[:2], torch.zeros(1, CONFIG.image_patches, CONFIG.image_channels), torch.tensor([True])
        )
        assert bags.called_for(usual).abs().max() < 1e-3
        sums = bags(*rows_of([0] * 6))[::3]  # pictures
        called, likelier = bags.called_for(sums), bags.likely_words(sums) > bags.likely_words(usual)
        gains = bags.gains(sums)
    torch.testing.assert_close(gains, (bags.likely_words(sums) - bags.likely_words(usual)).relu())
    assert ((called > 0) == likelier).all() and likelier.any(1).all() and not likelier.all(1).any()
    torch.testing.assert_close(called.norm(dim=1), torch.ones(2))
