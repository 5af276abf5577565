"""Attribution over a task: opened, attributed, candidates kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.attribute.means import Activity, Mean, mean_effects
from unweave.attribute.runner import Batch
from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import atomic_write
from unweave.data.batches import store_batches
from unweave.inputs.inputs import token_store
from unweave.inputs.saes import Opened, open_saes
from unweave.latents import annotations
from unweave.latents.annotations import Annotation, name_of
from unweave.lm.adapters import require_peft
from unweave.lm.model import LM
from unweave.methods.finetune.attribute.attribute import AnswerLogProb, candidates, choice_batches, of_assistant
from unweave.methods.finetune.attribute.differences import Components, latent_differences, principal_components
from unweave.methods.finetune.attribute.result import AttributeResult, Candidate, SiteTotal
from unweave.methods.finetune.attribute.spec import FinetuneAttributeSpec
from unweave.sae.module import SAE
from unweave.tasks.choices.choices import open_choices
from unweave.tasks.choices.encode import encode_choices

CANDIDATES, DIRECTIONS = "candidates.jsonl", "directions.safetensors"
_WORDS = {
    "effect": "effect on {metric}",
    "difference": "how much more it writes in {tuned}, in units of the activation",
    "components": "share of the variance that fine-tuning made",
}


@dataclass(frozen=True)
class _Texts:
    """What is looked at: batches with their metric."""

    name: str
    metric: str
    batches: list[Batch]
    skipped: Mapping[str, int]

    @property
    def examples(self) -> int:
        return sum(len(tokens) for tokens, *_ in self.batches)


@stage("finetune-attribute", version=1)
def run(spec: FinetuneAttributeSpec, ctx: Context) -> AttributeResult:
    """Candidates of all sites; ``candidates.jsonl``, and ``directions.safetensors`` for components. The handle is the
    SAEs where they are open already."""
    choices = None if spec.data is not None else open_choices(spec.task)  # refused before the model loads
    opened: Opened = ctx.handle or open_saes(spec)
    texts = _conversations(spec, opened, ctx) if choices is None else _choices(spec, opened.lm, choices)
    activity: Mapping[Site, Activity] = {}
    components: Mapping[Site, Components] = {}
    if spec.by == "components":
        tokens = [tokens for tokens, *_ in texts.batches]
        components = principal_components(
            opened.lm, open_tuned(spec, opened), opened.saes, tokens, most=spec.components, max_tokens=spec.batch_tokens
        )
        listed = _of_components(components)
        _write_directions(ctx.path / DIRECTIONS, components)
    else:
        activity, scores, scale = _scores(spec, opened, texts)
        listed = candidates(activity, scores, top=spec.top, per_site=spec.per_site, sign=spec.sign, scale=scale)
        if not listed:
            what = f"no latent has a score of sign {spec.sign}"
            raise UnweaveError(what, where=spec.by, remedy="ask for another sign, or compare with a model that differs")
    sites = tuple(_total(site, sae, opened, listed, activity, components) for site, sae in opened.saes.items())
    digests = {one.site: one.digest for one in sites}
    lines = (Annotation(name_of(one.site, one.number), sae=digests[one.site]) for one in listed)
    annotations.write(ctx.path / CANDIDATES, lines)
    return AttributeResult(
        subject=opened.subject,
        model=opened.model,
        by=spec.by,
        task=texts.name,
        metric=_WORDS[spec.by].format(metric=texts.metric, tuned=spec.tuned),
        tuned=spec.tuned,
        examples=texts.examples,
        tokens=sum(tokens.n_tokens for tokens, *_ in texts.batches),
        skipped=dict(texts.skipped),
        candidates=listed,
        sites=sites,
        directions=Path(DIRECTIONS) if components else None,
    )


def open_tuned(spec: FinetuneAttributeSpec, opened: Opened) -> LM:
    """The fine-tuned model, or the model itself with an adapter merged into it."""
    name = str(spec.tuned)
    dtype = str(opened.lm.dtype).removeprefix("torch.")
    if not (Path(name) / "adapter_config.json").is_file():
        return LM.load(name, dtype=dtype, device=spec.device)
    peft = require_peft("an adapter", where=name)
    base = LM.load(opened.model, dtype=dtype, device=spec.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going
        merged: Any = peft.PeftModel.from_pretrained(base.model, name)
    return LM(merged.merge_and_unload(), base.tokenizer, name=Path(name).name)


# -- what is looked at ------------------------------------------------------------------------------------------------


def _choices(spec: FinetuneAttributeSpec, lm: LM, choices: Any) -> _Texts:
    items = choices.splits["train"][: spec.examples]
    encoded = encode_choices(lm, items, chat=spec.chat, skip=True)
    skipped = dict(choices.left_out) | dict(encoded.skipped)
    return _Texts(
        choices.name, "logit(correct) - logit(incorrect)", list(choice_batches(encoded, spec.batch_tokens)), skipped
    )


def _conversations(spec: FinetuneAttributeSpec, opened: Opened, ctx: Context) -> _Texts:
    assert spec.data is not None
    store, _ = token_store(opened.lm, opened.model, spec.data, "train", None, ctx.runs)
    rows = range(store.n_rows if spec.examples is None else min(store.n_rows, spec.examples))
    batches, silent = [], 0
    for tokens in store_batches(opened.lm, store, rows, spec.batch_tokens):
        answered = of_assistant(tokens).any(1).nonzero()[:, 0]
        silent += len(tokens) - len(answered)
        if len(answered):
            part = tokens.rows(answered)  # type: ignore[arg-type]
            batches.append((part, None, AnswerLogProb(part)))
    if not batches:
        what = "no row of this text has an assistant's answer"
        raise UnweaveError(what, where="data", remedy="give conversations: data.sources with messages")
    name = ", ".join(source.path for source in spec.data.sources)
    return _Texts(name, "log p of the assistant's tokens", batches, {"no assistant's answer": silent} if silent else {})


# -- candidates -------------------------------------------------------------------------------------------------------


def _scores(spec: FinetuneAttributeSpec, opened: Opened, texts: _Texts) -> tuple[Any, dict[Site, Mean], Any]:
    """How latents fire, their scores, and what to multiply these with."""
    lm, saes = opened.lm, opened.saes
    if spec.by == "effect":
        means = mean_effects(lm, saes, texts.batches, max_tokens=spec.batch_tokens, total=texts.examples)
        return means, {site: one.effect for site, one in means.items()}, None
    tokens = [tokens for tokens, *_ in texts.batches]
    shifts = latent_differences(lm, open_tuned(spec, opened), saes, tokens, max_tokens=spec.batch_tokens)
    norms = {site: sae.W_dec.double().norm(dim=1) for site, sae in saes.items()}
    return shifts, {site: one.more for site, one in shifts.items()}, norms


def _of_components(components: Mapping[Site, Components]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(site, number, share, 0.0, 0.0, 1.0)
        for site, one in components.items()
        for number, share in enumerate(one.shares.tolist())
    )


def _write_directions(path: Path, components: Mapping[Site, Components]) -> None:
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file({str(site): one.rows.float().cpu().contiguous() for site, one in components.items()}, temporary)


def _total(
    site: Site,
    sae: SAE,
    opened: Opened,
    listed: tuple[Candidate, ...],
    activity: Mapping[Site, Activity],
    components: Mapping[Site, Components],
) -> SiteTotal:
    own = [one.score for one in listed if one.site == site]
    if site in components:
        share = components[site].mean_share
        return SiteTotal(site, len(components[site].rows), len(own), len(own), sum(own), None, None, share)
    firing = int((activity[site].frequency.value > 0).sum())
    return SiteTotal(site, sae.d_sae, firing, len(own), sum(own), opened.names[site], sae.digest())
