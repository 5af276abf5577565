"""What each stage can be asked. Nothing here imports torch, so that help is quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from unweave.core.errors import UnweaveError
from unweave.core.spec import Spec, operational, require
from unweave.data.corpus import Source
from unweave.data.pack import PackSpec
from unweave.judge.spec import JudgeSpec
from unweave.sae.spec import SAESpec

DEFAULT_MODEL = "smollm2-135m-instruct"


DEFAULT_SOURCES = (
    Source(path="chitchat", weight=4.0),
    Source(path="alpaca"),
    Source(path="wiki"),
    Source(path="c4"),
)


PAPER_CONTEXT = {"documents": 8192, "blocks": 2048}
"""How long rows are in the FAST paper."""


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """Which text becomes tokens, and how."""

    shorthands = {
        "packing": (
            Literal["documents", "blocks"] | None,
            "The FAST paper's rows: documents, each on its own and cut off at 8,192 tokens, or blocks of 2,048; fields "
            "of pack replace them.",
        )
    }

    sources: tuple[Source, ...]
    """Where the text comes from: catalogue names, files, folders, or `hub:org/name`; mixed by weight."""
    pack: PackSpec = PackSpec()
    """How documents become rows of tokens."""
    tokens: int = 320_000
    """How many distinct tokens to train on. Less text than that is refused."""
    heldout: float = 0.1
    """The share of documents that is never trained on, chosen by a hash of their content."""
    heldout_tokens: int = 22_000
    """How many tokens of those documents to measure on."""
    heldout_documents: int | None = None
    """How many of those documents to measure on, in place of heldout_tokens."""
    heldout_part: tuple[float, float] = (0.0, 1.0)
    """Which of those documents to measure on, as shares from and up to: parts that do not overlap share none."""
    seed: int = 0
    """Order of the documents and choice of the held-out ones."""
    dedup: int = 0
    """Drop documents that share this many words in a row with an earlier one: 20 in the FAST paper, 0 to keep all."""
    dedup_memory_mb: int = operational(512)
    """Memory for what earlier documents said; the rest lies on disk meanwhile, 8 bytes a word."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "", base: Spec | None = None) -> Self:
        """As ``Spec.from_dict``; ``packing`` stands for the fields of ``pack`` as the FAST paper sets them."""
        if "packing" not in values:
            return super().from_dict(values, where=where, base=base)
        rest = {name: value for name, value in values.items() if name != "packing"}
        if values["packing"] not in PAPER_CONTEXT:
            raise UnweaveError(
                f"{values['packing']!r} is no way to pack",
                where=f"{where}.packing" if where else "packing",
                remedy=f"use {' or '.join(PAPER_CONTEXT)}",
            )
        given = rest.get("pack", {})
        pack = {"packing": values["packing"], "context": PAPER_CONTEXT[values["packing"]]}
        rest["pack"] = pack | (given.to_dict() if isinstance(given, Spec) else dict(given))
        return super().from_dict(rest, where=where, base=base)

    def __post_init__(self) -> None:
        require(
            self,
            {
                "sources": len(self.sources) > 0,
                "dedup": self.dedup >= 0,
                "dedup_memory_mb": self.dedup_memory_mb > 0,
                "tokens": self.tokens > 0,
                "heldout": 0 < self.heldout < 1,
                "heldout_tokens": self.heldout_tokens > 0,
                "heldout_documents": self.heldout_documents is None or self.heldout_documents > 0,
                "heldout_part": 0 <= self.heldout_part[0] < self.heldout_part[1] <= 1,
            },
        )


