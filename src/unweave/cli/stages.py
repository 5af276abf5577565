"""The stages that are commands: what each is called, what its help teaches, and where its Spec and function live.

A command is built from its stage's Spec when it is asked for, so that ``unweave --help`` imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from unweave.core.spec import Spec


class Outcome(Protocol):
    """What a stage returns: a finished run directory, or anything with these two."""

    @property
    def path(self) -> Path: ...

    @property
    def result(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Stage:
    """One command. ``spec_home`` and ``run_home`` are ``module:name``; ``run(spec, runs)`` does the work.

    ``group`` is the command that it stands under, as ``paper``.
    """

    name: str
    summary: str
    about: str
    examples: tuple[str, ...]
    spec_home: str
    run_home: str
    group: str = ""

    @property
    def command(self) -> str:
        """What is typed after ``unweave``: ``train``, ``paper instruct-saes``."""
        return f"{self.group} {self.name}".strip()

    @property
    def help(self) -> str:
        """What the command does, how files and options go together, and examples."""
        examples = "\n".join(f"    {line}" for line in self.examples)
        return (
            f"{self.summary}\n\n{self.about}\n\n"
            "Fields come from their defaults, then the YAML or TOML file, then the options. A dotted option is a field "
            "inside a group: --data.seed 1 stands for data: {seed: 1} in the file. The run directory is "
            "printed; asking the same again reuses it.\n\n"
            f"For example:\n\n{examples}"  # a heading "Examples:" would be read as a docstring section, and dropped
        )

    def spec(self) -> type[Spec]:
        return _load(self.spec_home)

    def run(self, spec: Spec, runs: Path) -> Outcome:
        function: Callable[[Spec, Path], Outcome] = _load(self.run_home)
        return function(spec, runs)


def _load(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


_FOLDERS = {"eval": "methods.evaluate", "latents": "latents", "doctor": "methods.train"}
"""the commands that do not stand in a folder of their own name"""


def _stage(name: str, summary: str, about: str, *examples: str) -> Stage:
    folder = _FOLDERS.get(name, f"methods.{name.replace('-', '_')}")
    return Stage(
        name,
        summary,
        about,
        examples,
        spec_home=f"unweave.{folder}.spec:{name.title().replace('-', '')}Spec",
        run_home=f"unweave.{folder}.{'doctor' if name == 'doctor' else 'stage'}:run",
    )


_ALL = (
    _stage(
        "demo",
        "The main job from nothing to a report, on a small real model.",
        "Fetches the default model and text, harvests activations, trains a sparse autoencoder, measures it, collects "
        "what each latent responds to, finds the latents behind subject-verb agreement, steers with one of them, and "
        "writes report.html. About ten minutes on two cores; a second call returns at once, and after an "
        "interruption the same command goes on where it was.",
        "unweave demo",
        "unweave demo --scale smoke --runs elsewhere    # everything smaller: two minutes",
    ),
    _stage(
        "train",
        "Train sparse autoencoders on a model's activations, at one site or many, in one setting or many.",
        "Reads text or dialogues, runs the model up to the last site, and trains on what it finds there. Each "
        "autoencoder is saved as a SAELens folder together with what it was trained on. Interrupted training resumes "
        "exactly. torchrun -m unweave train divides the work between processes.",
        "unweave train --model smollm2-135m-instruct --sites resid_post.9",
        "unweave train my.yaml --sae.k 64 --data.sources wiki notes.txt",
        "unweave train --sites 'resid_post.{4,9}' --variants '{kind: [relu, jumprelu], seed: [0, 1]}'",
    ),
    _stage(
        "eval",
        "Measure a sparse autoencoder: fit, sparsity, and what the model loses when it is spliced in.",
        "Held-out text, special tokens and norm outliers left out; cross-entropy is compared with zero- and "
        "mean-ablation of the same site.",
        "unweave eval --sae runs/train-0123456789ab/sae",
    ),
    _stage(
        "latents",
        "Collect each latent's record: contexts it fires on, how often, and what it writes to the logits.",
        "Top, quantile and random contexts, the firing rate, the tokens it promotes and suppresses.",
        "unweave latents --sae runs/train-0123456789ab/sae",
    ),
    _stage(
        "trace",
        "Find the latents that cause a behaviour, and measure the strongest.",
        "Attribution patching and integrated gradients over minimal pairs of subject-verb agreement, next to the "
        "effects of the strongest latents measured from both ends, and how much of the whole they carry together.",
        "unweave trace --sae runs/train-0123456789ab/sae",
    ),
    _stage(
        "steer",
        "Generate text with a latent turned up, at several strengths, beside the unchanged model.",
        "Only the latent's own part of the activation changes; what the autoencoder does not explain is kept.",
        "unweave steer --sae runs/train-0123456789ab/sae --latent 1234",
    ),
    _stage(
        "rubric",
        "Have a chat model score how clear latents are, from 1 to 5.",
        "The judge sees the five strongest contexts of random latents, and beside them sets of contexts of five "
        "different latents, which should score low. By default a small judge runs here (a download of 1.1 GB, once, "
        "and 7 GB of memory); with --judge.base-url any OpenAI-compatible server. Every reply is kept: after an "
        "interruption, none is asked again.",
        "unweave rubric --sae runs/train-0123456789ab/sae --latents 8",
        "unweave rubric --sae runs/train-0123456789ab/sae --latents 128 --judge.model gpt-4o-2024-11-20 "
        "--judge.base-url https://api.openai.com/v1 --judge.api-key-env OPENAI_API_KEY",
    ),
    _stage(
        "special-tokens",
        "Measure a sparse autoencoder on special tokens and by role, and steer with a special token's latent.",
        "Reconstruction errors as the FAST paper defines them, over whole held-out conversations: on special tokens, "
        "by role, with and without norm outliers. Then the latents that answer to each special token, and the model's "
        "answers with the strongest one added at every position, beside latents drawn at random.",
        "unweave special-tokens --sae runs/train-0123456789ab/sae",
        "unweave special-tokens --sae runs/train-0123456789ab/sae --unit median --alphas 0.1 0.2 0.5 1",
    ),
    _stage(
        "report",
        "Write one self-contained HTML page from finished runs.",
        "Numbers with their meaning, training curves, a browsable list of latents, attribution and steered text. "
        "The page needs no network and no other file.",
        "unweave report --sae runs/train-0123456789ab/sae",
    ),
    _stage(
        "doctor",
        "Say what a run will cost before it is started, and what is wrong with it.",
        "Takes the same fields as train. Looks at the model, the site, the data and the machine, and tells tokens, "
        "memory, disk and time, and every problem it can find without doing the work.",
        "unweave doctor my.yaml",
        "unweave doctor --model smollm2-135m-instruct --sites resid_post.9 --json",
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}

_PAPERS = (
    Stage(
        "instruct-saes",
        "FAST: train SAEs of a chat model on whole conversations, and compare with block training.",
        "Trains ReLU and JumpReLU autoencoders at three layers with three initialisations on pre-training text in "
        "blocks, conversations in blocks, and conversations each on its own; measures errors of all and special tokens "
        "at the same number of active latents; has a judge rate latents; steers with latents of special tokens. Writes "
        "tables, figures and report.html. Finished parts are kept: after an interruption the same command goes on.",
        (
            "unweave paper instruct-saes --scale smoke --no-rubric    # under an hour on two cores",
            "unweave paper instruct-saes --scale paper --model Qwen/Qwen2.5-0.5B-Instruct --device cuda",
        ),
        spec_home="unweave.papers.instruct_saes.spec:InstructSaesSpec",
        run_home="unweave.papers.instruct_saes.recipe:run",
        group="paper",
    ),
    Stage(
        "feature-circuits",
        "Sparse feature circuits: agreement, SHIFT, and behaviours found without supervision.",
        "Trains autoencoders at attention, MLP and residual stream of four layers and the embedding; finds the "
        "circuits of subject-verb agreement in four structures and measures how faithful they are beside neurons; "
        "makes a classifier forget gender (SHIFT); finds behaviours and their circuits. Writes tables, figures and "
        "report.html. "
        "Finished parts are kept: after an interruption the same command goes on.",
        (
            "unweave paper feature-circuits --scale smoke    # about an hour and a half on two cores",
            "unweave paper feature-circuits --scale paper --model EleutherAI/pythia-70m-deduped --device cuda",
        ),
        spec_home="unweave.papers.feature_circuits.spec:FeatureCircuitsSpec",
        run_home="unweave.papers.feature_circuits.recipe:run",
        group="paper",
    ),
)
PAPERS: dict[str, Stage] = {stage.name: stage for stage in _PAPERS}


_OWN = ("shift", "behaviours")
"""what has a folder of its own; the others are stages of methods/circuits"""


def _circuit(name: str, summary: str, about: str, *examples: str) -> Stage:
    return Stage(
        name,
        summary,
        about,
        examples,
        spec_home=f"unweave.methods.{name if name in _OWN else 'circuits'}.spec:Circuit{name.title()}Spec",
        run_home=f"unweave.methods.{f'{name}.stage' if name in _OWN else f'circuits.stage_{name}'}:run",
        group="circuit",
    )


_CIRCUITS = (
    _circuit(
        "find",
        "Find the latents and errors that cause a behaviour, and how they act on one another.",
        "Integrated gradients over minimal pairs, or over single texts with ablation, give every latent's effect at "
        "every autoencoder's site; then the edges between those above a threshold. Keep positions for sentences of one "
        "template, sum over them for texts of any length. Examples run in batches that fit the memory; after an "
        "interruption the same command goes on where it was.",
        "unweave circuit find --saes runs/train-0123456789ab/sae --task across_pp",
        "unweave circuit find --saes runs/train-0123456789ab/sae --inputs contexts.jsonl --summed positions",
    ),
    _circuit(
        "evaluate",
        "Measure how much of a behaviour a circuit carries, on texts that it was not found on.",
        "Everything outside the circuit is set to its mean over the changed texts, at every threshold: faithfulness is "
        "what is left of the behaviour, 1 for the whole model and 0 for none; completeness is what is left without the "
        "circuit. Beside it stand circuits without errors, of neurons at the same sites, and of random nodes. Writes "
        "faithfulness.png, faithfulness.csv and how many nodes reach 0.8.",
        "unweave circuit evaluate --circuit runs/circuit-find-0123456789ab",
        "unweave circuit evaluate --circuit runs/circuit-find-0123456789ab --start-layer 2 --spaced paper --draws 5",
    ),
    _circuit(
        "draw",
        "Draw a circuit: layers upward, token positions across, as SVG, as a page to look around in, and as JSON.",
        "Rectangles are latents, triangles are errors; blue raises the metric when patched, red lowers it. Latents are "
        "labelled from an annotation file, as 'unweave annotate' writes it. circuit.html shows every node's effect and "
        "strongest edges, and with --contexts what it responds to. Without thresholds about 60 nodes are drawn.",
        "unweave circuit draw --circuit runs/circuit-find-0123456789ab --annotations annotations.jsonl --contexts",
        "unweave circuit draw --circuit circuit.safetensors --node-threshold 0.1 --edge-threshold 0.01",
    ),
    _circuit(
        "shift",
        "Make a classifier forget what it should not rely on, without labels that tell the two apart (SHIFT).",
        "A linear classifier of professors and nurses is trained where all professors are men, all nurses women. Its "
        "circuit is found in the autoencoders' latents; a rule, a file of annotations or a chat model says which of "
        "them are about gender; those are ablated, and the classifier is tested on all four groups, as it is and "
        "trained anew. Beside it every baseline of the paper's Table 2: concept bottleneck, random latents, skylines "
        "by neurons and latents that use labels of gender, and the oracle. Writes table.md, a figure, and why each "
        "latent was ablated. After an interruption the same command goes on where it was.",
        "unweave circuit shift --saes runs/train-0123456789ab/sae",
        "unweave circuit shift --saes runs/train-0123456789ab/sae --judge file --annotations mine.jsonl --seeds 1",
        "unweave circuit shift --saes runs/train-0123456789ab/sae --biographies hub:LabHC/bias_in_bios --judge chat",
    ),
    _circuit(
        "behaviours",
        "Discover what a model does in a text without naming it first, and find the circuit of each behaviour.",
        "Takes the tokens that the model is sure of and that do not repeat what stands before them, and clusters their "
        "contexts by what the model does with them: activations, latents, their effects on the answer, or gradients of "
        "the parameters. Each of the best clusters gets a circuit by ablation, and index.html shows them all. "
        "Contexts, vectors and every circuit are kept by themselves: asking for more behaviours, or another threshold, "
        "makes only what is new.",
        "unweave circuit behaviours --saes runs/train-0123456789ab/sae",
        "unweave circuit behaviours --saes runs/train-0123456789ab/sae --tokens 400_000 --contexts 8192 --clusters 750 "
        "--behaviours 100 --examples 100 --steps 10",
        "unweave circuit behaviours --saes runs/train-0123456789ab/sae --vectors gradients --dimensions 1000 "
        "--clustering kmeans",
    ),
)
CIRCUITS: dict[str, Stage] = {stage.name: stage for stage in _CIRCUITS}

GROUPS: dict[str, tuple[str, dict[str, Stage]]] = {
    "circuit": (
        "Find the circuits of a model's behaviours in latents, check them, draw them and change them.",
        CIRCUITS,
    ),
    "paper": ("Run a paper's recipe: its trainings, measurements, table and figures, beside what it claims.", PAPERS),
}
"""Commands that hold others: {name: (help, its stages)}."""


def __getattr__(name: str) -> Any:
    """``unweave.cli.stages:command_train`` builds that command, ``paper_instruct_saes`` and ``circuit_find`` those in
    a group; the command line asks for them by these names."""
    kind, _, written = name.partition("_")
    known = STAGES if kind == "command" else GROUPS.get(kind, ("", {}))[1]
    stage = known.get(written) or known.get(written.replace("_", "-"))
    if stage is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unweave.cli.bridge import stage_command

    return stage_command(stage)
