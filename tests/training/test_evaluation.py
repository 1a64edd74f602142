"""What `m6 eval` leaves in a run's folder, and how it is laid out: no model is needed for either."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.training.fake_run import make_recipe, make_record
from tests.training.test_report import HOSTILE, Page
from training.errors import UserError
from training.evaluation import (
    Drawing,
    Hit,
    Samples,
    Saying,
    Search,
    picture_uri,
    read_evaluation,
    tables,
    write_evaluation,
)
from training.report import write_report
from training.tracking import Tracker


def paired(difference: float) -> dict[str, float]:
    return {"difference": difference, "low": difference - 0.01, "high": difference + 0.01, "not_better": 0.0}


def recalls(r1: float) -> dict[str, Any]:
    found = {f"r{k}": r1 * k / 10 for k in (1, 5, 10)}
    return {"image_to_text": found | {"n": 1421, "intervals": {name: [0.01, 0.9] for name in found}}}


FIGURES = {
    "step": 1200, "parameters": 39_000_000, "split": "test",
    "retrieval": recalls(0.5), "retrieval_ridge": recalls(0.4),
    "retrieval_above_ridge": {"image_to_text": {f"r{k}": paired(0.1) for k in (1, 5, 10)}},
    "caption": {
        "exact": 0.0625, "chrf": 12.3, "cider": 0.5, "n": 421,
        "intervals": {"exact": [0.05, 0.08], "chrf": [11.0, 13.0], "cider": [None, 0.6]},
        "blank_image": {"exact": 0.0, "chrf": 2.2, "cider": None},
        "above_blank_image": {"exact": paired(0.06), "chrf": paired(10.1), "cider": paired(0.4)},
    },
    "answers": {"whether": {"accuracy": 0.7, "interval": [0.6, 0.8], "majority": 0.51, "blank_image": 0.52, "n": 400}},
    "text_poem": {
        "unprompted": {"bits_per_character": 7.1, "interval": [7.0, 7.2], "n": 1000},
        "5-gram, texts seen": {"bits_per_character": 7.5, "interval": [7.4, 7.6], "above_run": paired(0.4)},
    },
}  # fmt: skip


def make_samples(words: str = "红色的球") -> Samples:
    picture = picture_uri(Image.new("RGB", (300, 200), "red"))
    hit = Hit(picture=picture, words=words, right=True)
    return Samples(
        sayings=[
            Saying(task="caption", reference=words, output=words, picture=picture),
            Saying(task="caption", reference="月亮", output=words, picture=picture),
            Saying(task="poem", prompt=words, output=words),
        ],
        counts={"caption": (26, 421)},
        searches=[Search(query=words, picture=picture, hits=[hit], rank=2, of=421)],
        drawings=[
            Drawing(words=words, trained=False, picture=picture, nearest=picture, nearest_words=words, distance=0.312)
        ],
        distance_held_out=0.61,
        distance_copied=0.12,
    )


def begin(run: Path) -> Path:
    with Tracker(run, make_recipe(steps=1), {}) as tracker:
        tracker.step(make_record(1))
    return run


def check(page: Page, source: str) -> None:
    for words in ("What it can do", "Finding", "Naming", "Answering", "Writing", "search", "draw"):
        assert words in page.text
    for figure in ("0.062", "11.0 to 13.0", "+10.1", "– to 0.60", "7.500", "+0.400", "0.700", "1,421"):
        assert figure in page.text
    assert "26 of 421 exactly right" in page.text and page.text.count("✓ right") == 1
    assert (
        "found at 2" in page.text
        and "nearest, 0.31" in page.text
        and "are 0.61 from their nearest, and copies of training pictures 0.12" in page.text
    )
    assert len(page.addresses) == 6 and all(one.startswith("data:image/png;base64,") for one in page.addresses)
    assert not re.search(r"url\(|@import|https?:|<script", source)


def test_an_evaluation_has_a_page_and_stands_in_the_report(tmp_path: Path) -> None:
    begin(tmp_path)
    path = write_evaluation(tmp_path / "evaluation", "quick", FIGURES, make_samples())
    assert json.loads((tmp_path / "evaluation" / "figures.json").read_text()) == FIGURES
    found = read_evaluation(tmp_path)
    assert found and found.samples == make_samples()
    for page in (path, write_report(tmp_path)):
        check(Page(page), page.read_text(encoding="utf-8"))


def test_a_report_without_evaluation_tells_how_to_have_one(tmp_path: Path) -> None:
    text = Page(write_report(begin(tmp_path / "quick"))).text
    assert "m6 eval --run quick" in text and "What it can do" not in text


def test_what_a_model_says_stays_text(tmp_path: Path) -> None:
    page = Page(write_evaluation(tmp_path, HOSTILE, FIGURES, make_samples(HOSTILE)))
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 7


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("figures.json", "{"),
        ("figures.json", "[]"),
        ("figures.json", "{}"),
        ("figures.json", '{"step": 1, "caption": {"exact": 1}}'),
        ("samples.json", ""),
        ("samples.json", '{"drawings": 1}'),
        ("samples.json", '{"sayings": [{"task": "a", "output": "b", "picture": "https://example.org/x.png"}]}'),
    ],
)
def test_a_damaged_evaluation_is_one_line(tmp_path: Path, name: str, content: str) -> None:
    write_evaluation(tmp_path / "evaluation", "quick", FIGURES, make_samples())
    (tmp_path / "evaluation" / name).write_text(content)
    with pytest.raises(UserError, match="not an evaluation that this program wrote; run `m6 eval` again"):
        read_evaluation(tmp_path)


def test_a_missing_part_has_no_table(tmp_path: Path) -> None:
    figures = {"step": 3, "text": FIGURES["text_poem"]["unprompted"]}
    text = Page(write_evaluation(tmp_path, "quick", figures, Samples())).text
    assert "Writing" in text and "files of one's own" in text
    for words in ("Finding", "Naming", "Answering", "search", "draw"):
        assert words not in text


def test_what_fine_tuning_changed_stands_first(tmp_path: Path) -> None:
    def measured(before: float, after: float) -> dict[str, float]:
        return {"before": before, "after": after, **paired(after - before)}

    own = {"n": 177, "image_to_text r1": measured(0.25, 0.6), "caption chrf": measured(9.0, 31.5)}
    elsewhere = {"n": 179, "image_to_text r1": measured(0.35, 0.34), "text poem": measured(9.1, 9.2) | {"texts": 200}}
    found = {"checkpoint": "runs/a/checkpoints/step-4", "own": own, "elsewhere": elsewhere}
    mine, theirs, *_ = tables(FIGURES | {"before_after": found})
    assert [[cell.value for cell in row] for row in mine.rows] == [
        ["finding, image → text, R@1", "0.250", "0.600", "+0.350", "177"],
        ["captions, chrF", "9.0", "31.5", "+22.5", "177"],
    ]
    assert [cell.value for cell in theirs.rows[1]] == ["poems, bits a character", "9.100", "9.200", "+0.100", "200"]
    assert mine.rows[0][3].interval == "+0.340 to +0.360" and "runs/a/checkpoints/step-4" in theirs.note
    alone = tables(FIGURES | {"before_after": {"checkpoint": "x", "own": own}})
    assert [table.title for table in alone[:2]] == [mine.title, "Finding: image → text"]
