"""What to train at each scale: the same three recipes, only the data and the way it becomes rows differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.data.spec import DataSpec, StreamSpec
from unweave.methods.train.kinds import SAESpec, TopKSpec
from unweave.methods.train.spec import TrainSpec
from unweave.papers.instruct_saes.result import Recipe
from unweave.papers.instruct_saes.spec import LAYERS, InstructSaesSpec
from unweave.tasks.special_tokens import PAPER_IDS, Where

MATCHED_L0 = 32
"""Errors are compared at this many active latents per token."""

_CHAT = (Source(path="chitchat", weight=4.0), Source(path="alpaca"))
_PRETRAINING = (Source(path="wiki"), Source(path="c4"))
_PAPER_CHAT = (
    Source(path="hub:allenai/WildChat-1M-Full", messages_field="conversation"),
    Source(path="hub:BAAI/Infinity-Instruct:7M"),
    Source(path="hub:allenai/tulu-3-sft-mixture"),
    Source(path="hub:mlabonne/orca-agentinstruct-1M-v1-cleaned"),
    Source(path="hub:lmsys/lmsys-chat-1m", messages_field="conversation"),
)
_PAPER_PRETRAINING = (Source(path="hub:monology/pile-uncopyrighted"),)


@dataclass(frozen=True)
class Plan:
    """Everything that a scale asks for. Three texts of conversations nobody trained on: to measure errors on, to take
    the rated latents' contexts from, and to find the latents of special tokens on."""

    trainings: dict[Recipe, TrainSpec]
    measured: DataSpec
    read: DataSpec
    steered: DataSpec
    examined: str
    """name, within each training run, of the JumpReLU SAE whose latents are rated and steered"""
    rated: int
    conversations: int
    """how many conversations maximum activations on special tokens are averaged over, at most"""
    special_ids: tuple[int, ...] = ()
    """which ids are special, wherever they occur; none: the tokenizer's, and the template's words for who speaks,
    where the template wrote them"""

    @property
    def where(self) -> Where:
        """Where a special id counts as special."""
        return "anywhere" if self.special_ids else "template"


def plan_of(spec: InstructSaesSpec) -> Plan:
    """The trainings of a scale. They differ in their data alone."""
    return _smoke(spec) if spec.scale == "smoke" else _paper(spec)


def _recipes(
    base: TrainSpec, text: DataSpec, chat: DataSpec, blocks: PackSpec, whole: PackSpec
) -> dict[Recipe, TrainSpec]:
    return {
        "BT(P)": replace(base, data=replace(text, pack=blocks)),
        "BT(F)": replace(base, data=replace(chat, pack=blocks)),
        "FAST": replace(base, data=replace(chat, pack=whole)),
    }


def _smoke(spec: InstructSaesSpec) -> Plan:
    tokens = 300_032  # whole batches of 512
    text = DataSpec(sources=_PRETRAINING, tokens=310_000, heldout_tokens=10_000)
    chat = DataSpec(sources=_CHAT, tokens=310_000, heldout_tokens=10_000, dedup=20)
    kinds: list[dict[str, Any]] = [
        {"kind": ["relu", "jumprelu"], "k": [MATCHED_L0], "seed": [0, 1, 2]},
        {"kind": ["relu", "jumprelu"], "k": [MATCHED_L0 // 2, MATCHED_L0 * 2], "seed": [0]},  # for the L0-MSE curve
    ]
    # The page's figures are of these settings, not of what the defaults have become since.
    sae = TopKSpec(
        expansion=4, k=MATCHED_L0, tokens=tokens, batch=512, init="random", aux_weight=1 / 32, k_aux=64,
        dead_after=100_000,
    )  # fmt: skip
    base = TrainSpec(
        sites=("resid_post.{4,9,14}",),
        data=chat,
        stream=StreamSpec(special_tokens="include", max_norm_ratio=None),
        sae=sae,
        variants=tuple(kinds),
        epochs=1.0,
        device=spec.device,
        checkpoint_seconds=240.0,
    )
    trainings = _recipes(base, text, chat, PackSpec(packing="blocks", context=2048), PackSpec(context=8192))
    # Forty conversations are held out in all: every measurement needs them.
    heldout = replace(trainings["FAST"].data, heldout_tokens=40_000)
    return Plan(trainings, heldout, heldout, heldout, f"resid_post.9/jumprelu-k{MATCHED_L0}-seed0", 8, 200)


def _paper(spec: InstructSaesSpec) -> Plan:
    model = spec.model or "Qwen/Qwen2.5-0.5B-Instruct"
    tokens = 40_960_000
    text = DataSpec(sources=_PAPER_PRETRAINING, tokens=tokens + 1_000_000, heldout=0.01, heldout_tokens=200_000)
    chat = replace(text, sources=_PAPER_CHAT, dedup=20)
    wider = [8] if "7B" in model or "8B" in model else [8, 16]
    layers = LAYERS[model]
    base = TrainSpec(
        model=model,
        dtype="bfloat16",
        sites=tuple(f"resid_post.{layer}" for layer in layers),
        data=chat,
        stream=StreamSpec(special_tokens="include", max_norm_ratio=None, cache=False),
        sae=SAESpec.from_dict({"preset": "fast-jumprelu"}),
        variants=({"preset": ["fast-jumprelu", "fast-relu"], "expansion": wider},),
        epochs=1.0,
        device=spec.device,
        checkpoint_seconds=600.0,
    )
    trainings = _recipes(base, text, chat, PackSpec(packing="blocks", context=2048), PackSpec(context=8192))
    middle = layers[len(layers) // 2]
    ids = PAPER_IDS["llama-3" if "Llama" in model else "qwen2.5"]
    examined = f"resid_post.{middle}/fast-jumprelu-expansion8"
    whole = trainings["FAST"].data

    def dialogues(count: int, first: float, last: float) -> DataSpec:
        return replace(whole, heldout_documents=count, heldout_part=(first, last))

    # Sections 4.2, 5 and 6: 5,000 dialogues, 10,000 others, 1,000 others, of some 47,000 held out.
    texts = dialogues(5000, 0.0, 0.3), dialogues(10_000, 0.3, 0.9), dialogues(1000, 0.9, 1.0)
    return Plan(trainings, *texts, examined, 128, 1000, ids)
