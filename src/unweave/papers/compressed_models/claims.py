"""What the paper claims, beside what came out here. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from unweave.core.intervals import Interval, interval
from unweave.methods.compress.transfer.result import ORIGINAL, RETRAINED, Cell, Transfer, pruned
from unweave.methods.compress.transfer.view import damage_words
from unweave.methods.saebench.result import Measure
from unweave.papers.claims import Claim, Verdict
from unweave.papers.compressed_models.result import CompressedModels, Study
from unweave.show.pieces import bounded

FORMS = (ORIGINAL, pruned(0.25), pruned(0.5), RETRAINED)
POINTS = {"attn_heads": "attention", "mlp_add": "MLP", "resid_post": "residual stream"}
_TABLE_1 = {"attn_heads": ("0.802, 0.793, 0.727, 0.859", "0.893, 0.891, 0.855, 0.930"),
            "mlp_add": ("0.631, 0.633, 0.539, 0.750", "0.787, 0.789, 0.730, 0.867"),
            "resid_post": ("0.867, 0.867, 0.828, 0.883", "0.918, 0.918, 0.898, 0.938")}  # fmt: skip
"""explained variance and cosine: pretrained, pruned by a quarter, by half, trained anew"""
_DROP, _SLIGHT, _STRONG = 0.05, 1.25, 0.9
_TASKS = (
    ("absorption", "mean_absorption_fraction_score", "Figure 2 and Tables 4, 5",
     "pruned SAEs absorb hardly less than the pretrained one; MLP 0.345, 0.238, 0.208, trained anew 0.409"),
    ("scr", "scr_metric_threshold_20", "Figure 3 and Tables 9, 10",
     "pretrained and pruned by a quarter have the highest SCR: residual stream, 20 latents 0.304, 0.306, 0.269, 0.076"),
    ("tpp", "tpp_threshold_20_total_metric", "Figure 4 and Tables 11, 12",
     "pretrained and pruned by a quarter have the highest TPP: residual stream, 20 latents 0.046, 0.047, 0.041, 0.028"),
    ("ravel", "disentanglement_score", "Tables 2, 3 and 13",
     "they disentangle better than the one trained anew at the MLP (0.545 to 0.834 against 0.195 to 0.543), about as "
     "well at the residual stream"),
    ("sparse_probing", "sae_top_1_test_accuracy", "appendix A.7",
     "probes on one latent: residual stream 0.768, 0.768, 0.762, 0.748, MLP 0.661, 0.712, 0.703, 0.712"),
)  # fmt: skip


def values(study: Study, form: str, of: Callable[[Cell], float], point: str = "") -> list[float]:
    """A number of a form of every SAE (of one kind of site) in the compressed model, in a fixed order."""
    cells = (group.transfer.of(site, form, "compressed") for group in study.groups for site in group.transfer.sites
             if point in ("", site.point))  # fmt: skip
    return [of(cell) for cell in cells if cell is not None]


def explained(cell: Cell) -> float:
    return cell.metrics.explained_variance


def loss(cell: Cell) -> float:
    """What the SAE adds to the model's loss."""
    return cell.metrics.ce_sae - cell.metrics.ce_clean


def difference(study: Study, one: str, other: str, of: Callable[[Cell], float], point: str = "") -> Interval | None:
    """One form less another, SAE by SAE."""
    pairs = zip(values(study, one, of, point), values(study, other, of, point), strict=False)
    return interval([a - b for a, b in pairs])


def claims(result: CompressedModels) -> list[Claim]:
    """Every claim, figure and table of the paper with our figure and a verdict, for each model."""
    rows = []
    for study in result.studies:
        name = "" if len(result.studies) == 1 else f"{study.name}: "
        own = [
            *_transfer(study),
            *_table_1(study),
            *_sweep(study),
            *_bench(study),
            *_compression(study),
            *_latents(study),
        ]
        rows += [Claim(claim.claim, name + claim.ours, claim.verdict) for claim in own]
    measured = {study.name for study in result.studies}
    return [*rows, Claim(
        "it holds for GPT-2 small (all layers, Figures 1 and 5 to 7) and Gemma-2-2B (layer 12, the other tables)",
        f"measured here: {', '.join(sorted(measured))}; `--scale paper` has these models",
        "not measured" if result.scale == "smoke" else "partly",
    )]  # fmt: skip


def _mean(study: Study, of: Callable[[Cell], float], point: str = "") -> str:
    """The mean of each form over SAEs."""
    own = {form: values(study, form, of, point) for form in FORMS}
    return ", ".join(f"{form} {np.mean(some):.3f}" for form, some in own.items() if some)


