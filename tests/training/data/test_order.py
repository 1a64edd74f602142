from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import GlobalOrder, allot, allot_blocks, random_at, shuffled
from training.data.tasks import TASKS
from training.errors import UserError

LAW = settings(deadline=None, derandomize=True)
WEIGHTS = {"caption": 3, "image_denoise": 1, "denoise": 1, "language": 1, "poem": 1, "review": 1}
weights = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e-3, 1e3), min_size=1)


def order(corpus, weights=WEIGHTS, batch=16, text_positions=96, seed=1, split="train", block=1):
    return GlobalOrder([TASKS[name](corpus, split) for name in weights], weights, batch, text_positions, seed, block)


@pytest.fixture(scope="module")
def mixed(sample_corpus):
    return order(sample_corpus)


@LAW
@given(st.integers(1, 700), st.tuples(st.integers(), st.sampled_from(["caption", "诗"]), st.integers(0, 9)))
def test_shuffled_is_a_permutation(size, key):
    assert sorted(shuffled(index, size, key) for index in range(size)) == list(range(size))


@LAW
@given(st.integers(2**20, 2**48), st.lists(st.integers(0, 2**20 - 1), unique=True, max_size=20))
def test_shuffled_of_a_huge_range_stays_inside_and_apart(size, indices):
    images = [shuffled(index, size, (1, "x", 0)) for index in indices]
    assert len(set(images)) == len(indices) and all(0 <= image < size for image in images)


def test_shuffled_mixes():
    size = 1000
    images = [np.array([shuffled(index, size, (1, "x", epoch)) for index in range(size)]) for epoch in range(2)]
    # Of 1000 pairs about one stays in place, or agrees between two keys, by chance.
    assert (images[0] == np.arange(size)).sum() < 10 and (images[0] == images[1]).sum() < 10
    for image in images:
        assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 0.12
        assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.12


@LAW
@given(weights, st.integers(1, 600))
def test_allot_shares_a_batch_out(weights, batch):
    if len(weights) > batch:
        with pytest.raises(UserError, match=f"global_batch={batch} is less than the number of tasks"):
            allot(weights, batch)
        return
    counts = allot(weights, batch)
    shares = {name: weight / sum(weights.values()) * batch for name, weight in weights.items()}
    assert counts.keys() == weights.keys() and sum(counts.values()) == batch and min(counts.values()) >= 1
    if min(shares.values()) >= 1:
        assert all(abs(counts[name] - shares[name]) < 1 + 1e-9 for name in counts)
    for one in counts:
        for other in counts:
            assert weights[one] > weights[other] or counts[one] <= counts[other] + 1


def test_allot_is_exact_where_it_can_be():
    assert allot({"a": 3, "b": 1}, 8) == {"a": 6, "b": 2}
    assert allot({"a": 1e-9, "b": 1.0}, 8) == {"a": 1, "b": 7}


@LAW
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**62))
def test_random_numbers_are_of_their_position(seed, position):
    numbers = random_at(seed, position).integers(2**60, size=4).tolist()
    assert numbers == random_at(seed, position).integers(2**60, size=4).tolist()
    assert numbers != random_at(seed, position + 1).integers(2**60, size=4).tolist()
    assert numbers != random_at(seed ^ 1, position).integers(2**60, size=4).tolist()


@LAW
@given(position=st.integers(0, 10**9))
def test_a_row_is_a_function_of_seed_and_position(sample_corpus, mixed, position):
    again = order(sample_corpus)
    again.row(position + 7)
    assert again.row(position) == mixed.row(position)
    assert again.task_at(position) is again.task_at(position % 16)


def test_another_seed_is_another_order(sample_corpus, mixed):
    other = order(sample_corpus, seed=2)
    assert [other.row(position) for position in range(16)] != [mixed.row(position) for position in range(16)]


def test_each_step_has_the_same_share_of_each_task(mixed):
    for step in (0, 1, 1000):
        names = [mixed.task_at(step * 16 + place).name for place in range(16)]
        assert Counter(names) == mixed.counts == allot(WEIGHTS, 16)


@LAW
@given(st.dictionaries(st.sampled_from(sorted(WEIGHTS)), st.floats(0.1, 10), min_size=1), st.integers(1, 8))
def test_every_micro_batch_gets_its_share_of_each_task(sample_corpus, weights, blocks):
    """Of a step in blocks of 12 rows: tasks that want the same places can push a row over a block's edge, no more."""
    mixed = order(sample_corpus, weights, 12 * blocks)
    for start in range(0, 12 * blocks, 12):
        names = Counter(mixed.task_at(position).name for position in range(start, start + 12))
        assert all(abs(names[name] - count / blocks) <= 1 + len(weights) / 2 for name, count in mixed.counts.items())


