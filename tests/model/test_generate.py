"""Decoding with a cache against references without one: loops over single rows, and all answers that there are."""

import dataclasses
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoding import Answer, Decoding, generate, score
from model.m6 import IGNORE, M6
from model.trie import Trie
from tests.model.prompts import CONFIGS, TOLERANCE, build, every_config, prompts
from tests.model.samples import TINY, sample_batch
from training.data.batches import Collator
from training.data.corpus import Corpus
from training.data.tasks import Row, View
from training.data.tasks.caption import ASK_NAME

END = 2
FEW = Decoding(room=3, vocabulary=range(1, 5), end=END)  # so few answers that all can be tried
ALL = Decoding(room=6, vocabulary=range(CONFIGS["prototypes"].vocab), end=END)
MATCHING = {"max_positions": 64, "image_patches": 16, "image_channels": 1280}  # as the corpus has them
ANSWERS = [[5, 9], [5, 9, 3, 3], [5], [70, 3, 3, 3, 3], [127, 0], []]


@pytest.fixture(scope="module")
def model() -> M6:
    return build(CONFIGS["prototypes"])


def next_log_probabilities(
    model: M6,
    batch: dict[str, Tensor],
    row: int,
    said: list[int],
    settings: Decoding,
    twin: dict[str, Tensor] | None,
    called_BV: Tensor | None = None,
) -> list[float]:
    """Of each entry, by the full pass over one row without padding."""
    logits = []
    for side in (batch,) if twin is None else (batch, twin):
        tokens = side["tokens_BT"][row, : side["length_B"][row]].tolist() + said
        one = {name: value[row : row + 1] for name, value in side.items()}
        one |= {"tokens_BT": torch.tensor([tokens]), "length_B": torch.tensor([len(tokens)])}
        logits.append(model(one)["logits_BV"][0, settings.vocabulary.start : settings.vocabulary.stop])
    guided = logits[0] if twin is None else logits[1] + settings.guidance * (logits[0] - logits[1])
    if called_BV is not None:
        first = settings.vocabulary.start
        open_V = [entry + first not in said for entry in range(len(guided))]
        guided = guided + called_BV[row] * torch.tensor(open_V)
    return guided.log_softmax(0).tolist()


def likeliest(model: M6, batch: dict[str, Tensor], row: int, settings: Decoding) -> list[int]:
    """Greedily, by the full pass for each token."""
    said: list[int] = []
    while len(said) < settings.room:
        logs = next_log_probabilities(model, batch, row, said, settings, None)
        token = settings.vocabulary[max(range(len(logs)), key=logs.__getitem__)]
        if token == settings.end:
            break
        said.append(token)
    return said


@torch.no_grad()
def all_answers(
    model: M6,
    batch: dict[str, Tensor],
    row: int,
    settings: Decoding,
    twin: dict[str, Tensor] | None = None,
    called_BV: Tensor | None = None,
) -> list[Answer]:
    """Every answer that can be given, best first."""
    found: list[Answer] = []

    def visit(said: list[int], total: float) -> None:
        logs = next_log_probabilities(model, batch, row, said, settings, twin, called_BV)
        for token, log in zip(settings.vocabulary, logs, strict=True):
            size = (len(said) + 1) ** settings.length_penalty
            if token == settings.end:
                found.append(Answer(said, (total + log) / size))
            elif len(said) + 1 == settings.room:
                found.append(Answer([*said, token], (total + log) / size))
            else:
                visit([*said, token], total + log)

    visit([], 0.0)
    return sorted(found, key=lambda answer: -answer.score)


def same(found: list[list[Answer]], expected: list[list[Answer]]) -> None:
    assert [[answer.tokens for answer in row] for row in found] == [[a.tokens for a in row] for row in expected]
    scores = [[answer.score for answer in row] for row in found], [[answer.score for answer in row] for row in expected]
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), **TOLERANCE)


def tokens(found: list[list[Answer]]) -> list[list[int]]:
    return [row[0].tokens for row in found]


