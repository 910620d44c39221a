"""What opens doors is shown nowhere, and what does not is."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_robust.report.secrets import is_secret, mask_command, mask_settings, mask_text, mask_value

SECRET = "hf_Abc123"


@pytest.mark.parametrize(
    "name",
    [
        "key", "data.token", "hub_token", "api-key", "apiKey", "APIKey", "AWS_SECRET_ACCESS_KEY", "data.password",
        "password_file", "db.passwd", "client_secret", "secret_value", "credentials.user", "data.credential", "apikey",
        "token.value", "trainer.callbacks.Upload#2.token", "tokens", "Authorization",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, SECRET)
    assert mask_value(name, SECRET) == "***"


@pytest.mark.parametrize(
    "name",
    [
        "monkey", "keyboard", "tokens_per_image", "token_size", "tokenizer", "keypoints", "public_key", "hockey.size",
        "broken", "secretary", "model.network", "seed_everything", "trainer.callbacks.TokenMixer.width", "key_size",
    ],
)  # fmt: skip
def test_names_of_other_things(name: str) -> None:
    assert not is_secret(name, SECRET)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("max_tokens", 128, False),
        ("max_tokens", "128", False),
        ("tokens", ["a", "b"], True),
        ("pin_password", 1234, True),
        ("token", "1234", True),
        ("class_token", True, False),
        ("class_token", "true", False),
        ("token", None, False),
        ("token", "", False),
        ("keys", [], False),
    ],
)
def test_switches_counts_and_what_is_not_set_are_no_secrets(name: str, value: Any, secret: bool) -> None:
    assert is_secret(name, value) == secret


@pytest.mark.parametrize(
    ("words", "masked"),
    [
        (["--a.token=x"], ["--a.token=***"]),
        (["--a.token", "x", "--b", "y"], ["--a.token", "***", "--b", "y"]),
        (["--a.token=a=b"], ["--a.token=***"]),
        (["--use_token", "--b", "y"], ["--use_token", "--b", "y"]),
        (["--a.keys+=x"], ["--a.keys+=***"]),
        (["--a", '{"token": "x", "size": 1}'], ["--a", '{"token": "***", "size": 1}']),
        (["--a={b: {c: [{api_key: x}]}}"], ['--a={"b": {"c": [{"api_key": "***"}]}}']),
        (["--a={width: 8}"], ["--a={width: 8}"]),
        (["--monkey", "x", "--tokens_per_image=4"], ["--monkey", "x", "--tokens_per_image=4"]),
        (["--a", "https://me:x@example.org/z"], ["--a", "https://me:***@example.org/z"]),
        (["--a=[{", "token"], ["--a=[{", "token"]),
        (["--a", "b: [c", "--d.secret", "--e"], ["--a", "b: [c", "--d.secret", "--e"]),
    ],
)
def test_commands(words: list[str], masked: list[str]) -> None:
    assert mask_command(["train", *words]) == ["train", *masked]
    assert mask_command(["train", *masked]) == ["train", *masked]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://user:pass@host/x", "https://user:***@host/x"),
        ("postgresql://user:p@ss@host:5432/x", "postgresql://user:***@host:5432/x"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("see http://a:b@c and http://d:e@f", "see http://a:***@c and http://d:***@f"),
        ("https://host:8080/a?token=abc&size=8", "https://host:8080/a?token=***&size=8"),
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("https://host:8080/user@home", "https://host:8080/user@home"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_addresses(text: str, masked: str) -> None:
    assert mask_text(text) == masked


def test_settings_are_copied() -> None:
    settings: dict[str, Any] = {
        "data": {"class_path": "a.Hub", "init_args": {"token": SECRET, "url": f"s3://u:{SECRET}@b", "n": 3}}
    }
    masked = mask_settings(settings)
    assert masked["data"]["init_args"] == {"token": "***", "url": "s3://u:***@b", "n": 3}
    assert settings["data"]["init_args"]["token"] == SECRET
