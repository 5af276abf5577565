"""A report's run as rows. Its page is ``page.py``."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.report.result import Report
from unweave.show.page import ALONE, Around, Section
from unweave.show.pieces import esc


def rows(result: Report) -> list[Row]:
    """The file, and what is on it."""
    missing = f"not run yet: {', '.join(result.not_run)}" if result.not_run else ""
    return [("runs shown", len(result.runs), missing), ("size", result.megabytes, "MB")]


def section(result: Report, around: Around = ALONE) -> Section:
    """A link to the page."""
    return Section("Report", "Another report", f"<p><code>{esc(result.report)}</code></p>")
