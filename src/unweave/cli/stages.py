"""The commands that are stages. Methods and papers bring them; nothing here knows one of them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

from unweave.core.command import Command
from unweave.core.result import Result
from unweave.methods import commands

GROUPS = {
    "circuit": "Find the circuits of a model's behaviours in latents, check them, draw them and change them.",
    "paper": "Run a paper's recipe: its trainings, measurements, table and figures, beside what it claims.",
}
"""Commands that hold others, with their help."""

# fmt: off
# ruff: noqa: E501
_UNTYPED: tuple[tuple[str, str, str, str, str, tuple[str, ...]], ...] = (
    (
        "rubric",
        "unweave.methods.rubric.spec:RubricSpec",
        "unweave.methods.rubric.stage:run",
        "Have a chat model score how clear latents are, from 1 to 5.",
        "The judge sees the five strongest contexts of random latents, and beside them sets of contexts of "
        "five different latents, which should score low. By default a small judge runs here (a download of "
        "1.1 GB, once, and 7 GB of memory); with --judge.base-url any OpenAI-compatible server. Every reply "
        "is kept: after an interruption, none is asked again.",
        (
            "unweave rubric --sae runs/train-0123456789ab/sae --latents 8",
            "unweave rubric --sae runs/train-0123456789ab/sae --latents 128 --judge.model gpt-4o-2024-11-20 --judge.base-url https://api.openai.com/v1 --judge.api-key-env OPENAI_API_KEY",
        ),
    ),
    (
        "special-tokens",
        "unweave.methods.special_tokens.spec:SpecialTokensSpec",
        "unweave.methods.special_tokens.stage:run",
        "Measure a sparse autoencoder on special tokens and by role, and steer with a special token's latent.",
        "Reconstruction errors as the FAST paper defines them, over whole held-out conversations: on "
        "special tokens, by role, with and without norm outliers. Then the latents that answer to each "
        "special token, and the model's answers with the strongest one added at every position, beside "
        "latents drawn at random.",
        (
            "unweave special-tokens --sae runs/train-0123456789ab/sae",
            "unweave special-tokens --sae runs/train-0123456789ab/sae --unit median --alphas 0.1 0.2 0.5 1",
        ),
    ),
    (
        "paper instruct-saes",
        "unweave.papers.instruct_saes.spec:InstructSaesSpec",
        "unweave.papers.instruct_saes.recipe:run",
        "FAST: train SAEs of a chat model on whole conversations, and compare with block training.",
        "Trains ReLU and JumpReLU autoencoders at three layers with three initialisations on pre-training "
        "text in blocks, conversations in blocks, and conversations each on its own; measures errors of all "
        "and special tokens at the same number of active latents; has a judge rate latents; steers with "
        "latents of special tokens. Writes tables, figures and report.html. Finished parts are kept: after "
        "an interruption the same command goes on.",
        (
            "unweave paper instruct-saes --scale smoke --no-rubric    # under an hour on two cores",
            "unweave paper instruct-saes --scale paper --model Qwen/Qwen2.5-0.5B-Instruct --device cuda",
        ),
    ),
    (
        "paper feature-circuits",
        "unweave.papers.feature_circuits.spec:FeatureCircuitsSpec",
        "unweave.papers.feature_circuits.recipe:run",
        "Sparse feature circuits: agreement, SHIFT, and behaviours found without supervision.",
        "Trains autoencoders at attention, MLP and residual stream of four layers and the embedding; finds "
        "the circuits of subject-verb agreement in four structures and measures how faithful they are "
        "beside neurons; makes a classifier forget gender (SHIFT); finds behaviours and their circuits. "
        "Writes tables, figures and report.html. Finished parts are kept: after an interruption the same "
        "command goes on.",
        (
            "unweave paper feature-circuits --scale smoke    # about an hour and a half on two cores",
            "unweave paper feature-circuits --scale paper --model EleutherAI/pythia-70m-deduped --device cuda",
        ),
    ),
    (
        "circuit find",
        "unweave.methods.circuits.spec:CircuitFindSpec",
        "unweave.methods.circuits.stage_find:run",
        "Find the latents and errors that cause a behaviour, and how they act on one another.",
        "Integrated gradients over minimal pairs, or over single texts with ablation, give every latent's "
        "effect at every autoencoder's site; then the edges between those above a threshold. Keep positions "
        "for sentences of one template, sum over them for texts of any length. Examples run in batches that "
        "fit the memory; after an interruption the same command goes on where it was.",
        (
            "unweave circuit find --saes runs/train-0123456789ab/sae --task across_pp",
            "unweave circuit find --saes runs/train-0123456789ab/sae --inputs contexts.jsonl --summed positions",
        ),
    ),
    (
        "circuit evaluate",
        "unweave.methods.circuits.spec:CircuitEvaluateSpec",
        "unweave.methods.circuits.stage_evaluate:run",
        "Measure how much of a behaviour a circuit carries, on texts that it was not found on.",
        "Everything outside the circuit is set to its mean over the changed texts, at every threshold: "
        "faithfulness is what is left of the behaviour, 1 for the whole model and 0 for none; completeness "
        "is what is left without the circuit. Beside it stand circuits without errors, of neurons at the "
        "same sites, and of random nodes. Writes faithfulness.png, faithfulness.csv and how many nodes "
        "reach 0.8.",
        (
            "unweave circuit evaluate --circuit runs/circuit-find-0123456789ab",
            "unweave circuit evaluate --circuit runs/circuit-find-0123456789ab --start-layer 2 --spaced paper --draws 5",
        ),
    ),
    (
        "circuit draw",
        "unweave.methods.circuits.spec:CircuitDrawSpec",
        "unweave.methods.circuits.stage_draw:run",
        "Draw a circuit: layers upward, token positions across, as SVG, as a page to look around in, and as JSON.",
        "Rectangles are latents, triangles are errors; blue raises the metric when patched, red lowers it. "
        "Latents are labelled from an annotation file, as 'unweave annotate' writes it. circuit.html shows "
        "every node's effect and strongest edges, and with --contexts what it responds to. Without "
        "thresholds about 60 nodes are drawn.",
        (
            "unweave circuit draw --circuit runs/circuit-find-0123456789ab --annotations annotations.jsonl --contexts",
            "unweave circuit draw --circuit circuit.safetensors --node-threshold 0.1 --edge-threshold 0.01",
        ),
    ),
    (
        "circuit shift",
        "unweave.methods.shift.spec:CircuitShiftSpec",
        "unweave.methods.shift.stage:run",
        "Make a classifier forget what it should not rely on, without labels that tell the two apart (SHIFT).",
        "A linear classifier of professors and nurses is trained where all professors are men, all nurses "
        "women. Its circuit is found in the autoencoders' latents; a rule, a file of annotations or a chat "
        "model says which of them are about gender; those are ablated, and the classifier is tested on all "
        "four groups, as it is and trained anew. Beside it every baseline of the paper's Table 2: concept "
        "bottleneck, random latents, skylines by neurons and latents that use labels of gender, and the "
        "oracle. Writes table.md, a figure, and why each latent was ablated. After an interruption the same "
        "command goes on where it was.",
        (
            "unweave circuit shift --saes runs/train-0123456789ab/sae",
            "unweave circuit shift --saes runs/train-0123456789ab/sae --judge file --annotations mine.jsonl --seeds 1",
            "unweave circuit shift --saes runs/train-0123456789ab/sae --biographies hub:LabHC/bias_in_bios --judge chat",
        ),
    ),
    (
        "circuit behaviours",
        "unweave.methods.behaviours.spec:CircuitBehavioursSpec",
        "unweave.methods.behaviours.stage:run",
        "Discover what a model does in a text without naming it first, and find the circuit of each behaviour.",
        "Takes the tokens that the model is sure of and that do not repeat what stands before them, and "
        "clusters their contexts by what the model does with them: activations, latents, their effects on "
        "the answer, or gradients of the parameters. Each of the best clusters gets a circuit by ablation, "
        "and index.html shows them all. Contexts, vectors and every circuit are kept by themselves: asking "
        "for more behaviours, or another threshold, makes only what is new.",
        (
            "unweave circuit behaviours --saes runs/train-0123456789ab/sae",
            "unweave circuit behaviours --saes runs/train-0123456789ab/sae --tokens 400_000 --contexts 8192 --clusters 750 --behaviours 100 --examples 100 --steps 10",
            "unweave circuit behaviours --saes runs/train-0123456789ab/sae --vectors gradients --dimensions 1000 --clustering kmeans",
        ),
    ),
)


@lru_cache
def stages() -> dict[str, Command]:
    """{words: command}, in the order of help."""
    found = {command.words: command for command in commands()}
    for words, spec, run, summary, about, examples in _UNTYPED:
        if words not in found:
            module, _, name = spec.partition(":")
            kind = getattr(import_module(module), name)
            found[words] = Command(
                words=words, spec=kind, result=Result, stage=run, summary=summary, about=about, examples=examples
            )
    return found


def __getattr__(name: str) -> Any:
    """``unweave.cli.stages:command_circuit_find`` builds that command; the command line asks for it by this name."""
    written = name.removeprefix("command_")
    known = {words.replace(" ", "_").replace("-", "_"): command for words, command in stages().items()}
    if written == name or written not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unweave.cli.bridge import stage_command

    return stage_command(known[written])
