"""SAEs of known features, built or given, measured beside the truth."""

from __future__ import annotations

from unweave.core.errors import UnweaveError
from unweave.core.stage import Context, stage
from unweave.methods.saebench.baselines import random_directions
from unweave.methods.saebench.known.measures import measures
from unweave.methods.saebench.known.result import Known, KnownResult
from unweave.methods.saebench.known.spec import KnownSpec
from unweave.methods.saebench.planted import Planted
from unweave.sae.module import SAE


@stage("planted", version=1)
def run(spec: KnownSpec, ctx: Context) -> KnownResult:
    """SAEs of the true directions, with a child of each parent absorbing it, of random directions, and those given."""
    world = Planted.zipfian(spec.features, spec.width, children=spec.children, zipf=spec.zipf, rate=spec.rate,
                            seed=spec.seed)  # fmt: skip
    x, f = world.sample(spec.tokens, spec.seed + 1)
    first = {int(parent): child for child, parent in reversed(list(enumerate(world.parents))) if parent >= 0}
    saes = {"true directions": world.sae(), "absorbing": world.sae(sorted(first.values()), spec.absorbed),
            "random directions": random_directions(world.sae(), x, spec.seed)}  # fmt: skip
    for name in spec.saes:
        saes[name] = SAE.load(name)
        if saes[name].d_in != spec.width:
            raise UnweaveError(f"the SAE reads {saes[name].d_in} dimensions, not {spec.width}", where=name,
                               remedy="train it on these activations, or set width and features")  # fmt: skip
    rows: list[Known] = []
    for name, sae in saes.items():
        rows += [Known(name, *row) for row in measures(sae, world, x, f, spec.seed)]
        ctx.log("measured", {"sae": name})
    return KnownResult(spec.features, spec.width, spec.tokens, tuple(rows))
