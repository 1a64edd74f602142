"""`m6 plan`: will it fit, how long does it take, and what does it burn; and how far such answers are to be trusted."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.planner.cluster import load_cluster
from launch.planner.plan import PARTS, Plan, as_json, make_plan
from launch.planner.search import Candidate, overrides, search
from launch.planner.terms import Term
from launch.planner.validation import constants, predict, read_rows, score
from launch.planner.workload import Fill, Work, is_recipe, load_work
from training.errors import UserError
from training.placement import TIERS

DIGITS = 3


@dataclass(frozen=True)
class Request:
    """What is to be planned, as it was typed."""

    model: str | None
    cluster: str | None
    ds_config: str | None
    tokens: float | None
    overrides: Sequence[str]
    delinked: bool
    filled: float | None = 1.0  # None: as the recipe's data tell

    def work(self) -> Work:
        """Raises UserError."""
        for name, value in (("--model", self.model), ("--cluster", self.cluster)):
            if not value:
                raise UserError(f"{name} is missing: a plan needs a model, a cluster and a ds_config")
        assert self.model and self.cluster
        cluster = load_cluster(self.cluster)
        given = self.model, cluster, self.ds_config, self.tokens, self.overrides, self.delinked
        if self.filled is not None:
            return load_work(*given, Fill(self.filled))
        if not is_recipe(self.model):
            raise UserError(f"--filled auto: {self.model} has no data to look at; give a recipe, or a share")
        from launch.planned import fill_of  # which reads data: a plan without them starts in an instant

        full = load_work(*given)
        return load_work(*given, fill_of(full.recipe, cluster.devices, full.config.micro_batch))


# Options that another one would leave without a meaning.
CLASHES = {
    "--validate": (
        "--model", "--cluster", "--ds-config", "--tokens", "--filled", "--delinked", "--search", "--explain",
        "KEY=VALUE",
    ),
    "--search": ("--explain",),
    "--explain": ("--json",),
}  # fmt: skip


def check_options(given: Collection[str]) -> None:
    """Raises UserError where one would be ignored."""
    for option, others in CLASHES.items():
        if clashing := [other for other in others if option in given and other in given]:
            raise UserError(f"{clashing[0]} says nothing beside {option}: leave one of them out")


def plan_training(request: Request, as_json_text: bool, explained: str | None) -> None:
    """Print a plan, or how one of its terms came about. Raises UserError."""
    made = make_plan(request.work())
    if explained:
        print(explanation(made, explained))
    elif as_json_text:
        print(_json(as_json(made)))
    else:
        show(made, _console())


def _json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)


def _console() -> Console:
    """Shows names as they are, though they may read like Rich's markup."""
    return Console(markup=False, emoji=False)


def explanation(made: Plan, key: str) -> str:
    """The formula of a term and of all that go into it, with the numbers put in. Raises UserError."""
    key = ALIASES.get(key, key)
    if key not in made.terms:
        close = difflib.get_close_matches(key, made.terms, 3)
        known = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(made.terms)}"
        raise UserError(f"--explain {key}: the plan has no such term; {known}")
    return "\n".join(_explained(made.terms[key], 0, set()))


ALIASES = {"memory": "memory.device_bytes", "step": "step.seconds", "energy": "energy.kwh"}


def _explained(term: Term, depth: int, seen: set[str]) -> list[str]:
    indent = "  " * depth
    if term.key in seen:
        return [f"{indent}{term.key}: as above"]
    seen.add(term.key)
    numbers = ", ".join(f"{name}={float(value):.6g}" for name, value in term.inputs.items())
    lines = [f"{indent}{term.key} = {term.value:.6g} {term.unit}", f"{indent}  = {term.formula}"]
    lines += [f"{indent}  with {numbers}"] if numbers else []
    lines += [f"{indent}  ({term.source})"] if term.source else []
    for value in term.inputs.values():
        if isinstance(value, Term):
            lines += _explained(value, depth + 1, seen)
    return lines


