"""The meaning of a failed HTTP call: try again, give up this request, or stop. No message contains a key.

A refusal with status 400 is about one of three things: a field of the request, which may be left out; every request alike
(model, budget, account), so that the run ends; or one picture, so that the run goes on. Providers and proxies tell them
apart in words only, which is why this module reads the words.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from ...types import BUDGETS, CallError, Fatal, FieldRefused, Transient, Unanswerable

MAX_MESSAGE = 300

_SECRETS = (
    (re.compile(r"\b(?:sk-|AIza|hf_|gsk_|xai-)[\w*.\-]{6,}"), "[key]"),
    (re.compile(r"\bBearer\s+\S+", re.IGNORECASE), "Bearer [key]"),
    (re.compile(r"://[^\s/@]*@"), "://[key]@"),
    (re.compile(r"([?&][\w.\-]{1,64}=)[^\s&\"'<>]+"), r"\1[key]"),
)


def _words(*patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns), re.IGNORECASE)


# How providers say that an account has no money left. Gemini writes "exceeded your current quota … billing" for a limit
# per minute too, so its sentence decides nothing; the id of its quota does.
_QUOTA_CODES = {
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "billing_error",
    "budget_exceeded",
    "Arrearage",
}
_QUOTA_WORDS = _words(
    r"credit balance is too low",
    r"reached your specified API usage limits",
    r"budget has been exceeded",
    r"\bcredits are depleted",
    r"\bkey limit exceeded",
    r"\bdoesn't have any credits",
)
_KEY_CODES = {"API_KEY_INVALID", "invalid_api_key", "authentication_error", "permission_error"}
_KEY_WORDS = _words(r"^(?:incorrect|invalid) API key\b")
# LiteLLM looks up keys other than its master key in a database, and says so if it has none.
_NO_DATABASE = _words(r"no[ _]connected[ _]db", r"\bno_db_connection\b")
_COUNTRY_WORDS = _words(
    r"\bcountr(?:y|ies)\b",
    r"\bterritor(?:y|ies)\b",
    r"\b(?:your|this|the|supported) region\b",
    r"\blocation is not supported",
)
# A 400 of Gemini, whose messages of one picture may speak of a country, too.
_COUNTRY_WORDS_OF_400 = _words(r"\blocation is not supported", r"\bnot available in your country")
_MODEL_CODES = {"model_not_found", "model_not_supported", "invalid_model", "key_model_access_denied"}
_MODEL_CODES |= {"team_model_access_denied", "model_not_available"}
_MODEL_CODES |= {"model_decommissioned", "model_terms_required", "OperationNotSupported"}
_NAME = r"[`'\"]?[\w./:@-]+[`'\"]?"
_MODEL_WORDS = _words(
    rf"\bmodel {_NAME} (?:does not exist|(?:is |was )?not (?:found|available|supported)|is not a valid|has been (?:retired|removed|deprecated|decommissioned))",
    r"not a valid model",
    r"not a multimodal model",
    r"image_url is only supported",
    r"\bat most 0 images?\b",  # may be given in one prompt: of a model for text
    r"\bat most 0 image\(s\)",
    r"\bimage input modality is not enabled",
    r"\bmissing data required for image input",
    r"\bimage input is not supported",
    r"\bcontent must be a string",
    r"unknown variant [`'\"]image_url",
    r"\binvocation of model ID\b",
    r"does not support (?:images|image input|vision)\b",
    r"invalid model name",
    r"\b(?:unknown|unsupported) model\b",
    r"no 'model_name' with this string",
    r"LLM Provider NOT provided",
    r"no endpoints found (?:for|that support image)",
    r"\bmodels?/\S+ is not (?:found|supported)",
)
# A 401 or 403 that speaks of the model that was asked for.
_MODEL_ACCESS = {
    401: _words(r"\baccess (?:to )?(?:the )?model\b"),
    403: _words(
        r"\baccess (?:to )?(?:the )?model\b", r"\bmodels?[`'\":=/]", rf"\bmodel {_NAME}", r"\b(?:this|the|that) model\b"
    ),
}
_FIELD_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter", "FAILED_PRECONDITION"}
_FIELD_WORDS = _words(
    r"(?:unsupported|unknown|unrecogni[sz]ed|unexpected|extra) (?:request )?(?:parameters?|arguments?|fields?|inputs?|options?|keywords?|names?|keys?)\b",
    r"UnsupportedParams",
    r"not support(?:ed)? (?:the )?parameters?\b",
    r"\bextra_forbidden\b",
)
# The length of the answer, or of the thinking before it. "got -12" follows from the size of one picture.
_BUDGET_NAME = r"\bmax_?(?:completion|output|new)?_?tokens\b|\bmaximum (?:number of )?output tokens\b"
_BUDGET_WORDS = _words(
    rf"(?:{_BUDGET_NAME})(?!.*\bgot -)(?=.*(?:>|\blarge|\bexceed|\bmaximum|\bminimum|\bgreater|\bless\b|\bat (?:most|least)|\brange|\babove|\bbelow))",
    rf"(?:too large|exceeds?|at most|maximum)\b.*(?:{_BUDGET_NAME})",
    r"\bbudget [`'\"]?-?\d+[`'\"]? is invalid",
    r"\bthinking mode\b",
    r"\bthinking[_ .]?budget\b.*(?:range|invalid|at least|at most|between)",
    r"\bbudget_tokens\b",
)
# The value of a field is at fault: the user must type another one.
_VALUE_WORDS = _words(
    r"(?:above|below)[_ ](?:the )?(?:max|min)", r"\bout of range", r"\brange:", r"\b(?:less|greater) than or equal",
    r"\bexpected a value", r"\bchoose a value", r"\bmust be (?:between|in the range|at least|at most|a number)", r"\binput should be",
)  # fmt: skip
_PICTURE_WORDS = _words(
    r"\bimages?\b", r"image_url", r"\bpictures?\b", r"\bphotos?\b", r"\bmedia\b", r"\bmime\b", r"base64", r"\bpixels?\b",
    r"\bjpe?g\b", r"\bpng\b", r"inline_?data", r"\bcontent\b", r"\bsafety\b", r"\bprompt\b", r"context length", r"\btoo large\b",
)  # fmt: skip
_TRANSIENT = {408, 409, 425, 429, *range(500, 600)} - {501, 505}


def redact(text: str, *secrets: str | None) -> str:
    """Returns `text` as one printable line of at most 300 characters without markup and without keys.

    Args:
        text: a message of a server or a library.
        secrets: values to remove. Anything that looks like a key of a known provider, a bearer token, or the user part or
            query of an address is removed in any case.
    """
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    text = text[:20_000]
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    text = re.sub(r"<[^<>]*>", " ", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


def failure(server, status: int, headers: Mapping[str, str], text: str, optional: Sequence[str] = ()) -> CallError:
    """Returns (does not raise) what an unsuccessful answer means.

    Args:
        server: the `Transport`, whose host, key variable and advice the message names.
        status: HTTP status, or the code in the body of an answer that reports an error.
        headers: of the answer, case-insensitive.
        text: body of the answer.
        optional: names of the fields that were sent and may be left out.
    """
    host, api_key_env, secret = server.host, server.api_key_env, server.secret()
    found = _read_error(text)
    codes, said = found.codes, found.said[:20_000]

    def fatal(kind: str, expected: str, advice: str) -> Fatal:
        quoted = f" It said: {said}" if said.strip() else ""
        return Fatal(kind, redact(f"{host}: expected {expected}, found {status}. {advice}{quoted}", secret))

    key = f"the key in {api_key_env}" if api_key_env else "a request without a key"
    other_key = f"Type export {api_key_env}=…" if api_key_env else "Name a key's variable: --api_key_env NAME."
    line = redact(f"{host} answered {status}: {said.strip() or 'no reason given'}", secret)
    if status == 402 or codes & _QUOTA_CODES or _QUOTA_WORDS.search(said) or any("PerDay" in q for q in found.quotas):
        return fatal("quota", "an account with quota left", "Top it up or wait, then run the same command again.")
    if status == 403 and "flagged_input" in codes:  # a router's moderation rejected this picture; the key is fine
        return Unanswerable("moderation", line)
    if _speaks_of_country(status, codes, said):
        advice = "Type another --captioner, or the --base_url of a server of your own."
        return fatal("country", "a request from a country that the provider serves", advice)
    if _NO_DATABASE.search(said) or "no_db_connection" in codes:
        advice = f"The proxy has no database of keys and takes its master key alone. {other_key}"
        return fatal("credentials", "a key that the proxy knows", advice)
    if codes & _MODEL_CODES or (status in (401, 403) and _MODEL_ACCESS[status].search(said)):
        return fatal("model", "a model that takes pictures and that this key may use", server.not_found)
    if "SERVICE_DISABLED" in codes:
        return fatal("server", "a project in which this API is enabled", "Enable it, then type the same command.")
    if status in (401, 403) or codes & _KEY_CODES or (status == 400 and _KEY_WORDS.search(said)):
        return fatal("credentials", f"{key} to be accepted", other_key)
    if status in (404, 405, 410):
        return fatal("model", "a model that takes pictures at this address", server.not_found)
    if status in (400, 422):
        if (refused := _refused_field(found, optional)) is not None:
            name, instead = refused
            if name not in BUDGETS and _VALUE_WORDS.search(said):
                return fatal("field", f"another value of {name}", f"Change it, or leave it out: --omit {name}.")
            if name not in BUDGETS or instead:
                return FieldRefused(line, name, instead)
        if _MODEL_WORDS.search(said):
            return fatal("model", "a model that takes pictures at this address", server.not_found)
        if _BUDGET_WORDS.search(said):
            advice = "Type another --max_tokens, or another budget of thinking in --request_options."
            return fatal("budget", "a token limit that the model takes", advice)
    if codes & _FIELD_CODES or (status in (400, 422) and _FIELD_WORDS.search(said)):
        advice = "If it names a field: --omit FIELD leaves it out."
        return fatal("server", "a request that this model and account may send", advice)
    if 300 <= status < 400:
        target = re.sub(r"^\w+://|^//", "", headers.get("Location", "")).partition("/")[0] or "itself"
        target = target.rpartition("@")[2].partition("?")[0]
        return fatal("server", f"an answer, not a redirect to {target}", "Give the final address: --base_url URL.")
    if status in _TRANSIENT:
        hint = wait_hint({**headers, **found.headers}, limited=status == 429)
        return Transient(f"http_{status}", line, found.delay if hint is None else hint, limited=status == 429)
    if 400 <= status < 500 and status != 407:
        about_it = status == 413 or not said.strip() or _PICTURE_WORDS.search(said)
        return Unanswerable(f"http_{status}", line, general=not about_it)
    return fatal("server", "an answer", "Check --base_url and the proxy.")


def _speaks_of_country(status: int, codes: set[str], said: str) -> bool:
    if "unsupported_country_region_territory" in codes or status == 451:
        return True
    if status == 400:
        return _COUNTRY_WORDS_OF_400.search(said) is not None
    return status in (403, 404) and _COUNTRY_WORDS.search(said) is not None


# -- what an error says -----------------------------------------------------------------------------------------------
@dataclass
class _Error:
    """The body of an error.

    Args:
        said: its message.
        codes: words for its kind.
        places: paths of the fields that it names apart from the message.
        quotas: ids of exhausted quotas.
        delay: seconds to wait.
        headers: of the server behind a router.
    """

    said: str
    codes: set[str] = field(default_factory=set)
    places: list[str] = field(default_factory=list)
    quotas: list[str] = field(default_factory=list)
    delay: float | None = None
    headers: dict[str, str] = field(default_factory=dict)


def _read_error(text: str) -> _Error:
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        return _Error(text, delay=_delay_in(text))
    body = body[0] if isinstance(body, list) and body else body
    body = body if isinstance(body, dict) else {}
    error = body["error"] if isinstance(body.get("error"), dict) else body
    details = _dicts(error.get("details"))
    codes = {v for v in (error.get("code"), error.get("type"), error.get("status")) if isinstance(v, str)}
    codes |= {d["reason"] for d in details if isinstance(d.get("reason"), str)}
    metadata = error["metadata"] if isinstance(error.get("metadata"), dict) else {}
    codes |= {"flagged_input"} & set(metadata)
    violations = [v for d in details for v in _dicts(d.get("violations"))]
    delays = [seconds(str(d["retryDelay"])) for d in details if "retryDelay" in d]
    said = next((v for v in (error.get("message"), body.get("error"), body.get("detail")) if isinstance(v, str)), text)
    headers = metadata.get("headers") if isinstance(metadata.get("headers"), dict) else {}
    read = _Error(
        said,
        codes,
        list(_named_places(body)),
        [str(v.get("quotaId")) for v in violations],
        next((d for d in delays if d is not None), _delay_in(said)),
        {str(name).lower(): str(value) for name, value in headers.items()},
    )
    if isinstance(metadata.get("raw"), str) and metadata["raw"].strip():
        # OpenRouter says "Provider returned error", and passes on what the provider said.
        inner = _read_error(metadata["raw"])
        read.said = f"{inner.said} ({said})"
        read.codes |= inner.codes
        read.places += inner.places
        read.delay = inner.delay if read.delay is None else read.delay
    return read


def _dicts(value: object) -> list[dict]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _named_places(value: object, depth: int = 6):
    """Paths under the keys with which servers name a field: `param`, `field`, and `loc` of pydantic."""
    for child in value if isinstance(value, list) else ():
        if depth:
            yield from _named_places(child, depth - 1)
    for name, child in value.items() if isinstance(value, dict) else ():
        if name in ("param", "field") and isinstance(child, str):
            yield child
        elif name == "loc" and isinstance(child, list):
            yield ".".join(map(str, child))
        elif depth:
            yield from _named_places(child, depth - 1)


_REFUSED = _words(
    r"\b(?:un|not |n't )support", r"\bdeprecated\b", r"\bnot (?:permitted|allowed|enabled|available|accepted|recogni[sz]ed)\b",
    r"\b(?:unknown|unrecogni[sz]ed|unexpected|invalid|extra|incompatible)\b", r"\bno longer\b", r"\bremoved\b",
    r"\bcannot\b", r"\bonly\b", r"\bdoes not (?:accept|take|allow)\b", r"\bcannot find field\b",
)  # fmt: skip


def _refused_field(error: _Error, optional: Sequence[str]) -> tuple[str, str | None] | None:
    """The field that an error refuses, and the name that it wants instead."""
    wanted = re.search(r"\buse [`'\"]?(\w+)[`'\"]? instead", error.said, re.IGNORECASE)
    instead = wanted[1] if wanted and wanted[1] in BUDGETS else None
    for place in error.places:
        parts = [_plain(part) for part in re.split(r"[.\[\]/]+", place) if part]
        inside = parts and parts[0] in ("messages", "contents")
        for name in optional:
            if _plain(name) in (parts[-1:] if inside else parts):
                return name, instead
    if not _REFUSED.search(error.said):
        return None
    at = {name: found.start() for name in optional if (found := _mention(name).search(error.said))}
    return (min(at, key=at.get), instead) if at else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _mention(name: str) -> re.Pattern:
    """Finds a field in a message: its name in snake or camel case. A name that is a plain word must be marked as a name."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
    spelled = r"[_ ]?".join(re.escape(word) for word in words) or re.escape(name)
    if name in ("responseMimeType", "response_format"):
        spelled = rf"(?:{spelled}|json mode)"
    if len(words) > 1 or name in ("temperature", "seed"):
        return re.compile(rf"(?<![\w/-]){spelled}(?![\w/-])", re.IGNORECASE)
    marked = rf"[`'\"]{spelled}[`'\"]|^{spelled}\b\S*:|(?:parameter|argument|field|property|option|name)s?:? [`'\"]?{spelled}\b"
    return re.compile(marked, re.IGNORECASE)


