"""Reports: plain dataclasses in, one self-contained HTML file out; the pieces serve notebooks and the web explorer too.

``render(data)`` makes the page, ``latent_html(entry)`` one latent for a notebook.
"""

from __future__ import annotations

from unweave.report.model import (
    Attribution,
    AttributionRow,
    ContextEntry,
    DensityHistogram,
    LatentEntry,
    ReportData,
    SAESummary,
    Steering,
    TrainingCurve,
)
from unweave.report.page import render
from unweave.report.pieces import latent_html

__all__ = [
    "Attribution",
    "AttributionRow",
    "ContextEntry",
    "DensityHistogram",
    "LatentEntry",
    "ReportData",
    "SAESummary",
    "Steering",
    "TrainingCurve",
    "latent_html",
    "render",
]
