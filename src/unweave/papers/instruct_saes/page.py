"""The recipe's outcome as tables, figures, claims and one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unweave.core.run import Run, atomic_write, write_json
from unweave.papers.claims import Claim, Verdict, markdown
from unweave.papers.instruct_saes import figures
from unweave.papers.instruct_saes.compare import MEASURES, Cell, Contest, Measured, cells, contest
from unweave.papers.instruct_saes.plan import MATCHED_L0, RECIPES, Plan
from unweave.papers.instruct_saes.spec import InstructSaesSpec
from unweave.papers.page import claims_html, document, figure
from unweave.show.pieces import esc, table
from unweave.show.plots import png

_SHOWN = (
    "log2 MSE",
    "log2 MSE, special tokens",
    "log2 MSE without outliers",
    "log2 MSE, special tokens without outliers",
)
_ENOUGH_RATED = 30
"""latents per recipe below which shares of scores are not compared"""


def write(
    folder: Path,
    spec: InstructSaesSpec,
    plan: Plan,
    rows: Sequence[Measured],
    rated: Mapping[str, Run],
    steered: Run,
) -> dict[str, Any]:
    """Writes ``table.md``, ``claims.md``, ``errors.json``, figures and ``report.html``; returns the run's result."""
    k = MATCHED_L0 if any(row.k == MATCHED_L0 for row in rows) else None  # the paper fixes coefficients instead
    found = {measure: cells(rows, measure, k) for measure in MEASURES}
    contests = {
        measure: {other: contest(parts, "FAST", other) for other in RECIPES[:2]} for measure, parts in found.items()
    }
    scores = {name: run.result for name, run in rated.items()}
    claims = _claims(contests, k, scores, steered.result)
    drawn = {
        "errors": figures.errors({measure: found[measure] for measure in _SHOWN}),
        "curves": figures.curves(rows, "log2 MSE without outliers", min(row.seed for row in rows)),
    }
    if scores:
        drawn["ratings"] = figures.ratings(
            {name: _distribution(result["real"]) for name, result in scores.items()},
            {name: _distribution(result["shuffled"]) for name, result in scores.items() if result["shuffled"]},
        )
    pictures = {name: png(figure) for name, figure in drawn.items()}
    for name, picture in pictures.items():
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
    text = _tables(found)
    _write_text(folder / "table.md", text)
    _write_text(folder / "claims.md", markdown(claims))
    write_json(folder / "errors.json", [vars(row) | {"errors": dict(row.errors)} for row in rows])
    _write_text(folder / "report.html", _html(spec, plan, found, claims, pictures, scores, steered))
    return {
        "summary": _summary(contests, scores, rows),
        "claims": [claim.to_dict() for claim in claims],
        "contests": {m: {o: vars(c) for o, c in by.items()} for m, by in contests.items()},
        "report": "report.html",
        "table": "table.md",
    }


def _distribution(scores: Mapping[str, Any]) -> dict[int, int]:
    return {int(score): int(count) for score, count in scores["distribution"].items()}


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# -- claims -----------------------------------------------------------------------------------------------------------


def _verdict(found: Sequence[Contest]) -> Verdict:
    """As claimed: lower in most cells against every other recipe, and nowhere clearly higher."""
    if not all(c.cells for c in found):
        return "not measured"
    if all(c.lower > c.cells / 2 and c.clearly_higher == 0 for c in found):
        return "as claimed"
    return "not as claimed" if all(c.lower <= c.cells / 2 for c in found) else "partly"


def _claims(
    contests: Mapping[str, Mapping[str, Contest]], k: int | None, scores: Mapping[str, Any], steered: Mapping[str, Any]
) -> list[Claim]:
    basis = "at equal coefficients, whatever the L0" if k is None else f"all at L0 {k}"

    def against(measure: str) -> tuple[str, Verdict]:
        found = contests[measure]
        words = "; ".join(f"against {other}: {c.words()}" for other, c in found.items())
        return f"FAST's {measure}, {basis}: {words}", _verdict(list(found.values()))

    claims = [
        Claim(
            "FAST reconstructs all tokens better than both block trainings in most settings (Llama-3.2-3B, layer 20, "
            "Standard, 8x: log2 MSE -0.953 against -0.693 BT(P) and -0.919 BT(F))",
            *against("log2 MSE"),
        ),
        Claim(
            "FAST reconstructs special tokens far better (Qwen2.5-7B, layer 18: Standard 0.647 against 5.199 and "
            "1.509, JumpReLU -9.760 against -4.001 and -8.074)",
            *against("log2 MSE, special tokens"),
        ),
        Claim("(not in the paper) the same without norm outliers", *against("log2 MSE without outliers")),
        Claim(
            "(not in the paper) special tokens without norm outliers",
            *against("log2 MSE, special tokens without outliers"),
        ),
        Claim("(not in the paper) the assistant's own words", *against("log2 MSE, assistant's words")),
    ]
    claims.append(_rating_claim(scores))
    claims.append(
        Claim(
            "steering with latents of special tokens improves answers within a range of coefficients, and degrades "
            "them beyond it",
            # Whether answers get better was not measured, so there is no other verdict.
            str(steered.get("finding", "")),
            "not measured",
        )
    )
    return claims


