"""Did captions help? In words, computed from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...core.markdown import listed, one_line
from ..run.summary import FEWEST_SEEDS, FULL, image_chance, shots_name
from .methods import base_of, reads_captions
from .statistics import Difference, Findings, compare

METHOD, CONTROL = "mmft", "mmft-no-captions"
# What MMFT is held against first, and what each comparison means.
RIVALS = {
    CONTROL: "the same training without captions",
    "flyp": "both towers on class templates, CLIP loss alone",
    "zs-cap": "captions on the untuned model, no training",
}
BEST = "best without captions"
FEWEST_IMAGES = 100  # of the test split


def verdict(results: Findings) -> tuple[str, list[str], list[tuple[str, str, dict]]]:
    """A headline, sentences, and comparisons `(name, meaning, {shots: (other method, Difference)})`."""
    headline, sentences, comparisons = _compared(results)
    images = few_images(results)
    if images:
        count = images[0]
        sentences.append(
            f"With {count} test images this is a trial, not a result: one image is {100 / count:.1f} points."
        )
    return headline, sentences, comparisons


def few_images(results: Findings) -> tuple[int, float] | None:
    """Number of test images and what chance in them comes to, in points, if they are too few to say much; else None."""
    found = image_chance(results.all_rows())
    return found if found and found[0] < FEWEST_IMAGES else None


def _compared(results: Findings) -> tuple[str, list[str], list[tuple[str, str, dict]]]:
    done = [n for n in results.shots if results.rows(METHOD, n)]
    if not done:
        return *_without_mmft(results), []
    comparisons = []
    for other, meaning in RIVALS.items():
        found = {n: (other, d) for n in done if (d := compare(results, METHOD, other, n))}
        if found:
            comparisons.append((other, meaning, found))
    best = {}
    for n in done:
        for name in results.best(n, baselines(results), METHOD)[:1]:
            best[n] = (name, compare(results, METHOD, name, n))
    if best:
        comparisons.append((BEST, "chosen by its test accuracy, which favours it", best))
    found = {name: rest for name, _, rest in comparisons}
    control = CONTROL if CONTROL in found else "flyp" if "flyp" in found else None
    if control is None:
        headline = "Whether captions helped cannot be told: there is no control without them."
        sentences = [f"Add {CONTROL} to --methods: the same training on class templates alone."]
    else:
        level = "captions made no difference that can be told from chance"
        headline = in_words(found[control], "captions helped", "captions did harm", level, " whether captions helped")
        headline = headline[:1].upper() + headline[1:] + "."
        against = (
            "the same training without captions (mmft-no-captions)"
            if control == CONTROL
            else "flyp (on class templates)"
        )
        sentences = [f"MMFT against {against}: {figures(found[control])}."]
        if control == "flyp":
            sentences.append(f"The closer control, {CONTROL}, was not run.")
    if best:
        text = in_words(best, "it is ahead", "it is behind", "no difference can be told from chance")
        sentences.append(f"MMFT against the best method without captions: {text} ({figures(best, named=True)}).")
    seeds = {d.seeds for rest in found.values() for _, d in rest.values()}
    if seeds and min(seeds) < FEWEST_SEEDS:
        count = "one seed" if min(seeds) == 1 else f"{min(seeds)} seeds"
        sentences.append(f"Some of this rests on {count}: too few to call a difference one. {_more_seeds(results)}")
    return headline, sentences, comparisons


def _more_seeds(results: Findings) -> str:
    """What to type for more: enough may have been typed, and the grid be cut. Which were typed, results do not say."""
    rows = [*results.all_rows(), *results.failed]
    if len({row["seed"] for row in rows if row["shots"] != 0}) < FEWEST_SEEDS:
        return f"Type --seeds with {FEWEST_SEEDS} numbers or more."
    return _unfinished(results)


def _unfinished(results: Findings) -> str:
    """What is not there yet, as far as cells that are there tell; nothing where none is missing or failed."""
    missing, failed = results.missing(), len(results.failed)
    what = [f"{missing} cell{'s are' if missing > 1 else ' is'} missing"] if missing else []
    what += [f"{failed} cell{'s' if failed > 1 else ''} failed"] if failed else []
    return f"{listed(what)}: the grid is not finished. Type the same command to go on." if what else ""


def baselines(results: Findings) -> list[str]:
    """Methods that read no caption, MMFT's own training without them among these; a control that should lose is none."""
    return [m for m in results.methods if not reads_captions(m) and not base_of(m).endswith("permuted-labels")]