def show(made: Plan, console: Console) -> None:
    """The plan as tables."""
    work, terms = made.work, made.terms
    model, layout = work.config.model, work.job.layout
    console.print(
        f"{model.layers} layers, hidden {model.hidden}, {model.experts} experts: "
        f"{number(terms['parameters.total'].value)} parameters, {number(terms['parameters.active'].value)} active, "
        f"{number(terms['parameters.trained'].value)} trained"
        f"{' (layers share their weights)' if model.share_layers else ''}\n"
        f"{layout.devices} x {work.cluster.device.name}, ep {layout.ep}, micro-batch {layout.micro_batch} rows x "
        f"{layout.micro_batches}, {number(work.usual.tokens)} positions a step\n"
        f"weights on {work.config.placement.parameters}; optimizer on {work.config.placement.optimizer}; "
        f"{work.config.precision}"
    )
    for table in (_memory(made), _step(made), _whole(made)):
        console.print()
        console.print(table)
    console.print()
    console.print("It fits." if made.fits else "It does not fit:")
    for limit in made.limits:
        console.print(f"  {limit}", soft_wrap=True)
    for remark in made.remarks:
        console.print(f"Note: {remark}.", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def _memory(made: Plan) -> Table:
    machine = made.work.cluster.hardware
    there = {"device": machine.device_bytes, "cpu": machine.host_bytes, "nvme": machine.disk_bytes}
    heads = {"device": "device_bytes", "cpu": "host_bytes_per_node", "nvme": "nvme_bytes_per_node"}
    names = {"device": "device, the fullest", "cpu": "host, a node", "nvme": "NVMe, a node"}
    table = _table("memory", "GB", "low", "high", "there")
    for tier in TIERS:
        total = made.estimate(f"memory.{heads[tier]}")
        table.add_row(names[tier], *(gigabytes(total[name]) for name in total), gigabytes(there[tier]))
        for name, term in made.terms.under(f"memory.{tier}").items():
            if term.value:
                table.add_row(f"  {name}", gigabytes(term.value))
    return table


def _step(made: Plan) -> Table:
    table = _table("step", "s", "low", "high")
    whole = made.estimate("step.seconds")
    table.add_row("a step", *(number(whole[name]) for name in whole))
    for name in PARTS:
        each = " (a micro-batch)" if "micro-batch" in made.terms[f"step.{name}"].unit else ""
        if made.terms[f"step.{name}"].value:
            table.add_row(f"  {name}{each}", number(made.terms[f"step.{name}"].value))
    return table


def _whole(made: Plan) -> Table:
    table = _table(f"{number(made.work.tokens)} tokens", "", "low", "high", "")
    table.add_row(*_line(made, "tokens_per_second", "tokens a second"))
    table.add_row(*_line(made, "flops_utilization", "of peak", 100, "%"))
    table.add_row(*_line(made, "days", "days, training alone"))
    table.add_row(*_line(made, "energy.kwh", "energy", 1, "kWh"))
    for name in ("compute", "host", "switches", "overhead"):
        label = "cooling and supply (PUE)" if name == "overhead" else name
        table.add_row(*_line(made, f"energy.{name}", f"  {label}", 1, "kWh"))
    table.add_row(*_line(made, "energy.joules_per_token", "  of a token", 1, "J"))
    table.add_row(*_line(made, "co2e_kg", "CO2e", 1, "kg"))
    table.add_row(*_line(made, "cost", "cost", 1, made.work.cluster.price.currency))
    table.add_row(*_line(made, "checkpoint.bytes", "a checkpoint", 1e-9, "GB"))
    table.add_row(*_line(made, "checkpoint.save_seconds", "  written in", 1, "s"))
    for name, term in made.terms.under("effective").items():
        table.add_row(f"training, {name.replace('_', ' ')} of failures", f"{term.value:.1%}")
    return table


def _line(made: Plan, key: str, label: str, factor: float = 1.0, unit: str = "") -> list[str]:
    found = made.estimate(key)
    return [label, *(number(found[name] * factor) for name in ("value", "low", "high")), unit]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}"


