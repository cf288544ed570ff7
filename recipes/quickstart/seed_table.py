"""Prints a Markdown table of finished runs, one row each and their mean: `seed_table.py RUN_FOLDER …`."""

import json
import statistics
import sys
from pathlib import Path

from mmft_hf.core.console import percent

if __name__ == "__main__":
    runs = [json.loads((Path(folder) / "all_results.json").read_text()) for folder in sys.argv[1:]]
    captions = json.loads((Path(sys.argv[1]) / "mmft.json").read_text())["identity"]["captions"]
    name = "fine-tuned with captions" if captions else "fine-tuned without captions"
    print(f"| seed | zero-shot | {name} | gain | mean per class | chosen epoch |\n|---|---|---|---|---|---|")
    for r in runs:
        cells = [
            percent(r[f"{kind}test_accuracy"], (r[f"{kind}test_accuracy_ci_low"], r[f"{kind}test_accuracy_ci_high"]))
            for kind in ("zero_shot_", "")
        ]
        gain = 100 * (r["test_accuracy"] - r["zero_shot_test_accuracy"])
        rest = f"{gain:+.1f} | {percent(r['test_mean_per_class_accuracy'])} | {r['best_epoch']:g} of {r['epoch']:g}"
        print(f"| {r['seed']} | {cells[0]} | {cells[1]} | {rest} |")
    means = [statistics.mean(r[key] for r in runs) for key in ("zero_shot_test_accuracy", "test_accuracy")]
    mean_per_class = statistics.mean(r["test_mean_per_class_accuracy"] for r in runs)
    spread = statistics.stdev(r["test_accuracy"] for r in runs) if len(runs) > 1 else 0
    gain = 100 * (means[1] - means[0])
    print(
        f"| mean | {percent(means[0])} | {percent(means[1])}, s.d. {100 * spread:.1f} | {gain:+.1f} | {percent(mean_per_class)} | |"
    )
