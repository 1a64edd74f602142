"""Rows of published measurements as jobs: what their columns, notes and names say, in any words."""

from pathlib import Path

import pytest

from launch.planner import published
from launch.planner.step import add_step
from launch.planner.terms import Terms
from launch.planner.validation import predict, read_rows

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return [dict(row) for row in read_rows(Path("benchmarks/calibration.csv"))]


def named(rows: Rows, name: str) -> dict[str, str]:
    return next(row for row in rows if row["id"] == name)


def flops_a_token(row: dict[str, str]) -> float:
    """As published by a source that counts half of the scores."""
    seconds = predict(row | {"metric": "iter_time", "unit": "s"}).predicted
    rate = predict(row | {"metric": "model_tflops_per_gpu", "unit": "TFLOP/s"}).predicted
    assert seconds and rate
    return rate * 1e12 * seconds * float(row["gpus"]) / float(row["global_batch_tokens"])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("BR-1", 338e12 / 1297), ("BR-2", 589e12 / 2265), ("BR-3", 1292e12 / 4969),
        ("Q235-1", 245e12 * 256 * 19.7 / 8388608), ("Q235-2", 276e12 * 256 * 17.6 / 8388608),
    ],
)  # fmt: skip
def test_flops_of_a_token_are_those_that_a_row_tells_twice(rows: Rows, name: str, published: float) -> None:
    """Its FLOPs and its time: with wide heads, further predictions, and half of a causal mask."""
    assert flops_a_token(named(rows, name)) == pytest.approx(published, rel=0.02)
    narrow = named(rows, name) | {"model": "of no known name"}
    assert flops_a_token(narrow) < 0.97 * published


@pytest.mark.parametrize(
    ("name", "share"),
    [("GPT-22B", 0.415), ("GPT3-175B", 0.514), ("MTNLG-530B", 0.56), ("GPT-1T", 0.563)],
)
def test_selective_recomputation_reaches_what_the_notes_tell(rows: Rows, name: str, share: float) -> None:
    """Of jobs that no row has."""
    row = named(rows, f"KOR-{name}-full") | {"metric": "mfu", "unit": "share", "value": str(share)}
    found = predict(row | {"notes": row["notes"].replace("recompute=full", "recompute=seqsel")})
    assert found.error is not None and abs(found.error) < 0.06


DENSE = {"experts": "", "top_k": "", "moe_every": "", "ep": "1", "params_active": ""}
LLAMA_70B = DENSE | {
    "model": "Llama 3.1 70B", "layers": "80", "hidden": "8192", "ffn": "28672", "heads": "64", "seq": "8192",
    "vocab": "128256", "params_total": "7.06e10", "global_batch_tokens": str(128 * 8192), "notes": "", "tp": "4",
    "pp": "4",
}  # fmt: skip
QWEN_30B = {
    "model": "Qwen3-30B-A3B", "layers": "48", "hidden": "2048", "ffn": "768", "heads": "32", "params_total": "3.05e10",
    "params_active": "3.3e9", "global_batch_tokens": str(512 * 4096),
}  # fmt: skip