def _rating_claim(scores: Mapping[str, Any]) -> Claim:
    claim = "more of FAST's latents are rated 4 or 5 (Llama-3.2-3B, 8x: 21.1 % against 7.0 % BT(P) and 10.2 % BT(F))"
    if not scores:
        return Claim(claim, "", "not measured")

    def share(result: Mapping[str, Any]) -> str:
        high = result["real"]["high"]
        return f"{100 * high['value']:.0f} % of {result['real']['scored']}" if high else "none scored"

    judge = next(iter(scores.values()))["judge"]["model"]
    words = ", ".join(f"{name} {share(result)}" for name, result in scores.items())
    controls = ", ".join(
        f"{name} {result['shuffled']['mean']['value']:.1f} against {result['real']['mean']['value']:.1f}"
        for name, result in scores.items()
        if result["shuffled"] and result["shuffled"]["mean"] and result["real"]["mean"]
    )
    said = f"{judge}: {words}. Mean score of shuffled against real contexts: {controls}."
    fewest = min(result["real"]["scored"] for result in scores.values())
    deaf = [name for name, result in scores.items() if not _reads(result)]
    if fewest < _ENOUGH_RATED or deaf:
        why = f"{fewest} latents are too few for a verdict" if fewest < _ENOUGH_RATED else ""
        unread = f"the judge was not shown to tell latents from shuffled contexts ({', '.join(deaf)})" if deaf else ""
        return Claim(claim, f"{said} {'; '.join(part for part in (why, unread) if part)}.", "not measured")
    high = {name: result["real"]["high"]["value"] for name, result in scores.items()}
    best = all(high["FAST"] > high[other] for other in RECIPES[:2])
    return Claim(claim, said, "as claimed" if best else "not as claimed")


def _reads(result: Mapping[str, Any]) -> bool:
    """Whether the judge scored latents above shuffled contexts, more than chance would."""
    above = result["real_above_shuffled"]
    return above is not None and above["p"] is not None and above["p"] < 0.05 and above["value"] > 0


# -- tables -----------------------------------------------------------------------------------------------------------


def _rows_of(found: Sequence[Cell]) -> list[list[str]]:
    """A row per kind and site, the recipes side by side: mean and spread over seeds, and the L0 that was measured."""
    rows = []
    for kind, site in dict.fromkeys((cell.kind, cell.site) for cell in found):
        row = [kind, site]
        for recipe in RECIPES:
            cell = next((c for c in found if (c.recipe, c.kind, c.site) == (recipe, kind, site)), None)
            row.append("-" if cell is None else _cell_words(cell))
        rows.append(row)
    return rows


def _cell_words(cell: Cell) -> str:
    """`-1.234 ± 0.010 (L0 31.9)`: mean, spread over seeds where there are several, and the L0 on these very tokens."""
    mark = "" if cell.comparable else "; not comparable"
    spread = f" ± {cell.spread:.3f}" if len(cell.values) > 1 else ""
    return f"{cell.mean:.3f}{spread} (L0 {sum(cell.own_l0) / len(cell.own_l0):.1f}{mark})"


def _tables(found: Mapping[str, Sequence[Cell]]) -> str:
    parts = []
    for measure, parts_found in found.items():
        head = ["kind", "site", *RECIPES]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in _rows_of(parts_found)]
        parts.append(f"### {measure}\n\n" + "\n".join(lines) + "\n")
    note = (
        "Mean and standard deviation over seeds of log2 of the paper's error; in brackets the active latents per token "
        "on these very tokens. Lower is better. Errors are moved to the same L0 over all tokens along each recipe's "
        "L0-MSE curve; what cannot be moved there is marked, and counts in no comparison.\n\n"
    )
    return note + "\n".join(parts)


def _summary(
    contests: Mapping[str, Mapping[str, Contest]], scores: Mapping[str, Any], rows: Sequence[Measured]
) -> list[list[Any]]:
    found: list[list[Any]] = [["SAEs", len(rows), "all measured on the same held-out conversations"]]
    for measure in _SHOWN:
        for other, c in contests[measure].items():
            found.append([f"FAST against {other}", c.words(), measure])
    for name, result in scores.items():
        mean = result["real"]["mean"]
        found.append(
            [f"rating of {name}", mean["value"] if mean else None, f"mean of 1 to 5, by {result['judge']['model']}"]
        )
    return found


# -- the page ---------------------------------------------------------------------------------------------------------


def _html(
    spec: InstructSaesSpec,
    plan: Plan,
    found: Mapping[str, Sequence[Cell]],
    claims: Sequence[Claim],
    pictures: Mapping[str, bytes],
    scores: Mapping[str, Any],
    steered: Run,
) -> str:
    training = plan.trainings["FAST"]
    model = steered.result.get("model", training.model)
    note = steered.result.get("model_note") or ""
    told = {
        "errors": "Errors by layer. A point is one initialisation, the bar their mean; lower is better. All at the "
        "same number of active latents over all tokens, along each recipe's own curve, unless marked in the tables.",
        "curves": "Errors over the number of active latents, one initialisation, without norm outliers.",
        "ratings": "The judge's scores, and the same judge's scores of contexts shuffled between latents.",
    }
    images = "".join(figure(picture, told[name]) for name, picture in pictures.items())
    shown = "".join(
        f"<h3>{esc(measure)}</h3>"
        + table(["kind", "site", *RECIPES], [[esc(c) for c in row] for row in _rows_of(cells_)])
        for measure, cells_ in found.items()
    )
    names = "".join(
        f"<h3>{esc(name)}</h3>"
        + table(
            ["latent", "score", "the judge's name for it"],
            [[esc(row["latent"]), esc(row["score"] or "-"), esc(row["name"] or "-")] for row in result["latents"]],
        )
        for name, result in scores.items()
    )
    per = f"{training.sae.tokens:,} tokens per SAE, the same for all"
    return document(
        "FAST: SAEs of instruct models",
        "FAST: whole conversations against block training",
        f"{model}{f' ({note})' if note else ''}; {', '.join(training.sites)}; {per}; {spec.scale} scale.",
        {"Claims": claims_html(claims), "Figures": images, "Tables": shown, "Rated latents": names},
    )
