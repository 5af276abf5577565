"""A compression as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unweave.core.result import Row
from unweave.methods.compress.figures import changes
from unweave.methods.compress.result import Compressed, Loss, SAEChange, TensorChange
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import counted, esc, number, percent, table


def rows(result: Compressed) -> list[Row]:
    """What was done, what it cost, and where the outcome is."""
    lines: list[Row] = [("model", result.subject.named_model, ""), ("method", result.method, _calibration(result))]
    if result.loss is not None:
        done = [_weights(tensor) for tensor in result.tensors]
        lines += [
            ("weights compressed", sum(done), f"of {result.parameters:,} parameters, in {len(done)} tensors"),
            ("zeros", _mean_zeros(result.tensors), "share of these weights"),
            *_precision(result.tensors),
            *_loss_rows(result.loss, "perplexity"),
            ("model folder", str(result.folder), "below the run directory; an ordinary Hugging Face model"),
        ]
    for sae in result.saes:
        lines += _sae_rows(sae)
    return lines


def _sae_rows(sae: SAEChange) -> list[Row]:
    encoder, decoder = sae.tensors
    zeros = f"{percent(encoder.zeros)} of the encoder, {percent(decoder.zeros)} of the decoder"
    silent = [("  silenced latents", sae.silenced, "lost all weights of encoder or decoder")] if sae.silenced else []
    return [
        (f"SAE at {sae.site}", str(sae.folder), zeros if encoder.bits is None else f"{encoder.bits:g} bits a weight"),
        ("  unexplained variance", sae.after.unexplained_variance, f"{sae.before.unexplained_variance:.4f} before"),
        ("  latents per token (L0)", sae.after.l0, f"{sae.before.l0:.1f} before"),
        *silent,
        *_loss_rows(sae.loss, "  perplexity with the SAE"),
    ]


def _loss_rows(loss: Loss, name: str) -> list[Row]:
    return [(name, round(_perplexity(loss.after), 3), f"{_perplexity(loss.before):.3f} before; {_difference(loss)}")]


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _difference(loss: Loss) -> str:
    interval = "" if loss.low is None or loss.high is None else f" [{loss.low:+.4f}, {loss.high:+.4f}]"
    return f"{loss.after - loss.before:+.4f}{interval} nats a token on {loss.tokens:,} held-out tokens"


def _precision(tensors: Sequence[TensorChange]) -> list[Row]:
    bits = [(tensor.bits, _weights(tensor)) for tensor in tensors if tensor.bits is not None]
    mean = sum(b * n for b, n in bits) / max(1, sum(n for _, n in bits))
    ranks = [tensor.rank for tensor in tensors if tensor.rank is not None]
    return [
        *([("bits per weight", round(mean, 3), "scales included")] if bits else []),
        *([("rank", f"{min(ranks)} to {max(ranks)}", "of the matrices")] if ranks else []),
    ]


def _calibration(result: Compressed) -> str:
    return f"calibrated on {result.calibration:,} tokens" if result.calibration else "without calibration"


def _weights(tensor: TensorChange) -> int:
    return math.prod(tensor.shape)


def _mean_zeros(tensors: Sequence[TensorChange]) -> float:
    return sum(tensor.zeros * _weights(tensor) for tensor in tensors) / sum(map(_weights, tensors))


def section(result: Compressed, around: Around = ALONE) -> Section:
    """Losses before and after, how far weights moved in each block, and a table of tensors."""
    del around
    text = f"<p>{esc(result.method.capitalize())}, {_calibration(result)}.</p>"
    if result.loss is None:
        body = text + "".join(f"<h3>{esc(sae.site)}</h3>{_numbers(_sae_rows(sae))}{_tensors(sae.tensors)}"
                              for sae in result.saes)  # fmt: skip
        return Section("Compression", "Compressed SAEs", body, notes=result.subject.notes)
    caption = "How far each projection's weights moved, relative to their size, block by block."
    drawn = figure(changes(result.tensors), caption)
    tile = Tile(number(_perplexity(result.loss.after)), "perplexity after compression",
                f"{number(_perplexity(result.loss.before))} before; {result.method}.")  # fmt: skip
    body = text + _numbers(rows(result)[2:-1]) + drawn + _tensors(result.tensors)
    return Section("Compression", "A compressed model", body, tiles=(tile,), notes=result.subject.notes)


def _numbers(lines: Sequence[Row]) -> str:
    cells = [
        (esc(name.strip()), esc(number(value, 4) if isinstance(value, (int, float)) else value), esc(meaning))
        for name, value, meaning in lines
    ]
    return table(("Measure", "Value", "What it says"), cells, (1,))


def _tensors(tensors: Sequence[TensorChange]) -> str:
    head = ("Tensor", "Shape", "Zeros", "before", "Change", "Bits", "Rank")
    cells = [
        (esc(tensor.name if tensor.layer is None else f"{tensor.layer}.{tensor.name}"),
         " × ".join(map(str, tensor.shape)), percent(tensor.zeros, 4), percent(tensor.zeros_before, 4),
         number(tensor.change), number(tensor.bits), number(tensor.rank))
        for tensor in tensors
    ]  # fmt: skip
    name = f"Achieved in {counted(len(tensors), 'tensor')}"
    return f"<details><summary>{name}</summary>{table(head, cells, (2, 3, 4, 5, 6))}</details>"
