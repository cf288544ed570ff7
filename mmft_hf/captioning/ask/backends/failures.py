"""The meaning of a failed HTTP call: try again, give up this request, or stop. No message contains a key."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from ...types import CallError, Fatal, Transient, Unanswerable

MAX_MESSAGE = 300

_SECRETS = (
    (re.compile(r"\b(?:sk-|AIza|hf_|gsk_|xai-)[\w*.\-]{6,}"), "[key]"),
    (re.compile(r"\bBearer\s+\S+", re.IGNORECASE), "Bearer [key]"),
    (re.compile(r"://[^\s/@]*@"), "://[key]@"),
    (re.compile(r"([?&][\w.\-]{1,64}=)[^\s&\"'<>]+"), r"\1[key]"),
)

# How providers say that an account has no money left. Gemini writes "exceeded your current quota … billing" for a limit
# per minute too, so its sentence decides nothing; the id of its quota does.
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error"}
_QUOTA_WORDS = re.compile(r"credit balance is too low|reached your specified API usage limits", re.IGNORECASE)
_KEY_CODES = {"API_KEY_INVALID", "invalid_api_key", "authentication_error", "permission_error"}
_MODEL_CODES = {"model_not_found", "model_not_supported"}
_MODEL_WORDS = re.compile(
    r"\bmodel [`'\"]?[\w./:-]+[`'\"]? (?:does not exist|(?:is |was )?not found)|not a valid model|not a multimodal model"
    r"|image_url is only supported|does not support (?:images|image input|vision)\b",
    re.IGNORECASE,
)
# A field that this model does not accept, or a country without the API: the same for every request.
_FIELD_CODES = {"unsupported_parameter", "unsupported_value", "FAILED_PRECONDITION"}
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


def failure(server, status: int, headers: Mapping[str, str], text: str) -> CallError:
    """Returns (does not raise) what an unsuccessful answer means.

    Args:
        server: the `Transport`, whose host, key variable and advice the message names.
        status: HTTP status, or the code in the body of an answer that reports an error.
        headers: of the answer, case-insensitive.
        text: body of the answer.
    """
    host, api_key_env, secret = server.host, server.api_key_env, server.secret()
    codes, quotas, delay, said = _read_error(text)

    def fatal(kind: str, expected: str, advice: str) -> Fatal:
        quoted = f" It said: {said}" if said.strip() else ""
        return Fatal(kind, redact(f"{host}: expected {expected}, found {status}. {advice}{quoted}", secret))

    key = f"the key in {api_key_env}" if api_key_env else "a request without a key"
    line = redact(f"{host} answered {status}: {said.strip() or 'no reason given'}", secret)
    if status == 402 or codes & _QUOTA_CODES or _QUOTA_WORDS.search(said) or any("PerDay" in q for q in quotas):
        return fatal("quota", "an account with quota left", "Top it up or wait, then run the same command again.")
    if status == 403 and "flagged_input" in codes:  # a router's moderation rejected this picture; the key is fine
        return Unanswerable("moderation", line)
    if status in (401, 403) or codes & _KEY_CODES:
        advice = f"Type export {api_key_env}=…" if api_key_env else "Name a key's variable: --api_key_env NAME."
        return fatal("credentials", f"{key} to be accepted", advice)
    if status in (404, 405) or codes & _MODEL_CODES or (status in (400, 422) and _MODEL_WORDS.search(said)):
        return fatal("model", "a model that takes pictures at this address", server.not_found)
    if codes & _FIELD_CODES:
        advice = "If it names a field: null in the sampling options removes it."
        return fatal("server", "a request that this model and account may send", advice)
    if 300 <= status < 400:
        target = re.sub(r"^\w+://|^//", "", headers.get("Location", "")).partition("/")[0] or "itself"
        target = target.rpartition("@")[2].partition("?")[0]
        return fatal("server", f"an answer, not a redirect to {target}", "Give the final address: --base_url URL.")
    if status in _TRANSIENT:
        hint = wait_hint(headers, limited=status == 429)
        return Transient(f"http_{status}", line, delay if hint is None else hint, limited=status == 429)
    if 400 <= status < 500 and status != 407:
        return Unanswerable(f"http_{status}", line)
    return fatal("server", "an answer", "Check --base_url and the proxy.")


def _read_error(text: str) -> tuple[set[str], list[str], float | None, str]:
    """Codes, quota ids, waiting time in seconds and message in the body of an error."""
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        return set(), [], None, text
    body = body[0] if isinstance(body, list) and body else body
    body = body if isinstance(body, dict) else {}
    error = body["error"] if isinstance(body.get("error"), dict) else body
    details = _dicts(error.get("details"))
    codes = {v for v in (error.get("code"), error.get("type"), error.get("status")) if isinstance(v, str)}
    codes |= {d["reason"] for d in details if isinstance(d.get("reason"), str)}
    codes |= {"flagged_input"} & set(error["metadata"] if isinstance(error.get("metadata"), dict) else ())
    violations = [v for d in details for v in _dicts(d.get("violations"))]
    delays = [seconds(str(d["retryDelay"])) for d in details if "retryDelay" in d]
    said = next((v for v in (error.get("message"), body.get("error"), body.get("detail")) if isinstance(v, str)), text)
    return codes, [str(v.get("quotaId")) for v in violations], next((d for d in delays if d is not None), None), said


def _dicts(value: object) -> list[dict]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


# -- how long to wait -------------------------------------------------------------------------------------------------
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\d{1,12}(?:\.\d+)?")
_DURATION = re.compile(r"(\d{1,12}(?:\.\d+)?)(ms|s|m|h|d)")


def seconds(text: str) -> float | None:
    """Returns a duration such as `20ms`, `1s`, `6m0s` or `37` in seconds, or None for other text."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(n + u for n, u in parts) != text:
        return None
    return sum(float(n) * _UNITS[u] for n, u in parts)


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


def wait_hint(headers: Mapping[str, str], limited: bool = True) -> float | None:
    """Returns how many seconds a server asks to wait, uncapped, or None.

    `retry-after-ms` and `Retry-After` (seconds or a date) take precedence. Otherwise the longest reset of a rate limit
    counts: among the exhausted limits if the server reports what remains, else among all. Some servers send these headers
    with every answer, so they count only if a rate limit (`limited`) turned the call away.
    """
    found = {name.lower(): value for name, value in headers.items()}
    # The server's own clock if it shows it: ours may be wrong by more than the wait.
    sent = _until(found.get("date", ""), 0.0)
    now = sent if sent else time.time()
    milliseconds, value = seconds(found.get("retry-after-ms", "")), found.get("retry-after", "")
    if milliseconds is not None:
        return milliseconds / 1000
    wait = seconds(value) if _NUMBER.fullmatch(value.strip()) else _until(value, now)
    if wait is not None or not limited:
        return wait
    resets: dict[str, float] = {}
    for name, value in found.items():
        if re.match(r"x-ratelimit-reset-|anthropic-ratelimit-.*-reset$", name):
            wait = seconds(value)
            wait = _until(value, now) if wait is None else wait
            if wait is not None:
                resets[name] = wait
    exhausted = [w for name, w in resets.items() if found.get(name.replace("reset", "remaining")) == "0"]
    return max(exhausted or resets.values(), default=None)