# -- how long to wait -------------------------------------------------------------------------------------------------
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\d{1,13}(?:\.\d+)?")
_DURATION = re.compile(r"(\d{1,12}(?:\.\d+)?)(ms|s|m|h|d)")
_DELAY = re.compile(
    r"(?:try again|retry) (?:in|after) ((?:\d+(?:\.\d+)?(?:ms|[smhd]))+|\d+(?:\.\d+)?)( ?sec| ?min)?", re.I
)


def seconds(text: str) -> float | None:
    """Returns a duration such as `20ms`, `1s`, `6m0s` or `37` in seconds, or None for other text."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(n + u for n, u in parts) != text:
        return None
    return sum(float(n) * _UNITS[u] for n, u in parts)


def _delay_in(said: str) -> float | None:
    """The wait that a message asks for in words, as in `Please try again in 6m0s.` or `Please retry after 26 seconds.`"""
    found = _DELAY.search(said[:20_000])
    if not found:
        return None
    wait = seconds(found[1].lower())
    return wait if wait is None else wait * (60 if (found[2] or "").strip().lower() == "min" else 1)


def _until(text: str, now: float) -> float | None:
    """Seconds from `now` to a date (HTTP or RFC 3339), 0 if it has passed, None for other text."""
    try:
        date = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except (TypeError, ValueError):
            return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, date.timestamp() - now)


def _wait(text: str, now: float) -> float | None:
    """Seconds that the value of a header stands for: a duration, a date, or seconds or milliseconds since the epoch.

    A proxy may fold several headers into one, joined by commas; the longest counts.
    """
    waits = [seconds(part) for part in text.split(",")]
    if None in waits:
        return _until(text, now)
    longest = max(waits)
    if longest > 1e9:  # no wait of thirty years, but a moment
        return max(0.0, longest / (1000 if longest > 1e11 else 1) - now)
    return longest


def wait_hint(headers: Mapping[str, str], limited: bool = True) -> float | None:
    """Returns how many seconds a server asks to wait, uncapped, or None.

    `retry-after-ms` and `Retry-After` (seconds, a duration or a date) take precedence. Otherwise the longest reset of a rate
    limit counts: among the exhausted limits if the server reports what remains, else among all. Some servers send these
    headers with every answer, so they count only if a rate limit (`limited`) turned the call away. LiteLLM's proxy passes
    the headers of its provider on under `llm_provider-`; its own come first.
    """
    found = {name.lower().removeprefix("llm_provider-"): value for name, value in headers.items()}
    found |= {name.lower(): value for name, value in headers.items()}
    # The server's own clock if it shows it: ours may be wrong by more than the wait.
    sent = _until(found.get("date", ""), 0.0)
    now = sent if sent else time.time()
    milliseconds = seconds(found.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    wait = _wait(found.get("retry-after", ""), now)
    if wait is not None or not limited:
        return wait
    resets: dict[str, float] = {}
    for name, value in found.items():
        if re.fullmatch(r"(?:x-)?ratelimit-reset(?:-.*)?|anthropic-ratelimit-.*-reset", name):
            wait = _wait(value, now)
            if wait is not None:
                resets[name] = wait
    exhausted = [w for name, w in resets.items() if found.get(name.replace("reset", "remaining")) == "0"]
    return max(exhausted or resets.values(), default=None)