@dataclass(frozen=True, kw_only=True)
class StreamSpec(Spec):
    """How activations are harvested and mixed."""

    special_tokens: Literal["exclude", "include"] = "exclude"
    """Whether the tokenizer's special tokens count. Padding never does."""
    max_norm_ratio: float | None = 10.0
    """Tokens whose activation is longer than this many medians are outliers (attention sinks) and do not count."""
    chunk_tokens: int = 16_384
    """Tokens per chunk of activations, about."""
    buffer_tokens: int = 131_072
    """Tokens that are mixed at a time."""
    batch_tokens: int = operational(2048)
    """Tokens that go through the model at once; changes speed and memory, not the result beyond rounding."""
    nonfinite: Literal["stop", "drop"] = "stop"
    """What to do about tokens whose activations are NaN or infinite: stop and name the document, or drop and count."""
    cache: bool = operational(True)
    """Keep activations on disk, so that later epochs and runs need not compute them again."""

    def __post_init__(self) -> None:
        sizes = ("chunk_tokens", "buffer_tokens", "batch_tokens")
        ratio = self.max_norm_ratio
        require(
            self, {name: getattr(self, name) > 0 for name in sizes} | {"max_norm_ratio": ratio is None or ratio > 1}
        )


@dataclass(frozen=True, kw_only=True)
class TrainSpec(Spec):
    """Training sparse autoencoders: every variant at every site, on one stream of activations."""

    model: str = DEFAULT_MODEL
    """A catalogue name, a hub id, a folder or a GGUF file; see `unweave models`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in. The autoencoder is always trained in float32."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    sites: tuple[str, ...] = ("resid_post.9",)
    """Where to read activations, also by pattern: resid_post.*, mlp_add.{4,9,14}; mlp_in.*->mlp_add.* for transcoders.
    All sites share every forward pass."""
    data: DataSpec = DataSpec(sources=DEFAULT_SOURCES)
    """Which text, and how it becomes tokens."""
    stream: StreamSpec = StreamSpec()
    """Which tokens count, and how activations are mixed."""
    sae: SAESpec = SAESpec()
    """The autoencoder and its training."""
    variants: tuple[dict[str, Any], ...] = ()
    """Several autoencoders per site: fields of sae to change; a list of values stands for one variant each, as in
    {kind: [relu, jumprelu], seed: [0, 1, 2]}."""
    objective: Literal["reconstruction", "end-to-end"] = "reconstruction"
    """Learn to reconstruct activations, or to leave the model's predictions as they are (KL divergence)."""
    start: Path | None = None
    """Go on training this autoencoder (any that can be read: docs/formats.md), or those of this training run's sae/
    folder, site by site."""
    accept_mismatch: str | None = field(default=None, metadata={"result": False})
    """Go on training an autoencoder of another model, for this reason; what was measured is recorded."""
    epochs: float = 4.0
    """How often each distinct token may be trained on at most; a larger sae.tokens is refused."""
    seed: int = 0
    """Order of activations. Initial weights have a seed of their own, sae.seed."""
    checkpoint_seconds: float = operational(30.0)
    """How often to write a checkpoint, from which training goes on exactly."""

    def __post_init__(self) -> None:
        require(self, {"sites": len(self.sites) > 0, "epochs": self.epochs > 0})
        if self.accept_mismatch is not None and self.start is None:
            raise UnweaveError(
                "accept_mismatch has nothing to accept", where=type(self).__name__, remedy="it goes with start"
            )


@dataclass(frozen=True, kw_only=True)
class OfSAESpec(Spec):
    """A question about a trained autoencoder."""

    sae: Path = field(metadata={"result": False})
    """The autoencoder's folder, as `train` printed it, or any other SAE that can be read: docs/formats.md. Its content,
    not its path, decides which run is reused."""


