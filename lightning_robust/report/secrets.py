"""Keeps tokens, passwords and keys out of what is shown and shared; they are known by the names of their options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

HIDDEN = "***"
"""Stands where a secret was."""

_ANYWHERE = frozenset(
    (
        *("password", "passwords", "passwd", "passphrase", "pwd", "secret", "secrets"),
        *("credential", "credentials", "apikey", "apikeys", "authorization"),
    )
)
_AT_THE_END = frozenset(("key", "keys", "token", "tokens"))
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s/?#:@\"']*):[^\s/\"']+@", re.IGNORECASE)
_BARE_LOGIN = re.compile(r"\b(https?://)[^\s/?#:@\"']+@", re.IGNORECASE)
_QUERY = re.compile(r"(?<=[?&])([\w.-]+)=([^\s&#\"']+)")


def is_secret(name: str, value: Any = HIDDEN) -> bool:
    """Whether an option's value is to be hidden, going by its name.

    Names are split at dots, underscores, dashes and capitals. ``password``, ``secret``, ``credentials`` and the like
    count wherever they stand, ``key`` and ``token`` where a part of the name ends in them: ``api_key``, and neither
    ``monkey`` nor ``tokens_per_image``. Whatever is below such a part is secret, too. Switches are none, nor are
    numbers of ``tokens`` and ``keys``, which are counts.

    Args:
        name: dotted name.
        value: as it is, or as text.

    Example:
        >>> [name for name in ("data.token", "apiKey", "login.secret_value", "credentials.user") if is_secret(name)]
        ['data.token', 'apiKey', 'login.secret_value', 'credentials.user']
        >>> [name for name in ("monkey", "tokens_per_image", "public_key", "keyboard.rows") if is_secret(name)]
        []
        >>> is_secret("max_tokens", 128), is_secret("tokens", ["a", "b"]), is_secret("use_token", True)
        (False, True, False)
    """
    if value is None or isinstance(value, bool) or str(value).lower() in ("", "true", "false", "null", "[]", "{}"):
        return False
    for part in name.split("."):
        words = [word.lower() for word in _WORD.findall(part)]
        if _ANYWHERE & set(words):
            return True
        if words and words[-1] in _AT_THE_END and "public" not in words:
            count = words[-1].endswith("s") and _is_number(value)
            if not count:
                return True
    return False


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def mask_text(text: str) -> str:
    """A text without what addresses in it give away.

    Example:
        >>> mask_text("from https://me:pass@example.org/a.zip?token=123&size=8")
        'from https://me:***@example.org/a.zip?token=***&size=8'
    """
    text = _BARE_LOGIN.sub(rf"\1{HIDDEN}@", _LOGIN.sub(rf"\1:{HIDDEN}@", text))
    return _QUERY.sub(lambda found: f"{found[1]}={HIDDEN}" if is_secret(found[1], found[2]) else found[0], text)


def mask_value(name: str, value: str) -> str:
    """The text of a setting's value, as it may be shown.

    Example:
        >>> mask_value("data.token", "abc"), mask_value("data.root", "data")
        ('***', 'data')
    """
    return HIDDEN if is_secret(name, value) else mask_text(value)


def mask_settings(settings: Any) -> Any:
    """Nested settings with secrets hidden; a copy, of the same kinds of mappings and lists as YAML has.

    Example:
        >>> mask_settings({"data": {"token": "abc", "root": "data", "parts": [{"key": "k"}, 3]}})
        {'data': {'token': '***', 'root': 'data', 'parts': [{'key': '***'}, 3]}}
    """
    if isinstance(settings, Mapping):
        return {
            name: HIDDEN if is_secret(str(name), value) else mask_settings(value) for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [mask_settings(value) for value in settings]
    return mask_text(settings) if isinstance(settings, str) else settings


def mask_command(words: Sequence[str]) -> list[str]:
    """The words of a command line with secrets hidden, in options and in what they are given as YAML or JSON.

    Example:
        >>> mask_command(["train", "--data.token=abc", "--data.key", "abc", "--model", '{"secret": "abc", "width": 8}'])
        ['train', '--data.token=***', '--data.key', '***', '--model', '{"secret": "***", "width": 8}']
    """
    out: list[str] = []
    name = ""  # of the option before, where it may have its value in this word
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            out.append(f"{name}={_mask_word(_bare(name), value)}" if equals else word)
            name = "" if equals else name
        else:
            out.append(_mask_word(_bare(name), word))
            name = ""
    return out


def _bare(option: str) -> str:
    return option.lstrip("-").rstrip("+")


def _mask_word(name: str, word: str) -> str:
    if is_secret(name, word):
        return HIDDEN
    try:
        settings = yaml.safe_load(word) if ":" in word else None
    except yaml.YAMLError:  # a text that only looks like settings
        settings = None
    if isinstance(settings, Mapping | list):
        masked = mask_settings(settings)
        if masked != settings:
            return json.dumps(masked, default=str, ensure_ascii=False)
    return mask_text(word)
