"""Training: text -> tokens -> activations -> SAEs, several at once, saved with where they come from.

1. Every variant of the spec at every site is a member. All of them train on the same batches, from one forward pass.
2. A checkpoint holds every trainer's state and the place in the stream; killed at any moment, the same command goes on
   from the last one and ends with the same bytes.
3. Started by torchrun, several processes divide the forward passes. Where there are at least as many members as
   processes, each trains its own members on whole batches; otherwise all train every member, each on its part of the
   batch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.core import checkpoint
from unweave.core.dist import SOLO, Group, refuse_shared_device
from unweave.core.errors import UnweaveError, UnweaveWarning
from unweave.core.files import read_json
from unweave.core.progress import task
from unweave.core.run import Run
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.data.norms import Norms, calibrate
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource, MixingBuffer, RowBatches
from unweave.data.tokens import TokenStore
from unweave.inputs.inputs import activation_source, load_lm, token_store
from unweave.lm.model import LM
from unweave.methods.train import start
from unweave.methods.train.end_to_end import end_to_end_step
from unweave.methods.train.heldout import Heldout
from unweave.methods.train.members import Member, members, sites_of, variants_of
from unweave.methods.train.result import Reference, SiteNorms, TrainedSAE, Training
from unweave.methods.train.spec import TrainSpec
from unweave.methods.train.trainer import SAETrainer
from unweave.sae import provenance
from unweave.sae.module import SAE

_INIT_TOKENS = 16_384
_LOG_EVERY_TOKENS = 20_000
_GAMMA_LIMIT = 3.0
_SLICE = 1 << 22
"""tokens that are looked at at a time where all are"""


@stage("train", version=5, also=start.inputs, together=True)
def run(spec: TrainSpec, ctx: Context) -> Training:
    """Trains every variant at every site. The run holds ``sae/`` (several: ``sae/<site>/<variant>``) and the log."""
    group, runs = ctx.group, ctx.runs
    refuse_shared_device(spec.device, group)
    variants_of(spec.sae, spec.variants)  # refused before the model loads, and what follows before text is read
    for _ in group.in_turn():
        lm = load_lm(spec.model, spec.dtype, spec.device)
    every = members(spec, lm)
    _refuse_empty_shares(spec, every, group)
    _refuse_too_little(spec, spec.data.tokens + spec.data.pack.context, "data.tokens")
    starts = start.fitting(spec, lm, every, _own(every, group))
    for _ in group.in_turn():
        store, store_run = token_store(lm, spec.model, spec.data, "train", None, runs)
        heldout, _ = token_store(lm, spec.model, spec.data, "heldout", None, runs)
    source = activation_source(lm, store, store_run, sites_of(every), spec.stream, spec.dtype, runs, group)
    _refuse_too_little(spec, _counted(store, source), f"epochs allows {spec.epochs:g}")
    work = _Work(ctx.run, spec, lm, store, source, every, group, starts)
    work.train()
    work.save(heldout)
    return work.result()


def _divided(every: list[Member], group: Group) -> bool:
    """Whether each process trains members of its own."""
    return 1 < group.size <= len(every)


def _own(every: list[Member], group: Group) -> list[Member]:
    """The members that this process trains."""
    return every[group.rank :: group.size] if _divided(every, group) else every


def _refuse_empty_shares(spec: TrainSpec, every: list[Member], group: Group) -> None:
    if not _divided(every, group) and spec.sae.batch < group.size:
        what = f"batches of {spec.sae.batch} tokens cannot be divided among {group.size} processes"
        raise UnweaveError(what, where="sae.batch", remedy="use larger batches or fewer processes")


def sae_folder(run: Run[Any], name: str = "") -> Path:
    """Where a training run keeps an SAE; ``name`` is "" for a run's only one, else as in the result's ``saes``."""
    return run.path / "sae" / name


def last_checkpoint(folder: Path, names: Collection[str]) -> dict[str, Any] | None:
    """The last whole checkpoint with the trainers of these names, whichever process had them; None where there is none.

    Of every process's state only these trainers are held.
    """
    whole: dict[str, Any] = {"trainers": {}}
    for state in checkpoint.states(folder):
        own = {name: trainer for name, trainer in state["trainers"].items() if name in names}
        whole = state | whole | {"trainers": whole["trainers"] | own}
    return whole if len(whole) > 1 else None


def _trained(run: Run[Any], member: Member) -> TrainedSAE:
    """What a saved SAE says of itself."""
    folder = sae_folder(run, member.name)
    about = read_json(folder / "cfg.json")
    reference = about["metadata"]["unweave"]["provenance"]["reference"]
    return TrainedSAE(
        name=member.name,
        read=member.read,
        write=member.write,
        kind=member.spec.kind,
        d_in=about["d_in"],
        latents=about["d_sae"],
        k=about.get("k"),
        folder=folder.relative_to(run.path),
        reference=Reference(**reference),
    )


def _counted(store: TokenStore, source: ActivationSource) -> int:
    """How many of the stored tokens are not excluded."""
    slices = (store.ids[first : first + _SLICE] for first in range(0, store.n_tokens, _SLICE))
    return store.n_tokens - sum(int(np.isin(ids, source.exclude_ids).sum()) for ids in slices)


def _refuse_too_little(spec: TrainSpec, counted: int, where: str) -> None:
    """Trap 10: no silent further epoch over too little text, of which at most ``counted`` tokens count."""
    if spec.sae.tokens > spec.epochs * counted:
        raise UnweaveError(
            f"{spec.sae.tokens} training tokens are {spec.sae.tokens / max(1, counted):.1f} epochs over the {counted} "
            "distinct tokens that count",
            where=where,
            remedy="give more text (data.tokens), train on fewer (sae.tokens), or allow more epochs",
        )


@dataclass
class _Work:
    """A training run under way, in one process of ``group``."""

    run: Run
    spec: TrainSpec
    lm: LM
    store: TokenStore
    source: ActivationSource
    members: list[Member]
    group: Group
    starts: dict[str, tuple[SAE, dict[str, Any] | None]]
    """the SAEs to start from, until their training begins"""

    def __post_init__(self) -> None:
        self.divided = _divided(self.members, self.group)
        self.own = _own(self.members, self.group)
        self.shared = SOLO if self.divided else self.group  # who trains an SAE together
        self.writes = self.divided or self.group.rank == 0
        self.accepted: dict[str, dict[str, Any]] = {}  # what was measured of SAEs to start from

    def train(self) -> None:
        spec, source = self.spec, self.source
        batch, seed = spec.sae.batch, spec.seed
        self.norms: dict[Site, Norms] = calibrate(source, spec.stream.max_norm_ratio)
        self._warn_of_norms()
        self.policies = {site: TokenPolicy(source.exclude_ids, norms.max_norm) for site, norms in self.norms.items()}
        capacity = max(spec.stream.buffer_tokens, 2 * batch)
        self.buffer = MixingBuffer(source, batch=batch, capacity=capacity, seed=seed, policies=self.policies)
        self.rows = RowBatches(self.store, self.lm.pad_id, batch_tokens=batch, seed=seed, min_rows=self.shared.size)
        saved = last_checkpoint(self.run.path, {member.name for member in self.own})
        if saved is not None:
            self.buffer.load_state_dict(saved["stream"])
            self.rows.load_state_dict(saved["rows"])
        sample = self.buffer.peek(_INIT_TOKENS)  # what a trainer measures on its first sample is part of its state
        self.trainers = {member.name: self._trainer(member, sample) for member in self.own}
        del sample
        if saved is not None:
            for name, trainer in self.trainers.items():
                trainer.load_state_dict(saved["trainers"][name])
            if self.group.rank == 0:
                self.run.log("resumed", {"tokens": self.tokens_seen})
        self._loop()
        self.counted = self._count()  # the trainers go as their SAEs are saved

    def _trainer(self, member: Member, sample: dict[Site, Tensor]) -> SAETrainer:
        (x, goal), device = member.of(sample), self.lm.device
        sae, accepted = self.starts.pop(member.name, (None, None))
        if accepted is not None:
            self.accepted[member.name] = accepted
        return SAETrainer(
            member.spec, x.shape[1], init_x=x, init_target=goal, device=device, start=sae, group=self.shared
        )

    @property
    def tokens_seen(self) -> int:
        """The same for every trainer in every process."""
        return next(iter(self.trainers.values())).tokens_seen

    def _warn_of_norms(self) -> None:
        """Trap 7: a mean far larger than the spread kills latents early unless it is taken off."""
        uncentred = any(member.spec.centre == "none" for member in self.members)
        for site, norms in self.norms.items() if self.group.rank == 0 else ():
            self.run.log("norms", {"site": str(site), **asdict(norms)})
            if norms.gamma > _GAMMA_LIMIT and uncentred:
                warnings.warn(
                    f"{site}: the mean activation is {norms.gamma:.1f} times the spread; many latents will die. "
                    "Use sae.centre mean or median.",
                    UnweaveWarning,
                    stacklevel=2,
                )

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        total = self.spec.sae.tokens
        last_saved, next_log = time.monotonic(), self.tokens_seen
        name = f"train {len(self.members)} SAEs" if len(self.members) > 1 else f"train {self.members[0].read}"
        with task(name, total=total, unit="tokens", done=self.tokens_seen) as progress:
            while self.tokens_seen < total:
                before = self.tokens_seen
                rows = self._step()
                if before >= next_log or self.tokens_seen >= total:
                    self._log(rows)
                    next_log = self.tokens_seen + _LOG_EVERY_TOKENS
                    first = next(iter(rows.values()))
                    progress.note(f"unexplained {first['fvu']:.3f}, dead {first['dead']:.0f}")
                progress.advance(self.tokens_seen - before)
                due = time.monotonic() - last_saved > self.spec.checkpoint_seconds
                if bool(self.group.broadcast(torch.tensor(int(due)))):
                    self._checkpoint()
                    last_saved = time.monotonic()
        self._checkpoint()

    def _step(self) -> dict[str, dict[str, float]]:
        """One optimiser step of every trainer here."""
        if self.spec.objective == "end-to-end":
            tokens, _ = self.rows.next()
            mine, nonfinite = tokens.rows(self.shared.share(len(tokens))), self.spec.stream.nonfinite
            rows, left_out = {}, (0, 0)
            for member in self.own:
                trainer, policy = self.trainers[member.name], self.policies[member.read]
                rows[member.name] = row = end_to_end_step(
                    self.lm, trainer, mine, member.read, policy, nonfinite=nonfinite
                )
                left_out = int(row.pop("outliers")), int(row.pop("nonfinite"))  # equal for all, which are at one site
            self.rows.outliers += left_out[0]
            self.rows.nonfinite += left_out[1]
            return rows
        mine = self.shared.share(self.spec.sae.batch)
        batch = {site: x.to(self.lm.device)[mine] for site, x in self.buffer.next().items()}
        return {member.name: self.trainers[member.name].step(*member.of(batch)) for member in self.own}

    def _log(self, rows: dict[str, dict[str, float]]) -> None:
        for member in self.own if self.writes else ():
            place = {"site": str(member.write)} | ({"sae": member.name} if member.name else {})
            rounded = {name: float(f"{value:.6g}") for name, value in rows[member.name].items()}
            self.run.log("train", place | {"tokens": self.trainers[member.name].tokens_seen, **rounded})

    def _checkpoint(self) -> None:
        state = {
            "stream": self.buffer.state_dict(),
            "rows": self.rows.state_dict(),
            "trainers": {name: trainer.state_dict() for name, trainer in self.trainers.items()},
        }
        step = next(iter(self.trainers.values())).steps
        checkpoint.save(self.run.path, state, step, self.group, self.writes)

    # -- the end ------------------------------------------------------------------------------------------------------

    def save(self, heldout: TokenStore) -> None:
        """Saves every SAE with its provenance, and its unexplained variance and L0 on held-out text in that."""
        source = ActivationSource(
            self.lm, heldout, self.source.sites, chunk_tokens=heldout.n_tokens, batch_tokens=self.source.batch_tokens,
            exclude_ids=self.source.exclude_ids, nonfinite=self.source.nonfinite, group=self.group,
        )  # fmt: skip
        tokens, pack = self.tokens_seen, self.spec.data.pack
        measured = {member.name: self._finished(member) for member in self.own if self.writes}
        with task("measure on held-out text", total=heldout.n_tokens, unit="tokens") as progress:
            for batch in source.passes(0):
                for member in self.own if self.writes else ():
                    policy = TokenPolicy(max_norm=self.policies[member.read].max_norm)  # excluded ids are out already
                    inside = policy.keep(batch.x[member.read])
                    x, goal = (batch.x[site][inside].to(self.lm.device) for site in (member.read, member.write))
                    measured[member.name].add(x, goal)
                progress.advance(len(batch.where))
        for member in self.own if self.writes else ():
            sae = measured[member.name].sae
            settings = self.spec.to_dict() | {"sae": member.spec.to_dict()}
            if settings["accept_mismatch"] is None:
                del settings["accept_mismatch"]
            rows = {"context": pack.context, "bos": pack.bos, "begins_with_bos": self._begins_with_bos()}
            sae.provenance = {
                "model": provenance.describe_model(self.lm, sae),
                "data": rows | self.store.meta,
                "train": settings,
                "tokens": tokens,
                "distinct_tokens": self.store.n_tokens,
                "reference": measured[member.name].reference(),
            }
            if member.name in self.accepted:
                sae.provenance["start_accepted"] = self.accepted[member.name]
            sae.save(sae_folder(self.run, member.name))
        self.group.barrier()

    def _finished(self, member: Member) -> Heldout:
        """A member's SAE, to be measured; what its training held is released."""
        sae = self.trainers.pop(member.name).to_sae().at(member.read, member.write)
        sae.policy = self.policies[member.read]
        return Heldout(sae)

    def _begins_with_bos(self) -> bool:
        """Whether the rows that were trained on begin with the BOS token (traps 3 and 6)."""
        bos = getattr(self.lm.tokenizer, "bos_token_id", None)
        first = self.store.ids[self.store.starts[:-1]]
        return bos is not None and float((first == bos).mean()) > 0.5

    def _count(self) -> tuple[int, float, tuple[int, int]]:
        """Tokens trained on, epochs, and tokens left out: outliers, and those that are not finite."""
        seen, rows = self.tokens_seen, self.rows
        if self.spec.objective == "end-to-end":
            return seen, rows.epoch + rows.position / self.store.n_rows, (rows.outliers, rows.nonfinite)
        return seen, seen / self.store.n_tokens, self.buffer.left_out(seen)  # the buffer has drawn more

    def result(self) -> Training:
        """What the run holds, once every SAE is saved."""
        tokens, epochs, (outliers, nonfinite) = self.counted
        return Training(
            model=self.lm.name,
            note=self.lm.note,
            tokens=tokens,
            distinct_tokens=self.store.n_tokens,
            epochs=epochs,
            outliers_dropped=outliers,
            nonfinite_dropped=nonfinite,
            text={name: value for name, value in self.store.meta.items() if name != "tokenizer"},
            norms=tuple(SiteNorms(site=site, **asdict(norms)) for site, norms in self.norms.items()),
            sites=tuple(self.source.sites),
            processes=self.group.size,
            saes=tuple(_trained(self.run, member) for member in self.members),
        )