@dataclass(frozen=True, kw_only=True)
class UseSpec(OfSAESpec):
    """What every stage that uses a trained autoencoder in a model can be told."""

    model: str | None = None
    """The model to use it in; by default the one it was trained on."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    accept_mismatch: str | None = None
    """Use the autoencoder in a model that it was not trained on, for this reason; what was measured is recorded."""


@dataclass(frozen=True, kw_only=True)
class EvalSpec(UseSpec):
    """Measuring an autoencoder on held-out text."""

    data: DataSpec | None = None
    """Other text to measure on; by default held-out documents of the training text."""
    tokens: int | None = None
    """How many tokens to measure on, special tokens included; by default as many as the text's heldout_tokens."""
    batch_tokens: int = operational(1024)
    """Tokens that go through the model at once."""

    def __post_init__(self) -> None:
        require(self, {"tokens": self.tokens is None or self.tokens > 0, "batch_tokens": self.batch_tokens > 0})


@dataclass(frozen=True, kw_only=True)
class LatentsSpec(UseSpec):
    """Collecting what each latent responds to."""

    data: DataSpec | None = None
    """Other text to look at; by default the training text."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    tokens: int | None = None
    """How many tokens to look at; by default 200,000, or all there are."""
    seed: int = 0
    """Choice of the random and quantile contexts."""

    def __post_init__(self) -> None:
        require(self, {"tokens": self.tokens is None or self.tokens > 0})


@dataclass(frozen=True, kw_only=True)
class TraceSpec(UseSpec):
    """Finding the latents that cause a behaviour."""

    task: Literal["simple", "within_rc", "across_rc", "across_pp"] = "across_pp"
    """Subject-verb agreement: alone, within or across a relative clause, or across a prepositional phrase."""
    pairs: int = 128
    """How many pairs of a clean and a changed sentence."""
    top: int = 20
    """How many of the strongest latents to check by their exact effect."""
    random: int = 20
    """How many random latents to check beside them."""
    steps: int = 10
    """Steps of integrated gradients."""
    rule: Literal["left", "midpoint", "right"] = "midpoint"
    """Where in each step the gradient is taken: left is the feature-circuits code's convention, right the paper's."""
    seed: int = 0
    """Choice of pairs and of random latents."""

    def __post_init__(self) -> None:
        fine = {"pairs": self.pairs > 0, "top": self.top > 1, "random": self.random >= 0, "steps": self.steps > 0}
        require(self, fine)


@dataclass(frozen=True, kw_only=True)
class SteerSpec(UseSpec):
    """Generating text with a latent turned up."""

    latent: int | None = None
    """Which latent; by default one with a clear theme that shows in what the model then writes."""
    prompts: tuple[str, ...] = ("Tell me about the sea.",)
    """What to ask the model."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths, as multiples of the latent's largest activation in the records."""
    mode: Literal["clamp", "add"] = "clamp"
    """Set the latent to that value, or add that much of its direction."""
    max_new_tokens: int = 60
    """Length of the generated text."""
    latents_tokens: int | None = None
    """How many tokens the latents' records are taken from; as in `unweave latents`, whose run is shared."""

    def __post_init__(self) -> None:
        lists = {
            "prompts": len(self.prompts) > 0 and all(prompt.strip() for prompt in self.prompts),
            "strengths": len(self.strengths) > 0,
        }
        require(self, lists | {"max_new_tokens": self.max_new_tokens > 0})


@dataclass(frozen=True, kw_only=True)
class RubricSpec(UseSpec):
    """Having a chat model score how clear latents are."""

    judge: JudgeSpec = JudgeSpec()
    """The chat model that scores."""
    latents: int = 16
    """How many latents to score, drawn at random; the FAST paper takes 128."""
    shuffled: int | None = None
    """How many sets of contexts of five different latents to score beside them; by default as many as latents."""
    data: DataSpec | None = None
    """Other text to take contexts from; by default the training text."""
    split: Literal["train", "heldout"] = "train"
    """Which documents of that text: those to train on, or those held out."""
    latents_tokens: int | None = None
    """How many tokens the latents' records are taken from; as in `unweave latents`, whose run is shared."""
    seed: int = 0
    """Choice of the latents and of the shuffled sets."""

    def __post_init__(self) -> None:
        tokens = self.latents_tokens is None or self.latents_tokens > 0
        shuffled = self.shuffled is None or self.shuffled >= 0
        require(self, {"latents": self.latents > 0, "shuffled": shuffled, "latents_tokens": tokens})