@pytest.mark.parametrize(
    ("like", "changes"),
    [
        ("MLM21-09", {"layers": "128", "hidden": "25600", "ffn": "102400", "pp": "64", "dp": "6", "gpus": "3072"}),
        ("MCH100-9", {"dp": "24", "gpus": "3072"}),
        ("ZINF-10T", {"layers": "205", "hidden": "90112", "ffn": "360448", "tp": "8", "dp": "64",
                      "params_total": "2e13"}),
        ("ZINF-1T", {"gpus": "64", "dp": "16", "global_batch_tokens": str(5 * 64 * 1024)}),
        ("AZ-8", {"gpus": "1024", "dp": "1024", "global_batch_tokens": "8388608"}),
        ("DSMOE-1", DENSE | {"layers": "32", "hidden": "4096", "ffn": "16384", "params_total": "6.7e9", "tp": "8",
                             "dp": "16"}),
        ("BSV-3", {"zero": "3", "tp": "1", "pp": "1", "dp": "64", "offload": "cpu", "notes": "4 V100-32/node; mbs=16"}),
        ("BSA-2t", {"tp": "4", "dp": "8", "zero": "1"}),
        ("MXTRL-2", {"model": "Mixtral 8x7B", "layers": "32", "hidden": "4096", "ffn": "14336", "gpus": "64", "tp": "1",
                     "params_total": "4.67e10", "params_active": "1.29e10", "pp": "4", "dp": "16"}),
        ("Q235-1", {"gpu": "GB200", "tp": "1", "pp": "4", "ep": "64", "dp": "64", "precision": "mxfp8"}),
        ("Q235-1", {"gpu": "NVIDIA GB300", "pp": "1", "tp": "1", "ep": "32", "dp": "256", "notes": "4 GB300/node"}),
        ("Q235-1", QWEN_30B | {"gpus": "16", "tp": "1", "pp": "2", "ep": "8", "dp": "8"}),
        ("BR-1", {"precision": "bf16"}),
        ("BR-1", {"gpu": "H800", "recompute": "mla_up_proj+mlp"}),
        ("BR-1", LLAMA_70B | {"gpus": "64", "dp": "2", "notes": "CP 2; VP=5", "precision": "bf16"}),
        ("BR-1", LLAMA_70B | {"gpus": "64", "dp": "4", "notes": "cp 2; vpp 5", "precision": "BF16"}),
        ("TT-2t", LLAMA_70B | {"gpus": "256", "tp": "8", "pp": "1", "dp": "32", "recompute": "full"}),
        ("TT-2t", {"precision": "bf16+float8"}),
        ("RUN-1", {"global_batch_tokens": "62914560"}),
    ],
)  # fmt: skip
def test_jobs_like_the_published_ones_are_planned_sanely(rows: Rows, like: str, changes: dict[str, str]) -> None:
    """Other members of each group, in words of their own; that they were measured is not claimed."""
    row = named(rows, like) | changes | {"metric": "mfu", "unit": "%", "value": "1"}
    found = predict(row)
    assert found.predicted is not None, found.reason
    assert 4 < found.predicted < 95  # of 16-bit peak; in 8 bits up to twice as much is possible
    if row["offload"] in ("", "none"):
        memory = predict(row | {"metric": "peak_mem_per_gpu", "unit": "GB"})
        assert memory.predicted and memory.predicted > 1


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("BR-1", {"notes": "vp 4"}, {"notes": "VPP=4"}),
        ("BR-1", {"precision": "fp8"}, {"precision": "FP8-CS"}),
        ("BR-1", {"recompute": "none"}, {"recompute": "No"}),
        ("Q235-1", {"notes": "1F1B overlap"}, {"notes": "1F1B A2A overlap"}),
        ("Q235-1", {"notes": "DeepEP"}, {"notes": "DeepEP, no 1F1B overlap"}),
        ("KOR-GPT-22B-full", {"notes": "recompute=seqsel; mbs=4"}, {"notes": "mbs 4", "recompute": "seqpar+selective"}),
        ("MLM21-09", {}, {"gpu": "A100-SXM4-80GB", "notes": "MBS=1; recompute=Full", "recompute": ""}),
        ("PAT-1d", {"tp": "8", "pp": "8", "gpus": "1024", "global_batch_tokens": "3e6", "notes": "300B tokens"},
         {"tp": "8", "pp": "8", "gpus": "1024", "global_batch_tokens": "3e6", "notes": "0.3 trillion tokens"}),
    ],
)  # fmt: skip
def test_what_is_said_in_other_words_is_understood(
    rows: Rows, name: str, one: dict[str, str], other: dict[str, str]
) -> None:
    found = [predict(named(rows, name) | changes) for changes in (one, other)]
    assert found[0].predicted is not None and found[0].predicted == found[1].predicted


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("BR-3", {"precision": "nvfp4"}, "precision=nvfp4: no rate was fitted"),
        ("BR-1", {"recompute": "sometimes"}, "recompute=sometimes is not known"),
        ("BR-1", {"notes": "cp 3"}, "tp x pp x dp x cp is 3072, of 1024 devices"),
        ("TT-2t", {"params_total": "70e9"}, "params_total=70e9 contradicts layers, hidden and ffn"),
        ("RUN-1", {"metric": "iter_time", "unit": "s"}, "the batch of a step is not stated"),
        ("M6-1", {"gpu": "TPU v5p"}, "the device TPU v5p is not known"),
        ("BSA-1t", {"gpu": "A100-PCIe-80GB"}, "the device A100-PCIe-80GB is not known"),
    ],
)
def test_what_is_not_understood_is_told(rows: Rows, name: str, changes: dict[str, str], reason: str) -> None:
    found = predict(named(rows, name) | changes)
    assert found.predicted is None and found.reason.startswith(reason)


