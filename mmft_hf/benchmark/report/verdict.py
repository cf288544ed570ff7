"""Did captions help? The answer in words, computed from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...core.markdown import listed, one_line
from ..run.summary import FEWEST_SEEDS, FULL, image_chance, shots_name
from .statistics import Difference, Findings, compare, method_of

METHOD, CONTROL = "mmft", "mmft-no-captions"
# What MMFT is compared with first. The last is chosen by its test accuracy, which favours it.
CONTROLS, BEST = (CONTROL, "flyp", "zs-cap"), "best without captions"
FEWEST_IMAGES = 100  # of the test split

Comparisons = dict[object, tuple[str, Difference]]  # by shots: the other method, and mmft minus that method


def verdict(results: Findings) -> tuple[str, list[str], dict[str, Comparisons]]:
    """A headline, sentences, and comparisons of mmft with each of `CONTROLS` and `BEST` that has results."""
    shots = [n for n in results.shots if results.rows(METHOD, n)]
    others = {name: dict.fromkeys(shots, name) for name in CONTROLS}
    others[BEST] = {n: names[0] for n in shots if (names := results.best(n, baselines(results), METHOD))}
    comparisons = {
        name: {n: (m, found) for n, m in methods.items() if (found := compare(results, METHOD, m, n))}
        for name, methods in others.items()
    }
    headline, sentences = _answer(results, comparisons) if shots else _no_answer(results)
    chance = image_chance(results.all_rows())
    if chance and chance[0] < FEWEST_IMAGES:
        sentences.append(
            f"With {chance[0]} test images this is a trial, not a result: one image is {100 / chance[0]:.1f} points, and the "
            f"choice of test images alone moves any accuracy by about ±{chance[1]:.0f} points."
        )
    return headline, sentences, {name: found for name, found in comparisons.items() if found}


def _answer(results: Findings, found: dict[str, Comparisons]) -> tuple[str, list[str]]:
    control = next((name for name in (CONTROL, "flyp") if found[name]), None)
    if control is None:
        headline = "It is not clear whether captions helped: there is no control without them."
        sentences = [f"Add {CONTROL} to --methods: the same training on class templates alone."]
    else:
        level = "captions made no difference that stands out from chance"
        answer = in_words(found[control], "captions helped", "captions hurt", level, " whether captions helped")
        headline = answer[0].upper() + answer[1:] + "."
        what = f"the same training without captions ({CONTROL})" if control == CONTROL else "flyp (on class templates)"
        sentences = [f"MMFT against {what}: {figures(found[control])}."]
        if control == "flyp":
            sentences.append(f"The closer control, {CONTROL}, was not run.")
    if found[BEST]:
        text = in_words(found[BEST], "it is ahead", "it is behind", "no difference stands out from chance")
        sentences.append(f"MMFT against the best method without captions: {text} ({figures(found[BEST], named=True)}).")
    fewest = min((d.seeds for rest in found.values() for _, d in rest.values()), default=FEWEST_SEEDS)
    if fewest < FEWEST_SEEDS:
        # More seeds may have been asked for and the grid been interrupted; the results do not tell.
        todo = _unfinished(results)
        if len(results.seeds()) < FEWEST_SEEDS:
            todo = f"Type --seeds with {FEWEST_SEEDS} numbers or more."
        count = "one seed" if fewest == 1 else f"{fewest} seeds"
        sentences.append(f"Some of this rests on {count}, too few to call a difference one. {todo}")
    return headline, sentences


def _no_answer(results: Findings) -> tuple[str, list[str]]:
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
    return f"It is not clear whether captions helped: {why}", [text for text in (highest, rest) if text]


def _unfinished(results: Findings) -> str:
    """How many cells are missing or failed; empty if none."""
    missing, failed = results.missing(), len(results.failed)
    what = [f"{missing} cell{'s are' if missing > 1 else ' is'} missing"] if missing else []
    what += [f"{failed} cell{'s' if failed > 1 else ''} failed"] if failed else []
    return f"{listed(what)}: the grid is not finished. Type the same command to continue." if what else ""


def baselines(results: Findings) -> list[str]:
    """Methods that read no captions, MMFT's own training without them included; sanity checks are not baselines."""
    known = {name: method_of(name) for name in results.methods}
    return [name for name, method in known.items() if not (method.reads_captions or method.sanity_check)]


def _leader(results: Findings, shots) -> str:
    """`lp with 1 shot`; `none above zs (70.8) with 1 shot` if an untuned model leads; empty without results."""
    names = results.best(shots, results.methods) if results.most_seeds(shots) else []
    where = shots_name(shots) if shots == 0 else f"with {shots_name(shots)}"
    if untuned := [name for name in names if not results.rows(name, shots)]:
        return f"none above {untuned[0]} ({results.mean(untuned[0], 0):.1f}) {where}"
    return f"{listed(names)} {where}" if names else ""


def in_words(found: Comparisons, better: str, worse: str, level: str, what: str = "") -> str:
    """`with 1 and 4 shots, captions helped; with all images, captions made no difference that stands out from chance`"""
    words = {
        "better": better,
        "worse": worse,
        "not distinguishable": level,
        "too few seeds": f"there are too few seeds to say{what}",
        "same for every seed": f"all seeds give the same, which is too little to say{what}",
        "not at equal budget": f"the budgets are not equal, which leaves it open{what}",
    }
    groups = {verdict: [n for n, (_, d) in found.items() if d.verdict == verdict] for verdict in words}
    return "; ".join(f"with {shots_list(shots)}, {words[verdict]}" for verdict, shots in groups.items() if shots)


def shots_list(shots: Iterable) -> str:
    """`1, 4 and 16 shots, and all images`."""
    counts = [n for n in shots if n != FULL]
    parts = [f"{listed(map(str, counts))} shots" if len(counts) > 1 else shots_name(counts[0])] if counts else []
    parts += [shots_name(FULL)] if FULL in shots else []
    return (", and " if len(counts) > 1 else " and ").join(parts)


def figures(found: Comparisons, named: bool = False) -> str:
    """`+8.2 points with 1 shot, +4.4 with 4 shots`; `named` adds what each is against."""
    texts = [
        f"{signed(difference.points)} points{f' against {other}' if named else ''} with {shots_name(n)}"
        for n, (other, difference) in found.items()
    ]
    return ", ".join([*texts[:1], *(text.replace(" points", "", 1) for text in texts[1:])])


def signed(points: float) -> str:
    """`+1.2`, `−0.3`, `0.0`."""
    return f"{points:+.1f}".replace("-", "−") if f"{abs(points):.1f}" != "0.0" else "0.0"


MARKS = {
    "better": "▲",
    "worse": "▼",
    "not distinguishable": "≈",
    "too few seeds": "?",
    "same for every seed": "?",
    "not at equal budget": "≠",
}


def intervals(difference: Difference) -> list[str]:
    """The intervals of a difference in words: over seeds, and over test images if there is one."""
    known = {"seeds": difference.over_seeds, "images": difference.over_images}
    found = [f"{name} {signed(pair[0])} to {signed(pair[1])}" for name, pair in known.items() if pair]
    without = {1: "one seed", 2: "two seeds"}.get(difference.seeds, "the same for every seed")
    return found if difference.over_seeds else [without, *found]
