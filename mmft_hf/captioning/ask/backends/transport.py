"""A pool of HTTP connections to one server. This is the only module that imports an HTTP library.

The key is read from the environment for each call and goes into a header: no attribute and no message contains it.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from ....core.errors import UserError
from ...types import CallError, Fatal, Transient
from .failures import failure, redact

MAX_ANSWER_BYTES = 8 * 2**20
CONNECT_TIMEOUT_S = 15.0

# Stands for a picture in a body: encoding 130 kB of base64 with json.dumps would take four times as long as splicing
# it in. Random, so that no prompt can contain it.
PICTURE = f"picture-{secrets.token_hex(16)}"
_PICTURE = PICTURE.encode()


class Transport:
    """Posts JSON to one server and returns JSON, or raises what a failure means.

    Args:
        base_url: http or https address to which the paths of `post` are appended.
        api_key_env: name of the environment variable that holds the key; None: no key is sent.
        key_header: the header for the key; for `Authorization`, `Bearer ` is put before the key.
        not_found: advice for the message if the server knows no such address or model.
        concurrency: maximum number of connections.
        timeout_s: of one call in seconds, from connecting to the last byte.
        allow_http: send the key to another machine even over http.

    Raises:
        UserError: an address or a name that cannot be right. `check_key` checks whether the variable is set.
    """

    def __init__(
        self,
        base_url: str,
        api_key_env: str | None = None,
        key_header: str = "Authorization",
        not_found: str = "",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        allow_http: bool = False,
    ):
        check_key_name(api_key_env)
        parts = check_url(base_url)
        self.loopback = _is_loopback(parts.hostname)
        if api_key_env and parts.scheme == "http" and not (self.loopback or allow_http):
            raise UserError(
                f"--base_url: expected https for {parts.hostname}, found http, and the key in {api_key_env} would "
                f"travel in the clear. Type --base_url https://{parts.netloc}…, or leave --api_key_env out."
            )
        if concurrency < 1 or not timeout_s > 0:
            raise UserError(
                f"expected at least one connection and a timeout above 0 s, found {concurrency} and {timeout_s}."
            )
        self.base_url, self.scheme, self.host = base_url.strip().rstrip("/"), parts.scheme, parts.netloc
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self.api_key_env, self.key_header, self.not_found = api_key_env, key_header, not_found
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._proxy: str | None = None
        self._connect_s = min(timeout_s, CONNECT_TIMEOUT_S)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_proxy": None}

    def check_key(self) -> None:
        """Raises `UserError` if a key is needed and its environment variable is not set."""
        if self.api_key_env:
            _read_key(self.api_key_env)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        pictures: Sequence[bytes] = (),
        headers: Mapping[str, str] | None = None,
        optional: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Returns the JSON object with which the server answers.

        Args:
            path: appended to the base URL, already percent-encoded.
            body: sent as JSON. Each `PICTURE` in its strings stands for one of the pictures, in their order.
            pictures: encoded pictures, sent as base64.
            headers: sent with this call; never a key.
            optional: names of fields that the server may refuse.

        Raises:
            Transient, Unanswerable, Fatal (`FieldRefused` for an optional field): with a message of one printable line, at most 300 characters, without keys.
        """
        first, *others = json.dumps(body).encode().split(_PICTURE)
        pairs = zip(pictures, others, strict=True)
        data = b"".join(
            (first, *(part for p, after in pairs for part in (binascii.b2a_base64(p, newline=False), after)))
        )
        # Raised here because the frames and exceptions inside hold the headers, which a traceback could show.
        result = await self._exchange(path, data, headers or {}, optional)
        if isinstance(result, CallError):
            raise result
        return result

    async def _exchange(
        self, path: str, data: bytes, headers: Mapping[str, str], optional: Sequence[str]
    ) -> dict[str, Any] | CallError:
        try:
            async with (self._session or self._open()).post(
                URL(self.base_url + path, encoded=True),
                data=data,
                headers={**headers, **self._with_key()},
                allow_redirects=False,
                proxy=self._proxy,
            ) as response:
                cap = MAX_ANSWER_BYTES if response.status == 200 else 2**16
                return self._read(response.status, response.headers, await _body(response, cap), optional)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as found:
            return self._unreachable(found)

    async def aclose(self) -> None:
        """Closes the connections. A later `post` opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        """Opens a session in the running event loop.

        Proxies are looked up here, once. aiohttp's `trust_env` would also read .netrc at every call and send what it holds.
        """
        proxy = None if self.loopback or proxy_bypass(self.host) else getproxies().get(self.scheme)
        if proxy and "://" not in proxy:
            proxy = f"http://{proxy}"
        if proxy and not proxy.startswith(("http://", "https://")):
            found = proxy.partition("://")[0]
            raise UserError(f"expected an http proxy in the environment, found {found}. Type unset {self.scheme}_proxy")
        self._proxy = proxy
        self._session = aiohttp.ClientSession(
            headers=self.headers,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=self._connect_s),
            connector=aiohttp.TCPConnector(limit=self.concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self._session

    def _with_key(self) -> dict[str, str]:
        if not self.api_key_env:
            return {}
        bearer = "Bearer " if self.key_header == "Authorization" else ""
        return {self.key_header: bearer + _read_key(self.api_key_env)}

    def secret(self) -> str | None:
        """The key, which is removed from messages."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else None

    def _read(
        self, status: int, headers: Mapping[str, str], data: bytes | None, optional: Sequence[str]
    ) -> dict[str, Any] | CallError:
        if status != 200:
            return failure(self, status, headers, (data or b"").decode(errors="replace"), optional)
        if data is None:
            return self.bad_answer(f"more than {MAX_ANSWER_BYTES // 2**20} MiB")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            return self.bad_answer(data[:1000].decode(errors="replace"))
        error = answer.get("error")
        if isinstance(error, dict):
            # Routers report a failed upstream server with status 200, and its status in the body.
            code = error.get("code")
            known = isinstance(code, int) and 400 <= code < 600
            return failure(self, code if known else 502, headers, json.dumps(answer), optional)
        return answer

    def bad_answer(self, found: object) -> Transient:
        """The error for an answer of unexpected shape, to be raised."""
        return Transient("bad_answer", redact(f"{self.host}: expected an answer, found {found}", self.secret()))

    def _unreachable(self, found: Exception) -> CallError:
        said = redact(f"{self.host}: {type(found).__name__}: {found}", self.secret())
        if isinstance(found, aiohttp.ServerTimeoutError):  # while connecting: the only other timeout is the total one
            return Transient("connect", f"{self.host}: no connection within {self._connect_s:g} s")
        if isinstance(found, asyncio.TimeoutError):
            return Transient("timeout", f"{self.host}: no answer within {self.timeout_s:g} s")
        if isinstance(found, aiohttp.ClientConnectorCertificateError):
            advice = "If the server is your own, point SSL_CERT_FILE to its authority's certificate."
            return Fatal("server", redact(f"expected a valid TLS certificate. {advice} Found {said}", self.secret()))
        if isinstance(found, aiohttp.ClientConnectorError):
            return Transient("connect", redact(f"{self.host}: {_cause(found.os_error)}", self.secret()))
        lost = isinstance(found, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError))
        kind = "connect" if isinstance(found, aiohttp.ClientHttpProxyError) else "reset" if lost else "bad_answer"
        return Transient(kind, said)