def test_a_precision_in_its_column_is_not_overruled_by_notes(rows: Rows) -> None:
    row = named(rows, "Q235-1")
    assert predict(row | {"notes": row["notes"] + "; the FP8 variant is faster"}).predicted == predict(row).predicted


BLOOM_HOURS = 1_082_990  # arXiv 2211.02001, table 2: with all that was lost and repeated


def test_whole_trainings_are_those_of_their_makers(rows: Rows) -> None:
    """DeepSeek-V3's own hours, of which the row does not tell the batch; others need what their papers do not tell."""
    row = named(rows, "RUN-1")
    assert predict(row).error == pytest.approx(0, abs=0.05)
    empty = dict.fromkeys(row, "") | {"id": "RUN-9", "metric": "gpu_hours", "value": "1", "gpu": "A100-80GB"}
    assert predict(empty | {"model": "BLOOM-176B", "unit": "A100 GPU-h"}).predicted == pytest.approx(
        BLOOM_HOURS, rel=0.15
    )
    assert predict(empty | {"model": "BLOOM-7B", "unit": "A100 GPU-h"}).predicted is None
    for given in ({"gpus": "1000"}, {"params_total": "7e9"}):  # contradicts the paper
        large = {"model": "Llama-3.1-405B", "gpu": "H100-80GB SXM", "unit": "H100 GPU-h", "notes": "15.6T tokens"}
        assert predict(empty | large).predicted and predict(empty | large | given).predicted is None


@pytest.mark.parametrize(
    ("name", "changes", "fits"),
    [
        ("BSA-7m", {}, 1), ("BSA-7m", {"micro_batch": "8", "pp": "4", "dp": "12"}, 0),
        ("ZCAP-Data_parallel", {"params_total": "1.2e9"}, 1), ("ZCAP-Data_parallel", {"params_total": "8e9"}, 0),
        ("ZCAP-ZeRO-Offload", {"params_total": "12e9"}, 1), ("ZCAP-ZeRO-Offload", {"params_total": "2e10"}, 0),
        ("M6-1", {"gpus": "60"}, 0), ("M6-1", {"zero": "3", "offload": "none"}, 0),
        ("M6-1", {"zero": "3", "offload": "nvme"}, 1),
    ],
)  # fmt: skip
def test_what_fits_is_told_by_where_a_job_keeps_its_states(
    rows: Rows, name: str, changes: dict[str, str], fits: int
) -> None:
    assert predict(named(rows, name) | changes | {"metric": "fits", "unit": "bool", "value": "1"}).predicted == fits


def test_power_behind_the_supplies_is_less(rows: Rows) -> None:
    row = named(rows, "MLP-3")
    plain, behind = predict(row).predicted, predict(row | {"notes": "same runs, DC side"}).predicted
    assert plain and behind == pytest.approx(plain / 1.015)


def test_energy_by_rated_power_is_that_of_the_devices(rows: Rows) -> None:
    """As of trainings without a meter."""
    row = named(rows, "RUN-1")
    hours = predict(row).predicted
    energy = row | {"metric": "energy", "unit": "MWh", "notes": row["notes"] + "; energy = TDP x hours"}
    assert hours and predict(energy).predicted == pytest.approx(hours * 700 / 1e6)


def test_a_pipeline_gathers_once_a_step(rows: Rows) -> None:
    row = named(rows, "TT-2t") | LLAMA_70B | {"gpus": "64", "tp": "8", "pp": "4", "dp": "2", "micro_batch": "1"}

    def gathers(batch: int) -> float:
        terms, changed = Terms(), row | {"global_batch_tokens": str(batch * 8192)}
        add_step(terms, published.job(changed), published.machine(changed))
        return terms["step.gathers"].value

    assert gathers(64) == gathers(128) > 0