def _transfer(study: Study) -> Iterator[Claim]:
    less, cheaper = (difference(study, ORIGINAL, RETRAINED, of) for of in (explained, loss))
    pruned_less, pruned_loss = (difference(study, FORMS[1], RETRAINED, of) for of in (explained, loss))
    yield Claim(
        "SAEs of the original model interpret the compressed one, slightly worse than SAEs trained on it (abstract)",
        f"explained variance in the compressed model: {_mean(study, explained)}; original less retrained "
        f"{bounded(less, 3)}, and in the loss that the SAE adds {bounded(cheaper, 3)} nats",
        "not measured" if less is None else
        "as claimed" if -0.1 <= less.value <= 0.02 else "partly" if less.value > 0.02 else "not as claimed",
    )  # fmt: skip
    yield Claim(
        "pruning the original SAE by a quarter does as well as training a new one, and saves the training (hypothesis)",
        f"pruned by a quarter less retrained: explained variance {bounded(pruned_less, 3)}, added loss "
        f"{bounded(pruned_loss, 3)} nats",
        _close(pruned_less, 0.05),
    )
    sparse = {form: np.mean(values(study, form, lambda cell: cell.metrics.l0) or [np.nan]) for form in FORMS}
    yield Claim(
        "the SAEs trained anew have an L0 of 2,835 to 4,658, the others about 90 (Tables 6 to 8)",
        "L0 here: " + ", ".join(f"{form} {value:.0f}" for form, value in sparse.items()) + "; they are trained to be "
        "as sparse as the original ones, else the comparison says little",
        "not measured",
    )  # fmt: skip


def _close(difference: Interval | None, near: float) -> Verdict:
    """Whether one is no worse than another by more than ``near``."""
    if difference is None:
        return "not measured"
    if difference.value >= -near:
        return "as claimed"
    return "partly" if difference.high is not None and difference.high > -near else "not as claimed"


def _table_1(study: Study) -> Iterator[Claim]:
    for point, name in POINTS.items():
        own, less = values(study, ORIGINAL, explained, point), values(study, FORMS[1], explained, point)
        drop = float(np.mean([(a - b) / a for a, b in zip(own, less, strict=True)])) if own and less else None
        variance, cosine = _TABLE_1[point]
        yield Claim(
            f"{name}: pruning by a quarter costs 2 to 5 % (Tables 1 and 6 to 8; explained variance of pretrained, "
            f"pruned by 25 and 50 %, trained anew: {variance}; cosine: {cosine})",
            f"explained variance: {_mean(study, explained, point)}; cosine: "
            f"{_mean(study, lambda cell: cell.metrics.cosine, point)}; KL: "
            f"{_mean(study, lambda cell: cell.metrics.kl_sae, point)}; added loss: {_mean(study, loss, point)}"
            if drop is not None else "",
            "not measured" if drop is None else "as claimed" if drop <= _DROP else "not as claimed",
        )  # fmt: skip


def _rise(study: Study, share: float, point: str) -> float | None:
    """By which factor pruning raises what an SAE leaves unexplained: the mean over SAEs."""

    def unexplained(cell: Cell) -> float:
        return cell.metrics.unexplained_variance

    own, less = values(study, ORIGINAL, unexplained, point), values(study, pruned(share), unexplained, point)
    return float(np.mean([b / a for a, b in zip(own, less, strict=True)])) if own and less else None


def _sweep(study: Study) -> Iterator[Claim]:
    shares = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    rises = {
        point: {share: rise for share in shares if (rise := _rise(study, share, point)) is not None} for point in POINTS
    }
    ours = "; ".join(
        f"{POINTS[point]} " + ", ".join(f"{100 * share:g} %: {rise:.2f}" for share, rise in of.items())
        for point, of in rises.items() if of
    )  # fmt: skip
    at_90 = [of[0.9] for point, of in rises.items() if point != "attn_heads" and 0.9 in of]
    yield Claim(
        "pruning SAEs by up to 90 % (attention 85 %) raises the reconstruction loss only slightly (Figure 1)",
        f"what is left unexplained, in multiples of the original SAE's: {ours}; figures by layer are below",
        "not measured" if not at_90 else "as claimed" if max(at_90) <= _SLIGHT else "not as claimed",
    )
    half = {point: of[0.5] for point, of in rises.items() if 0.5 in of}
    yield Claim(
        "pruned SAEs work better for MLP and attention than for the residual stream (section 4.1)",
        "at half: " + ", ".join(f"{POINTS[point]} {rise:.2f}" for point, rise in half.items()),
        "not measured" if len(half) < 3 else
        "as claimed" if max(half["mlp_add"], half["attn_heads"]) < half["resid_post"] else
        "partly" if min(half["mlp_add"], half["attn_heads"]) < half["resid_post"] else "not as claimed",
    )  # fmt: skip
    own, last = values(study, ORIGINAL, explained), values(study, pruned(0.99), explained)
    strong = sum(b >= _STRONG * a for a, b in zip(own, last, strict=False))
    yield Claim(
        "even at 99 % certain layers keep strong performance (appendix A.1, Figures 5 to 7)",
        f"{strong} of {len(last)} SAEs keep {100 * _STRONG:.0f} % of their explained variance at 99 %",
        "not measured" if not last else "as claimed" if strong else "not as claimed",
    )