def _cause(error: OSError) -> str:
    """Why there is no connection in the words of the system, e.g. `connection refused`."""
    number = re.search(r"\[Errno (\d+)\] Connect call failed", str(error))
    return (os.strerror(int(number[1])) if number else error.strerror or str(error)).lower()


async def _body(response: aiohttp.ClientResponse, cap: int) -> bytes | None:
    """The body. If it is larger than `cap` bytes, its begin, or None for a good answer; the rest is never read."""
    try:
        data = await response.content.readexactly(cap + 1)
    except asyncio.IncompleteReadError as whole:
        return whole.partial
    response.close()
    return None if response.status == 200 else data


def check_url(url: str) -> SplitResult:
    """Returns the parts of a base URL.

    Raises:
        UserError: not an http(s) address, or more than an address. The message does not repeat it.
    """
    example = "Type an address such as http://localhost:8000/v1."
    try:
        parts = urlsplit(url.strip())
        readable = URL(url.strip()).port is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        readable = False
    if not readable:  # not inside the block above, whose exception may quote the address
        raise UserError(f"--base_url: expected http:// or https:// and a host, found something else. {example}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"--base_url: expected an address alone, found a user, a query or a fragment as well. {example} A key goes "
            "into an environment variable: --api_key_env NAME."
        )
    return parts


def check_key_name(name: str | None) -> None:
    """Raises `UserError` unless `name` is None or a valid variable name. The message never repeats `name`."""
    if name is None:
        return
    # Some keys are valid names: those of Google and Hugging Face, and twenty or more letters and digits.
    like_key = redact(name) != name or re.search(r"(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}", name)
    if like_key or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(
            "--api_key_env: expected the name of an environment variable, found something else (not repeated here, as "
            "it may be the key itself). Type export MY_KEY=… in the shell, and then --api_key_env MY_KEY."
        )


def _read_key(name: str) -> str:
    # No local variable holds the value while an exception is raised.
    if re.fullmatch(r"\s*[!-~]+\s*", os.environ.get(name, "")):
        return os.environ[name].strip()
    found = "one with blanks or accents inside" if os.environ.get(name, "").strip() else "none"
    raise UserError(f"expected a key in the environment variable {name}, found {found}. Type export {name}=…")


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"
