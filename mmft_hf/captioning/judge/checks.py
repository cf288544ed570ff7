"""Is this text a caption of this class? Pure functions: no network, no data set, the same answer for the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...core.errors import UserError, nearest
from ...data.texts import DEFAULT_TEMPLATE, check_template, class_prompt, clean_class_name, training_text
from .cleaning import CLEANINGS, clean_caption, sentence_ends
from .tokens import TokenCounter
from .wording import REFUSAL, STOPS, ClassWords, contradicts, has_loop, has_url, is_foreign, words_of

RULES = 1  # to be raised with any change of what a check finds or a cleaning changes: it is part of the fingerprint

DEFAULT_ACTIONS = {
    **dict.fromkeys(CLEANINGS, "keep"),
    "empty": "reask",
    "thinking_budget": "reask",
    "refusal": "reject",
    "truncated": "trim",
    "over_token_limit": "trim",
    "repetition": "reask",
    "foreign_script": "reask",
    "prompt_echo": "reask",
    "url": "keep",
    "label_missing": "keep",
    "other_class": "keep",
    "label_contradicted": "reask",
}
CHECKS = (
    *DEFAULT_ACTIONS,
    "duplicate",
)  # in the order in which they are recorded; `duplicate` by whoever sees all rows
ACTIONS = ("keep", "reask", "reject")
MEANING = {  # of a check that fired, for people
    "thinking": "a thinking block was taken out",
    "markdown": "bold, headings, bullets or fences were cleaned",
    "boilerplate": "an opener such as “Here is a caption:” was taken off",
    "quotes": "typographic quotes straightened, enclosing ones removed",
    "empty": "nothing was answered",
    "thinking_budget": "thinking used up the token budget",
    "refusal": "the model or its provider refused",
    "truncated": "the token budget ended the answer",
    "over_token_limit": "with its class template longer than the text tower reads",
    "repetition": "a loop",
    "foreign_script": "letters of another script",
    "prompt_echo": "eight words of the prompt in a row",
    "url": "a web or mail address",
    "label_missing": "the class is not named",
    "other_class": "another class is named, and this one is not",
    "label_contradicted": "the label is denied",
    "duplicate": "the same text for another image",
}
OWN_ACTIONS = {"truncated": "trim", "over_token_limit": "trim", "label_missing": "prefix"}

SCRIPTS = "Latin Cyrillic Greek Arabic Hebrew Armenian Georgian Devanagari Bengali Tamil Telugu Thai Han Hiragana Katakana Hangul"


@dataclass(frozen=True)
class Checked:
    """What became of one answer.

    Args:
        text: cleaned, and cut where `status` is `trimmed`; None where nothing is left. Only with a status of
            `types.ACCEPTED` is it a caption; otherwise it is there to be looked at.
        status: a word of `types.STATUSES`. Where `reask` is given: the status if nobody asks again.
        checks: names of all checks that fired, in the order of `CHECKS`.
        clip_tokens: of the text alone, begin and end tokens counted; None without a tokenizer.
        mentions_label: whether the text names its own class.
        reask: what to add to the prompt, in words, before asking again; None where asking again is not wanted.
    """

    text: str | None
    status: str
    checks: tuple[str, ...]
    clip_tokens: int | None
    mentions_label: bool
    reask: str | None

    @property
    def needs_larger_budget(self) -> bool:
        """Thinking used up the token budget: asked again with the same one, the answer would be as empty."""
        return "thinking_budget" in self.checks


def parse_actions(texts: Iterable[str]) -> dict[str, str]:
    """`["label_missing=reask"]` -> `{"label_missing": "reask"}`. Raises `UserError` at an unknown check or action."""
    pairs = [text.partition("=")[::2] for text in texts]
    return check_actions({name.strip(): action.strip() for name, action in pairs})


def check_actions(actions: Mapping[str, str]) -> dict[str, str]:
    """The actions, or `UserError` where a check or an action of it is unknown."""
    for name, action in actions.items():
        if name not in DEFAULT_ACTIONS:
            known = ", ".join(DEFAULT_ACTIONS)
            raise UserError(f"check: expected one of {known}, found {name!r}.{nearest(name, DEFAULT_ACTIONS)}")
        known = [*ACTIONS, *([OWN_ACTIONS[name]] if name in OWN_ACTIONS else [])]
        if action not in known:
            raise UserError(
                f"action of {name}: expected {', '.join(known)}, found {action!r}.{nearest(action, known)} "
                f"Type for example {name}={known[1]}."
            )
    return dict(actions)


# -- the checker ------------------------------------------------------------------------------------------------------
_ADVICE = {
    "thinking_budget": "Answer directly, without thinking first.",
    "repetition": "Do not repeat yourself.",
    "foreign_script": "Use {scripts} letters only.",
    "prompt_echo": "Do not repeat these instructions.",
    "url": "Write no web addresses.",
    "label_missing": "Use the words {name!r}.",
    "other_class": "Name no other class.",
    "label_contradicted": "Describe what can be seen, without comparing it with anything else.",
}


class CaptionChecker:
    """Checks and cleans captions of a set of classes.

    Args:
        class_names: of the data set, by label.
        tokenizer (*optional*): of the model that will be trained, or a `TokenCounter`. Without it no tokens are counted.
        words: length asked for, repeated when asking again.
        scripts: whose letters a caption may hold, of `SCRIPTS`.
        template: put in front of a caption in training; counted with it.
        actions: what follows from a check, where it is not `DEFAULT_ACTIONS`: `keep` records it and no more, `reask` asks
            again (on the last try, `keep` for checks that are kept by default, `reject` or the check's own status for the
            others), `reject` drops the caption for good. `trim`, for `truncated` and `over_token_limit`, cuts at the end of
            a sentence; `prefix`, for `label_missing`, puts the class template in front.
        clean: False for texts that people wrote: they stay as they are, and every check is `keep` where `actions` is silent.

    Raises:
        UserError: an unknown check, action or script, or a bad template.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        tokenizer=None,
        words: int = 50,
        scripts: Sequence[str] = ("Latin",),
        template: str = DEFAULT_TEMPLATE,
        actions: Mapping[str, str] | None = None,
        clean: bool = True,
    ):
        for script in scripts:
            if script.title() not in SCRIPTS.split():
                found = nearest(script.title(), SCRIPTS.split())
                raise UserError(f"scripts: expected names of {SCRIPTS.replace(' ', ', ')}, found {script!r}.{found}")
        self.class_names, self.words, self.clean = tuple(class_names), words, clean
        counts = tokenizer is None or isinstance(tokenizer, TokenCounter)
        self.tokens = tokenizer if counts else TokenCounter(tokenizer)
        self.scripts, self.template = tuple(scripts), check_template(template)
        defaults = DEFAULT_ACTIONS if clean else dict.fromkeys(DEFAULT_ACTIONS, "keep")
        self.actions = {**defaults, **check_actions(actions or {})}
        self._classes = ClassWords(self.class_names)
        self._scripts = frozenset("CJK" if s.upper() == "HAN" else s.upper() for s in self.scripts)
        self._echoes: dict[tuple[str, int], frozenset] = {}

    def spec(self) -> dict:
        """Everything that can change a result, JSON-able: part of a fingerprint."""
        return {
            "rules": RULES,
            "actions": self.actions,
            "words": self.words,
            "scripts": list(self.scripts),
            "template": self.template,
            "clean": self.clean,
            "tokenizer": self.tokens.digest() if self.tokens else None,
            "token_limit": self.tokens.limit if self.tokens else None,
        }

    def check(
        self,
        text: str | None,
        finish_reason: str | None,
        label: int,
        prompt: str = "",
        thinking_tokens: int = 0,
        last_try: bool = False,
    ) -> Checked:
        """Checks one answer.

        Args:
            text: as the model wrote it.
            finish_reason: as in `types.Answer`.
            label: the class of the picture.
            prompt (*optional*): what was asked; a caption that repeats eight words of it in a row is an echo.
            thinking_tokens: spent before the answer.
            last_try: nobody will ask again.
        """
        raw, name, actions = " ".join((text or "").split()), self.class_names[label], self.actions
        text, fired, unclosed = clean_caption(text or "")
        text = text if self.clean else raw
        if finish_reason == "refusal" or REFUSAL.match(text):
            fired.add("refusal")
        if not text:
            if "refusal" not in fired:
                fired.add("empty")
                if finish_reason == "length" or unclosed or (thinking_tokens and finish_reason != "stop"):
                    fired.add("thinking_budget")
            return self._checked(None, fired, "empty", False, False, last_try, name)

        cut, status = False, "ok"
        whole = text
        if finish_reason == "length":
            fired.add("truncated")
            if actions["truncated"] == "trim" or (actions["truncated"] == "reask" and last_try):
                ends = sentence_ends(text)
                cut = bool(ends) and 2 * len(text[: ends[-1]].split()) >= len(text.split())
                text = text[: ends[-1]] if cut else text
            if not cut and actions["truncated"] != "keep":
                status = "truncated"
                if thinking_tokens:
                    fired.add("thinking_budget")
        marked, own, other = self._classes.mark(text, label)
        # What was cut off counts here: a model that doubts the label has doubted it of the whole picture.
        doubts = marked if whole is text else self._classes.mark(whole, label)[0]
        if contradicts(doubts):
            fired.add("label_contradicted")
        if not own:
            fired.add("label_missing")
            if other:
                fired.add("other_class")
            if actions["label_missing"] == "prefix":
                text, own = f"{class_prompt(self.template, name)} {text}", True
        tokens = None
        if self.tokens:
            tokens, over = self._count(text, name)
            if over:
                fired.add("over_token_limit")
                if actions["over_token_limit"] == "trim" or (actions["over_token_limit"] == "reask" and last_try):
                    for end in reversed([end for end in sentence_ends(text) if end < len(text)]):
                        shorter, still_over = self._count(text[:end], name)
                        if not still_over:
                            text, tokens, cut = text[:end], shorter, True
                            own = self._classes.mark(text, label)[1]
                            break
        spoken = [word for word in marked if word not in STOPS]
        if has_loop(spoken):
            fired.add("repetition")
        if is_foreign(text, self._scripts):
            fired.add("foreign_script")
        if prompt and not self._echo(prompt, label).isdisjoint(_eight(spoken)):
            fired.add("prompt_echo")
        if has_url(text):
            fired.add("url")
        return self._checked(text, fired, status, cut, own, last_try, name, tokens)

    def _checked(self, text, fired, status, cut, own, last_try, name, tokens=None) -> Checked:
        """Turns the checks that fired into a status, and into what to say when asking again."""
        checks = tuple(check for check in CHECKS if check in fired)
        asking = [check for check in checks if self.actions[check] == "reask"]
        if status == "truncated" and self.actions["truncated"] == "trim":
            asking.append("truncated")  # nothing to cut back to
        rejecting = [check for check in checks if self.actions[check] == "reject"]
        hard = [check for check in asking if DEFAULT_ACTIONS[check] == "reask"]
        if "refusal" in fired and self.actions["refusal"] != "keep":
            status = "refused"
        elif rejecting:
            status = "rejected"
        elif status == "ok":
            status = "rejected" if hard else "trimmed" if cut else "ok"
        advice = None
        if asking and not rejecting and not last_try:
            names = {"scripts": " and ".join(self.scripts), "name": clean_class_name(name)}
            said = [_ADVICE[check].format(**names) for check in asking if check in _ADVICE]
            advice = " ".join([*said, f"Answer in one plain paragraph of at most {self.words} words."])
        return Checked(text, status, checks, tokens, own, advice)

    def _count(self, text: str, name: str) -> tuple[int, bool]:
        """Tokens of a caption alone, and whether it is over the limit behind its class template."""
        whole = self.tokens.count(training_text(self.template, name, text))
        return self.tokens.count(text), whole > (self.tokens.limit or float("inf"))

    def _echo(self, prompt: str, label: int) -> frozenset:
        """Runs of eight words of a prompt; the class name counts as one, since a caption should hold it."""
        found = self._echoes.get((prompt, label))
        if found is None:
            marked = self._classes.mark(prompt, label)[0]
            found = frozenset(_eight([word for word in marked if word not in STOPS]))
            if len(self._echoes) > 20_000:  # prompts that differ for every picture must not fill the memory
                self._echoes.clear()
            self._echoes[prompt, label] = found
        return found


def _eight(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(8)), strict=False)


# -- across pictures --------------------------------------------------------------------------------------------------
def duplicate_key(text: str) -> str:
    """Equal for texts that differ in case, accents, stops and spaces only."""
    return hashlib.blake2b(" ".join(words_of(text)).encode(), digest_size=8).hexdigest()


def duplicates(texts_by_image: Iterable[tuple[str, str]]) -> set[str]:
    """Keys (`duplicate_key`) of the texts that more than one image has, from pairs of `image_sha256` and text."""
    first: dict[str, str] = {}
    return {key for image, text in texts_by_image if first.setdefault(key := duplicate_key(text), image) != image}
