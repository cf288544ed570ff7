"""Did refining pay? The answer in words: methods on refined captions against the same methods on those of the dataset."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..run.methods import AT
from ..run.refined import DEFAULT
from ..run.summary import shots_name
from .statistics import Difference, Findings, compare, method_of
from .verdict import CONTROL, METHOD, Comparisons, in_words, intervals, signed

SHUFFLED = "mmft-shuffle-within"
LEVEL = "no difference stands out from chance"


@dataclass
class Refining:
    """What the captions of one refined folder did.

    Args:
        source: its name.
        headline, sentences: the answer.
        comparisons: differences by number of shots, by the two methods that are compared.
    """

    source: str
    headline: str
    sentences: list[str] = field(default_factory=list)
    comparisons: dict[tuple[str, str], dict[object, Difference]] = field(default_factory=dict)


def refining(results: Findings) -> list[Refining]:
    """An answer for each refined folder whose captions a method reads; none without any."""
    sources = dict.fromkeys(source for name in results.methods if (source := method_of(name).captions))
    return [_answer(results, source) for source in sources]


def _answer(results: Findings, source: str) -> Refining:
    suffix = f"{AT}{source}"
    own = [name.removesuffix(suffix) for name in results.methods if name.endswith(suffix)]
    own.sort(key=lambda name: name != METHOD)  # the first gives the headline
    both = {name: found for name in own if (found := _compared(results, name + suffix, name))}
    if not both:
        missing = ", ".join(own)
        return Refining(
            source,
            f"It is not clear whether refining paid: there are no results of {missing} on the captions of the dataset.",
            [f"Add {missing} to --methods."],
        )
    leading = next(iter(both))
    level = "refining made no difference that stands out from chance"
    answer = _words(both[leading], "refining paid", "refining hurt", level, " whether refining paid")
    named = f"{source}: " if source != DEFAULT else ""
    found = Refining(source, named + f"{answer[0].upper()}{answer[1:]}.")
    for name, differences in both.items():
        found.comparisons[name + suffix, name] = differences
        found.sentences.append(
            f"{name} on refined captions against {name} on those of the dataset: {_figures(differences)}."
        )
    if METHOD in own:
        _controls(results, found, suffix)
    return found


def _controls(results: Findings, found: Refining, suffix: str) -> None:
    """Adds what shuffled captions and class templates do to the same training."""
    shuffled = _compared(results, METHOD, SHUFFLED)
    if shuffled:
        found.comparisons[METHOD, SHUFFLED] = shuffled
        words = _words(
            shuffled,
            "captions are worth more with their own image than with another one of its class",
            "captions are worth less with their own image than with another one of its class",
            "it makes no difference that stands out from chance which image of its class a caption belongs to, so captions that fit "
            "their image better can hardly help",
        )
        found.sentences.append(
            f"Control, captions of the dataset shuffled within each class ({SHUFFLED}): {words} ({_figures(shuffled)})."
        )
    elif SHUFFLED not in results.methods:
        found.sentences.append(
            f"{SHUFFLED} was not run: add it to --methods, to see whether it matters here which image a caption belongs to."
        )
    if within := _compared(results, METHOD + suffix, SHUFFLED + suffix):
        found.comparisons[METHOD + suffix, SHUFFLED + suffix] = within
    if template := _compared(results, METHOD + suffix, CONTROL):
        found.comparisons[METHOD + suffix, CONTROL] = template
        words = _words(template, "refined captions help", "refined captions hurt", LEVEL)
        found.sentences.append(f"Against the class template alone ({CONTROL}): {words} ({_figures(template)}).")


def _compared(results: Findings, method: str, other: str) -> dict[object, Difference]:
    """By number of shots. With one image per class nothing is shuffled."""
    shots = [n for n in results.positive_shots if n != 1 or not other.startswith(SHUFFLED)]
    return {n: found for n in shots if (found := compare(results, method, other, n))}


def _words(found: dict[object, Difference], better: str, worse: str, level: str, what: str = "") -> str:
    comparisons: Comparisons = {n: ("", difference) for n, difference in found.items()}
    return in_words(comparisons, better, worse, level, what)


def _figures(found: dict[object, Difference]) -> str:
    """`+1.2 points with 4 shots (seeds +0.4 to +2.0, images −0.3 to +2.7), …`"""
    return ", ".join(_figure(n, difference, i == 0) for i, (n, difference) in enumerate(found.items()))


def _figure(shots, difference: Difference, first: bool) -> str:
    points = " points" if first else ""
    return f"{signed(difference.points)}{points} with {shots_name(shots)} ({', '.join(intervals(difference))})"
