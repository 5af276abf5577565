"""SHIFT as a stage: biographies, SAEs and a judge opened, the table and its figure written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveWarning
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.inputs.identity import texts_of
from unweave.inputs.saes import open_saes
from unweave.judge.base import check_judge
from unweave.methods.shift import biographies, view
from unweave.methods.shift.judge import judge_of
from unweave.methods.shift.result import ShiftResult
from unweave.methods.shift.shift import shift
from unweave.methods.shift.spec import CircuitShiftSpec


def _also(spec: CircuitShiftSpec, _handle: Any) -> Mapping[str, str]:
    """The text that latents are judged by, where none is named."""
    return texts_of(spec, spec.data) if spec.judge != "file" else {}


@stage("circuit-shift", version=6, also=_also)
def run(spec: CircuitShiftSpec, ctx: Context) -> ShiftResult:
    """Every method of Table 2 on every seed; ``table.md``, a figure, and every seed's circuits. Warns where the task is
    too easy."""
    if spec.judge == "chat":
        check_judge(spec.chat)
    opened = open_saes(spec)
    people = biographies.sets(spec.biographies, pool=spec.pool, test=spec.test, seed=spec.seed)
    _write(ctx.path / "biographies.jsonl", people)
    judge = judge_of(spec, opened, ctx.runs)
    result = shift(opened.lm, opened.saes, people, judge, spec, pieces=ctx.pieces, folder=ctx.path)
    result = replace(result, subject=opened.subject)
    view.save(ctx.path, result)
    for warning in view.warnings(result):
        warnings.warn(warning, UnweaveWarning, stacklevel=2)
    return result


def _write(path: Path, people: biographies.Sets) -> None:
    train = [person for group in biographies.GROUPS for person in people.train[group]]
    parts = {"train": train, "test": people.test}
    lines = [asdict(person) | {"split": split} for split, part in parts.items() for person in part]
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
