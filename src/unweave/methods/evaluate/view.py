"""An evaluation as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from unweave.core.result import Row, to_plain
from unweave.inputs.subject import SAEInfo
from unweave.methods.evaluate import figures
from unweave.methods.evaluate.numbers import MEASURES, sentence, shown, value_of
from unweave.methods.evaluate.result import Evaluation
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import esc, table

_TILES = {"unexplained_variance": "unexplained variance", "recovered_vs_mean": "of the loss recovered"}


def rows(result: Evaluation) -> list[Row]:
    """The numbers that matter most, and what fits badly."""
    m = result.metrics
    reasons = {name: next((note for note in m.notes if f"{name} ablation" in note), "") for name in ("mean", "zero")}
    return [
        ("model", result.subject.named_model, ""),
        ("tokens", m.tokens, ", ".join(f"{count:,} left out: {reason}" for reason, count in m.excluded.items())),
        ("unexplained variance", m.unexplained_variance, "0 is perfect, 1 is guessing the mean"),
        ("active latents per token (L0)", m.l0, f"of {result.subject.saes[0].latents:,}"),
        ("alive latents", m.alive_fraction, f"fire somewhere in {m.tokens:,} tokens"),
        ("cosine", m.cosine, "between activation and reconstruction"),
        ("cross-entropy", m.ce_clean, f"{m.ce_sae:.4f} with the SAE in place, {m.predictions:,} predictions"),
        ("recovered", m.recovered_vs_mean, reasons["mean"] or "against mean ablation; 1 is the unedited model"),
        ("... against zero ablation", m.recovered_vs_zero, reasons["zero"] or "an easier comparison"),
        ("KL divergence", m.kl_sae, "of next-token predictions, with the SAE in place"),
        *(("caution", finding, "") for finding in result.drift),
    ]


def section(result: Evaluation, around: Around = ALONE) -> Section:
    """Every number with its meaning, the losses as bars and the density of the latents."""
    sae, m, values = result.subject.saes[0], result.metrics, to_plain(result.metrics)
    losses = (
        "The model's loss with the SAE in place, between the untouched model and one whose activations are replaced "
        "with their average or with zeros. The closer to the first bar, the better."
    )
    never = f"{m.density.never:,} latents never fired." if m.density.never else "Every latent fired."
    density = (
        "How often latents fire, each bar a range of frequencies. A healthy SAE has one broad hill; a heap at the "
        f"right end would be latents that are always on and mean little. {never}"
    )
    drawn = beside(
        figure(figures.cross_entropy_bars(m.ce_clean, m.ce_sae, m.ce_mean, m.ce_zero), losses),
        figure(figures.density(m.density), density),
    )
    body = "".join([_lead(result), drawn, *_measures(values, sae)])
    tiles = tuple(
        Tile(shown(key, values), name, sentence(key, values, sae) or "")
        for key, name in _TILES.items()
        if value_of(values, key) is not None
    )
    heading = f"How faithful it is: {esc(m.site)}"
    return Section("Evaluation", heading, body, tiles=tiles, notes=(*result.subject.notes, *result.drift))


def _lead(result: Evaluation) -> str:
    m = result.metrics
    text = (
        f"Measured on text the SAE was not trained on, {m.tokens:,} tokens of it. Losses are means over "
        f"{m.predictions:,} next tokens."
    )
    if m.excluded:
        counts = ", ".join(f"{esc(name)} {count:,}" for name, count in m.excluded.items())
        text += f" Left out of the variance and left unedited in the model: {counts}."
    return f"<p>{text}</p>" + "".join(f"<p>{esc(note)}</p>" for note in m.notes)


def _measures(values: Mapping[str, object], sae: SAEInfo) -> list[str]:
    tables = []
    for group in dict.fromkeys(measure.group for measure in MEASURES):
        rows = [
            (esc(measure.name), esc(shown(measure.key, values)), esc(sentence(measure.key, values, sae)))
            for measure in MEASURES
            if measure.group == group and value_of(values, measure.key) is not None
        ]
        listed = table(("Measure", "Value", "What it says"), rows, (1,), group)
        tables.append(f'<div class="uw-measures">{listed}</div>')
    return tables