@every_config
@torch.no_grad()
def test_the_likeliest_tokens_are_those_without_a_cache(config: ModelConfig):
    model, batch = build(config), prompts(config)
    settings = Decoding(room=8, vocabulary=range(config.text_vocab), end=None)
    expected = [likeliest(model, batch, row, settings) for row in range(5)]
    # Drops nothing, though a model in training would.
    assert tokens(generate(model.train(), batch, settings)) == expected
    # An end that the rows come to at different times, one at once.
    end = expected[0][0]
    stopped = [row[: row.index(end)] if end in row else row for row in expected]
    assert tokens(generate(model, batch, dataclasses.replace(settings, end=end))) == stopped
    assert stopped[0] == [] and len({len(row) for row in stopped}) > 1


def test_the_model_is_called_until_all_rows_have_ended(model: M6, monkeypatch: pytest.MonkeyPatch):
    calls, extend = [], model.extend
    monkeypatch.setattr(model, "extend", lambda *inputs: calls.append(1) or extend(*inputs))
    batch = prompts(model.config)
    free = tokens(generate(model, batch, dataclasses.replace(ALL, end=None)))
    assert len(calls) == ALL.room - 1
    calls.clear()
    alone = {name: value[:1] for name, value in batch.items()}
    said = tokens(generate(model, alone, dataclasses.replace(ALL, end=free[0][2])))
    assert said == [free[0][: free[0].index(free[0][2])]] and len(calls) == len(said[0])


@torch.no_grad()
def test_image_codes_alone_are_said_where_they_are_asked_for(model: M6):
    batch, config = prompts(model.config), model.config
    settings = Decoding(room=4, vocabulary=range(config.text_vocab, config.vocab), end=None)
    assert tokens(generate(model, batch, settings)) == [likeliest(model, batch, row, settings) for row in range(5)]


def test_tokens_are_told_as_they_are_said(model: M6):
    batch, told = prompts(model.config), []
    said = tokens(generate(model, batch, FEW, on_token=lambda row, token: told.append((row, token))))
    assert [[token for row, token in told if row == number] for number in range(5)] == said
    # Side by side: the first tokens of all rows come before the second of any.
    places = [[row for row, _ in told[:at]].count(row) for at, (row, _) in enumerate(told)]
    assert places == sorted(places) and places


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("end", [END, None])
def test_a_beam_as_wide_as_there_are_answers_ranks_them_all(model: M6, length_penalty: float, end: int | None):
    batch = prompts(model.config, rows=3)
    settings = dataclasses.replace(FEW, end=end, beams=64, answers=10, length_penalty=length_penalty)
    expected = [all_answers(model, batch, row, settings)[:10] for row in range(3)]
    same(generate(model, batch, settings), expected)


def test_what_a_row_is_called_for_is_likelier_until_it_is_said(model: M6):
    batch = prompts(model.config, rows=3)
    settings = dataclasses.replace(FEW, beams=64, answers=10)
    called_BV = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 2
    expected = [all_answers(model, batch, row, settings, called_BV=called_BV)[:10] for row in range(3)]
    same(generate(model, batch, settings, called_BV=called_BV), expected)
    assert tokens(expected) != tokens(generate(model, batch, settings))
    loud_BV = torch.zeros(3, 4)
    loud_BV[:, 2] = 99  # entry 3
    greedy = generate(model, batch, dataclasses.replace(FEW, room=6), called_BV=loud_BV)
    assert all(answer.tokens[0] == 3 for [answer] in greedy)
    assert any(answer.tokens[1:2] != [3] for [answer] in greedy)
    with pytest.raises(ValueError, match="must be rows x entries"):
        generate(model, batch, settings, called_BV=called_BV[:2])


