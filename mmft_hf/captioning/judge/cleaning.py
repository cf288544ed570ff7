"""Removes what models write around a caption: thinking, Markdown, openers, quotes. Pure functions of one text."""

from __future__ import annotations

import re
import unicodedata

CLEANINGS = ("thinking", "markdown", "boilerplate", "quotes")

_HIDDEN = "\u200b\u200e\u200f\u2060\ufeff" + "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
_INVISIBLE = str.maketrans(dict.fromkeys([*_HIDDEN, *(chr(c) for c in range(32) if chr(c) not in "\t\n\r")]))
_QUOTES = str.maketrans({**dict.fromkeys("“”„‟″«»", '"'), **dict.fromkeys("‘’‚‛′", "'")})

_THINK = r"(?:think|thinking|thought|reasoning)"
_THINK_START = re.compile(rf"[<\[]{_THINK}[>\]]", re.IGNORECASE)
_THINK_END = re.compile(rf"[<\[]/{_THINK}[>\]]", re.IGNORECASE)

_HEADING = re.compile(r"^#{1,6}[ \t]+(.*?)#*$", re.MULTILINE)
_BULLET = re.compile(r"^[ \t]*(?:[-*+•‣▪]|>)[ \t]+", re.MULTILINE)
_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+", re.MULTILINE)
_MARKDOWN = (
    (re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$|^[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*$", re.MULTILINE), ""),
    (re.compile(r"```(?:\w+\n)?"), ""),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", re.DOTALL), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<!\w)_(?=[^\s_])([^_\n]+?)(?<=[^\s_])_(?!\w)"), r"\1"),
    (re.compile(r"`([^`\n]+)`"), r"\1"),
    (re.compile(r"!?\[([^\[\]\n]+)\]\(([^\s()]+)\)"), r"\1 (\2)"),
    (re.compile(r"</?(?:p|br|b|i|em|strong|div|span|li|ul|caption|answer|description)\b[^<>]*>", re.IGNORECASE), " "),
    (re.compile(r"\*\*"), ""),  # half of a pair whose other half is missing
)

_NOUN = r"(?:captions?|descriptions?|answers?|responses?|outputs?)"
_CONTENT = r"(?:characteristics|features|paragraph|summary)"
_OPENER = re.compile(
    r"(?:(?:sure|certainly|of course|absolutely|ok|okay|great)(?: thing)?[,!.:]*\s+(?=here\b|below\b|this is\b|caption\b|"
    r"description\b|i can\b|i'd\b|i will\b|i'll\b)"
    r"|(?:sure|certainly|of course|absolutely)!\s+"
    rf"|(?:here(?:'s| is| are)|below is|the following is|this is)\s+[^:.!?\n]{{0,120}}?\b(?:{_NOUN}|{_CONTENT})\b"
    r"[^:.!?\n]{0,100}:\s*"
    r"|(?:i'd|i can|i will|i'll)\s+(?:be happy to\s+)?(?:describe|caption|help)[^:.!?\n]{0,100}[:.!]\s*"
    r"|(?:(?:the|a|an|my|your|image|photo|picture|alt|visual|shape|texture|context|spatial|petals?|colou?r|symbols?|primary|"
    rf"main|key|short|brief|concise|final|detailed|{{W}})[ -]){{0,5}}(?:{_NOUN}|{_CONTENT})\s*:\s*)".replace(
        "{W}", r"\d+[ -]words?"
    ),
    re.IGNORECASE,
)
_FOOTER = re.compile(
    r"\s*[(\[]\s*(?:word count:?\s*\d+(?: words?)?|(?:approx\.?\s*|about\s*)?\d+ words?\.?)\s*[)\]]\s*\.?$"
    r"|\s+word count:\s*\d+(?: words?)?\s*\.?$"
    r"|(?<=[.!?])\s+(?:let me know if|i hope this|feel free to|would you like)\b[^\n]*$",
    re.IGNORECASE,
)
# Looked for first, because the pattern is slow.
_FOOTER_SIGNS = ("word", "let me know", "i hope this", "feel free", "would you like")
_SPECIAL = re.compile(r"<\|[\w ]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn|start_of_turn)>|\[/?INST\]")


def clean_caption(text: str) -> tuple[str, set[str], bool]:
    """Removes everything that is not part of the caption.

    Returns:
        The text on one line, which of `CLEANINGS` changed it, and whether a thinking block was never closed.
    """
    fired, unclosed = set(), False
    text = text.translate(_INVISIBLE).strip()
    if "<" in text or "[" in text:
        spoken, unclosed = _without_thinking(text)
        if spoken != text:
            fired.add("thinking")
        text = spoken.strip()
    straight = text if text.isascii() else text.translate(_QUOTES)
    if straight != text:
        fired.add("quotes")
        text = straight
    plain = _plain(text)
    if plain != " ".join(text.split()):
        fired.add("markdown")
    bare = _without_boilerplate(plain)
    if bare != plain:
        fired.add("boilerplate")
    text = bare.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" and text[0] not in text[1:-1]:
        fired.add("quotes")
        text = text[1:-1].strip()
    return " ".join(text.split()), fired, unclosed


def _without_thinking(text: str) -> tuple[str, bool]:
    """Removes thinking blocks; also tells whether one was never closed. A block without a start began in the prompt."""
    *closed, last = _THINK_END.split(text)
    starts = [_THINK_START.search(part) for part in closed]
    before = [part[: start.start()] for part, start in zip(closed, starts, strict=True) if start]
    start = _THINK_START.search(last)
    return " ".join([*before, last[: start.start()] if start else last]), start is not None


def _plain(text: str) -> str:
    """Removes Markdown and puts the text on one line. List items that end without punctuation are joined by semicolons."""
    if "\n" in text or text[:1] in "#-*+•‣▪>":
        headings = _HEADING.findall(text)
        # A heading adds nothing to the text below it; a text that is only a heading stays.
        text = _HEADING.sub("", text) if headings and _HEADING.sub("", text).strip() else _HEADING.sub(r"\1", text)
        items = _BULLET if _BULLET.search(text) else _NUMBER if len(_NUMBER.findall(text)) > 1 else None
        if items:
            lines = [(items.match(line) is not None, items.sub("", line).strip()) for line in text.splitlines()]
            lines = [(item, line) for item, line in lines if line]
            joined = ""
            for place, (item, line) in enumerate(lines):
                following = place + 1 < len(lines) and lines[place + 1][0]
                joined += line + (";" if item and following and line[-1] not in ".!?;:," else "") + "\n"
            text = joined
    if any(mark in text for mark in ("*", "_", "`", "[", "<", "~~~", "---")):
        for pattern, replacement in _MARKDOWN:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _without_boilerplate(text: str) -> str:
    """Removes openers, closing remarks about the answer itself, and tokens of a chat template."""
    if "<" in text or "[" in text:
        text = _SPECIAL.sub(" ", text).strip()
    for _ in range(4):
        opener = _OPENER.match(text)
        if not opener or not opener[0]:
            break
        text = text[opener.end() :].lstrip()
    ending = text[-240:].lower()
    footer = any(sign in ending for sign in _FOOTER_SIGNS) and _FOOTER.search(text, max(len(text) - 240, 0))
    return " ".join((text[: footer.start()] if footer else text).split())


def fold(text: str) -> str:
    """The text for comparisons: case folded, without accents and apostrophes."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text.translate(_QUOTES))
        text = "".join(c for c in decomposed if not unicodedata.combining(c))
    return text.casefold().replace("'", "")
