"""Reports: plain dataclasses in, one self-contained HTML file out; the pieces serve notebooks and the web explorer too.

``render(data)`` makes the page, ``latent_html(entry)`` one latent for a notebook.
"""

from __future__ import annotations

from unweave.methods.report.page import render
from unweave.show.model import (
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
from unweave.show.pieces import latent_html

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