def _bench(study: Study) -> Iterator[Claim]:
    for task, key, where, claim in _TASKS:
        told, alike = [], []
        for bench in study.benches:
            own: dict[str, Measure] = {
                bench.forms[one.sae]: measure
                for one in bench.scores.scores if one.task == task for measure in one.measures if measure.key == key
            }  # fmt: skip
            if own:
                told.append(f"{bench.site}: " + ", ".join(
                    f"{form} {bounded(Interval(own[form].value, own[form].low, own[form].high), 3)}"
                    for form in FORMS if form in own
                ))  # fmt: skip
            if ORIGINAL in own and FORMS[1] in own:  # alike: these seeds cannot tell the pruned SAE from the original
                alike.append(abs(own[FORMS[1]].value - own[ORIGINAL].value) <= own[ORIGINAL].smallest)
        yield Claim(
            f"{claim} ({where})", f"{key} {'; '.join(told)}" if told else "",
            "not measured" if not alike else
            "as claimed" if all(alike) else "partly" if any(alike) else "not as claimed",
        )  # fmt: skip


def _compression(study: Study) -> Iterator[Claim]:
    first: Transfer = study.groups[0].transfer
    after = {one.words: one.loss.after for one in first.compressions}
    wanda, magnitude, gpt = (
        next((after[words] for words in after if words.startswith(f"pruned by {name}") and "50 %" in words), None)
        for name in ("wanda", "magnitude", "sparsegpt")
    )  # fmt: skip
    lost = "; ".join(f"{one.words}: {damage_words(one.loss)}" for one in first.compressions)
    yield Claim(
        "WANDA at half keeps the model working, better than magnitude and about as well as SparseGPT (section 2.2)",
        lost,
        "not measured" if wanda is None or magnitude is None or gpt is None else
        "not as claimed" if wanda >= magnitude else "as claimed" if wanda <= gpt + 0.1 else "partly",
    )  # fmt: skip
    kept = "; ".join(
        f"{one.words}: latents' mean r {_over(site.survival.every.mean for site in one.sites):.3f}, explained variance "
        f"{np.mean([1 - site.unexplained_variance for site in one.sites]):.3f}"
        for one in first.compressions
    )  # fmt: skip
    yield Claim("(future work) quantised and low-rank models", f"the original SAEs there: {kept}", "not measured")


def _over(means: object) -> float:
    return float(np.mean([one.value for one in means if one is not None]))  # type: ignore[attr-defined]


def _latents(study: Study) -> Iterator[Claim]:
    cells = [cell for group in study.groups for cell in group.transfer.cells]
    own = [cell for cell in cells if (cell.form, cell.on) == (ORIGINAL, "compressed")]
    rates = zip(*(cell.survival.by_rate for cell in own if cell.survival), strict=True)
    by_rate = "; ".join(
        f"firing on {some[0].low:g} to {some[0].high:g} of the tokens: {_over(one.mean for one in some):.3f} of "
        f"{sum(one.latents for one in some):,}"
        for some in rates if any(one.mean for one in some)
    )  # fmt: skip
    yield Claim("(not in the paper) which latents survive: correlation of activations before and after", by_rate,
                "not measured")  # fmt: skip
    told = [f"{cell.site} {cell.form}: AUROC {bounded(cell.told.auroc)}, change {bounded(cell.told.change)}"
            for cell in cells if cell.told and cell.on == "compressed"]  # fmt: skip
    yield Claim("(not in the paper) latents still tell their labels", "; ".join(told), "not measured")
    steered = [f"{cell.site} {bounded(cell.steered.alike)} (random directions {bounded(cell.steered.random_alike)})"
               for cell in own if cell.steered]  # fmt: skip
    yield Claim("(not in the paper) steering still does the same: correlation of changes in log-probability",
                "; ".join(steered), "not measured")  # fmt: skip
    predicted = [f"{one.site} R² {bounded(Interval(one.explained, one.low, one.high))}"
                 for group in study.groups[:1] for one in group.transfer.predictors]  # fmt: skip
    overlaps = study.groups[0].transfer.overlaps
    shared = (
        f"; two compressions share {100 * np.mean([o.shared for o in overlaps]):.0f} % of the worst tenth"
        if overlaps
        else ""
    )
    yield Claim("(not in the paper) damage can be told beforehand, and differs from compression to compression",
                "; ".join(predicted) + shared, "not measured")  # fmt: skip
