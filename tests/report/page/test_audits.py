"""Audits on the page: explained, with names, and side by side."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_robust.report.page import is_run, read_run, render_page
from lightning_robust.report.page.audit import parse_audit
from lightning_robust.report.page.verdicts import AuditGroup, audit_groups

from .conftest import AUDIT, MakeRun, Page, picture


def audit(**changes: Any) -> dict[str, Any]:
    """One that trusts its model, unless it is told otherwise."""
    told: dict[str, Any] = copy.deepcopy(AUDIT) | {"verdict": "trusted", "robust_accuracy": 0.412, "sentence": "Fine."}
    for check in told["checks"]:
        check["outcome"] = "pass"
    return told | changes


def put(folder: Path, name: str, told: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(told))


def page_of(*folders: Path) -> Page:
    return Page(render_page([read_run(folder) for folder in folders]))


def groups(*folders: Path) -> list[AuditGroup]:
    return audit_groups([read_run(folder) for folder in folders])


def table(page: Page, key: str) -> str:
    found = re.search(rf'<table id="{key}".*?</table>', page.text, re.DOTALL)
    assert found is not None
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", found[0].replace("<wbr>", "")))


def test_the_audit_is_explained(make_run: MakeRun) -> None:
    folder = make_run()
    put(folder, "audit.json", AUDIT)
    page = page_of(folder)
    for words in (
        "Do not trust it: the gradients are masked", "gradient-free attacks beat gradient ones", "0.4 to 2.8 %",
        "95 % confidence interval", "linf, ε = 8/255", "1 flagged, 1 passed, 1 skipped", "Attack with BPDA.",
        "arXiv 1802.00420", "Square fools 40 % more.", "budget quick",
    ):  # fmt: skip
        assert words in page.said
    assert page.said.index("Gradient-free attacks") < page.said.index("More steps")  # what is wrong comes first
    assert "No audit was made" not in page.said
    assert "Not audited" not in page.said
    # and stands open, in the first section
    opened = re.search(r"<details open><summary>(.*?)</summary>", page.text)
    assert opened is not None
    assert opened[1] == "Gradient-free attacks"
    assert page.text.index('id="audit"') < page.text.index('id="results"')


def test_what_nobody_has_audited_is_said_beside_the_numbers(make_run: MakeRun) -> None:
    folder = make_run()
    said = page_of(folder).said
    assert "Not audited: nobody has looked" in said
    assert "lightning-robust audit --ckpt …" in said
    (folder / "results.json").write_text('{"test/acc": 0.5}')
    assert "No attack was run: these numbers say nothing of robustness." in page_of(folder).said


def test_trust_is_said_with_the_number(make_run: MakeRun) -> None:
    folder = make_run()
    put(folder, "audit.json", audit(robust_accuracy=0.0))
    assert "Trust it: 0.0 % robust" in page_of(folder).said


@pytest.mark.parametrize(
    ("eps", "text"), [(8 / 255, "8/255"), (0.3, "0.3"), (0.123456789, "0.123457"), (None, "–"), (1, "1")]
)
def test_a_budget_is_short(eps: float | None, text: str) -> None:
    told = audit(threat_model={"norm": "linf", "eps": eps})
    assert parse_audit(json.dumps(told)).threat_text == f"linf, ε = {text}"


def test_audits_of_one_run_stand_side_by_side_by_name(make_run: MakeRun) -> None:
    folder = make_run()
    put(folder, "audit_shifted.json", AUDIT)
    put(folder, "audit_plain.json", audit())
    page = page_of(folder)
    told = table(page, "audits-1")
    assert "What plain shifted" in told
    assert "Verdict (differs) Trust it Do not trust it: the gradients are masked" in told
    assert "Robust accuracy in the audit (differs) 41.20 % 1.20 % −40.00 points worse" in told
    assert "Gradient-free attacks (differs) passed flagged" in told
    assert "More steps" not in told
    assert "Checks that all have passed: 1 More steps" in page.said
    for name, words in (("plain", "Trust it: 41.2 % robust"), ("shifted", "Do not trust it: the gradients are masked")):
        assert f"{name}: {words}" in page.said
    assert all(f'id="checks-1-{number}"' in page.text for number in (1, 2))


def test_an_upper_bound_is_not_said_to_be_better(make_run: MakeRun) -> None:
    folder = make_run()
    masked = {"verdict": "masked", "robust_accuracy": 0.5, "clean_accuracy": 0.99}
    for name, told in (("a", audit(clean_accuracy=0.9)), ("b", audit(**masked))):
        put(folder, f"audit_{name}.json", told)
    (group,) = groups(folder)
    robust, clean = group.rows()[1:3]
    assert [(cell.difference, cell.way) for cell in robust.cells] == [("", ""), ("+8.80 points", "")]
    assert clean.cells[1].way == "better"
    assert "+8.80 points better" not in table(page_of(folder), "audits-1")
    # nor is another worse than an upper bound; but above one, or below what is trusted, there is no doubt
    for first, second, way in (
        (masked, {}, ""),
        (masked, {"robust_accuracy": 0.7}, "better"),
        ({}, masked | {"robust_accuracy": 0.1}, "worse"),
    ):
        for name, told in (("a", audit(**first)), ("b", audit(**second))):
            put(folder, f"audit_{name}.json", told)
        assert groups(folder)[0].rows()[1].cells[1].way == way


def test_the_order_is_that_of_the_settings(make_run: MakeRun) -> None:
    folder = make_run()
    entries = "".join(f"\n  - class_path: a.Audit\n    init_args: {{name: {name}}}" for name in ("plain", "above"))
    (folder / "config.yaml").write_text(f"trainer:\n  callbacks:{entries}\n")
    for name in ("plain", "above"):
        put(folder, f"audit_{name}.json", audit())
    assert [column.label for column in groups(folder)[0].columns] == ["plain", "above"]


def test_audits_of_several_runs_are_compared_by_name(make_run: MakeRun) -> None:
    folders = [make_run(f"quick/version_{number}") for number in range(3)]
    put(folders[0], "audit.json", audit())
    put(folders[1], "audit.json", audit(threat_model={"norm": "l2", "eps": 0.5}, robust_accuracy=0.6))
    for folder, robust in zip(folders[:2], (0.4, 0.3), strict=True):
        put(folder, "audit_defended.json", audit(robust_accuracy=robust))
    nameless, defended = groups(*folders)
    assert (nameless.name, defended.name) == ("", "defended")
    assert [column.label for column in defended.columns] == ["quick/version_0", "quick/version_1"]
    assert nameless.without == defended.without == ("quick/version_2",)
    page = page_of(*folders)
    assert "−10.00 points worse" in table(page, "audits-2")
    # of another threat model no difference is taken
    assert "points" not in table(page, "audits-1")
    assert "Threat model (differs) linf, ε = 8/255 l2, ε = 0.5" in table(page, "audits-1")
    assert "Audit without a name" in page.said
    assert "Audit defended" in page.said
    assert page.said.count("Without such an audit: quick/version_2.") == 2
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[:4] == [1, 2, 3, 4]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_broken_one_costs_only_itself(make_run: MakeRun) -> None:
    folder = make_run()
    put(folder, "audit.json", audit())
    (folder / "audit_half.json").write_text('{"version": 1, "verd')
    page = page_of(folder)
    assert "audit_half.json is broken and left out: Unterminated string" in page.said
    assert "Trust it: 41.2 % robust" in page.said


def test_of_seeds_every_verdict_is_shown(make_run: MakeRun) -> None:
    members = [make_run(f"quick/group/seed_{seed}", seed=seed) for seed in range(2)]
    for folder, robust in zip(members, (0.4, 0.3), strict=True):
        put(folder, "audit.json", audit(robust_accuracy=robust))
    told = {"version": 1, "seeds": [0, 1], "runs": ["seed_0", "seed_1"], "values": {}}
    put(members[0].parent, "seeds.json", told)
    assert "What seed_0 seed_1" in table(page_of(members[0].parent), "audits-1")


def test_a_folder_with_an_audit_alone_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "audit_net" / "version_0"
    (folder / "tables").mkdir(parents=True)
    assert not is_run(folder)
    put(folder, "audit_a.json", audit())
    (folder / "tables" / "audit_a.csv").write_text("check,seen\nsteps,nothing\n")
    picture(folder / "figures" / "audit_attacks.png")
    assert is_run(folder)
    page = page_of(folder)
    assert "a: Trust it: 41.2 % robust" in page.said
    assert "Nothing that this run should have left behind." in page.said
    assert "What each attack of the audit leaves" in page.said
    assert 'id="tables"' not in page.text  # its rows stand above
