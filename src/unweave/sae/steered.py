"""What the model writes while latents are changed, and what that does to the writing.

1. ``generate_sweep`` continues many prompts, each with changes of its own, in full batches.
2. ``sweep`` answers each prompt unedited, then with one latent at multiples of its largest activation; greedy, so that
   the same call gives the same text.
3. Beside every text stand three numbers: how much of it is among the tokens that the latent's direction promotes (does
   it steer?), how many of its 3-grams are distinct, and its perplexity under the unedited model (does it still write?).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, task
from unweave.lm.chat import Role
from unweave.lm.decoding import row_seed
from unweave.lm.model import LM, Tokens
from unweave.lm.unembed import top_tokens
from unweave.sae.edits import MODES, Change, Mode, Where, finite, together
from unweave.sae.module import SAE

_GRAM = 3
_THEME = 20
_CONFIDENT = 20
_BATCH_TOKENS = 8192
_LOGITS = 1 << 25
"""how many logits are held at once"""


@dataclass(frozen=True)
class SteeredText:
    """One prompt's continuation at one strength."""

    prompt: str
    strength: float | None
    """multiples of the latent's largest activation; None: unedited"""
    value: float | None
    """the latent's value (clamp), what was added to it (add), and so on; see ``sae/edits.py``"""
    text: str
    n_tokens: int
    """new tokens before the end token"""
    on_theme: float | None
    """share of the new tokens that are among the 20 the latent's direction promotes most; None for an empty text, or
    where the SAE does not write to the residual stream"""
    distinct: float
    """distinct 3-grams of new tokens over all of them; 1 where nothing repeats, near 0 in a loop"""
    perplexity: float | None
    """of the new tokens after the prompt, under the unedited model; None for an empty text"""
    log_prob: float | None = None
    """mean log-probability of the new tokens under the model that wrote them, in nats; None for an empty text, and
    where edits do not persist"""
    kl: float | None = None
    """KL(model that wrote it || unedited model) of the next token, in nats, mean over the text; None as above"""


class Generated(NamedTuple):
    """New tokens ``ids`` int64 [N, T], of which the first ``lengths`` int64 [N] of each row come before its end."""

    ids: Tensor
    lengths: Tensor

    def texts(self, lm: LM) -> list[str]:
        """Every row's text, special tokens left out."""
        return [lm.decode(row[:n]) for row, n in zip(self.ids, self.lengths.tolist(), strict=True)]


