from collections import Counter

import pytest

from training.data.splits import emoji_family, emoji_key, split_of


@pytest.mark.parametrize(
    ("hexcode", "key", "family"),
    [
        ("1F48D", "1f48d", "1f48d"),
        ("2764-FE0F", "2764", "2764"),
        ("1F481-200D-2640-FE0F", "1f481-200d-2640", "1f481"),
        ("1F469-200D-1F33E", "1f469-200d-1f33e", "P-1f33e"),
        ("1F468-1F3FD-200D-1F33E", "1f468-1f3fd-200d-1f33e", "P-1f33e"),
        ("1F469", "1f469", "1f469"),
        ("1F3F4-200D-2620-FE0F", "1f3f4-200d-2620", "1f3f4-2620"),
    ],
)
def test_key_and_family(hexcode, key, family):
    assert emoji_key(hexcode) == key
    assert emoji_family(key) == family


def test_gender_and_skin_tone_share_a_split():
    farmers = ["1f468-200d-1f33e", "1f469-200d-1f33e", "1f9d1-200d-1f33e", "1f469-1f3ff-200d-1f33e"]
    assert len({split_of(emoji_family(key)) for key in farmers}) == 1


def test_split_is_by_sha1_modulo_ten():
    assert [split_of(family) for family in ("1f40c", "1f415", "1f402")] == ["test", "validation", "train"]
    counts = Counter(split_of(f"family {number}") for number in range(2000))
    assert counts["test"] == pytest.approx(200, rel=0.25)
    assert counts["validation"] == pytest.approx(200, rel=0.25)
