"""Redaction: secrets and personal data in texts are replaced by their kind, as `[EMAIL]`.

What a telephone number, an IBAN and a card number is, `phonenumbers` and `python-stdnum` know.
Nothing here uses the network. It finds what has a form; names and addresses have none.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import phonenumbers
from stdnum import iban, luhn

from serve_app.body_shape import shape_of
from serve_app.config import Bodies
from serve_app.records import RequestRecord

# Each a form of its own, with what one of its finds holds in lower case: looking for that costs
# a tenth. What an earlier one finds is replaced for the later ones. All are linear in the text.
_FORMS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("private key",),
        r"-----BEGIN (?P<a>[A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?)-----"
        r"[\s\S]{0,20000}?(?:-----END (?P=a)-----|\Z)",
        "[PRIVATE KEY]",
    ),
    (("eyj", "eyi"), r"\bey[JI][\w-]{8,}\.ey[\w-]{4,}(?:\.[\w-]*)?", "[JWT]"),
    (("bearer", "basic"), r"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{8,}", r"\1\2[TOKEN]"),
    (("cai-",), r"\bcai-[0-9A-Za-z]{12}-[0-9A-Za-z]{20,}", "[API KEY]"),
    (
        ("sk-", "pk-", "rk-", "sk_", "pk_", "rk_"),
        r"\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{2,12}[-_]){0,3}[\w-]{16,}",
        "[API KEY]",
    ),
    (
        ("a3t", "abia", "acca", "agpa", "aida", "akia", "aroa", "asia"),
        r"\b(?:A3T[A-Z0-9]|ABIA|ACCA|AGPA|AIDA|AKIA|AROA|ASIA)[A-Z0-9]{16}\b",
        "[AWS KEY]",
    ),
    (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "gl"),
        r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bgl[a-z]{2,6}-[\w-]{20,}",
        "[API KEY]",
    ),
    (
        ("xox", "aiza", "hf_", "npm_"),
        r"\bxox[a-z]-[\w-]{10,}|\bAIza[\w-]{30,}|\bhf_[A-Za-z0-9]{30,}|\bnpm_\w{30,}",
        "[API KEY]",
    ),
    (
        ("://",),
        r"(\b[a-z][a-z0-9+.-]{1,20}://)[^\s/:@]{1,100}:[^\s/@]{1,200}@",
        r"\1[CREDENTIALS]@",
    ),
    (
        ("pass", "secret", "key", "token"),
        r"(?i)((?:passw(?:or)?d|passphrase|secret(?:[_-]?access)?(?:[_-]?key)?|api[_-]?key|"
        r"(?:access|auth|refresh)[_-]?token)[\"']?\s{0,5}[:=]\s{0,5}[\"']?)[^\s\"',;\[]{6,}",
        r"\1[SECRET]",
    ),
    (
        ("@",),
        r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{1,62}",
        "[EMAIL]",
    ),
)
_IBAN = re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_DIGITS = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,}(?!\d)")
_IP = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)|"
    r"(?<![\w.:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}(?![\w:])"
)
_MAY_BE_PHONE = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")
_DATA = re.compile(r"data:[\w/+.;=-]{1,200},|[A-Za-z0-9+/_-]{1000,}={0,2}\Z")
_TOKENS_AT = frozenset({"prompt", "input", "tokens"})
_LEAST_DIGITS = 10**7

# What a text that is not as it should be may raise in the libraries. Such a body is not kept.
_FAILURES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


class Redactor:
    """Redacts texts. Threads may share it.

    Args:
        regions: whose national telephone numbers are found, as ISO 3166 codes; international
            ones, which begin with `+`, are found anyway.
    """

    def __init__(self, regions: tuple[str, ...] = ("US", "DE")) -> None:
        # A region of None is for international numbers.
        self._regions: tuple[str | None, ...] = regions or (None,)
        self._forms = [(needles, re.compile(form), kind) for needles, form, kind in _FORMS]

    def text(self, text: str) -> str:
        """Return `text` with what was found replaced by its kind."""
        lower = text.lower()
        for needles, form, kind in self._forms:
            if any(needle in lower for needle in needles):
                text = form.sub(kind, text)
        text = _IBAN.sub(_without_iban, text)
        text = _DIGITS.sub(_without_card, text)
        text = self._without_phones(text)
        return _IP.sub(_without_ip, text)

    def json(self, value: Any, name: str = "") -> Any:
        """Return a value of JSON with every text in it redacted, be it a name of a field."""
        if isinstance(value, str):
            return "[DATA]" if _DATA.match(value) else self.text(value)
        if isinstance(value, dict):
            return {self.text(field): self.json(inner, field) for field, inner in value.items()}
        if isinstance(value, list):
            if name in _TOKENS_AT and any(type(inner) is int for inner in value):
                return "[TOKENS]"  # of which the text can be made again
            return [self.json(inner, name) for inner in value]
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LEAST_DIGITS:
            told = self.text(str(value))
            return value if told == str(value) else told
        return value

    def body(self, text: str) -> str:
        """Return a request's body redacted. Raises ValueError where it is no JSON."""
        return orjson.dumps(self.json(orjson.loads(text))).decode()

    def _without_phones(self, text: str) -> str:
        if _MAY_BE_PHONE.search(text) is None:
            return text
        for region in self._regions:
            for found in reversed(list(phonenumbers.PhoneNumberMatcher(text, region))):
                text = f"{text[: found.start]}[PHONE]{text[found.end :]}"
        return text


