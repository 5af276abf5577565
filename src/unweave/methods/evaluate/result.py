"""The result of an evaluation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.result import Result
from unweave.inputs.subject import Subject
from unweave.sae.measure.result import Metrics


@dataclass(frozen=True)
class Evaluation(Result):
    """An SAE measured on held-out text."""

    subject: Subject
    metrics: Metrics
    drift: tuple[str, ...]
    """where the SAE does something else here than where it was made, in sentences"""
