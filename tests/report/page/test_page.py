"""The page of one run, of several, and of runs that are not whole."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from lightning_robust.errors import UserError
from lightning_robust.report.page import MARK, find_runs, read_run, render_page, write_page

from .conftest import AUDIT, EVIL, MakeRun, Page, picture, results


def page_of(*folders: Path) -> Page:
    return Page(render_page([read_run(folder) for folder in folders]))


def test_shows_what_was_run_and_what_came_out(make_run: MakeRun) -> None:
    page = page_of(make_run())
    for words in (
        "Robustness of quick/version_0", "Clean accuracy", "95.00 %", "60.00 %",
        "lightning-robust train --config quickstart",
        "2 × cpu, DDPStrategy", "torch 2.15", "ImageClassifier, digits_cnn", "3 of 3", "32-true",
        "Nothing that this run should have left behind.", "No audit was made",
    ):  # fmt: skip
        assert words in page.said
    headings = ["Results", "What was run", "Training curves", "λ sweeps", "Heatmaps", "Examples", "Further figures"]
    assert [heading for heading in headings if heading not in page.said] == []
    assert "trainer.callbacks.PixelIoU.stride" in page.said


def test_is_a_page_for_everybody(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "audit.json").write_text(json.dumps(AUDIT))
    page = page_of(folder, make_run("quick/version_1", acc=0.9))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("main", "nav", "header", "footer", "h1")] == [1] * 5
    links = [str(attrs["href"]) for attrs in page.all("a")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    labels = [attrs["aria-labelledby"] for attrs in page.all("section")]
    assert set(labels) <= set(ids)
    assert all(attrs.get("scope") for attrs in page.all("th"))
    # whoever has no mouse can scroll a wide table
    regions = [attrs for attrs in page.all("div") if attrs.get("role") == "region"]
    assert len(regions) == len(page.all("table"))
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_asks_nothing_of_any_network_and_runs_no_other_script(make_run: MakeRun) -> None:
    text = render_page([read_run(make_run())])
    page = Page(text)
    sources = [str(value) for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[^\"]*", "", text))
    assert len(page.all("script")) == 1
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    style = re.search(r"<style>(.*)</style>", text, re.DOTALL)
    assert script is not None
    assert style is not None
    policy = next(str(attrs["content"]) for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for kind, found in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_names_are_text_wherever_they_stand(make_run: MakeRun, tmp_path: Path) -> None:
    evil_folder = EVIL.replace("/", "∕")  # the one character that no folder's name has
    folders = [make_run(f"{evil_folder}/version_0", network=EVIL), make_run("quick/version_1")]
    for folder in folders:
        told = results() | {f"test/robust_acc/{EVIL}": 0.5, f"test/{EVIL}": 1.0, EVIL: 2.0}
        (folder / "results.json").write_text(json.dumps(told))
        rows = f'epoch,"{EVIL.replace(chr(34), chr(34) * 2)}",val/acc\n0,0.5,0.5\n1,0.4,0.6\n'
        (folder / "metrics.csv").write_text(rows)
        (folder / "tables" / f"{evil_folder}_test.csv").write_text(f"attack,class\n{EVIL.split(chr(34))[0]},x\n")
        picture(folder / "figures" / f"adversarial_examples_{evil_folder}_test.png")
        audit = json.loads(json.dumps(AUDIT))
        for entry in (audit, *audit["checks"], *audit["attacks"]):
            entry |= {
                key: EVIL
                for key, value in entry.items()
                if isinstance(value, str) and key not in ("verdict", "outcome")
            }
        (folder / "audit.json").write_text(json.dumps(audit))
        (folder / "environment.json").write_text(json.dumps({"command": [EVIL], "status": "failed", "error": EVIL}))
    for shown in (folders[:1], folders):
        text = render_page([read_run(folder) for folder in shown])
        page = Page(text)
        assert len(page.all("script")) == 1
        assert "<script>alert" not in text
        assert page.said.count("<script>alert(1)") > 20
        assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)


def test_compares_runs_and_marks_what_differs(make_run: MakeRun) -> None:
    first, second = make_run("quick/version_0", acc=0.9), make_run("other/version_0", acc=0.8, objective="TRADES")
    page = page_of(first, second)
    assert "2 runs compared" in page.said
    assert "Settings that differ model.objective" in page.said.replace("Setting quick/version_0 other/version_0 ", "")
    rows = re.findall(r"<tr[^>]*>.*?</tr>", page.text)
    accuracy = next(row for row in rows if 'data-v="test/acc"' in row)
    assert 'class="apart"' in accuracy
    assert re.search(r"90\.00 % .*\(best\).*80\.00 %.*worse\">−10\.00 points worse", accuracy)
    loss = next(row for row in rows if 'data-v="test/loss"' in row)
    assert "apart" not in loss
    # a curve for each logged name, with a line for each run
    assert any("quick/version_0 ends at" in str(attrs["alt"]) for attrs in page.all("img"))
    assert any(str(attrs["alt"]).endswith(", other/version_0") for attrs in page.all("img"))


def test_names_tell_runs_apart(make_run: MakeRun) -> None:
    runs = [read_run(make_run(f"{root}/quick/version_0")) for root in ("a", "b")]
    assert "a/quick/version_0" in render_page(runs)
    assert runs[1].name == "b/quick/version_0"


def test_runs_that_differ_in_their_seed_are_averaged(make_run: MakeRun) -> None:
    folders = [make_run(f"quick/version_{seed}", acc=0.9 + seed / 100, seed=seed) for seed in range(3)]
    page = page_of(*folders)
    assert "These runs differ in their seed and in nothing else." in page.said
    assert "91.00 ± 1.00 %" in page.said
    assert "Over the seeds" not in page_of(folders[0], make_run("quick/other", seed=5, lam=0.1)).said


# -- what is not whole -------------------------------------------------------------------------------------------------


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = tmp_path / "quick" / "version_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {class_path: a.ImageClassifier}\ntrainer: {max_epochs: 30}\n")
    (folder / "environment.json").write_text(json.dumps({"status": "running", "stages": ["fit"]}))
    page = page_of(folder)
    assert "There are no results" in page.said
    assert "results.json is missing: nothing was measured to the end." in page.said
    assert "The run was still running when this page was made, or it was killed." in page.said
    assert "0 of 30 epochs are there." in page.said


def test_a_run_that_was_stopped_while_training(make_run: MakeRun) -> None:
    folder = make_run()
    told = yaml.safe_load((folder / "config.yaml").read_text())
    told["trainer"]["max_epochs"] = 10
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    (folder / "results.json").write_text(json.dumps({"val/acc": 0.5, "val/robust_acc/pgd": 0.25}))
    (folder / "environment.json").write_text(json.dumps({"status": "interrupted", "stages": ["fit"]}))
    page = page_of(folder)
    assert "The run was interrupted" in page.said
    assert "3 of 10 epochs are there." in page.said
    assert "There are no test results: the numbers are those of the validation images." in page.said
    assert "25.00 %" in page.said


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("results.json", '{"test/acc": 0.', "results.json is broken and left out"),
        ("results.json", "[1]", "results.json is broken and left out: it holds no names with values"),
        ("config.yaml", "model: [", "config.yaml is broken and left out"),
        ("config.yaml", "just a text", "config.yaml is broken and left out: it holds no settings"),
        ("metrics.csv", "epoch,val/acc\n0,0.5\n1", "metrics.csv is broken and left out: row 2 has not as many"),
        ("environment.json", "", "environment.json is broken and left out"),
        ("audit.json", '{"version": 2}', "audit.json is broken and left out: it is no audit of version 1"),
        ("audit.json", '{"version": 1, "verdict": "<b>"}', "the verdict '<b>' is none of trusted, masked"),
        ("audit.json", '{"version": 1, "verdict": "masked", "checks": ["x"]}', "it does not hold what such a file"),
        ("seeds.json", '{"version": 1, "seeds": [0]}', "seeds.json is broken and left out: it does not hold what"),
        ("results.json", "[" * 100_000, "results.json is broken and left out: it is nested too deeply"),
        ("results.json", '{"a": 1,\n"b" 2}', "results.json is broken and left out: Expecting ':' delimiter in line 2."),
        ("audit.json", '{"version": 1, "verdict": "masked", "confidence_interval": [1]}', "audit.json is broken"),
        ("tables/more_test.csv", "a,b\n1,2,3\n", "tables/more_test.csv is broken and left out: row 1"),
        ("figures/broken_test.png", "no picture", "figures/broken_test.png is broken and left out: it is no picture."),
    ],
)
def test_a_broken_file_costs_only_itself(name: str, content: str, told: str, make_run: MakeRun) -> None:
    folder = make_run()
    (folder / name).write_text(content)
    page = page_of(folder)
    assert told.lower() in page.said.lower()
    assert "Adversarial examples, pgd" in page.said
    if name != "results.json":
        assert "95.00 %" in page.said


def test_bytes_that_are_no_text(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "results.json").write_bytes(b"\xff\xfe\x00")
    assert "results.json is broken and left out: it is no text in UTF-8." in page_of(folder).said


def test_repetitions_are_folders_of_their_group(make_run: MakeRun) -> None:
    folder = make_run()
    told = {"version": 1, "seeds": [0, 1, 2], "runs": [".", "..", "../other"], "values": {}}
    (folder / "seeds.json").write_text(json.dumps(told))
    make_run("quick/other")
    assert page_of(folder).said.count("the folder of this repetition is missing") == 3


def test_a_picture_that_is_cut_off_and_one_that_is_a_folder(make_run: MakeRun) -> None:
    folder = make_run()
    picture(folder / "figures" / "cut_test.png", 200, 200, noise=True)
    whole = (folder / "figures" / "cut_test.png").read_bytes()
    (folder / "figures" / "cut_test.png").write_bytes(whole[: len(whole) // 2])
    (folder / "figures" / "folder_test.png").mkdir()
    page = page_of(folder)
    assert "figures/cut_test.png is broken and left out: image file is truncated" in page.said
    assert "figures/folder_test.png is broken and left out: Is a directory." in page.said
    assert "Left out to keep the page small" not in page.said
    assert "object at 0x" not in page.text


def test_what_no_page_may_hold_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "results.json").write_text('{"test/a\\u0000b": 0.5, "test/\\ud800": 1, "test/\\u001b[1m": 2}')
    latin = folder.with_name(os.fsdecode(b"r\xe9sum\xe9"))  # the name of a folder is bytes, and no text
    folder.rename(latin)
    text = write_page([latin], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "r\ufffdsum\ufffd" in text
    assert "a\ufffdb" in text
    assert not set(text) & {chr(code) for code in range(32) if code not in (9, 10, 13)}


def test_not_a_number_is_a_dash(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "results.json").write_text('{"test/acc": null, "test/loss": 1e999}')
    page = page_of(folder, make_run("quick/version_1"))
    assert "–" in page.said
    assert "nan" not in page.said


# -- size --------------------------------------------------------------------------------------------------------------


def test_large_pictures_shrink_and_the_least_important_go(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    for number in range(6):
        picture(folder / "figures" / f"more_{number}_test.png", 1600, 1200, noise=True)
    for epoch in range(0, 50, 5):
        picture(folder / "figures" / f"input_gradient_val_epoch{epoch:03d}.png")
    path = write_page([folder], tmp_path / "page.html", budget=600_000)
    assert path.stat().st_size <= 600_000
    page = Page(path.read_text())
    assert "the page would grow too large; figures/more_5_test.png" in page.said
    assert all(int(str(attrs.get("width", 0))) <= 1400 for attrs in page.all("img"))
    shown = re.findall(r"epoch (\d+)\)", " ".join(str(attrs["alt"]) for attrs in page.all("img")))
    assert [int(epoch) for epoch in shown] == [0, 15, 30, 45]
    assert page.said.count("other epochs of it are shown") == 6
    whole = write_page([folder], tmp_path / "page.html")
    assert whole.stat().st_size < 5_000_000
    assert "would grow too large" not in whole.read_text()


def test_long_tables_are_cut_and_that_is_said(make_run: MakeRun) -> None:
    folder = make_run()
    rows = "\n".join(f"{number},0.5" for number in range(400))
    (folder / "tables" / "long_test.csv").write_text(f"index,value\n{rows}\n")
    page = page_of(folder)
    assert "100 further rows of tables/long_test.csv" in page.said
    assert "300 rows" in page.said


# -- files -------------------------------------------------------------------------------------------------------------


def test_no_file_of_somebody_else_is_written_over(make_run: MakeRun, tmp_path: Path) -> None:
    folder, out = make_run(), tmp_path / "index.html"
    out.write_text("<p>mine")
    with pytest.raises(UserError, match=r"index\.html exists and is no page of this program.*--out"):
        write_page([folder], out)
    assert out.read_text() == "<p>mine"
    out.unlink()
    for _ in range(2):
        assert MARK in write_page([folder], out).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "quick"]
    with pytest.raises(UserError, match="is a folder"):
        write_page([folder], tmp_path)


def test_runs_are_found_from_files_and_folders(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run(f"quick/version_{number}") for number in (0, 2, 10)]
    (tmp_path / "quick" / "notes").mkdir()
    (folders[0] / "checkpoints").mkdir()
    (folders[0] / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert find_runs([tmp_path / "quick"]) == folders
    assert find_runs([tmp_path]) == folders
    assert find_runs([folders[0] / "results.json", folders[0] / "checkpoints" / "last.ckpt", folders[0]]) == folders[:1]
    with pytest.raises(UserError, match="there is no folder"):
        find_runs([tmp_path / "absent"])
    with pytest.raises(UserError, match="is no run's folder and holds none"):
        find_runs([tmp_path / "quick" / "notes"])
    stray = tmp_path / "stray" / "below" / "notes.txt"
    stray.parent.mkdir(parents=True)
    stray.write_text("no run")
    with pytest.raises(UserError, match="is no run's folder and holds none"):
        find_runs([stray])
