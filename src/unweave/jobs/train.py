"""Training: text -> tokens -> activations -> one SAE per site, saved with where it comes from.

A checkpoint holds every trainer's state and the place in the stream; killed at any moment, the same command goes on
from the last one and ends with the same bytes.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.progress import task
from unweave.core.run import Run, atomic_write
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource, MixingBuffer, Norms, calibrate
from unweave.data.tokens import TokenStore
from unweave.jobs.common import activation_source, load_lm, stamps, token_store
from unweave.jobs.specs import TrainSpec
from unweave.lm.model import LM
from unweave.sae import provenance
from unweave.sae.module import SAE
from unweave.sae.train import SAETrainer

VERSION = 1
_INIT_TOKENS = 16_384
_LOG_EVERY_TOKENS = 20_000
_CHECKPOINT = "checkpoint.pt"
_GAMMA_LIMIT = 3.0


def run(spec: TrainSpec, runs: Path) -> Run:
    """Trains one SAE per site. The run holds ``sae/`` (several sites: ``sae/<site>/``), a log and the result."""
    with Run.open(runs, "train", spec, version=VERSION, inputs=stamps(spec.model, spec.data)) as run:
        if run.done:
            return run
        started = time.monotonic()
        lm = load_lm(spec.model, spec.dtype, spec.device)
        sites = sorted({lm.site(site) for site in spec.sites})
        store, store_run = token_store(lm, spec.model, spec.data, "train", spec.data.tokens, runs)
        source = activation_source(lm, store, store_run, sites, spec.stream, spec.dtype, runs)
        _refuse_too_little(spec, store, source)
        heldout, _ = token_store(lm, spec.model, spec.data, "heldout", spec.data.heldout_tokens, runs)
        work = _Work(run, spec, lm, store, source)
        result = work.train()
        result["reference"] = work.save(heldout)
        run.finish(result | {"seconds": round(time.monotonic() - started, 1)})
        (run.path / _CHECKPOINT).unlink(missing_ok=True)
    return run


def sae_folder(run: Run, spec: TrainSpec, site: str | Site) -> Path:
    """Where a training run keeps the SAE of a site."""
    return run.path / "sae" if len(spec.sites) == 1 else run.path / "sae" / str(site)


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UnweaveError(
            f"the checkpoint is damaged: {str(error).splitlines()[0]}",
            where=str(path),
            remedy="delete it: training begins again, from the activations that are kept",
        ) from error


def _reference(sae: SAE, x: Tensor) -> dict[str, float]:
    """Unexplained variance and L0 on activations [N, D]."""
    codes = sae.codes(x)
    missed = (x - sae.decode(codes)).double().square().sum()
    spread = (x.double() - x.double().mean(0)).square().sum()
    return {
        "unexplained_variance": float(missed / spread),
        "l0": len(codes.values) / max(1, codes.n_rows),
        "tokens": codes.n_rows,
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def _refuse_too_little(spec: TrainSpec, store: TokenStore, source: ActivationSource) -> None:
    """Trap 10: no silent further epoch over too little text."""
    ids = torch.from_numpy(store.ids.astype("int64"))
    counted = len(ids) - sum(int((ids == excluded).sum()) for excluded in source.exclude_ids)
    if spec.sae.tokens > spec.epochs * counted:
        raise UnweaveError(
            f"{spec.sae.tokens} training tokens are {spec.sae.tokens / max(1, counted):.1f} epochs over the {counted} "
            "distinct tokens that count",
            where=f"epochs allows {spec.epochs:g}",
            remedy="give more text (data.tokens), train on fewer (sae.tokens), or allow more epochs",
        )


@dataclass
class _Work:
    """A training run under way."""

    run: Run
    spec: TrainSpec
    lm: LM
    store: TokenStore
    source: ActivationSource

    def train(self) -> dict[str, Any]:
        self.norms: dict[Site, Norms] = calibrate(self.source, self.spec.stream.max_norm_ratio)
        self._warn_of_norms()
        limits = {site: norms.max_norm for site, norms in self.norms.items()}
        self.policies = {site: TokenPolicy(self.source.exclude_ids, limit) for site, limit in limits.items()}
        smallest = 2 * self.spec.sae.batch
        self.buffer = MixingBuffer(
            self.source,
            batch=self.spec.sae.batch,
            capacity=max(self.spec.stream.buffer_tokens, smallest),
            seed=self.spec.seed,
            policies=self.policies,
        )
        path = self.run.path / _CHECKPOINT
        saved = _load_checkpoint(path) if path.exists() else None
        if saved is not None:
            self.buffer.load_state_dict(saved["stream"])
        device = self.lm.device
        self.trainers = {  # what a trainer measures on its first sample is part of its state
            site: SAETrainer(self.spec.sae, x.shape[1], init_x=x.to(device), seed=self.spec.seed)
            for site, x in self.buffer.peek(_INIT_TOKENS).items()
        }
        if saved is not None:
            for site, trainer in self.trainers.items():
                trainer.load_state_dict(saved["trainers"][str(site)])
            self.run.log("resumed", {"tokens": self.tokens_seen})
        self._loop()
        return self._result()

    @property
    def tokens_seen(self) -> int:
        return next(iter(self.trainers.values())).tokens_seen

    def _warn_of_norms(self) -> None:
        """Trap 7: a mean far larger than the spread kills latents early unless it is taken off."""
        for site, norms in self.norms.items():
            self.run.log("norms", {"site": str(site), **asdict(norms)})
            if norms.gamma > _GAMMA_LIMIT and self.spec.sae.centre == "none":
                warnings.warn(
                    f"{site}: the mean activation is {norms.gamma:.1f} times the spread; many latents will die. "
                    "Use sae.centre mean or median.",
                    UnweaveWarning,
                    stacklevel=2,
                )

    def _loop(self) -> None:
        total = self.spec.sae.tokens
        last_saved, next_log = time.monotonic(), self.tokens_seen
        name = "train " + ", ".join(map(str, self.source.sites))
        with task(name, total=total, unit="tokens", done=self.tokens_seen) as progress:
            while self.tokens_seen < total:
                batch = self.buffer.next()
                for site, trainer in self.trainers.items():
                    found = trainer.step(batch[site].to(self.lm.device))
                    if self.tokens_seen >= next_log or trainer.done:
                        self.run.log("train", {"site": str(site), "tokens": trainer.tokens_seen, **_rounded(found)})
                        progress.note(f"unexplained {found['fvu']:.3f}, dead {found['dead']:.0f}")
                if self.tokens_seen >= next_log:
                    next_log = self.tokens_seen + _LOG_EVERY_TOKENS
                progress.advance(self.spec.sae.batch)
                if time.monotonic() - last_saved > self.spec.checkpoint_seconds:
                    self._checkpoint()
                    last_saved = time.monotonic()
        self._checkpoint()

    def _checkpoint(self) -> None:
        state = {
            "stream": self.buffer.state_dict(),
            "trainers": {str(site): trainer.state_dict() for site, trainer in self.trainers.items()},
        }
        with atomic_write(self.run.path / _CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def save(self, heldout: TokenStore) -> dict[str, dict[str, float]]:
        """Saves every SAE with its provenance; returns its unexplained variance and L0 on held-out text."""
        source = ActivationSource(
            self.lm,
            heldout,
            self.source.sites,
            chunk_tokens=heldout.n_tokens,
            batch_tokens=self.source.batch_tokens,
            exclude_ids=self.source.exclude_ids,
        )
        sample = source.chunk(0)
        references = {}
        for site, trainer in self.trainers.items():
            sae = trainer.to_sae(read=site, policy=self.policies[site])
            inside = TokenPolicy(max_norm=self.policies[site].max_norm)  # the source has left the excluded ids out
            x = sample.x[site][inside.keep(sample.x[site])].to(self.lm.device)
            references[str(site)] = _reference(sae, x)
            sae.provenance = {
                "model": provenance.describe_model(self.lm, sae),
                "data": {
                    "context": self.spec.data.pack.context,
                    "bos": self.spec.data.pack.bos,
                    "begins_with_bos": self._begins_with_bos(),
                    **self.store.meta,
                },
                "train": self.spec.to_dict(),
                "tokens": trainer.tokens_seen,
                "distinct_tokens": self.store.n_tokens,
                "reference": references[str(site)],
            }
            sae.save(sae_folder(self.run, self.spec, site))
        return references

    def _begins_with_bos(self) -> bool:
        """Whether the rows that were trained on begin with the BOS token (traps 3 and 6)."""
        bos = getattr(self.lm.tokenizer, "bos_token_id", None)
        first = self.store.ids[self.store.starts[:-1]]
        return bos is not None and float((first == bos).mean()) > 0.5

    def _result(self) -> dict[str, Any]:
        counted = {str(s): asdict(n) for s, n in self.norms.items()}
        return {
            "tokens": self.tokens_seen,
            "distinct_tokens": self.store.n_tokens,
            "epochs": self.buffer.epoch + self.buffer.position / self.source.n_chunks,
            "outliers_dropped": self.buffer.outliers,
            "norms": counted,
            "sites": [str(s) for s in self.source.sites],
        }
