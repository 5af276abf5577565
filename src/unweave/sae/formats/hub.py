"""SAEs on the Hugging Face hub: ``hub:org/name[@revision][/sub/folder or file]``, and SAELens's names for some of them.

Only the files that a format can use are fetched, so that one SAE of a repository of hundreds costs only itself.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.sae.formats.source import Source

HUB, SAELENS = "hub:", "saelens:"

_FILES = (
    "cfg.json",
    "sae_weights.safetensors",
    "sae.safetensors",
    "config.json",
    "ae.pt",
    "params.npz",
    "params.safetensors",
    "hyperparams.json",
    "checkpoints/final.safetensors",
    "unweave.json",
)
"""What an SAE's folder may hold, in any format."""
_BESIDE = ("cfg.json", "config.yaml", "config.json", "hyperparams.json", "unweave.json")
"""What may lie beside a single file, or at the repository's top: without it the file does not say what it is."""

# release/id -> (repository, path). {0}, {1}, ... are the pattern's groups; what both halves name must agree.
_RELEASES: tuple[tuple[str, str, str], ...] = (
    (r"(gemma-scope-(?:2b|9b)-(?:pt|it)-(?:res|mlp|att|transcoders))"
     r"/((?:layer_\d+|embedding)/width_\w+/average_l0_\d+)",
     "google/{0}", "{1}"),
    (r"llama_scope_lx([rma])_(8x|32x)/l(\d+)\1_\2",
     "fnlp/Llama3_1-8B-Base-LX{0}-{1}", "Llama3_1-8B-Base-L{2}{0}-{1}"),
    (r"gpt2-small-resid-post-v5-32k/blocks\.(\d+)\.hook_resid_post",
     "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_{0}.pt"),
    (r"gpt2-small-(?=resid-post|resid-mid|attn-out|mlp-out)([a-z]+)-([a-z]+)-v5-(32k|128k)/blocks\.(\d+)\.hook_\1_\2",
     "jbloom/GPT2-Small-OAI-v5-{2}-{0}-{1}-SAEs", "v5_{2}_layer_{3}"),
    (r"gpt2-small-res-jb/(blocks\.\d+\.hook_resid_(?:pre|post))",
     "jbloom/GPT2-Small-SAEs-Reformatted", "{0}"),
    (r"pythia-70m-deduped-res-sm/blocks\.0\.hook_resid_pre",
     "ctigges/pythia-70m-deduped__res-sm_processed", "e-res-sm"),
    *((rf"pythia-70m-deduped-({kind})-sm/blocks\.(\d+)\.hook_{hook}",
       "ctigges/pythia-70m-deduped__{0}-sm_processed", "{1}-{0}-sm")
      for kind, hook in (("att", "attn_out"), ("mlp", "mlp_out"), ("res", "resid_post"))),
    (r"gemma-2-2b-res-matryoshka-dc/(blocks\.\d+\.hook_resid_post)",
     "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", "standard/{0}"),
    (r"gemma-2-9b-res-matryoshka-dc/(blocks\.\d+\.hook_resid_post)",
     "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60", "{0}"),
)  # fmt: skip


_PROCESSED = {
    "jbloom/GPT2-Small-SAEs-Reformatted": "these SAEs belong to a GPT-2 whose weights TransformerLens had centred, "
    "which their files do not say; the model as published gives other activations: measure before you trust them"
}
"""Repositories whose SAEs belong to a changed model, although their files do not say so (trap 12)."""


def fetch(name: str) -> Source:
    """Downloads what ``hub:`` or ``saelens:`` names into the hub's own cache. Raises UnweaveError when it cannot."""
    if name.startswith(SAELENS):
        repository, path = released(name)
        revision = None
    else:
        repository, revision, path = parse(name)
    return _download(name, repository, revision, path)


def parse(name: str) -> tuple[str, str | None, str]:
    """``hub:org/name[@revision][/path]`` as (org/name, revision, path)."""
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+?))?/?", name)
    if match is None or ".." in (match[3] or "").split("/"):
        raise UnweaveError(
            f"{name!r} is not a name on the hub", remedy="write hub:org/name, with @revision and /sub/folder if needed"
        )
    return match[1], match[2], match[3] or ""


def released(name: str) -> tuple[str, str]:
    """The repository and path of ``saelens:RELEASE/ID``. Raises UnweaveError for releases that are not known here."""
    release = name.removeprefix(SAELENS)
    for pattern, repository, path in _RELEASES:
        match = re.fullmatch(pattern, release)
        if match is None:
            continue
        groups = list(match.groups())
        if release.startswith("llama_scope"):
            groups[0] = groups[0].upper()
        return repository.format(*groups), path.format(*groups)
    remedy = "give the repository and path that SAELens lists for it: hub:org/name/path (docs/formats.md)"
    raise UnweaveError(f"unknown SAELens name {release!r}", remedy=remedy)


def _download(name: str, repository: str, revision: str | None, path: str) -> Source:
    import huggingface_hub

    patterns = [f"{path}/{file}" if path else file for file in _FILES]  # a folder's name may end in .pt: ask for both
    if path:
        patterns += [path, path.removesuffix(".pt") + "_cfg.json", *_beside(path)]
    try:
        top = Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=[*patterns, *_BESIDE])
        )
    except Exception as error:  # network, hub and authorisation errors of several libraries meet here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnweaveError(
            f"it cannot be fetched from the hub: {reason}",
            where=name,
            remedy="check the name and the network (a gated repository needs `hf auth login`), or download it "
            "yourself and give the folder",
        ) from error
    if repository in _PROCESSED:
        warnings.warn(_PROCESSED[repository], UnweaveWarning, stacklevel=2)
    place = top / path if path else top
    if not place.exists():
        what = f"the repository {repository} has no SAE at {path or 'its top'!r}"
        raise UnweaveError(what, where=name, remedy="name the folder that holds its files, as the hub's page shows it")
    return Source(place, name, {"repository": repository, "revision": top.name})


def _beside(path: str) -> list[str]:
    folders = [folder.as_posix() for folder in Path(path).parents if folder.as_posix() != "."][:2]
    return [f"{folder}/{file}" for folder in folders for file in _BESIDE]
