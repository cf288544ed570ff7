"""Results of several seeds put together."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

from scipy.stats import t


def interval(values: list[float]) -> float | None:
    """Half the 95 % interval of the mean of a few runs (Student's t); None for one run."""
    if len(values) < 2:
        return None
    return t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def summary_table(rows: list[dict]) -> str:
    """Test accuracy in percent of each method at each number of shots, as Markdown: mean over seeds, ± half its interval."""
    values: dict[tuple, list[float]] = defaultdict(list)
    policies: dict[str, set] = defaultdict(set)
    for row in rows:
        if row["status"] == "done":
            values[row["method"], row["shots"]].append(100 * row["test_accuracy"])
            policies[row["method"]].add(row["selection_policy"])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shots = sorted({row["shots"] for row in rows}, key=lambda n: (isinstance(n, str), n if isinstance(n, int) else 0))
    lines = [
        "| method | selection | " + " | ".join(f"{n} shots" if n != "full" else "all images" for n in shots) + " |"
    ]
    lines.append("|---|---|" + "---|" * len(shots))
    for method in methods:
        cells = []
        for n in shots:
            found = values.get((method, n))
            half = interval(found) if found else None
            cells.append(
                "" if not found else f"{statistics.mean(found):.1f}" + ("" if half is None else f" ± {half:.1f}")
            )
        lines.append(f"| {method} | {', '.join(sorted(policies[method]))} | " + " | ".join(cells) + " |")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        lines.append(f"\n{len(failed)} cells failed: " + "; ".join(f"{r['method']} ({r['error']})" for r in failed[:4]))
    return "\n".join(lines)
