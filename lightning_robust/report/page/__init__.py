"""A page of HTML that shows one run or compares several, and needs nothing but itself."""

from lightning_robust.report.page.page import MARK, render_page, write_page
from lightning_robust.report.page.record import Run, find_runs, is_run, read_run

__all__ = ["MARK", "Run", "find_runs", "is_run", "read_run", "render_page", "write_page"]
