import hashlib
import pickle

import pytest

from training.data.build import _tokenizer_lines
from training.data.tokenizer import SPECIAL_IDS, Tokenizer, train_tokenizer
from training.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "红色圆",
        "床前明月光，\n疑是地上霜。",
        "  two  spaces ",
        "“引号”……（全角）！？",
        "☃ 𠮷 é\t",
        "\n\n",
        "",
    ],
)
def test_any_text_comes_back_unchanged(sample_corpus, text):
    tokenizer = sample_corpus.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_captions_and_poems_come_back_unchanged(sample_corpus):
    tokenizer = sample_corpus.tokenizer
    for words in [*sample_corpus.pictures["zh"], *sample_corpus.texts["text"]]:
        assert tokenizer.decode(tokenizer.encode(words)) == words


def test_special_ids(sample_corpus):
    tokenizer = sample_corpus.tokenizer
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 2, 3, 4)
    ids = tokenizer.encode("<mask><pad></s>红")
    assert min(ids) >= SPECIAL_IDS
    assert tokenizer.decode([2, 4, 31, *tokenizer.encode("红\n蓝"), 3, 0]) == "红\n蓝"
    assert len(tokenizer.encode("\n")) == 1


def test_model_is_reproducible_and_pickles(sample_corpus, tmp_path):
    pictures = [sample_corpus.picture(row) for row in range(len(sample_corpus.pictures))]
    texts = [sample_corpus.text(row) for row in range(len(sample_corpus.texts))]
    train_tokenizer(_tokenizer_lines(pictures, texts), tmp_path / "again.model", sample_corpus.tokenizer.vocab_size)
    again = Tokenizer(tmp_path / "again.model")
    assert again.sha256 == sample_corpus.tokenizer.sha256
    assert again.sha256 == hashlib.sha256((tmp_path / "again.model").read_bytes()).hexdigest()
    copy = pickle.loads(pickle.dumps(sample_corpus.tokenizer))
    assert copy.encode("红色圆") == sample_corpus.tokenizer.encode("红色圆")


def test_held_out_words_teach_nothing(sample_corpus):
    pictures = [sample_corpus.picture(row) for row in range(len(sample_corpus.pictures))]
    held_out = {picture.zh for picture in pictures if picture.split != "train"}
    assert held_out and held_out.isdisjoint(_tokenizer_lines(pictures, []))


def test_not_a_model(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    for name in ("x.model", "missing.model"):
        with pytest.raises(UserError, match=name):
            Tokenizer(tmp_path / name)


def test_words_are_pieces_of_either_cut_in_lower_case_each_once(sample_corpus):
    tokenizer = sample_corpus.tokenizer
    found = tokenizer.words("红色 红色 RED")
    assert found == tokenizer.words("红色 red") == sorted(set(found))
    assert {*tokenizer.encode("红"), *tokenizer.encode("色")} <= set(found)
    assert {*tokenizer.words("red"), *tokenizer.words("红色")} == set(found)  # the same pieces in any company
    assert not set(tokenizer.encode(" ")) & set(found) and tokenizer.words(" ") == []