def _without_mmft(results: Findings) -> tuple[str, list[str]]:
    leaders = [text for n in results.shots if (text := _leader(results, n))]
    errors = Counter(str(row.get("error")) for row in results.failed if row["method"] == METHOD)
    if "captions" in results.data and (results.data["captions"] or {"images": 0}).get("images") == 0:
        why = "the training images have no captions."
    elif errors:
        why = f"every cell of mmft failed ({one_line(errors.most_common(1)[0][0], 200).rstrip('.')})."
    else:
        why = "mmft is not among the results."
    highest = f"Highest test accuracy on the same seeds: {listed(leaders)}." if leaders else ""
    rest = _unfinished(results) if results.missing() else ""
    return f"Whether captions helped cannot be told: {why}", [text for text in (highest, rest) if text]


def _leader(results: Findings, shots) -> str:
    """`lp with 1 shot`, or `none above zs (70.8) with 1 shot`, since an untuned model has no shots; nothing without results."""
    names = results.best(shots, results.methods) if results.most_seeds(shots) else []
    where = shots_name(shots) if shots == 0 else f"with {shots_name(shots)}"
    if untuned := [name for name in names if not results.rows(name, shots)]:
        return f"none above {untuned[0]} ({results.mean(untuned[0], 0):.1f}) {where}"
    return f"{listed(names)} {where}" if names else ""


def in_words(found: dict, better: str, worse: str, level: str, what: str = "") -> str:
    """`with 1 and 4 shots, captions helped; with all images, captions made no difference that can be told from chance`"""
    groups: dict[str, list] = {}
    for n, (_, difference) in found.items():
        groups.setdefault(difference.verdict, []).append(n)
    words = {
        "better": better,
        "worse": worse,
        "not distinguishable": level,
        "too few seeds": f"there are too few seeds to say{what}",
        "same for every seed": f"all seeds give the same, too little to say{what}",
    }
    return "; ".join(f"with {shots_list(groups[key])}, {word}" for key, word in words.items() if key in groups)


def shots_list(shots: Iterable) -> str:
    """`1, 4 and 16 shots, and all images`."""
    counts = [n for n in shots if n != FULL]
    parts = [f"{listed(map(str, counts))} shots" if len(counts) > 1 else shots_name(counts[0])] if counts else []
    parts += [shots_name(FULL)] if FULL in shots else []
    return (", and " if len(counts) > 1 else " and ").join(parts)


def figures(found: dict, named: bool = False) -> str:
    """`+8.2 points with 1 shot, +4.4 with 4 shots`."""
    texts = []
    for i, (n, (other, difference)) in enumerate(found.items()):
        name = f" against {other}" if named else ""
        texts.append(f"{signed(difference.points)}{' points' if i == 0 else ''}{name} with {shots_name(n)}")
    return ", ".join(texts)


def signed(points: float) -> str:
    """`+1.2`, `−0.3`, `0.0`."""
    text = f"{abs(points):.1f}"
    return text if float(text) == 0 else f"{'+' if points > 0 else '−'}{text}"


def between(pair: tuple[float, float]) -> str:
    """`−0.4 to +2.1`."""
    return f"{signed(pair[0])} to {signed(pair[1])}"


MARKS = {"better": "▲", "worse": "▼", "not distinguishable": "≈", "too few seeds": "?", "same for every seed": "?"}


def intervals(difference: Difference) -> list[str]:
    """Its intervals in words."""
    few = {1: "one seed", 2: "two seeds"}
    without = few.get(difference.seeds, "the same for every seed")
    found = [f"seeds {between(difference.over_seeds)}" if difference.over_seeds else without]
    return found + ([f"images {between(difference.over_images)}"] if difference.over_images else [])
