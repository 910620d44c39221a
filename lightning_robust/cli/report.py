"""``lightning-robust report RUN [RUN …]``: one page of one run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

from lightning_robust.errors import UserError

_USAGE = """usage: lightning-robust report RUN [RUN ...] [--out FILE]

Make a page of HTML that shows a run, or compares several; it needs no network and nothing but itself.

  RUN          a run's folder (runs/quickstart/version_0), a file in it, or a folder of runs (runs/quickstart: all)
  --out FILE   the page; by default report.html in the folder of a single run, and in the current one for several

The first run is what the others are compared with. Runs that are not finished are shown as far as they are."""


def report(words: list[str]) -> None:
    """Make the page and say where it is.

    Args:
        words: runs and options.

    Raises:
        UserError: for what is no run, and for options that there are not.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return
    given, out = _parse(words)
    # what draws and fills in takes a second to import
    from lightning_robust.report.page import find_runs, write_page

    runs = find_runs(given)
    path = write_page(runs, out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html")))
    size = path.stat().st_size / 1e6
    print(f"Page: {path} ({len(runs)} run{'s' * (len(runs) > 1)}, {size:.1f} MB)")


def _parse(words: list[str]) -> tuple[list[str], Path | None]:
    given: list[str] = []
    out: Path | None = None
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        name, equals, value = word.partition("=")
        if name == "--out":
            if not equals:
                if index == len(words) or words[index].startswith("--"):
                    raise UserError("--out needs a file, such as --out report.html")
                value = words[index]
                index += 1
            out = Path(value)
        elif word.startswith("-"):
            raise UserError(f"report has no option {name}: it takes folders of runs and --out FILE")
        else:
            given.append(word)
    if not given:
        raise UserError("report needs the folder of a run, such as runs/quickstart/version_0")
    return given, out