def plain_beam(model: M6, batch: dict[str, Tensor], row: int, settings: Decoding) -> list[Answer]:
    """Beam search by lists: a line that has ended keeps its place."""
    going, ended = [([], 0.0)], []
    for _ in range(settings.room):
        candidates = [
            ([*said, token], total + log)
            for said, total in going
            for token, log in zip(
                settings.vocabulary, next_log_probabilities(model, batch, row, said, settings, None), strict=True
            )
        ]
        best = sorted(candidates, key=lambda line: -line[1])[: settings.beams - len(ended)]
        ended += [line for line in best if line[0][-1] == settings.end]
        going = [line for line in best if line[0][-1] != settings.end]
    answers = [
        Answer([token for token in said if token != settings.end], total / len(said) ** settings.length_penalty)
        for said, total in going + ended
    ]
    return sorted(answers, key=lambda answer: -answer.score)


@pytest.mark.parametrize("beams", [1, 2, 3])
@torch.no_grad()
def test_narrow_beams_are_those_of_a_plain_search(model: M6, beams: int):
    batch = prompts(model.config)
    settings = dataclasses.replace(FEW, room=6, beams=beams, answers=beams)
    found = generate(model, batch, settings)
    same(found, [plain_beam(model, batch, row, settings) for row in range(5)])
    if beams == 1:
        expected = [likeliest(model, batch, row, settings) for row in range(5)]
        assert tokens(found) == expected


