"""The demo as rows, and as a section of a page."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.demo.result import Demo
from unweave.show.page import ALONE, Around, Section
from unweave.show.pieces import esc, table


def rows(result: Demo) -> list[Row]:
    """The results, one line each."""
    mean, zero = (next((n for n in result.recovery_notes if f"{name} ablation" in n), "") for name in ("mean", "zero"))
    recovered = mean or "against mean ablation; 1 is the unedited model"
    return [
        ("model", result.model, ""),
        ("training tokens", result.tokens, f"{result.distinct_tokens:,} distinct ones"),
        ("unexplained variance", result.unexplained_variance, "0 is perfect, 1 is guessing the mean"),
        ("active latents per token (L0)", result.l0, f"of {result.latents:,}"),
        ("cross-entropy recovered", result.recovered_vs_mean, recovered),
        ("... against zero ablation", result.recovered_vs_zero, zero or "an easier comparison"),
        ("alive latents", result.alive_fraction, f"fire somewhere in {result.read_tokens:,} tokens"),
        ("effect found", result.share, "of the change in agreement is what its strongest latents make together"),
        (
            "attribution, Spearman",
            result.spearman,
            "integrated gradients with measured effects of the strongest latents, without the first",
        ),
        ("steered latent", result.steered, " ".join(token.strip() for token in result.label[:6])),
        ("SAE", result.sae.as_posix().removeprefix("../"), ""),
    ]


def section(result: Demo, around: Around = ALONE) -> Section:
    """Its runs."""
    lines = [(esc(step.stage), f"<code>{esc(step.run)}</code>") for step in result.steps]
    return Section("Demo", "The main job", table(("Step", "Run"), lines, ()))
