"""Special tokens: how well an SAE describes them, which latents answer to them, and what adding such a latent does."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.run import Run, atomic_write
from unweave.data.batches import store_batches
from unweave.data.spec import DataSpec
from unweave.data.tokens import TokenStore
from unweave.inputs.identity import sae as sae_digest
from unweave.inputs.inputs import data_of, token_store
from unweave.inputs.saes import open_one
from unweave.lm.chat import Role
from unweave.lm.model import LM
from unweave.methods.special_tokens import view as figures
from unweave.methods.special_tokens.degradation import SweetSpot, sweet_spot
from unweave.methods.special_tokens.errors import GROUPS, TokenErrors, token_errors
from unweave.methods.special_tokens.maxima import AlphaSweep, TokenMaxima, alpha_sweep, average_maxima, random_latents
from unweave.methods.special_tokens.spec import SpecialTokensSpec
from unweave.sae.module import SAE
from unweave.tasks.special_tokens import QUESTIONS, SpecialTokens

VERSION = 2
_TOP = 5


def run(spec: SpecialTokensSpec, runs: Path) -> Run:
    """Errors by role, the special tokens' latents, and answers along alpha; tables and figures in the run directory."""
    with Run.open(runs, "special-tokens", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        opened = open_one(spec)
        lm, sae, record = opened.lm, opened.sae, opened.record
        special = SpecialTokens.of(lm, spec.special_ids or None, spec.where)
        store, rows = _conversations(spec, lm, sae, runs)
        errors = token_errors(lm, {"sae": sae}, store, rows, special=special, batch_tokens=spec.batch_tokens)["sae"]
        sample = store_batches(lm, store, rows[: spec.samples], spec.batch_tokens)
        maxima = average_maxima(lm, sae, sample, special=special, top=_TOP, max_norm=errors.max_norm)
        latent, reason = _latent(spec, lm, maxima)
        swept = alpha_sweep(
            lm,
            sae,
            latent,
            spec.alphas,
            unit=1.0 if spec.unit == "absolute" else errors.median_norm_edited,
            questions=spec.questions or QUESTIONS,
            controls=random_latents(latent, errors.firing_counts, spec.controls, spec.seed),
            max_new_tokens=spec.max_new_tokens,
            seed=spec.seed,
        )
        spots = [_spot(spec, levels) for levels in (swept.levels, swept.control_levels)]
        _tables(run.path, errors, maxima, swept)
        drawn = figures.save(run.path, errors, swept, spots[0], spec.unit)
        result = record | _result(errors, maxima, swept, spots, reason, spec.unit) | {"figures": drawn}
        run.finish(result)
    return run


def _conversations(spec: SpecialTokensSpec, lm: LM, sae: SAE, runs: Path) -> tuple[TokenStore, list[int]]:
    """Held-out text, a document a row, and which rows are conversations.

    An SAE that was trained on blocks is measured on whole conversations too, like every other (FAST, section 4.2).
    """
    data: DataSpec = data_of(sae, spec.data)
    data = replace(data, pack=replace(data.pack, packing="documents"))
    model = spec.model or sae.provenance.get("train", {})["model"]
    store, _ = token_store(lm, model, data, "heldout", spec.tokens, runs)
    said = np.isin(store.roles, [int(Role.USER), int(Role.ASSISTANT)])
    rows = np.flatnonzero(np.logical_or.reduceat(said, store.starts[:-1])).tolist()
    if not rows:
        raise UnweaveError(
            "there are no conversations in this text, so it has no special tokens to speak of",
            remedy="name a source that holds some, e.g. --data.sources chitchat",
        )
    return store, rows


def _latent(spec: SpecialTokensSpec, lm: LM, maxima: Sequence[TokenMaxima]) -> tuple[int, str]:
    """The latent to steer with, and why it."""
    if spec.latent is not None:
        return spec.latent, "named"
    wanted = _opener(lm) if spec.token is None else None
    found = next((m for m in maxima if m.id == wanted or (spec.token is not None and m.text == spec.token)), None)
    if found is None and spec.token is not None:
        raise UnweaveError(
            f"{spec.token!r} is not among the special tokens that occur",
            where="token",
            remedy=f"use one of {', '.join(repr(m.text) for m in maxima)}",
        )
    found = found or maxima[0]
    if not found.top:
        raise UnweaveError(f"no latent fires on {found.text!r}", remedy="choose another --token, or name a --latent")
    latent, value = found.top[0]
    return (
        latent,
        f"largest average maximum on {found.text!r}: {value:.3g} over {found.conversations:,} conversations",
    )


def _opener(lm: LM) -> int | None:
    """The token that opens a turn: the first that the template writes to let the assistant speak."""
    talk = [[{"role": "user", "content": "7"}]]
    closed = lm.chat(talk).ids[0].tolist()
    opened = lm.chat(talk, add_generation_prompt=True).ids[0].tolist()
    return opened[len(closed)] if len(opened) > len(closed) and opened[: len(closed)] == closed else None


def _spot(spec: SpecialTokensSpec, levels: Sequence[Any]) -> SweetSpot | None:
    if not levels:
        return None
    return sweet_spot(
        levels,
        max_distinct_loss=spec.max_distinct_loss,
        max_perplexity_ratio=spec.max_perplexity_ratio,
        min_answers_changed=spec.min_answers_changed,
    )


# -- what is written --------------------------------------------------------------------------------------------------


def _tables(folder: Path, errors: TokenErrors, maxima: Sequence[TokenMaxima], swept: AlphaSweep) -> None:
    """errors.csv, maxima.csv, steering.csv and answers.csv."""
    wholes = {"all": errors.everything, "without outliers": errors.without_outliers}
    _csv(folder / "errors.csv", [{"tokens_of": w, "group": g} | asdict(wholes[w][g]) for w in wholes for g in GROUPS])
    _csv(folder / "maxima.csv", [row for token in maxima for row in _maxima_rows(token)])
    levels = [(swept.latent, swept.levels), ("random", swept.control_levels)]
    _csv(folder / "steering.csv", [{"latent": n} | _flat(asdict(level)) for n, group in levels for level in group])
    _csv(folder / "answers.csv", [asdict(answer) for answer in (*swept.answers, *swept.control_answers)])


def _maxima_rows(token: TokenMaxima) -> list[dict[str, Any]]:
    tops = {"all": (token.conversations, token.top)}
    tops["without outliers"] = (token.conversations_without_outliers, token.top_without_outliers)
    return [
        {
            "id": token.id,
            "text": token.text,
            "tokens_of": which,
            "conversations": n,
            "rank": rank,
            "latent": j,
            "value": v,
        }
        for which, (n, top) in tops.items()
        for rank, (j, v) in enumerate(top, 1)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals as three columns."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        parts = {f"{name}_{k}" if k != "mean" else name: v for k, v in value.items()} if isinstance(value, dict) else {}
        flat |= parts or {name: value}
    return flat


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a table; a column that only some rows have is empty in the others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def _result(
    errors: TokenErrors,
    maxima: Sequence[TokenMaxima],
    swept: AlphaSweep,
    spots: Sequence[SweetSpot | None],
    reason: str,
    unit: str,
) -> dict[str, Any]:
    finding = _finding(errors, swept, spots[0], spots[1], unit)
    names = ("sweet_spot", "control_sweet_spot")
    steering = {name: asdict(value) for name, value in zip(names, spots, strict=True) if value}
    return {
        "summary": _summary(errors, swept, reason),
        "errors": errors.to_dict(),
        "maxima": [asdict(token) for token in maxima],
        "steering": {
            "latent": swept.latent,
            "chosen": reason,
            "controls": list(swept.controls),
            "alpha_unit": f"{unit}: an alpha of 1 moves every position by {swept.unit:.6g}",
            "where": "every position of prompt and answer, the tokens that the SAE's policy excludes among them",
            "levels": [asdict(level) for level in swept.levels],
            "control_levels": [asdict(level) for level in swept.control_levels],
            **steering,
        },
        "answers": [asdict(answer) for answer in swept.answers],
        "control_answers": [asdict(answer) for answer in swept.control_answers],
        "finding": finding,
        "tables": ["errors.csv", "maxima.csv", "steering.csv", "answers.csv"],
    }


def _summary(errors: TokenErrors, swept: AlphaSweep, reason: str) -> list[list[Any]]:
    rows: list[list[Any]] = [
        ["conversations", errors.sequences, f"{errors.everything['all'].tokens:,} tokens"],
        ["median norm", errors.median_norm, f"at {errors.site_read}, where the SAE reads; first tokens: "
         f"{errors.median_norm_first:.4g}"],
        *_written(errors),
        ["norm outliers", errors.outliers, f"tokens longer than {errors.max_norm:.4g}"],
    ]  # fmt: skip
    for group in GROUPS:
        whole, rest = errors.everything[group], errors.without_outliers[group]
        if whole.tokens:
            without = "-" if rest.log2_mse is None else f"{rest.log2_mse:.3f}"
            spread = "-" if rest.unexplained_variance is None else f"{rest.unexplained_variance:.3f}"
            words = f"without outliers {without}, unexplained variance {spread}; {whole.tokens:,} tokens"
            rows.append([f"log2 MSE, {group}", whole.log2_mse, words])
    rows.append(["steered latent", swept.latent, reason])
    for level in swept.levels:
        ratio = level.perplexity_ratio
        words = f"distinct 3-grams {level.distinct.mean:.2f}, perplexity x {ratio.mean:.2f}" if ratio else "no text"
        rows.append([f"alpha {level.alpha:g}: words changed", level.words_changed.mean, words])
    return rows + [["note", "", note] for note in errors.notes]


def _written(errors: TokenErrors) -> list[list[Any]]:
    """A transcoder's other site, which is where a latent is added."""
    if errors.median_norm_write is None:
        return []
    return [["median norm, written", errors.median_norm_write, f"at {errors.site}, where it writes"]]


def _finding(
    errors: TokenErrors, swept: AlphaSweep, spot: SweetSpot | None, control: SweetSpot | None, unit: str
) -> str:
    assert spot is not None
    rule = (
        f"at least {spot.min_answers_changed:.0%} of the answers change, distinct 3-grams fall by at most "
        f"{spot.max_distinct_loss:g} and perplexity rises at most {spot.max_perplexity_ratio:g} times"
    )
    names = {True: "and the intervals of both lie within that too", False: "though not with their whole intervals"}
    if spot.alphas:
        span = f"from alpha {spot.alphas[0]:g} to {spot.alphas[-1]:g} ({unit})"
        words = f"With latent {swept.latent}, {span}, {rule}, {names[spot.certain]}."
    else:
        words = f"With latent {swept.latent} there is no alpha at which {rule}."
    if control is not None:
        other = f"from alpha {control.alphas[0]:g} to {control.alphas[-1]:g}" if control.alphas else "at no alpha"
        words += f" With latents drawn at random, moved by the same lengths, the same holds {other}."
    return f"{words} Whether any answer is better was not measured."
