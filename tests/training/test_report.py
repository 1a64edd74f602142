import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.training.fake_run import TASKS, make_load, make_recipe, make_record, make_run, make_samples
from training.charts import MAX_CELLS, MAX_POINTS, bins, compact, thinned, three_digits, ticks, unbroken
from training.errors import UserError
from training.records import Sample, read_lines, write_json
from training.report import Quarter, layer_load, planned_steps, quarters, reach, write_report
from training.run import PLAN
from training.tracking import DROPPED, Tracker

HOSTILE = '</pre><script>alert("1")</script><img src=https://example.org/x.png onerror=alert(2)>{{ 7*7 }}'
VOID = {"meta", "img", "link"}


class Page(HTMLParser):
    """What a browser would see; every element must be closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.tags, self.addresses, self._open = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "quick", make_recipe(), make_load(), make_samples())


def test_the_page_has_every_part_and_asks_for_nothing(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report/index.html"
    for heading in ("What it writes", "Learning", "Experts", "Machine and optimiser", "Facts", "Recipe"):
        assert heading in page.text
    for figure in ("45.6M", "8.12M active a token", "960k", "of peak FLOP/s", "no counter to read"):
        assert figure in page.text
    assert "3 of 6 exactly right" in page.text and "更上一层楼" in page.text and "登鹳雀楼" in page.text
    assert "global_batch: 32" in page.text and "checkpoints/step-400" in page.text
    assert len(page.addresses) == 6 and all(one.startswith("data:image/png;base64,") for one in page.addresses)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"url\(|@import|https?:", path.read_text(encoding="utf-8"))


def test_a_sample_says_what_is_what(run: Path) -> None:
    text = Page(write_report(run)).text
    assert text.count("✓ right") == 3 and text.count("✗ differs") == 3
    assert re.search(r"output ✗ differs\s+黄色的月亮\s+reference金色的球", text)
    assert re.search(r"output ✗ differs\s+\(nothing\)\s+reference灰色的球", text)
    assert re.search(r"prompt登鹳雀楼\s+output\s+白日依山尽", text)  # any poem will do: no verdict, no reference


def test_figures_have_their_meaning_and_facts_their_units(tmp_path: Path) -> None:
    facts = {"matmul_peak_flops/rank": 93_123_123_123.4, "host_bytes/before_model": 1_201_635_008, "ranks": 2048}
    with Tracker(tmp_path, make_recipe(steps=1), facts) as tracker:
        tracker.step(make_record(1))
    text = Page(write_report(tmp_path)).text
    assert "93.1 GFLOP/s" in text and "1.2 GB" in text and "2,048" in text
    assert DROPPED in text


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    recipe = make_recipe(steps=1)
    with Tracker(tmp_path, recipe, {HOSTILE: HOSTILE}) as tracker:
        tracker.step(make_record(1) | {f"loss/{HOSTILE}": 1.0, "energy/source": HOSTILE, "energy/joules_per_token": 1})
        tracker.evaluation(1, {f"loss/validation/{HOSTILE}": 1.0})
        tracker.samples(1, [Sample(None, HOSTILE, HOSTILE, HOSTILE, HOSTILE)])
        tracker.event(1, HOSTILE, HOSTILE)
    (tmp_path / "recipe.yaml").write_text(HOSTILE)
    page = Page(write_report(tmp_path))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 10


def test_parts_that_a_run_lacks_do_not_appear(tmp_path: Path) -> None:
    bare = {"step": 1, "position": 8, "tokens": 100, "loss": float("nan"), "lr": 0.1}
    bare |= {"step_seconds": 1.0, "tokens_per_second": 100.0, "grad_norm": 1.0}
    with Tracker(tmp_path, make_recipe(steps=1), {}) as tracker:
        tracker.step(bare)
    text = Page(write_report(tmp_path)).text
    assert "not finite" in text and "Learning" in text
    for part in (
        "What it writes",
        "Experts",
        "first quarter",
        "Facts",
        "Recipe",
        "Events",
        "Parameters",
        "all tasks",
    ):
        assert part not in text


def test_a_folder_without_steps_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no steps in metrics\.jsonl.*train first"):
        write_report(tmp_path)


def test_energy_and_time_are_summed_over_all_steps(tmp_path: Path) -> None:
    with Tracker(tmp_path, make_recipe(steps=30), {}) as tracker:
        for step in range(1, 31):
            measured = {"step_seconds": 2.0, "energy/joules": 24_000.0 * step, "energy/source": "modelled"}
            tracker.step(make_record(step) | measured | {"energy/joules_per_token": 9.5})
    text = Page(write_report(tmp_path)).text
    assert "1 min 00 s" in text  # 30 steps of 2 s
    assert "0.2 kWh" in text and "9.5 J a token, modelled" in text  # 30 steps of 24 kJ


def test_what_a_loss_took_is_told_where_it_was_first_reached() -> None:
    steps = [
        {"step": 10 * n, "tokens": 500 * n, "loss": 6.0 - n / 2, "step_seconds": 2.0, "energy/joules": 30.0 * n}
        | {"energy/source": "measured (rapl)"}
        for n in range(1, 9)
    ]
    steps[4]["loss"] = None  # not finite
    reached = reach(steps, 4.5)
    assert reached is not None
    assert reached._asdict() == {
        "step": 30, "tokens": 1500, "seconds": 60.0, "joules": 90.0, "source": "measured (rapl)"
    }  # fmt: skip
    assert reach(steps, 1.0) is None
    unknown = {"energy/joules": None, "energy/source": "unavailable"}
    assert reach([steps[0] | unknown], 6.0)[3:] == (None, "unavailable")


def test_the_plan_stands_beside_what_came_and_events_are_marked(tmp_path: Path) -> None:
    with Tracker(tmp_path, make_recipe(steps=30), {}) as tracker:
        for step in range(1, 31):
            tracker.step(make_record(step) | {"energy/joules": 500.0 * step})
        tracker.event(20, "skipped step", "for a reason")
        tracker.event(30, "saved", "checkpoints/step-30")
    write_json(tmp_path / PLAN, {"stages": [{"watts": 9.0, "metrics": {"step_seconds": {"value": 1.3}}}]})
    page = Page(write_report(tmp_path))
    html = (tmp_path / "report" / "index.html").read_text()
    assert "planned" in page.text and html.count('class="line planned"') == 1
    assert html.count('class="mark trouble"') == 1 and html.count('class="mark"') == 1
    assert "step 20: skipped step" in page.text and "loss over kWh" in page.text


def test_quarters_compare_the_runs_ends() -> None:
    lines = [{"step": step, "loss/validation/poem": 9.0 - step / 20} for step in range(0, 101, 20)]
    lines += [{"step": 100, "loss/validation/late": 1.0}, {"step": 5, "loss": 3.0}]
    rows = [Quarter("late", None, 1.0), Quarter("poem", 8.5, 4.5)]
    for planned in (0, 90, 100):  # unknown; cut down by a resume; run to its end
        assert quarters(lines, planned) == (rows, "")
    assert Quarter("late", None, 1.0).change is None
    assert Quarter("poem", 8.0, 4.0).change == pytest.approx(-0.5)


def test_an_unfinished_run_has_no_last_quarter_yet() -> None:
    lines = [{"step": step, "loss/validation/poem": 9.0 - step / 20} for step in range(0, 101, 20)]
    found = quarters(lines, planned=200)
    assert found.rows == [Quarter("poem", 8.0, None)]  # steps 0, 20 and 40
    assert found.late(found.rows[0]) == "not yet"
    assert found.standing == "step 100 of 200; the last quarter begins with step 151"
    assert quarters(lines, 120).rows == [Quarter("poem", 8.5, 4.0)]  # begun: what there is of it


def test_the_end_of_a_run_is_its_recipes(run: Path, tmp_path: Path) -> None:
    assert planned_steps(run, False) == 400
    assert planned_steps(tmp_path, False) == 0
    (tmp_path / "recipe.yaml").write_text("steps: 9\ndelink: {after: 5, then: {steps: 20}}\n")
    assert [planned_steps(tmp_path, delinked) for delinked in (False, True)] == [9, 20]
    assert "not yet" not in Page(write_report(run)).text
    shutil.copy(run / "recipe.yaml", tmp_path)
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= 250]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = Page(write_report(tmp_path)).text
    assert text.count("not yet") == len(TASKS)
    assert "Step 250 of 400; the last quarter begins with step 301." in text


def test_load_of_a_layer() -> None:
    row = layer_load(3, wanted=[30, 10, 10, 10], kept=[15, 10, 10, 10])
    assert row.cv == pytest.approx(3**0.5 / 3)
    assert row.dropped == pytest.approx(0.25)
    assert "layer 3, expert 1: 2.00 × the even load, 15 of 30 dropped" in row.heat
    assert layer_load(1, [0, 0], [0, 0]).cv is None


def test_many_experts_share_cells_and_none_is_lost() -> None:
    cells = bins(960)
    assert len(cells) == MAX_CELLS and [expert for cell in cells for expert in cell] == list(range(960))
    assert layer_load(1, [1] * 960, [1] * 960).heat.count("<rect") == MAX_CELLS
    assert [len(cell) for cell in bins(16)] == [1] * 16


def test_long_lines_are_thinned_and_gaps_stay_gaps() -> None:
    points = [(step, float(step % 7)) for step in range(10_000)]
    assert len(thinned(points)) <= MAX_POINTS and thinned(points)[-1][0] == 9_999
    assert unbroken([(1, None), (2, 1.0), (3, None), (4, 2.0), (5, 3.0)]) == [
        [(2, 1.0)],
        [(4, 2.0), (5, 3.0)],
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 0), (2.2, 9.7), (-3, 4), (1e-5, 1e-3), (5, 5), (0, 1e12), (-2, -2)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 6 and marks[0] <= low and high <= marks[-1]


def test_numbers_in_few_characters() -> None:
    shown = [compact(value) for value in (0, 7.5e-4, 0.25, 3.21, 999.9, 12_345, 45.6e6, 1.2e9, 10e12)]
    assert shown == ["0", "7.5e-4", "0.25", "3.21", "1k", "12.3k", "45.6M", "1.2B", "10T"]
    assert [three_digits(value) for value in (2.2, 12.0, 250.0, 1e-4)] == ["2.20", "12.0", "250", "1e-4"]