def number(value: float) -> str:
    """Three digits: 1.00 T, 12.3 B, 456 M, 7,890, 0.123."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{DIGITS}g}"


SHOWN = 12  # of those that fit, on the terminal; JSON has all


def plan_search(request: Request, as_json_text: bool) -> None:
    """The cheapest settings that fit, and why the rest lost. Raises UserError, also if nothing fits."""
    work = request.work()
    found = search(work)
    best = found.best
    if as_json_text:
        rows = [
            {"settings": c.settings, "fits": c.fits, "cost": c.cost if c.plan else None,
             "reason": c.lost(best) if best else c.refused or c.plan.limits[0]}  # type: ignore[union-attr]
            for c in found.candidates
        ]  # fmt: skip
        chosen = {"overrides": overrides(best.settings, work.ds_key), "remarks": _remarks(best)} if best else {}
        print(_json({"best": best and best.settings, **chosen, "candidates": rows}))
    if best is None:
        least = min((c for c in found.candidates if c.plan), key=_device_bytes, default=None)
        if least is None:
            raise UserError(f"--search: no settings fit: {found.candidates[0].refused}")
        assert least.plan
        raise UserError(f"--search: no settings fit; the nearest ({_told(least)}): {'; '.join(least.plan.limits)}")
    if not as_json_text:
        _show_search(found.candidates, best, work.ds_key)


def _remarks(candidate: Candidate) -> list[str]:
    assert candidate.plan
    return candidate.plan.remarks


def _device_bytes(candidate: Candidate) -> float:
    assert candidate.plan
    return len(candidate.plan.limits) * 1e15 + candidate.plan.terms["memory.device_bytes"].value


def _told(candidate: Candidate) -> str:
    _, _, _, again, micro, *_ = candidate.settings.values()
    return f"{_places(candidate)}, {'recompute' if again else 'no recompute'}, {micro} rows"


def _columns(candidate: Candidate) -> list[str]:
    weights, states, kind, again, micro, *_ = candidate.settings.values()
    return [weights, f"{states} {kind}", "yes" if again else "no", str(micro)]


def _places(candidate: Candidate) -> str:
    weights, states, kind, *_ = candidate.settings.values()
    return f"weights {weights}, {kind} optimizer {states}"


def _show_search(candidates: list[Candidate], best: Candidate, ds_key: str) -> None:
    console = _console()
    table = _table("weights", "optimizer", "recompute", "rows", "s a step", "GB", "cost", "times")
    fitting = [c for c in candidates if c.fits]
    for candidate in fitting[:SHOWN]:
        assert candidate.plan
        terms = candidate.plan.terms
        table.add_row(
            *_columns(candidate), number(terms["step.seconds"].value), gigabytes(terms["memory.device_bytes"].value),
            number(candidate.cost), f"{candidate.times(best):.2f}",
        )  # fmt: skip
    console.print(table)
    if len(fitting) > SHOWN:
        console.print(f"and {len(fitting) - SHOWN} more that fit and cost more")
    for places, reason in _too_large(candidates).items():
        console.print(f"{places}, at the least: {reason}", soft_wrap=True)
    for refusal, refused in _refusals(candidates).items():
        console.print(f"refused ({'; '.join(refused)}): {refusal}", soft_wrap=True)
    for remark in _remarks(best):
        console.print(f"Note: {remark}.", soft_wrap=True)
    console.print(f"\nTo take it: {shlex.join(overrides(best.settings, ds_key))}", soft_wrap=True)


def _too_large(candidates: list[Candidate]) -> dict[str, str]:
    """What the most modest settings of each pair of tiers lack, where none of that pair fit."""
    fitting = {_places(candidate) for candidate in candidates if candidate.fits}
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        places = _places(candidate)
        if not candidate.plan or places in fitting:
            continue
        if places not in found or _device_bytes(candidate) < _device_bytes(found[places]):
            found[places] = candidate
    return {places: "; ".join(candidate.plan.limits) for places, candidate in found.items() if candidate.plan}


def _refusals(candidates: list[Candidate]) -> dict[str, list[str]]:
    """The tiers of which settings were refused, by the reason, and each once."""
    found: dict[str, dict[str, None]] = {}
    for candidate in candidates:
        if candidate.refused:
            found.setdefault(candidate.refused, {})[_places(candidate)] = None
    return {refusal: list(places) for refusal, places in found.items()}


def plan_validation(path: Path, as_json_text: bool) -> None:
    """Score predictions against the published measurements of a table. Raises UserError."""
    predictions = [predict(row) for row in read_rows(path)]
    groups = score(predictions)
    if as_json_text:
        rows = [asdict(row) | {"error": row.error} for row in predictions]
        found = {"groups": {name: asdict(g) for name, g in groups.items()}, "constants": constants(), "rows": rows}
        print(_json(found))
        return
    table = _table("group", "rows", "expressible", "mean error", "max error", "bias", "skill")
    for name, group in groups.items():
        errors = (group.mean_abs_error, group.max_abs_error)
        table.add_row(
            name, str(group.rows), str(group.expressible), *(_percent(error) for error in errors),
            _percent(group.bias, "+"), "-" if group.skill is None else f"{group.skill:.2f}",
        )  # fmt: skip
    console = _console()
    console.print(table)
    console.print(
        f"\n{sum(g.expressible for g in groups.values())} of {len(predictions)} rows are expressible; of the rest:"
    )
    for row in predictions:
        if row.predicted is None:
            console.print(f"  {row.id}: {row.reason}", soft_wrap=True)
    console.print("\nFitted, as shares of the peaks on the data sheet:")
    for name, values in constants().items():
        numbers = ", ".join(f"{key} {value}" for key, value in values.items() if key != "rows")
        console.print(f"  {name}: {numbers}; by {values['rows']}", soft_wrap=True)


def _percent(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{share:{sign}.1%}"
