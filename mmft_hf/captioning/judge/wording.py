"""The patterns behind the checks: class names, denials of the label, refusals, loops, scripts, addresses."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from ...data.texts import NO_CLASS, clean_class_name
from .cleaning import fold

STOPS = ".,;:!?()"
GLYPHS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")  # one character of these scripts is a word

# -- words ------------------------------------------------------------------------------------------------------------
_TOKEN = re.compile(rf"[^\W_]+|[{STOPS}]")
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")  # scripts that put no spaces between words
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


FUNCTION_WORDS = frozenset(
    "a an the this that these those it its he she they them their his her i you we who which what whose there here and or but nor so yet "
    "if as than then of in on at by for from to into onto with without over under above below between behind before after near "
    "against about around along across through during up down out off is are was were be been being am has have had do does did "
    "can could may might will would shall should must not no one ones some any each all both other another such very".split()
)
"""English words that say how others belong together, and nothing of a picture by themselves."""


def words_of(text: str) -> list[str]:
    """The words of a text, folded for comparison."""
    return _WORD.findall(fold(text))


def numbers(word: str) -> set[str]:
    """A word with its regular singular and plural forms: `daisy`, `daisies`; `box`, `boxes`; `leaf`, `leaves`."""
    found = {word, word + "s"}
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        found.add(word + "es")
    if word.endswith("y"):
        found.add(word[:-1] + "ies")
    if word.endswith("f") or word.endswith("fe"):
        found.add(word.removesuffix("e")[:-1] + "ves")
    if word.endswith("man"):
        found.add(word[:-2] + "en")
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        found.add(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.add(word[:-2])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        if word.endswith("ves"):
            found |= {word[:-3] + "f", word[:-3] + "fe"}
    return found


class ClassWords:
    """Finds class names in texts by whole words, with one lookup per word, however many classes there are."""

    def __init__(self, class_names: Sequence[str]):
        self.own_words, self.unspaced = [], []
        index: dict[str, dict[tuple, set[int]]] = {}
        for label, name in enumerate(class_names):
            # `tench, Tinca tinca` holds two names of one class; `AnnualCrop` and `hot dog` have other spellings.
            forms = {tuple(words_of(part)) for part in (name, *name.split(", "), _CAMEL.sub(" ", name))} - {()}
            forms = set() if name == NO_CLASS else forms | {("".join(words),) for words in forms}
            self.own_words.append({word for words in forms for word in words})
            if _UNSPACED.search(name):
                self.unspaced.append((fold(clean_class_name(name)), label))
            for *first, last in forms:
                for end in numbers(last):
                    words = (*first, end)
                    index.setdefault(words[0], {}).setdefault(words, set()).add(label)
        self.index = {first: sorted(entries.items(), key=lambda e: -len(e[0])) for first, entries in index.items()}

    def mark(self, text: str, label: int) -> tuple[list[str], bool, bool]:
        """Marks class names in a text.

        Returns:
            The words and punctuation of the text, with OWN in place of its own class and OTHER in place of another one;
            whether it names its own class; whether it names another.
        """
        folded = fold(text)
        tokens = _TOKEN.findall(folded)
        marked, place, own, other = [], 0, False, False
        for name, owner in self.unspaced:
            if name in folded:
                own, other = own or owner == label, other or owner != label
        while place < len(tokens):
            word, step = tokens[place], 1
            for words, labels in self.index.get(word, ()):
                if len(words) > 1 and tuple(tokens[place : place + len(words)]) != words:
                    continue
                if label in labels:
                    own, word, step = True, "OWN", len(words)
                    break
                # A class whose name is part of this one's (`tiger` in `tiger cat`) does not count as another class.
                if word != "OTHER" and not self.own_words[label].issuperset(words):
                    other, word, step = True, "OTHER", len(words)
            marked.append(word)
            place += step
        return marked, own, other


# -- patterns on marked words -----------------------------------------------------------------------------------------
_END = (
    r"(?=$| (?:[.,;:!?)]|but|it|its|this|that|which|as|because|since|despite|at all|given|and|or|due|though|although|"
    r"instead|however|here)(?: |$))"
)
_OWN = r"OWN(?: (?:breed|dog|cat|bird|species|flower|plant|sign|class))?" + _END
_ADVERB = r"(?: (?:actually|clearly|definitely|certainly|really|in fact|at all))?"
_THING = (
    r"(?:this|it|that|which|photo|image|picture|pattern|texture|subject|breed|species|object|animal|flower|plant|dog|cat|"
    r"bird|sign|vehicle|car|aircraft|food|dish|scene)"
)
_CONTRADICTED = re.compile(
    "|".join(
        (
            rf"(?:(?:is|are|was|were){_ADVERB} not|isnt|arent|wasnt|werent){_ADVERB} an? {_OWN}",
            rf"{_THING} (?:(?:is|are|was|were){_ADVERB} not|isnt|arent|wasnt){_ADVERB} (?:the )?{_OWN}",
            rf"[,;:(] (?:and |but |clearly |definitely |certainly |is |rather )?not (?:that of |those of |of )?an? {_OWN}",
            rf"(?:is|are|shows|depicts|be) an? (?:\w+ ){{1,3}}not an? {_OWN}",
            r"not an? OWN (?:, )?but (?:an?|rather|instead|actually) ",
            rf"OTHER (?:\w+ )?(?:, )?(?:and )?(?:not|rather than|instead of) (?:the )?{_OWN}",
            r"(?:is|are|was|be|being|to|with|of|like|depicts|shows|features|as|resembles|suggests) (?:an? |the )?(?:\w+ ){1,4}"
            rf"(?:, )?(?:rather than|instead of) (?:that of |those of )?(?:an?|the) {_OWN}",
            r"(?:(?:does|do|did) not|doesnt|dont|didnt) (?:appear to be|look like|resemble|seem to be|depict|show|match|"
            rf"represent|contain|feature|portray) (?:(?:an?|the|any) )?{_OWN}",
            rf"there (?:is|are) no (?:OWN (?:visible|present|shown|here|in (?:the|this) (?:photo|image|picture))|{_OWN})",
            r"no OWN (?:is|are|can be) (?:visible|present|seen|shown|found)",
            rf"(?:this|it|that) is no {_OWN}",
            rf"(?:can not|cannot|cant|could not|couldnt|unable to) (?:be|see|identify|find|detect) (?:(?:an?|any|the) )?{_OWN}",
            r"(?:^|[.;,] )unlike an? OWN ,",
            rf"(?:inconsistent|not consistent) with (?:that of |those of )?(?:an?|the) {_OWN}",
            rf"{_THING} (?:actually |in fact )?(?:is|shows|depicts|appears to be) (?:actually|in fact) (?:an? |the )?OTHER{_END}",
            rf"{_THING} (?:actually|in fact) (?:is|shows|depicts) (?:an? |the )?OTHER{_END}",
            r"(?<!often )(?<!commonly )(?<!sometimes )(?<!frequently )(?<!easily )(?<!can be )(?:mis ?label(?:l?ed|l?ing)|"
            r"mis ?identified|mis ?classified|(?:wrongly|incorrectly) (?:label+ed|identified|classified|named|described))",
            r"(?:label|class name) (?:is|seems|appears|may be|might be|must be) (?:\w+ )?(?:wrong|incorrect|inaccurate|mistaken)",
            r"(?:despite|contrary to) (?:the|its|being) (?:given |provided )?(?:label(?:l?ed)?|class name|caption|prompt)",
        )
    )
)
_CUES = frozenset(
    "not no isnt arent wasnt werent doesnt dont didnt cant cannot couldnt unable rather instead unlike inconsistent mis "
    "mislabeled mislabelled mislabeling mislabelling misidentified misclassified wrongly incorrectly label class actually "
    "fact despite contrary".split()
)


def contradicts(marked: Sequence[str]) -> bool:
    """Whether marked words (`ClassWords.mark`) deny their own class. Only sentences with a cue word are searched."""
    if _CUES.isdisjoint(marked):
        return False
    sentences = " ".join(marked).split(" . ")
    return any(not _CUES.isdisjoint(s.split()) and _CONTRADICTED.search(s) for s in sentences)


_NOT_ABLE = r"(?:can ?not|can't|could not|couldn't|won't|will not|am unable|am not able|must decline|have to decline|don't have)"
REFUSAL = re.compile(
    r"(?:(?:i'm|i am|we're|we are)?\s*(?:so |very |really |truly )?sorry(?:[,.!]|\s+(?:but|i|for)\b)"
    r"|(?:i|my) apolog(?:i[sz]e|ies)\b"
    rf"|(?:unfortunately,? |regrettably,? )?i(?:'m unable|'m not able| {_NOT_ABLE})\b"
    r"|as an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"|unable to (?:process|describe|identify|view|see|determine|generate|provide|assist|analy[sz]e|comply|fulfil)"
    r"|it (?:is|'s) (?:not possible|impossible) to (?:describe|identify|view|see|determine|provide|analy[sz]e)"
    r"|(?:there is )?no (?:image|photo|picture) (?:is |was |has been )?(?:provided|attached|visible|available|uploaded|shown)"
    r"|please (?:provide|upload|attach|share|send)\b"
    r"|(?:this|your) (?:request|content) (?:violates|cannot|can't|was blocked|goes against))",
    re.IGNORECASE,
)
_URL = re.compile(
    # No name is longer than 64 characters; without a bound, a long text without blanks would take minutes.
    r"https?://|\bwww\.\w|\b[\w.+-]{1,64}@[\w-]{1,64}\.\w{2,}|\b[\w-]{1,64}\.(?:com|org|net|edu|gov|io|ai)\b(?!\w)",
    re.IGNORECASE,
)
_URL_MARKS = ("://", "www.", "@", ".com", ".org", ".net", ".edu", ".gov", ".io", ".ai")
_QUOTED = re.compile(r"[\"“„«][^\"”“»]*[\"”“»]")
_CHARACTER_LOOP = re.compile(r"(.{1,10}?)\1{5,}")


def has_url(text: str) -> bool:
    """Whether the text holds a web or email address."""
    lower = text.lower()
    return any(mark in lower for mark in _URL_MARKS) and _URL.search(lower) is not None


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    """`LATIN`, `CJK` and so on. Full-width and ordinal forms count as the letters they stand for."""
    return unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "UNKNOWN").split()[0]


def is_foreign(text: str, scripts: Sequence[str] = ("LATIN",)) -> bool:
    """Whether a text holds another script than these: more than 3 % of its letters, a word of four letters, or one glyph.

    Quoted text, such as the words on a sign, does not count.
    """
    if text.isascii() and "LATIN" in scripts:
        return False
    letters = foreign = run = longest = 0
    for letter in _QUOTED.sub(" ", text):
        if letter.isalpha():
            letters += 1
            script = "LATIN" if letter < "\x80" else _script(letter)
            if script not in scripts:
                foreign += 1
                run += 4 if script in GLYPHS else 1
                longest = max(longest, run)
                continue
        run = 0
    return longest >= 4 or foreign > max(2, 0.03 * letters)


def has_loop(words: Sequence[str]) -> bool:
    """Whether the words repeat themselves.

    A loop is one word five times in a row, two words four times, three to ten words three times, or a text of which more
    than a third of all three-word runs (and more than ten) occurred before.
    """
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    doubled = len(trigrams) - len(set(trigrams))
    if doubled > max(10, 0.35 * len(trigrams)):
        return True
    if doubled >= 2:
        for period in range(1, 11):
            run, needed = 0, {1: 4, 2: 6}.get(period, 2 * period)
            for one, two in zip(words, words[period:], strict=False):
                run = run + 1 if one == two else 0
                if run >= needed:
                    return True
    return any(len(word) > 30 and _CHARACTER_LOOP.search(word) for word in words)
