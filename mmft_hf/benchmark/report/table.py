"""The table of a benchmark's results for the console."""

from __future__ import annotations

from statistics import mean

from ..run.summary import fewer_seeds, interval, seeds_text, shots_name
from .statistics import TEST, Findings


def summary_table(rows: list[dict], split: str = TEST) -> str:
    """A Markdown table of accuracy in percent by method and number of shots: mean over seeds ± half its interval.

    Args:
        split: see `statistics.accuracy`.
    """
    results = Findings(rows)
    lines = ["| method | selection | seeds | " + " | ".join(map(shots_name, results.shots)) + " |"]
    lines.append("|---|---|---|" + "---|" * len(results.shots))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for n in results.shots:
            found = results.values(method, n, split)
            half = interval(found) if found else None
            text = "" if not found else f"{mean(found):.1f}" + ("" if half is None else f" ± {half:.1f}")
            cells.append(text + (fewer_seeds(len(found), results.most_seeds(n)) if found else ""))
        policies, seeds = ", ".join(results.policies(method)), seeds_text(results.seed_counts(method))
        lines.append(f"| {method} | {policies} | {seeds} | " + " | ".join(cells) + " |")
    if (failed := results.failed) and split == TEST:
        named = [f"{r['method']}, {shots_name(r['shots'])}, seed {r['seed']} ({r['error']})" for r in failed[:4]]
        more = "; …" if len(failed) > len(named) else ""
        lines.append(f"\n{len(failed)} cell{'s' if len(failed) > 1 else ''} failed: {'; '.join(named)}{more}")
    return "\n".join(lines)
