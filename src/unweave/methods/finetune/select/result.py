"""What was selected, of which candidates, and what it does to the untrained model. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unweave.core.result import Result
from unweave.inputs.subject import Subject
from unweave.methods.finetune.attribute.result import Candidate
from unweave.methods.finetune.diagnosis import Diagnosis


@dataclass(frozen=True)
class Weighed:
    """A candidate, what is known of it, and whether it was chosen."""

    candidate: Candidate
    words: str
    """an explanation, labels, or on what it fires and what it promotes; empty where nothing is known"""
    relevance: float | None
    """to the query, from 0 to 1 (cosines from -1); of a label its AUROC on texts held out"""
    chosen: bool
    why: str
    """why it was chosen; empty where it was not"""
    contexts: tuple[str, ...] = ()
    """its strongest contexts, where they were asked for, with brackets around the token that it fires on most"""


@dataclass(frozen=True)
class SelectResult(Result):
    """A selection and its controls, each a file (``latents/selection.py``); ``candidates.jsonl`` beside them has a line
    for every candidate, to be changed by hand and given back with --by annotations."""

    subject: Subject
    attribution: str
    """the run of `unweave finetune attribute`, by name"""
    metric: str
    """what candidates are ranked by"""
    by: str
    query: str
    weighed: tuple[Weighed, ...]
    unknown: int
    """candidates of which nothing is known that could be judged"""
    selection: Path
    controls: tuple[Path, ...]
    annotations: Path
    diagnosis: Diagnosis | None