@pytest.mark.parametrize("batch", [6, 7, 16])
def test_every_epoch_of_a_task_takes_each_item_once(sample_corpus, batch):
    mixed = order(sample_corpus, batch=batch)
    taken = {task.name: [] for task in mixed.tasks}
    for task in mixed.tasks:
        # Written down by the task itself, so that what is drawn is seen and not what is made of it.
        task.row = lambda item, limit, random, seen=taken[task.name]: seen.append(item)
    epochs = 2
    for position in range(batch * epochs * max(len(task.pool) for task in mixed.tasks)):
        mixed.row(position)
    for task in mixed.tasks:
        size, seen = len(task.pool), taken[task.name]
        rounds = [seen[start : start + size] for start in range(0, epochs * size, size)]
        assert all(sorted(items) == sorted(task.pool) for items in rounds)
        assert rounds[0] != rounds[1]


@LAW
@given(st.data())
def test_width_holds_every_row(mixed, data):
    step = data.draw(st.integers(0, 1000))
    start = data.draw(st.integers(0, 15))
    stop = data.draw(st.integers(start + 1, 16))
    width = mixed.width(step * 16 + start, step * 16 + stop)
    for place in range(start, stop):
        row = mixed.row(step * 16 + place)
        assert len(row.source) + len(row.target) <= mixed.task_at(place).limit(96) <= width


def test_a_task_without_items_is_named(sample_corpus):
    task = TASKS["poem"](sample_corpus, "train")
    task.pool = task.pool[:0]
    with pytest.raises(UserError, match=r"poem: the corpus has nothing for it in split 'train': leave it out \(tasks"):
        GlobalOrder([task], {"poem": 1}, 8, 96, 1)


@LAW
@given(weights, st.integers(1, 20), st.sampled_from([1, 2, 8, 64]))
def test_blocks_are_whole_and_the_rest_is_shared_out(weights, blocks, block):
    grouped, batch = min(weights), blocks * block
    rest = {name: weight for name, weight in weights.items() if name != grouped}
    try:
        counts = allot_blocks(weights, batch, grouped, block)
    except UserError as error:
        assert str(error).startswith(f"global_batch={batch} ") and len(rest) > 0
        return
    assert counts.keys() == weights.keys() and sum(counts.values()) == batch and min(counts.values()) >= 1
    assert counts[grouped] % block == 0
    assert {name: counts[name] for name in rest} == (allot(rest, batch - counts[grouped]) if rest else {})


def test_a_batch_that_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(UserError, match="global_batch=17 is not divisible by 8, the rows of a contrastive group"):
        allot_blocks({"caption": 1, "contrast": 1}, 17, "contrast", 8)
    with pytest.raises(UserError, match="global_batch=8 leaves no room for caption beside 8 contrastive rows"):
        allot_blocks({"caption": 1, "contrast": 9}, 8, "contrast", 8)
    assert allot_blocks({"caption": 1, "contrast": 99}, 24, "contrast", 8) == {"contrast": 16, "caption": 8}


@pytest.mark.parametrize(("batch", "block"), [(32, 8), (64, 16), (16, 2)])
def test_contrastive_pairs_stand_together_in_whole_blocks(sample_corpus, batch, block):
    mixed = order(sample_corpus, WEIGHTS | {"contrast": 3}, batch, block=block)
    for start in range(0, 3 * batch, block):
        names = {mixed.task_at(position).name for position in range(start, start + block)}
        assert names == {"contrast"} or "contrast" not in names
        if names == {"contrast"}:
            rows = [mixed.row(position) for position in range(start, start + block)]
            for seen, said in zip(rows[::2], rows[1::2], strict=True):
                assert seen.picture is not None and said.picture is None and seen.concept == said.concept


def test_every_epoch_of_pairs_takes_each_pair_once(sample_corpus):
    mixed = order(sample_corpus, {"contrast": 1}, 8, block=8)
    (task,) = mixed.tasks
    seen = []
    task.row = lambda item, limit, random: seen.append(item)
    for position in range(2 * len(task.pool)):
        mixed.row(position)
    for epoch in (seen[: len(task.pool)], seen[len(task.pool) :]):
        assert sorted(epoch) == sorted(task.pool) and all(
            words == ~item for item, words in zip(epoch[::2], epoch[1::2], strict=True)
        )
