"""The caption checks: a table of them, and `CaptionChecker`, which applies it to an answer.

To add a check, write a function that looks at a `Candidate` and give it a row in `TABLE`. Everything here is pure: no
network, no dataset, and equal texts give equal results.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...core.errors import UserError, nearest
from ...data.sentences import sentence_ends
from ...data.texts import DEFAULT_TEMPLATE, NO_CLASS, check_template, class_prompt, clean_class_name, training_text
from .cleaning import clean_caption
from .tokens import TokenCounter
from .wording import REFUSAL, STOPS, ClassWords, contradicts, has_loop, has_url, is_foreign, words_of

RULES = 1  # part of the fingerprint: raise it whenever a check or a cleaning step gives another result for some text

ACTIONS = ("keep", "reask", "reject")


@dataclass
class Candidate:
    """An answer that may become a caption, as a check sees it.

    Args:
        whole: the answer after cleaning.
        finish_reason: as in `types.Answer`.
        cleaned: names of the cleaning steps that changed the answer (`cleaning.CLEANINGS`).
        unclosed: whether a thinking block was never closed.
        thinking_tokens: spent before the answer.
        text: the caption: `whole`, perhaps trimmed, perhaps with the class template in front.
        status: a word of `types.STATUSES`, as far as it is known before the checks.
        trimmed: whether `text` was trimmed.
        words: of `text` before it was trimmed to the token limit, with OWN and OTHER in place of class names
            (`ClassWords.mark`) and without punctuation.
        all_words: of `whole`, with punctuation.
        names_class, names_other: whether `text`, before any template, names its own class, and another one.
        mentions_label: whether the final `text` names its own class.
        clip_tokens: of `text` alone, begin and end tokens included; None without a tokenizer.
        over_limit: whether template and caption together were longer than the text tower reads.
        echo: runs of eight words of the prompt.
        scripts: in which it may be written.
        class_name: of the picture, in the language of the text.
    """

    whole: str
    finish_reason: str | None
    cleaned: set[str]
    unclosed: bool
    thinking_tokens: int
    text: str = ""
    status: str = "ok"
    trimmed: bool = False
    words: list[str] = field(default_factory=list)
    all_words: list[str] = field(default_factory=list)
    names_class: bool = False
    names_other: bool = False
    mentions_label: bool = False
    clip_tokens: int | None = None
    over_limit: bool = False
    echo: frozenset[tuple[str, ...]] = frozenset()
    scripts: Sequence[str] = ("LATIN",)
    class_name: str = ""


# -- the checks -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Check:
    """A row of `TABLE`.

    Args:
        finds: whether the check fires for a candidate. None: it needs more than one row to tell.
        action: what follows by default: one of `ACTIONS` or `own_action`.
        meaning: what it found, in words for the report and the card.
        advice: added to the prompt when the caption is asked for again; `{name}` (of the class) and `{letters}` are filled in.
        own_action: an action that only this check offers: `trim` or `prefix`.
    """

    finds: Callable[[Candidate], bool] | None
    action: str | None
    meaning: str
    advice: str = ""
    own_action: str | None = None


def _refused(c: Candidate) -> bool:
    return c.finish_reason == "refusal" or REFUSAL.match(c.whole) is not None


def _empty(c: Candidate) -> bool:
    return not c.whole and not _refused(c)


def _thinking_used_up_budget(c: Candidate) -> bool:
    if c.whole:
        return c.status == "truncated" and c.thinking_tokens > 0
    stopped_early = c.finish_reason == "length" or (c.thinking_tokens > 0 and c.finish_reason != "stop")
    return _empty(c) and (stopped_early or c.unclosed)


TABLE = {  # in the order in which `checks` of a caption record lists them
    "thinking": Check(lambda c: "thinking" in c.cleaned, "keep", "a thinking block was removed"),
    "markdown": Check(lambda c: "markdown" in c.cleaned, "keep", "bold, headings, bullets or fences were removed"),
    "boilerplate": Check(
        lambda c: "boilerplate" in c.cleaned, "keep", "an opener such as “Here is a caption:” was removed"
    ),
    "quotes": Check(
        lambda c: "quotes" in c.cleaned, "keep", "typographic quotes were straightened or enclosing quotes removed"
    ),
    "empty": Check(_empty, "reask", "the answer was empty"),
    "thinking_budget": Check(
        _thinking_used_up_budget,
        "reask",
        "thinking used up the token budget",
        advice="Answer directly, without thinking first.",
    ),
    "refusal": Check(_refused, "reject", "the model or its provider refused"),
    "truncated": Check(
        lambda c: bool(c.whole) and c.finish_reason == "length",
        "trim",
        "the answer reached the token budget",
        own_action="trim",
    ),
    "over_token_limit": Check(
        lambda c: c.over_limit, "trim", "with its class template longer than the text tower reads", own_action="trim"
    ),
    "repetition": Check(
        lambda c: has_loop(c.words), "reask", "the text repeats itself", advice="Do not repeat yourself."
    ),
    "foreign_script": Check(
        lambda c: is_foreign(c.text, c.scripts),
        "reask",
        "letters of another script",
        advice="Use {letters} letters only.",
    ),
    "prompt_echo": Check(
        lambda c: not c.echo.isdisjoint(_runs_of_eight(c.words)),
        "reask",
        "eight consecutive words of the prompt",
        advice="Do not repeat these instructions.",
    ),
    "url": Check(lambda c: has_url(c.text), "keep", "a web or email address", advice="Write no web addresses."),
    "label_missing": Check(
        lambda c: bool(c.whole) and not c.names_class,
        "keep",
        "the class is not named",
        advice="Use the words {name!r}.",
        own_action="prefix",
    ),
    "other_class": Check(
        lambda c: c.names_other and not c.names_class,
        "keep",
        "another class is named instead of this one",
        advice="Name no other class.",
    ),
    "label_contradicted": Check(
        lambda c: contradicts(c.all_words),
        "reask",
        "the text denies the label",
        advice="Describe what can be seen, without comparing it with anything else.",
    ),
    "duplicate": Check(None, None, "another image has the same text"),  # added by `duplicates`, which sees all rows
}
CHECKS = tuple(TABLE)
MEANINGS = {name: check.meaning for name, check in TABLE.items()} | {  # of all checks, those that steps add included
    "duplicate": "another caption has the same text",
    "contradicted": "a judge denies something that it says",
    "unanswered": "a question about it has no answer",
    "length_off": "more than a quarter longer or shorter than was asked for",
    "speaks_of_mark": "it speaks of the line around the object, which is not in the image",
    "not_different": "a judge does not find it true of this image and false of the other one",
    "worse": "it fits the image less than the captions that it was made from",
    "not_unique": "it fits another region of the image as well",
}
DEFAULT_ACTIONS = {name: check.action for name, check in TABLE.items() if check.action}


def parse_actions(texts: Iterable[str]) -> dict[str, str]:
    """`["label_missing=reask"]` -> `{"label_missing": "reask"}`. Raises `UserError` for an unknown check or action."""
    pairs = [text.partition("=")[::2] for text in texts]
    return check_actions({name.strip(): action.strip() for name, action in pairs})


def check_actions(actions: Mapping[str, str]) -> dict[str, str]:
    """Returns the actions. Raises `UserError` for an unknown check, or an action that a check does not offer."""
    for name, action in actions.items():
        if name not in DEFAULT_ACTIONS:
            known = ", ".join(DEFAULT_ACTIONS)
            raise UserError(f"check: expected one of {known}, found {name!r}.{nearest(name, DEFAULT_ACTIONS)}")
        known = [action for action in (*ACTIONS, TABLE[name].own_action) if action]
        if action not in known:
            raise UserError(
                f"action of {name}: expected {', '.join(known)}, found {action!r}.{nearest(action, known)} "
                f"For example, type {name}={known[1]}."
            )
    return dict(actions)


# -- the checker ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Checked:
    """The result for one answer.

    Args:
        text: cleaned, and trimmed where `status` is `trimmed`; None where nothing is left. It is a caption only if
            `status` is one of `types.ACCEPTED`; otherwise it is kept for inspection.
        status: a word of `types.STATUSES`. If `reask` is given: the status that applies unless someone asks again.
        checks: names of all checks that fired, in the order of `CHECKS`.
        clip_tokens: of the text alone, begin and end tokens included; None without a tokenizer.
        mentions_label: whether the text names its own class.
        reask: what to add to the prompt before asking again; None if asking again is not wanted.
    """

    text: str | None
    status: str
    checks: tuple[str, ...]
    clip_tokens: int | None
    mentions_label: bool
    reask: str | None

    @property
    def needs_larger_budget(self) -> bool:
        """Whether thinking used up the token budget: with the same budget, the next answer would be empty, too."""
        return "thinking_budget" in self.checks


class CaptionChecker:
    """Checks and cleans captions for a set of classes.

    Args:
        class_names: of the dataset, by label.
        tokenizer (*optional*): of the model that will be trained, or a `TokenCounter`. Without it no tokens are counted.
        words: requested length, repeated when asking again.
        template: precedes a caption in training; its tokens count, too.
        actions: what follows from a check, where it differs from `DEFAULT_ACTIONS`. `keep` only records it. `reask` asks
            again; on the last try, checks that are kept by default are kept, the others reject the caption or set a status
            of their own. `reject` drops the caption without asking again. `trim` (`truncated` and `over_token_limit`)
            shortens the text to complete sentences. `prefix` (`label_missing`) puts the class template in front.
        clean: False for texts written by people: they are left unchanged, and every check defaults to `keep`.
        translated (*optional*): names of each class in the language of texts in other scripts (`check`), the first one for questions.

    Raises:
        UserError: an unknown check or action, or an invalid template.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        tokenizer=None,
        words: int = 50,
        template: str = DEFAULT_TEMPLATE,
        actions: Mapping[str, str] | None = None,
        clean: bool = True,
        translated: Sequence[Sequence[str]] | None = None,
    ):
        self.class_names, self.words, self.clean = tuple(class_names), words, clean
        counts = tokenizer is None or isinstance(tokenizer, TokenCounter)
        self.tokens = tokenizer if counts else TokenCounter(tokenizer)
        self.template = check_template(template)
        defaults = DEFAULT_ACTIONS if clean else dict.fromkeys(DEFAULT_ACTIONS, "keep")
        self.actions = {**defaults, **check_actions(actions or {})}
        self._classes = ClassWords(self.class_names)
        self.translated = translated
        self._translated = None if translated is None else ClassWords([", ".join(own) for own in translated])
        self._echoes: dict[tuple[str, int], frozenset] = {}

    def spec(self) -> dict:
        """Everything that can change a result, JSON-able: part of a fingerprint."""
        return {
            "rules": RULES,
            "actions": self.actions,
            "words": self.words,
            "scripts": ["Latin"],
            "template": self.template,
            "clean": self.clean,
            "tokenizer": self.tokens.digest() if self.tokens else None,
            "token_limit": self.tokens.limit if self.tokens else None,
            **({} if self.translated is None else {"translated": [list(own) for own in self.translated]}),
        }

    def check(
        self,
        text: str | None,
        finish_reason: str | None,
        label: int,
        prompt: str = "",
        thinking_tokens: int = 0,
        last_try: bool = False,
        scripts: Sequence[str] = (),
        says_length: bool = False,
    ) -> Checked:
        """Cleans and checks one answer.

        Args:
            text: as the model wrote it.
            finish_reason: as in `types.Answer`.
            label: the class of the picture.
            prompt (*optional*): the question; a caption that repeats eight consecutive words of it is an echo.
            thinking_tokens: spent before the answer.
            last_try: the caption will not be asked for again.
            scripts: of the language that was asked for; names of classes are looked for as far as they are `translated`. Empty: Latin
                letters.
            says_length: the question says how long the answer is to be, which is not repeated.
        """
        cleaned, changed, unclosed = clean_caption(text or "")
        whole = cleaned if self.clean else " ".join((text or "").split())
        c = Candidate(whole, finish_reason, changed, unclosed, thinking_tokens, text=whole)
        c.scripts = scripts or c.scripts
        if whole:
            self._trim_to_sentences(c, last_try)
            classes, c.class_name = self._classes, self.class_names[label]
            if scripts and self._translated:
                classes, c.class_name = self._translated, self.translated[label][0]
            marked, c.names_class, c.names_other = classes.mark(c.text, label)
            c.words = _without_stops(marked)
            # A denial counts even if it was trimmed away: the model doubted the label of the whole picture.
            c.all_words = classes.mark(whole, label)[0] if c.trimmed else marked
            c.mentions_label = c.names_class
            if scripts and not self._translated:
                c.names_class, c.names_other = True, False
            if self.class_names[label] == NO_CLASS:  # there is no name to look for
                c.names_class = True
            if not c.names_class and self.actions["label_missing"] == "prefix":
                c.text, c.mentions_label = f"{class_prompt(self.template, c.class_name)} {c.text}", True
            self._fit_to_token_limit(c, label, last_try, classes)
            c.echo = self._echo(prompt, label) if prompt else frozenset()
        else:
            c.status = "empty"
        checks = tuple(name for name, check in TABLE.items() if check.finds and check.finds(c))
        status, advice = self._decide(c, checks, last_try)
        length = "" if says_length else f" of at most {self.words} words"
        reask = None if advice is None else " ".join([*advice, f"Answer in one plain paragraph{length}."])
        return Checked(c.text or None, status, checks, c.clip_tokens, c.mentions_label, reask)

    def _trims(self, check: str, last_try: bool) -> bool:
        return self.actions[check] == "trim" or (self.actions[check] == "reask" and last_try)

    def _trim_to_sentences(self, c: Candidate, last_try: bool) -> None:
        """Removes the unfinished last sentence of a truncated answer if at least half of its words remain."""
        if c.finish_reason != "length":
            return
        if self._trims("truncated", last_try):
            kept = c.whole[: next(reversed(sentence_ends(c.whole)), 0)]
            if kept and 2 * len(kept.split()) >= len(c.whole.split()):
                c.text, c.trimmed = kept, True
        if not c.trimmed and self.actions["truncated"] != "keep":
            c.status = "truncated"

    def _fit_to_token_limit(self, c: Candidate, label: int, last_try: bool, classes: ClassWords) -> None:
        """Counts tokens, and removes sentences from the end until template and caption fit, if anything is left then."""
        if not self.tokens:
            return
        c.clip_tokens, c.over_limit = self.tokens.count(c.text), self._is_over(c.text, label)
        if c.over_limit and self._trims("over_token_limit", last_try):
            ends = [end for end in sentence_ends(c.text) if end < len(c.text)]
            # Longer texts have more tokens, so that most of thousands of sentences need no count of their own.
            fitting = bisect_left(ends, True, key=lambda end: self._is_over(c.text[:end], label))
            for end in reversed(ends[: fitting + 5]):
                if not self._is_over(kept := c.text[:end], label):
                    c.text, c.clip_tokens, c.trimmed = kept, self.tokens.count(kept), True
                    c.mentions_label = classes.mark(c.text, label)[1]
                    return

    def _is_over(self, text: str, label: int) -> bool:
        """Whether a caption exceeds the limit together with its class template."""
        return self.tokens.exceeds(training_text(self.template, self.class_names[label], text))

    def _decide(self, c: Candidate, checks: tuple[str, ...], last_try: bool) -> tuple[str, list[str] | None]:
        """The status that follows from the checks, and what to say if it is asked again."""
        asking = [name for name in checks if self.actions.get(name) == "reask"]
        rejecting = [name for name in checks if self.actions.get(name) == "reject"]
        status = c.status
        if status == "truncated" and self.actions["truncated"] == "trim":
            asking.append("truncated")  # there was no sentence to trim to
        if "refusal" in checks and self.actions["refusal"] != "keep":
            status = "refused"
        elif rejecting:
            status = "rejected"
        elif status == "ok":
            faulty = any(DEFAULT_ACTIONS[name] == "reask" for name in asking)
            status = "rejected" if faulty else "trimmed" if c.trimmed else "ok"
        if not asking or rejecting or last_try:
            return status, None
        own_name = clean_class_name(c.class_name)
        letters = " or ".join(script if script == "CJK" else script.title() for script in c.scripts)
        advice = [TABLE[name].advice.format(name=own_name, letters=letters) for name in asking if TABLE[name].advice]
        return status, advice

    def _echo(self, prompt: str, label: int) -> frozenset:
        """Runs of eight words of a prompt. The class name counts as one word, since a caption should contain it."""
        found = self._echoes.get((prompt, label))
        if found is None:
            found = frozenset(_runs_of_eight(_without_stops(self._classes.mark(prompt, label)[0])))
            if len(self._echoes) > 20_000:  # prompts that differ for every picture must not fill the memory
                self._echoes.clear()
            self._echoes[prompt, label] = found
        return found


def _without_stops(marked: Sequence[str]) -> list[str]:
    return [word for word in marked if word not in STOPS]


def _runs_of_eight(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(8)), strict=False)


# -- across pictures --------------------------------------------------------------------------------------------------
def duplicate_key(text: str) -> str:
    """Equal for texts that differ only in case, accents, punctuation and spaces."""
    return hashlib.blake2b(" ".join(words_of(text)).encode(), digest_size=8).hexdigest()


class SharedTexts:
    """Finds texts that several images share. `keys` are theirs (`duplicate_key`)."""

    def __init__(self):
        self.keys: set[str] = set()
        self._first: dict[str, str] = {}

    def add(self, image_sha256: str, text: str) -> str:
        """Adds a text of an image, and returns its key."""
        key = duplicate_key(text)
        if self._first.setdefault(key, image_sha256) != image_sha256:
            self.keys.add(key)
        return key


def duplicates(texts_by_image: Iterable[tuple[str, str]]) -> set[str]:
    """Keys of the texts that several images share, from pairs of `image_sha256` and text."""
    shared = SharedTexts()
    for image, text in texts_by_image:
        shared.add(image, text)
    return shared.keys