def generate_sweep(
    lm: LM,
    prompts: Tokens,
    changes: Sequence[Sequence[Change]],
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
    persist: bool = True,
    shown: Task | None = None,
) -> Generated:
    """Continues every prompt, padded on the left (``prompt_tokens``), under the changes of its row; none: unedited.

    Rows go into batches from the longest prompt to the shortest, each of as many as have at most 8,192 tokens with
    their answers, whatever SAEs, sites, latents and strengths they have. What a row draws depends on ``seed`` and
    its place in ``prompts`` alone. ``persist`` False: see ``lm/decoding.py``. ``shown``: progress that goes on here, in
    place of its own. Raises UnweaveError before anything is generated for changes that do not fit the prompts, the SAEs
    or the model.
    """
    if len(changes) != len(prompts):
        raise UnweaveError(f"changes are given for {len(changes)} rows, there are {len(prompts)} prompts")
    for edit in together(changes):
        edit.verify(lm)
    order = prompts.mask.sum(1).argsort(descending=True, stable=True).tolist()
    ids = torch.full((len(order), max_new_tokens), lm.pad_id, dtype=torch.int64)
    first = 0
    with task("generate", total=len(order), unit="texts") if shown is None else nullcontext(shown) as bar:
        while first < len(order):
            width = int(prompts.mask[order[first]].sum())
            rows = order[first : first + max(1, _BATCH_TOKENS // (width + max_new_tokens))]
            batch = Tokens(prompts.ids[rows], prompts.mask[rows], prompts.roles[rows])
            edits = together([changes[row] for row in rows])
            new = lm.generate_ids(
                batch,
                edits,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=[row_seed(seed, row) for row in rows],
                persist=persist,
            )
            ids[rows, : new.shape[1]] = new.cpu()
            first += len(rows)
            bar.advance(len(rows))
    return Generated(ids, until_end(lm, ids))


def sweep(
    lm: LM,
    sae: SAE,
    latent: int,
    prompts: Sequence[str],
    strengths: Sequence[float] = (1.0, 2.0, 4.0),
    *,
    maximum: float,
    mode: Mode = "clamp",
    where: Where = "policy",
    max_new_tokens: int = 60,
    chat: bool | None = None,
) -> list[SteeredText]:
    """Every prompt unedited and at every strength, in that order, prompt by prompt.

    ``maximum`` is the latent's largest activation (its record has it); a strength of 1 means that much. ``chat`` puts
    prompts in the model's chat template; None does so where it has one. Raises UnweaveError for a latent that never
    fires, and for invalid strengths or modes.
    """
    check_prompts(prompts)
    if not (finite(maximum) or 0.0) > 0:
        what = f"latent {latent} has no largest activation to measure strengths by ({maximum})"
        raise UnweaveError(what, remedy="choose a latent that fires, or collect records on more text")
    if any(finite(strength) is None for strength in strengths):
        raise UnweaveError(f"strengths must be numbers, not {list(strengths)}", remedy="for example 1 2 4")
    if mode not in MODES:
        raise UnweaveError(f"unknown way to steer {mode!r}", remedy=f"use one of {', '.join(MODES)}")
    unit = 1.0 if mode in ("multiply", "project") else maximum
    changes = [(strength, [Change(sae, latent, strength * unit, mode, where)]) for strength in strengths]
    return side_by_side(lm, prompts, changes, themes=[(sae, latent)], max_new_tokens=max_new_tokens, chat=chat)


def side_by_side(
    lm: LM,
    prompts: Sequence[str],
    changes: Sequence[tuple[float, Sequence[Change]]],
    *,
    themes: Sequence[tuple[SAE, int]] = (),
    max_new_tokens: int = 60,
    chat: bool | None = None,
    persist: bool = True,
) -> list[SteeredText]:
    """Every prompt unedited, and under each (strength, changes), in that order, prompt by prompt.

    ``themes``: the latents whose tokens are counted, of those that write to the residual stream. ``chat`` as in
    ``sweep``, ``persist`` as in ``LM.generate_ids``. Raises UnweaveError before anything is generated.
    """
    check_prompts(prompts)
    plain: tuple[None, Sequence[Change]] = (None, ())
    cells = [(prompt, strength, edits) for prompt in prompts for strength, edits in (plain, *changes)]
    rows = [edits for _, _, edits in cells]
    tokens = prompt_tokens(lm, [prompt for prompt, _, _ in cells], chat)
    lens = [lens_tokens(lm, sae, [latent]).cpu().flatten() for sae, latent in themes if sae.d_out == lm.d_model]
    written = generate_sweep(lm, tokens, rows, max_new_tokens=max_new_tokens, persist=persist)
    measured = measures(lm, tokens, written, rows if persist else None)
    texts = written.texts(lm)
    steered = []
    for row, ((prompt, strength, edits), numbers) in enumerate(zip(cells, measured, strict=True)):
        new = written.ids[row, : int(written.lengths[row])]
        on_theme = float(torch.isin(new, torch.cat(lens)).float().mean()) if lens and len(new) else None
        value = edits[0].value if edits else None
        steered.append(SteeredText(prompt, strength, value, texts[row], len(new), on_theme, distinct(new), *numbers))
    return steered


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UnweaveError where there are no prompts, or one holds no words."""
    if not prompts:
        raise UnweaveError("there are no prompts", remedy="give at least one")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UnweaveError(f"prompt {index} holds no words", where=repr(prompt), remedy="write it or leave it out")


def prompt_tokens(lm: LM, prompts: Sequence[str], chat: bool | None) -> Tokens:
    """Prompts padded on the left; in the model's chat template if ``chat``, or None and it has one."""
    if chat if chat is not None else getattr(lm.tokenizer, "chat_template", None) is not None:
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return lm.chat(talks, side="left", add_generation_prompt=True)
    return lm.tokenize(prompts, side="left")


def until_end(lm: LM, ids: Tensor) -> Tensor:
    """How many of the new tokens [B, N] of each row come before an end token, int64 [B]."""
    ended = torch.isin(ids, torch.tensor(lm.end_ids, dtype=ids.dtype, device=ids.device)).int()
    return torch.where(ended.any(1), ended.argmax(1), ids.shape[1])


def distinct(ids: Tensor, n: int = _GRAM) -> float:
    """Distinct n-grams of token ids [N] over all n-grams; 1 for a text too short to have any."""
    if len(ids) < n:
        return 1.0
    grams = ids.unfold(0, n, 1)
    return len({tuple(gram) for gram in grams.tolist()}) / len(grams)


class Measures(NamedTuple):
    """Of one text, as in ``SteeredText``; all None where it is empty."""

    perplexity: float | None
    log_prob: float | None
    kl: float | None


def measures(lm: LM, prompts: Tokens, written: Generated, changes: Sequence[Sequence[Change]] | None) -> list[Measures]:
    """Each text under the unedited model and, with ``changes`` by row, under the model that is changed so: one forward
    pass each of left-padded prompt and text, whose new tokens are the answer for ``where`` as when it was written."""
    found: list[Measures] = []
    step = max(1, _LOGITS // (lm.vocab_size * (written.ids.shape[1] + 1)))
    for start in range(0, len(written.ids), step):
        rows = slice(start, start + step)
        ids, lengths = written.ids[rows].to(lm.device), written.lengths[rows].to(lm.device)
        counted = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        prompt = prompts.rows(rows).to(lm.device)
        plain = _log_probs(lm, prompt, ids, counted)
        columns = [_mean(plain.gather(2, ids.unsqueeze(2)).squeeze(2), counted)]
        if changes is not None:
            with lm.taps(edit=together(changes[rows])):
                edited = _log_probs(lm, prompt, ids, counted)
            columns.append(_mean(edited.gather(2, ids.unsqueeze(2)).squeeze(2), counted))
            columns.append(_mean((edited.exp() * (edited - plain)).sum(2), counted))
        for n, loss, *others in zip(lengths.tolist(), *columns, strict=True):
            log_prob, kl = others if others and n else (None, None)
            found.append(Measures(math.exp(min(-loss, 700.0)) if n else None, log_prob, kl))
    return found


def _log_probs(lm: LM, prompt: Tokens, ids: Tensor, counted: Tensor) -> Tensor:
    """The next token's log-probabilities [B, N, V] at every place where a new token ``ids`` [B, N] came."""
    roles = torch.where(counted, int(Role.ASSISTANT), int(Role.PAD)).to(torch.uint8)
    whole = Tokens(
        torch.cat([prompt.ids, ids], 1), torch.cat([prompt.mask, counted], 1), torch.cat([prompt.roles, roles], 1)
    )
    logits = lm(whole, keep_logits=ids.shape[1] + 1)
    if logits is None:
        raise UnweaveError("the forward pass was stopped before its logits", remedy="measure outside taps(stop=...)")
    return torch.log_softmax(logits[:, :-1].float(), -1)


def _mean(values: Tensor, counted: Tensor) -> list[float]:
    """Of each row's counted values [B, N]; 0 where there are none."""
    total = torch.where(counted, values, 0.0).double().sum(1)
    return (total / counted.sum(1).clamp(min=1)).tolist()


def confidence_changes(
    lm: LM, changes: Sequence[Sequence[Change]], prompts: Sequence[str], *, max_rows: int = 32
) -> list[float]:
    """By how much each row of changes makes the model's next token more confident, in nats, mean over plain prompts.

    Token confidence is minus the mean log-probability of the 20 likeliest tokens: the more of the mass the first have,
    the less is left for the others. Latents that change it steer well (Wang et al. 2025, arXiv 2510.03659).
    """
    rows: list[Sequence[Change]] = [(), *changes]
    values = torch.zeros(len(rows), dtype=torch.float64)
    for prompt in prompts:
        row = lm.tokenize(prompt)
        for start in range(0, len(rows), max_rows):
            part = rows[start : start + max_rows]
            batch = Tokens(*(column.expand(len(part), -1) for column in (row.ids, row.mask, row.roles)))
            with lm.taps(edit=together(part)):
                logits = lm(batch, keep_logits=1)
            assert logits is not None
            top = torch.log_softmax(logits[:, -1].float(), -1).topk(min(_CONFIDENT, lm.vocab_size), -1).values
            values[start : start + len(part)] -= top.mean(-1).double().cpu()
    return ((values[1:] - values[0]) / len(prompts)).tolist()


def lens_tokens(lm: LM, sae: SAE, latents: Sequence[int], k: int = _THEME) -> Tensor:
    """The tokens whose logits the latents' directions raise most, int64 [n, k], strongest first."""
    if sae.d_out != lm.d_model:
        what = f"directions of width {sae.d_out} do not lie in the residual stream ({lm.d_model})"
        raise UnweaveError(what, where=str(sae.write), remedy="use an SAE whose site adds to the residual stream")
    directions = sae.subset(latents).directions
    parts = [top_tokens(lm, lm.logit_lens(part), k)[1] for part in directions.split(256)]
    return torch.cat(parts)