def twin_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows without picture and source, in a batch of another width."""
    length_B = (batch["length_B"] - batch["source_B"]).clamp(min=1)
    return batch | {
        "tokens_BT": batch["tokens_BT"][:, : int(length_B.max())],
        "source_B": torch.zeros_like(length_B),
        "length_B": length_B,
        "has_image_B": torch.zeros_like(batch["has_image_B"]),
    }


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
def test_guidance_leads_away_from_the_twin(model: M6, guidance: float):
    batch = prompts(model.config, rows=3)
    twin = twin_of(batch)
    settings = dataclasses.replace(FEW, beams=64, answers=5, guidance=guidance)
    expected = [all_answers(model, batch, row, settings, twin)[:5] for row in range(3)]
    found = generate(model, batch, settings, twin=twin)
    same(found, expected)
    if guidance != 3.5:
        same(found, generate(model, batch if guidance else twin, dataclasses.replace(settings, guidance=1.0)))


def candidates(batch: dict[str, Tensor], answers: list[list[int]]) -> dict[str, Tensor]:
    """Each row with each answer as its labels."""
    tokens_BT = torch.nn.functional.pad(batch["tokens_BT"].repeat_interleave(len(answers), 0), (0, 5))
    rest = {name: value.repeat_interleave(len(answers), 0) for name, value in batch.items() if name != "tokens_BT"}
    labels_BT = torch.full_like(tokens_BT, IGNORE)
    for place, length in enumerate(rest["length_B"].tolist()):
        answer = answers[place % len(answers)]
        tokens_BT[place, length : length + len(answer)] = torch.tensor(answer, dtype=torch.int64)
        labels_BT[place, length - 1 : length + len(answer)] = torch.tensor([*answer, END])
        rest["length_B"][place] += len(answer)
    return rest | {"tokens_BT": tokens_BT, "labels_BT": labels_BT}


def test_beams_rank_given_answers_as_their_scores_do(model: M6):
    batch = prompts(model.config)
    settings = dataclasses.replace(ALL, beams=8, answers=8, length_penalty=0)
    found = generate(model, batch, settings, trie=Trie(ANSWERS, END))
    score_BA = score(model, candidates(batch, ANSWERS), rows=7).view(5, -1).tolist()
    ranked = [sorted(map(Answer, ANSWERS, scores), key=lambda answer: -answer.score) for scores in score_BA]
    same(found, ranked)


def test_pictures_are_named_by_the_names_that_there_are(sample_corpus: Corpus):
    """Real pictures and words: the cache with its beams ranks as whole passes over each candidate do."""
    encode, end = sample_corpus.tokenizer.encode, sample_corpus.tokenizer.eos_id
    pool = sample_corpus.picture_rows("validation")[:3].tolist()
    names = sorted({sample_corpus.picture(row).zh for row in sample_corpus.picture_rows("train").tolist()})
    answers = [encode(name) for name in names]
    model = M6(dataclasses.replace(TINY, **MATCHING, text_vocab=sample_corpus.tokenizer.vocab_size))
    collate, width = Collator(sample_corpus, model.config), 40
    questions = [Row(encode(ASK_NAME), [end], View(row, 0)) for row in pool]
    batch = collate(questions, width)
    beams = Decoding(16, range(model.config.vocab), end, answers=9, beams=len(answers), length_penalty=0)
    found = generate(model, batch, beams, trie=Trie(answers, end))
    rows = [dataclasses.replace(row, target=[*answer, end]) for row in questions for answer in answers]
    score_BA = score(model, collate(rows, width)).view(len(pool), -1).tolist()
    same(found, [sorted(map(Answer, answers, scores), key=lambda answer: -answer.score)[:9] for scores in score_BA])


@pytest.mark.parametrize(
    "changes",
    [{}, {"beams": 2, "answers": 2}, {"temperature": 3.0, "answers": 20}, {"temperature": 1.0, "top_k": 1}],
    ids=["likeliest", "beams", "drawn", "drawn of one"],
)
def test_nothing_but_given_answers_is_said(model: M6, changes: dict[str, Any]):
    batch, generator = prompts(model.config), torch.Generator().manual_seed(0)
    settings = dataclasses.replace(ALL, repetition_penalty=1.5, **changes)
    found = generate(model, batch, settings, trie=Trie(ANSWERS, END), generator=generator)
    said = [answer.tokens for row in found for answer in row]
    assert len(said) == 5 * settings.answers and all(answer in ANSWERS for answer in said)
    if settings.answers == 20:
        assert all(answer in said for answer in ANSWERS)


def test_drawn_answers_come_as_often_as_they_are_likely(model: M6):
    batch = prompts(model.config, rows=2)
    draws = 4000
    settings = dataclasses.replace(FEW, room=2, temperature=0.8, answers=draws, length_penalty=0)
    found = generate(model, batch, settings, generator=torch.Generator().manual_seed(1))
    cool = dataclasses.replace(settings, answers=1)
    with torch.no_grad():
        for row in range(2):
            for answer, chance in tempered(model, batch, row, cool).items():
                count = sum(tuple(a.tokens) == answer for a in found[row])
                assert abs(count - draws * chance) < 5 * (draws * chance * (1 - chance)) ** 0.5 + 1
    best = {tuple(answer.tokens): answer.score for answer in all_answers(model, batch, 0, cool)}
    for answer in found[0]:
        assert answer.score == pytest.approx(best[tuple(answer.tokens)], abs=1e-4)


def tempered(model: M6, batch: dict[str, Tensor], row: int, settings: Decoding) -> dict[tuple[int, ...], float]:
    """The chance of each answer of at most two tokens."""
    chances: dict[tuple[int, ...], float] = {}
    for token, chance in enumerate(_chances(model, batch, row, [], settings), settings.vocabulary.start):
        if token == settings.end:
            chances[()] = chance
            continue
        for second, share in enumerate(_chances(model, batch, row, [token], settings), settings.vocabulary.start):
            chances[(token,) if second == settings.end else (token, second)] = chance * share
    assert sum(chances.values()) == pytest.approx(1)
    return chances


def _chances(model: M6, batch: dict[str, Tensor], row: int, said: list[int], settings: Decoding) -> list[float]:
    logs = torch.tensor(next_log_probabilities(model, batch, row, said, settings, None))
    return (logs / settings.temperature).softmax(0).tolist()


def test_the_same_generator_draws_the_same(model: M6):
    batch = prompts(model.config)
    settings = dataclasses.replace(ALL, temperature=1.0, top_k=20, top_p=0.9, answers=3)
    first, again, other = (
        generate(model, batch, settings, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert first == again and first != other


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_is_said_twice(model: M6, n: int):
    batch = prompts(model.config)
    settings = Decoding(room=12, vocabulary=range(3, 15), end=None)

    def repeats(row: list[int]) -> bool:
        ngrams = [tuple(row[at : at + n]) for at in range(len(row) - n + 1)]
        return len(set(ngrams)) < len(ngrams)

    assert any(map(repeats, tokens(generate(model, batch, settings))))
    assert not any(map(repeats, tokens(generate(model, batch, dataclasses.replace(settings, no_repeat_ngram=n)))))


def test_a_strong_penalty_lets_each_token_be_said_once(model: M6):
    batch = prompts(model.config)
    settings = Decoding(room=10, vocabulary=range(3, 20), end=None)
    free = tokens(generate(model, batch, settings))
    assert any(len(set(row)) < len(row) for row in free)
    for row in tokens(generate(model, batch, dataclasses.replace(settings, repetition_penalty=1e6))):
        assert len(set(row)) == len(row)


@every_config
@pytest.mark.parametrize("rows", [1, 2, 32])
@torch.no_grad()
def test_scores_are_the_losses(config: ModelConfig, rows: int):
    model, batch = build(config), sample_batch(config)
    score_B = score(model.train(), batch, rows)  # which drops tokens of experts that are full
    torch.testing.assert_close(score_B, -model.eval()(batch)["loss_B"], **TOLERANCE)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"room": 0}, "room=0: must be at least 1"),
    ({"beams": 0}, "beams=0: must be at least 1"),
    ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
    ({"temperature": -1.0}, "temperature=-1.0: must not be negative"),
    ({"temperature": inf}, "temperature=inf: must be a number"),
    ({"guidance": float("nan")}, "guidance=nan: must be a number"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: must be over 0 and at most 1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be a number over 0"),
    ({"vocabulary": range(0)}, "must be entries in a row, and at least one"),
    ({"vocabulary": range(0, 8, 2)}, "must be entries in a row, and at least one"),
    ({"end": 5}, r"end=5: is not in vocabulary=range\(1, 5\)"),
    ({"room": 5, "no_repeat_ngram": 2}, "no_repeat_ngram with room=5: may leave none of 4 entries"),
    ({"temperature": 1.0, "beams": 2}, "temperature=1.0 with beams=2: draw or search, not both"),
    ({"top_k": 3}, "top_k and top_p limit a draw; set a temperature"),
    ({"top_p": 0.5}, "top_k and top_p limit a draw; set a temperature"),
    ({"answers": 2}, "answers=2 with beams=1: without a temperature, beams give them"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FEW, **changes)


def test_arguments_that_do_not_fit_are_refused(model: M6):
    batch = prompts(model.config)
    half = {name: value[:2] for name, value in batch.items()}
    drawn = dataclasses.replace(FEW, temperature=1.0)
    refused: list[tuple[Decoding, dict[str, Any], str]] = [
        (dataclasses.replace(FEW, vocabulary=range(999)), {}, "the model has 128 entries"),
        (drawn, {}, "temperature=1.0: lots need a generator"),
        (dataclasses.replace(FEW, beams=2), {"on_token": print}, "2 lines are written for each row"),
        (dataclasses.replace(FEW, guidance=2.0), {}, "guidance=2.0: needs the batch's twin"),
        (FEW, {"twin": half}, "5 rows, 2 in their twin: must be as many"),
        (FEW, {"trie": Trie([[1]], 3)}, "end=2: the answers to choose from end with 3"),
        (FEW, {"trie": Trie([[1], [1, 3, 4]], END)}, "room=3: the longest answer to choose from takes 4 with its end"),
        (FEW, {"trie": Trie([[1], [7]], END)}, "answers to choose from hold 7"),
        (dataclasses.replace(FEW, no_repeat_ngram=2), {"trie": Trie([[1]], END)}, "may repeat themselves"),
        (dataclasses.replace(FEW, room=60), {}, "the model has 24"),
    ]
    for settings, others, message in refused:
        with pytest.raises(ValueError, match=message):
            generate(model, batch, settings, **others)