@dataclass(frozen=True, kw_only=True)
class SpecialTokensSpec(UseSpec):
    """Measuring an autoencoder on special tokens and by role, and steering with a latent of a special token."""

    data: DataSpec | None = None
    """Other conversations to measure on; by default held-out ones of the training text, each on its own."""
    tokens: int | None = None
    """How many tokens to read; by default as many as the text's heldout_tokens. Only conversations count."""
    batch_tokens: int = operational(1024)
    """Tokens that go through the model at once."""
    special_ids: tuple[int, ...] = ()
    """Which ids are special; by default the tokenizer's special ids and the template's words for who speaks."""
    where: Literal["template", "anywhere"] = "template"
    """Whether such an id counts only where the chat template wrote it, or wherever it stands."""
    samples: int = 1000
    """Over how many conversations at most a latent's largest activations are averaged."""
    token: str | None = None
    """The special token whose strongest latent is steered with; by default the one that opens a turn."""
    latent: int | None = None
    """The latent to steer with; by default the token's strongest, by its average largest activation."""
    questions: tuple[str, ...] = ()
    """What to ask the model; by default ten questions of different kinds."""
    alphas: tuple[float, ...] = (0.0, 15.0, 25.0, 50.0, 100.0, 150.0, 200.0)
    """How far to move every position along the latent's direction; the default is the FAST paper's."""
    unit: Literal["absolute", "median"] = "absolute"
    """What alpha counts: the activation's own units, or multiples of its median norm where the SAE writes."""
    controls: int = 3
    """With how many latents drawn at random to do the same beside it."""
    max_new_tokens: int = 60
    """Length of the answers."""
    max_distinct_loss: float = 0.1
    """How much lower the share of distinct 3-grams may be than unedited for answers to count as not degraded."""
    max_perplexity_ratio: float = 1.25
    """By what factor perplexity under the unedited model may be higher."""
    min_answers_changed: float = 0.5
    """What share of the answers must differ from the unedited ones for an alpha to count as having done something."""
    seed: int = 0
    """Choice of the random latents and of the resamples behind the intervals."""

    def __post_init__(self) -> None:
        fine = {name: getattr(self, name) > 0 for name in ("batch_tokens", "samples", "max_new_tokens")}
        fine |= {"tokens": self.tokens is None or self.tokens > 0, "controls": self.controls >= 0}
        fine |= {
            "max_distinct_loss": self.max_distinct_loss >= 0,
            "max_perplexity_ratio": self.max_perplexity_ratio >= 1,
        }
        fine |= {"alphas": any(alpha > 0 for alpha in self.alphas) and all(alpha >= 0 for alpha in self.alphas)}
        require(self, fine | {"min_answers_changed": 0 <= self.min_answers_changed <= 1})


@dataclass(frozen=True, kw_only=True)
class ReportSpec(OfSAESpec):
    """One page from what was found about an autoencoder; stages that were not run yet are named in it."""

    title: str = "What is inside this model?"
    """The page's heading."""
    latents: int | None = 8192
    """How many latents to show, besides those that other parts of the page name; none: all of them. A page of 8,192
    is about 5 MB; it says what it leaves out."""

    def __post_init__(self) -> None:
        require(self, {"latents": self.latents is None or self.latents >= 1})


@dataclass(frozen=True, kw_only=True)
class DemoSpec(Spec):
    """The main job on the default model and text."""

    scale: Literal["smoke", "demo", "long"] = "demo"
    """smoke: about two minutes, for a quick check; demo: about seven on two cores; long: more text and training."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class DoctorSpec(TrainSpec):
    """What a training run will cost, before it is started, and what is wrong with it."""
