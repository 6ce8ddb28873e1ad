"""Result rows to the tables of RESULTS.md. Pure Python."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.throughput.cases import (
    CASES,
    FIRST_LOSS_TOLERANCE,
    OURS,
    PARITY_COSINE,
    PARITY_NORM,
    TARGETS,
    Target,
)
from benchmarks.throughput.shapes import SHAPES

Row = dict[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """All tables for which there are rows."""
    parts = [
        _heading(rows),
        _cases(rows),
        _targets(rows),
        _sweep(rows),
        _parity(rows),
        _precisions(rows),
        _lengths(rows),
        _faults(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["kind"] == "device" and "error" not in row and row.get("device")]
    if not found:
        return ""
    facts = found[-1]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    lines = [f"{facts.get('date', '')}: {facts.get('device')}, Python {facts.get('python')}, {versions}"]
    for name in dict.fromkeys(row["model"] for row in rows):
        shape = SHAPES.get(name)
        if shape and shape.published_layers:
            built = shape.arguments["num_hidden_layers"]
            lines.append(f"{name}: {built} of its {shape.published_layers} layers, so that every arm fits the card")
    return "\n".join(lines)


def timed(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(case, arm) -> its timed repeats without errors. Overridden plans are arms of their own."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "time" and "error" not in row:
            found.setdefault((row["case"], _label(row)), []).append(row)
    return found


def _label(row: Row) -> str:
    overrides = ", ".join(f"{key} {value}" for key, value in (row.get("overrides") or {}).items())
    return f"{row['arm']} ({overrides})" if overrides else str(row["arm"])


def _cases(rows: Sequence[Row]) -> str:
    table = [
        "| case | arm | micro-batch or plan | pairs/s, median (min-max) | one epoch incl. reference | of limit | "
        "peak GiB, allocated / reserved | estimate GiB | first loss - ln 2 | repeats |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, arm), found in timed(rows).items():
        table.append(_case_row(case, arm, found))
    return "\n".join(table) if len(table) > 2 else ""


def _case_row(case: str, arm: str, found: list[Row]) -> str:
    cap = found[-1].get("cap_gib")
    where = f"{case} ({f'cap {cap:g} GiB' if cap else 'no cap'})"
    speed, cold = _values(found, "pairs_per_s"), _values(found, "cold_pairs_per_s")
    share, loss = _values(found, "share_of_limit"), _values(found, "first_loss_minus_ln2")
    allocated, reserved = _values(found, "peak_allocated_gib"), _values(found, "peak_reserved_gib")
    peak = f"{max(allocated):.2f} / {max(reserved):.2f}" if allocated and reserved else "-"
    cells = [
        where, arm, _how(found[-1]), f"{statistics.median(speed):.2f} ({min(speed):.2f}-{max(speed):.2f})",
        f"{statistics.median(cold):.2f}", f"{statistics.median(share):.1%}" if share else "-", peak,
        _estimate(found[-1], allocated), f"{max(loss, key=abs):+.1e}", str(len(found)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _how(row: Row) -> str:
    plan = row.get("plan")
    if plan is None:
        return f"{row['micro_batch']}x{16 // row['micro_batch']}" if row.get("micro_batch") else "-"
    kernels = row.get("kernels", plan["kernels"])
    return f"{kernels}, {plan['token_budget']} tokens, {plan['recomputed_layers']} layers recomputed"


def _estimate(row: Row, allocated: list[float]) -> str:
    """The plan's memory estimate, and its error against the measured peak of the allocator."""
    plan = row.get("plan")
    if plan is None:
        return "-"
    error = f" ({plan['memory_gib'] / max(allocated) - 1:+.1%})" if allocated else ""
    return f"{plan['memory_gib']:.2f}{error}"


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _targets(rows: Sequence[Row]) -> str:
    found = timed(rows)
    table = ["| case | ours against | target | measured | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        ours = next((found[key] for key in found if key[0] == target.case and _is_plain_ours(key[1])), None)
        if ours:
            table += _target_rows(target, ours, found.get((target.case, target.against)))
    return "\n".join(table) if len(table) > 2 else ""


def _is_plain_ours(label: str) -> bool:
    return label.startswith(f"{OURS}-") and "(" not in label


def _target_rows(target: Target, ours: list[Row], peer: list[Row] | None) -> list[str]:
    if target.against == "limit":
        share = _values(ours, "share_of_limit")
        measured = statistics.median(share) if share else None
        return [_verdict(target.case, "arithmetic limit", target.warm, measured, "{:.0%}".format)]
    if target.against == "pairs/s":
        measured = statistics.median(_values(ours, "pairs_per_s"))
        return [_verdict(target.case, "pairs/s", target.warm, measured, "{:.1f}".format)]
    lines = []
    for name, field, wanted in (("", "pairs_per_s", target.warm), (", cold epoch", "cold_pairs_per_s", target.cold)):
        # A cold ratio is worth a line also where no target was set.
        theirs = _values(peer or [], field)
        measured = statistics.median(_values(ours, field)) / statistics.median(theirs) if theirs else None
        lines.append(_verdict(target.case, target.against + name, wanted, measured, "{:.2f}x".format))
    return lines


def _is_control(row: Row) -> bool:
    """Whether it is TRL against itself."""
    return not str(row["what"]).startswith(OURS)


def _verdict(
    case: str, against: str, wanted: float | None, measured: float | None, show: Callable[[float], str]
) -> str:
    if wanted is None:
        return f"| {case} | {against} | - | {'-' if measured is None else show(measured)} | |"
    if measured is None:
        return f"| {case} | {against} | {show(wanted)} | - | not measured |"
    return (
        f"| {case} | {against} | {show(wanted)} | {show(measured)} | {'reached' if measured >= wanted else 'missed'} |"
    )


def _parity(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["kind"] == "parity"]
    if not found:
        return ""
    table = [
        "| model | against TRL at micro-batch 8 | cosine of the step-1 gradient | lowest of one matrix | norm ratio | "
        "largest loss difference (steps) | |",
        "|---|---|---|---|---|---|---|",
    ]
    # How far TRL's own losses lie apart when only its micro-batch changes: no one can be asked to come closer.
    spread = max(
        (row["largest_loss_difference"] for row in found if _is_control(row) and "error" not in row), default=0
    )
    for row in found:
        if "error" in row:
            table.append(f"| {row['model']} | {row['what']} | {row['error']} | | | | |")
            continue
        curve = "control" if _is_control(row) else "within" if row["largest_loss_difference"] <= spread else "outside"
        good = row["cosine"] >= PARITY_COSINE and abs(row["norm_ratio"] - 1) <= PARITY_NORM
        table.append(
            f"| {row['model']} | {row['what']} | {row['cosine']:.6f} | {row['lowest_matrix_cosine']:.5f} | "
            f"{row['norm_ratio']:.5f} | {row['largest_loss_difference']:.1e} ({row['steps']}) | "
            f"{'within' if good else 'outside'} cosine {PARITY_COSINE}, norm {PARITY_NORM:.0%}; losses: {curve} |"
        )
    exact = [row for row in rows if row["kind"] == "parity-exact" and "error" not in row]
    if exact:
        table += [
            "",
            "| model | against TRL in fp32 | cosine of the step-1 gradient | norm ratio | largest loss difference |",
        ]
        table.append("|---|---|---|---|---|")
    for row in exact:
        table.append(
            f"| {row['model']} | {row['what']} | {row['cosine']:.6f} | {row['norm_ratio']:.5f} | "
            f"{row['largest_loss_difference']:.1e} ({row['steps']}) |"
        )
    return "\n".join(table)


def _sweep(rows: Sequence[Row]) -> str:
    """Ours under other plans than the planner's."""
    found = [row for row in rows if row["kind"] == "sweep"]
    if not found:
        return ""
    table = ["| case | tokens a forward | recomputed layers | pairs/s | peak GiB |", "|---|---|---|---|---|"]
    for row in found:
        plan = row["overrides"]
        head = f"| {row['case']} | {plan['token_budget']:,} | {plan['recomputed_layers']} |"
        if "error" in row:
            table.append(f"{head} {'out of memory' if row.get('out_of_memory') else row['error'][:80]} | |")
        else:
            peak = row.get("peak_allocated_gib")
            table.append(f"{head} {row['pairs_per_s']:.2f} | {'-' if peak is None else f'{peak:.2f}'} |")
    return "\n".join(table)


def _precisions(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["kind"] == "precision"]
    if not found:
        return ""
    table = [
        "| model | precision | pairs/s | peak GiB | estimate GiB | first loss - ln 2 | last loss | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        head = f"| {row['model']} | {row['arm'].partition('-')[2]} |"
        if "error" in row:
            table.append(f"{head} | | | | | {row['error'][:120]} |")
            continue
        allocated = _values([row], "peak_allocated_gib")
        loss = row["first_loss_minus_ln2"]
        verdict = "ln 2" if abs(loss) <= FIRST_LOSS_TOLERANCE else f"off ln 2 by more than {FIRST_LOSS_TOLERANCE:g}"
        table.append(
            f"{head} {row['pairs_per_s']:.2f} | {f'{allocated[0]:.2f}' if allocated else '-'} | "
            f"{_estimate(row, allocated)} | {loss:+.1e} | {row['losses'][-1]:.4f} | {verdict} |"
        )
    return "\n".join(table)


def _lengths(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["kind"] == "length"]
    if not found:
        return ""
    table = [
        "| max_length | prompt / completion | pairs/s | tokens computed/s | saved by sharing | of limit | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        head = f"| {row['max_length']} | {row['ratio']:g} |"
        if "error" in row:
            table.append(f"{head} {row['error'][:120]} | | | | |")
            continue
        peak, share = row.get("peak_allocated_gib"), row.get("share_of_limit")
        computed = row["pairs_per_s"] * row["shared_tokens_per_pair"]
        saved = 1 - row["shared_tokens_per_pair"] / row["unshared_tokens_per_pair"]
        table.append(
            f"{head} {row['pairs_per_s']:.2f} | {computed:,.0f} | {saved:.0%} | "
            f"{'-' if share is None else f'{share:.1%}'} | {'-' if peak is None else f'{peak:.2f}'} |"
        )
    return "\n".join(table)


def _faults(rows: Sequence[Row]) -> str:
    """What failed, except searches that ran out of memory: those are how a search ends."""
    lines = []
    for row in rows:
        if "error" in row and not (row["kind"] == "search" and row.get("out_of_memory")):
            where = " ".join(str(row[key]) for key in ("case", "arm", "what") if row.get(key))
            lines.append(f"- {row['kind']} {where}: {' '.join(str(row['error']).split())[:200]}")
        over = row.get("peak_reserved_gib")
        if row["kind"] == "time" and over and row.get("cap_gib") and over > row["cap_gib"]:
            lines.append(f"- {row['case']} {row['arm']}: {over:.2f} GiB reserved under a cap of {row['cap_gib']:g} GiB")
    missing = sorted({row["case"] for row in rows if row["kind"] == "time"} - set(CASES))
    lines += [f"- unknown case {name}" for name in missing]
    return "\n".join(["Faults:", *dict.fromkeys(lines)]) if lines else ""
