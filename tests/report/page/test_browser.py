"""The page in a real browser, where there is one; and its colours, everywhere."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import lightning_robust.report.page as pages

from .conftest import AUDIT, MakeRun

STYLE = Path(pages.__file__).parent / "templates" / "style.css"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


# -- colours -----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_as_defined() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", range(3), ids=["light", "dark", "print"])
def test_text_can_be_read_by_everybody(theme: int) -> None:
    themes = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(themes) == 3
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", themes[theme]))
    on_paper = ("ink", "quiet", "link", "good", "bad", "unsure")
    pairs = [(text, ground) for ground in ("paper", "soft") for text in on_paper]
    pairs += [("ink", f"{kind}-soft") for kind in ("good", "bad", "unsure")]
    pairs += [(kind, f"{kind}-soft") for kind in ("good", "bad", "unsure")]
    pairs += [(text, "mark") for text in ("ink", "quiet")]
    found = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: value for pair, value in found.items() if value < 4.5} == {}  # WCAG 2.2 AA, normal text


# -- a browser ---------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """What a browser made of a page."""

    dom: str
    console: list[str]
    requests: list[str]

    @property
    def title(self) -> str:
        found = re.search(r"<title>(.*?)</title>", self.dom, re.DOTALL)
        assert found is not None
        return html.unescape(found[1])


@pytest.fixture
def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(NAMES)}): install it to look at the page in a browser")
    return found


def visit(browser: str, page: Path, *options: str) -> Visit:
    log, profile = page.with_suffix(".net.json"), page.with_suffix(".profile")
    result = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
            f"--log-net-log={log}", "--virtual-time-budget=3000", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    # an event a line, in a file that is whole only if the browser had the time
    lines = (line.rstrip(",\n") for line in log.read_text(encoding="utf-8").splitlines() if '"url":' in line)
    events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    asked = [event["params"] for event in events if isinstance(event.get("params"), dict) and "url" in event["params"]]
    # the browser itself asks for things, too: those have no origin
    pages_own = [str(one["url"]) for one in asked if one.get("initiator", "not an origin") != "not an origin"]
    remote = [url for url in pages_own if not url.startswith(("data:", "file:", "about:", "blob:"))]
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return Visit(result.stdout, console, remote)


@pytest.fixture
def page(make_run: MakeRun, tmp_path: Path) -> Path:
    """Two runs compared, with audits: one that both have, and one by name."""
    folders = [make_run("quick/version_0", acc=0.9), make_run("quick/version_1", acc=0.8, objective="TRADES" * 20)]
    for folder, name in ((folders[0], "audit"), (folders[1], "audit"), (folders[1], "audit_defended")):
        (folder / f"{name}.json").write_text(json.dumps(AUDIT))
    return pages.write_page(folders, tmp_path / "page.html")


@pytest.mark.slow
def test_no_error_and_no_request(page: Path, chromium: str) -> None:
    seen = visit(chromium, page, "--dump-dom")
    assert (seen.console, seen.requests) == ([], [])
    assert 'class="scripted"' in seen.dom  # our own script ran


@pytest.mark.slow
def test_another_script_or_request_would_be_stopped_and_seen(page: Path, chromium: str, tmp_path: Path) -> None:
    evil = '<img src="http://127.0.0.1:9/x.png" alt="x"><script>console.error("it ran")</script></body>'
    text = page.read_text(encoding="utf-8").replace("</body>", evil)
    guarded, open_page = tmp_path / "guarded.html", tmp_path / "open.html"
    guarded.write_text(text, encoding="utf-8")
    open_page.write_text(POLICY.sub("", text), encoding="utf-8")
    stopped = visit(chromium, guarded, "--dump-dom")
    assert stopped.requests == []
    assert len(stopped.console) == 2
    assert all("Content Security Policy" in line for line in stopped.console)
    # so that the two tests above can fail at all
    let = visit(chromium, open_page, "--dump-dom")
    assert let.requests == ["http://127.0.0.1:9/x.png"]
    assert "it ran" in let.console[0]


LOOK = """
onload = () => {
  const page = document.getElementById("page").contentDocument;
  const button = page.querySelector("#headline thead th:last-child button");
  const body = page.querySelector("#headline tbody");
  const order = () => Array.from(body.rows).map((row) => row.lastElementChild.dataset.v);
  const told = { before: order() };
  button.focus();
  told.focused = page.activeElement === button;
  button.click(); told.up = order(); told.sort = button.parentElement.getAttribute("aria-sort");
  button.click(); told.down = order();
  const all = page.getElementById("all"), rows = Array.from(all.tBodies[0].rows);
  const shown = () => rows.filter((row) => page.defaultView.getComputedStyle(row).display !== "none").length;
  told.rows = shown();
  page.querySelector(".choice input").click();
  told.apart = shown();
  const root = page.documentElement;
  told.wide = [root.scrollWidth, root.clientWidth];
  document.title = JSON.stringify(told);
};
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_tables_sort_and_nothing_is_wider_than_the_screen(
    width: int, page: Path, chromium: str, tmp_path: Path
) -> None:
    inner = html.escape(POLICY.sub("", page.read_text(encoding="utf-8")))
    frame = f'<iframe id="page" width="{width}" height="800" srcdoc="{inner}"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!DOCTYPE html><title>-</title>{frame}<script>{LOOK}</script>", encoding="utf-8")
    told = json.loads(visit(chromium, outer, "--dump-dom").title)
    assert told["focused"]
    assert told["sort"] == "ascending"
    numbers = sorted(map(float, told["before"]))
    assert [float(value) for value in told["up"]] == numbers
    assert [float(value) for value in told["down"]] == numbers[::-1]
    assert 0 < told["apart"] < told["rows"]
    scroll, client = told["wide"]
    assert scroll <= client


@pytest.mark.slow
@pytest.mark.parametrize("size", ["390,1200", "1280,1200"])
def test_something_is_drawn(size: str, page: Path, chromium: str, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    visit(chromium, page, f"--screenshot={shot}", f"--window-size={size}", "--hide-scrollbars")
    with Image.open(shot) as image:
        assert image.size == tuple(map(int, size.split(",")))
        colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    assert len(colours) > 100


@pytest.mark.slow
def test_a_validator_has_nothing_to_say(page: Path) -> None:
    jar = os.environ.get("VNU_JAR")
    if not jar or not shutil.which("java"):
        pytest.skip("set VNU_JAR to the Nu Html Checker's vnu.jar, and install Java, to validate the page")
    words = ["java", "-jar", jar, "--format", "json", "--exit-zero-always", str(page)]
    told = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stderr)["messages"]
    # its check of the policy knows neither hashes nor data: in it; the browser's own is tested above
    others = [one["message"] for one in told if "Content Security Policy" not in one["message"]]
    assert others == []
