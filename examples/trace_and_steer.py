"""Which latents decide a verb's number? Estimate, measure, then turn the strongest one up.

    python examples/trace_and_steer.py runs/train-0123456789ab/sae
    python examples/trace_and_steer.py runs/train-0123456789ab/sae --pairs mine.jsonl

A line of the pairs' file: {"clean_prefix": "The key near the doors", "patch_prefix": "The keys near the doors",
"clean_answer": " is", "patch_answer": " are"}. Prefixes must have equally many tokens, answers must be one token each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unweave import LM, SAE
from unweave.attribute.runner import Batch
from unweave.lm.model import Tokens
from unweave.methods.trace.comparison import compare
from unweave.methods.trace.spec import TraceOptions
from unweave.sae.steered import sweep
from unweave.tasks import agreement


def largest_activation(lm: LM, sae: SAE, latent: int, batches: Sequence[Batch]) -> float:
    """The latent's largest value on these examples, at tokens that the SAE was trained on."""
    assert sae.read is not None
    largest = 0.0
    for clean, patch, _ in batches:
        for tokens in (clean, patch):
            assert isinstance(tokens, Tokens)
            with lm.taps(read=[sae.read], stop=sae.read) as seen:
                lm(tokens)
            x = seen[sae.read]
            kept = sae.policy.keep(x, tokens.ids.to(x.device), tokens.mask.to(x.device))
            largest = max(largest, float(sae.codes(x[kept]).maxima()[latent]))
    return largest


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", type=Path, help="an SAE's folder, as `unweave train` printed it")
    parser.add_argument("--model", help="by default the one that the SAE was trained on")
    parser.add_argument("--pairs", type=Path, help="JSON lines of your own; by default subject-verb agreement")
    parser.add_argument("--count", type=int, default=64, help="how many pairs to make")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--prompt", default="Tell me about the sea.")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args(args)

    sae = SAE.load(options.sae)
    lm = LM.load(options.model or sae.provenance["train"]["model"])
    sae = sae.to(lm.device)
    pairs = agreement.load(options.pairs) if options.pairs else agreement.pairs(lm, "across_pp", options.count)
    batches = agreement.batches(lm, pairs)
    right = agreement.accuracy(lm, pairs)
    print(f"{len(pairs)} pairs; the model is right on {right.clean:.0%} (clean) and {right.patch:.0%} (patch)\n")

    found = compare(lm, sae, batches, TraceOptions(top=options.top, random=options.top))
    print(f"the {options.top} strongest latents make {found.share or 0:.0%} of the change when they move together\n")
    print("latent   exact, from both ends   integrated gradients   attribution patching")
    for row in found.effects:
        values = (row.exact, row.exact_patch, row.ig, row.attribution)
        print(f"{row.latent:6d}  {'  '.join(f'{value:+.4f}' for value in values)}  {'top' if row.chosen else 'random'}")
    ig, attribution = (found.spearman(estimate, "chosen") for estimate in ("ig", "attribution"))
    print(f"Spearman with the mean of both ends: {ig:.3f} (IG), {attribution:.3f} (AP)")
    if found.diagnosis is not None:
        print(found.diagnosis.text)

    strongest = found.strongest()[0].latent
    largest = largest_activation(lm, sae, strongest, batches)
    print(f"\nlatent {strongest}, largest activation here {largest:.2f}")
    texts = sweep(lm, sae, strongest, [options.prompt], maximum=largest, max_new_tokens=options.max_new_tokens)
    for text in texts:
        name = "unedited" if text.strength is None else f"strength {text.strength:g}"
        print(f"{name:12s} {text.text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