def redact(
    redactor: Redactor, records: list[RequestRecord]
) -> tuple[list[RequestRecord], list[RequestRecord]]:
    """Return `records` with those texts redacted of which the policy says so.

    The second list holds those that could not be: of them the shape alone is kept.
    """
    done: list[RequestRecord] = []
    failed: list[RequestRecord] = []
    for record in records:
        if record.bodies != Bodies.REDACTED or not record.has_texts:
            done.append(record)
            continue
        try:
            done.append(_redacted(redactor, record))
        except _FAILURES:
            done.append(_bare(record))
            failed.append(record)
    return done, failed


def _redacted(redactor: Redactor, record: RequestRecord) -> RequestRecord:
    request, response = record.request_body, record.response_text
    return replace(
        record,
        request_body=None if request is None else redactor.body(request),
        response_text=None if response is None else _answer(redactor, response),
    )


def _answer(redactor: Redactor, text: str) -> str:
    # Scores are JSON, and so are the calls of tools, which stand behind a text.
    start = text.find('[{"')
    if start < 0:
        return redactor.text(text)
    try:
        return redactor.text(text[:start]) + redactor.body(text[start:])
    except orjson.JSONDecodeError:
        # Cut off: with its escapes taken away, so that none hides the beginning of anything.
        return redactor.text(re.sub(r'\\[nrt"]', " ", text))


def _bare(record: RequestRecord) -> RequestRecord:
    try:
        body = orjson.loads(record.request_body or "")
    except orjson.JSONDecodeError:
        body = None
    shape = shape_of(body) if isinstance(body, dict) else None
    return replace(record, bodies=Bodies.METADATA, request_body=shape, response_text=None)


def _without_iban(match: re.Match[str]) -> str:
    # What follows may look like more of it.
    whole = match[0]
    for end in range(len(whole), 14, -1):
        if whole[end - 1].isalnum() and iban.is_valid(whole[:end]):
            return "[IBAN]" + whole[end:]
    return whole


def _without_card(match: re.Match[str]) -> str:
    # Other numbers may stand before and behind it.
    whole = match[0]
    for start, end in _stretches(whole):
        digits = re.sub(r"\D", "", whole[start:end])
        if 13 <= len(digits) <= 19 and luhn.is_valid(digits):
            return f"{whole[:start]}[CARD]{whole[end:]}"
    return whole


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of groups of digits that stand side by side, the longest first."""
    groups = [match.span() for match in re.finditer(r"\d+", text)]
    for count in range(len(groups), 0, -1):
        for first in range(len(groups) - count + 1):
            yield groups[first][0], groups[first + count - 1][1]


def _without_ip(match: re.Match[str]) -> str:
    try:
        ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    return "[IP]" if any(digit in match[0] for digit in "0123456789") else match[0]
