"""No page shows a secret."""

from __future__ import annotations

import json

import yaml

from lightning_robust.report.page import read_run, render_page

from .conftest import MakeRun, Page

SECRET = "hf_Abc123"


def test_no_page_shows_one(make_run: MakeRun) -> None:
    folders = [make_run(f"quick/version_{number}") for number in range(2)]
    for number, folder in enumerate(folders):
        told = yaml.safe_load((folder / "config.yaml").read_text())
        told["data"]["init_args"] |= {
            "hub_token": f"{SECRET}{number}",
            "url": f"https://me:{SECRET}@example.org",
            "login": {"credentials": {"user": SECRET}},
            "tokens_per_image": 49,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(told))
        # as an earlier version wrote it
        command = ["lightning-robust", "train", "--data.hub_token", SECRET]
        (folder / "environment.json").write_text(json.dumps({"command": command, "status": "finished"}))
    for shown in (folders[:1], folders):
        text = render_page([read_run(folder) for folder in shown])
        said = Page(text).said
        assert SECRET not in text
        assert "https://me:***@example.org" in said
        assert "tokens_per_image 49" in said
        assert "--data.hub_token '***'" in said
    # that they differ is no secret
    assert "data.hub_token *** ***" in said
    assert "data.login.credentials.user ***" in said
