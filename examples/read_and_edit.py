"""Read an activation, edit it, and see what the model says then. No autoencoder is needed for this.

    python examples/read_and_edit.py
    python examples/read_and_edit.py --site resid_post.22

1. Reads the activation of one prompt's last token at a site; blocks after the site are not run.
2. Puts it in place of another prompt's last token and compares the next tokens.
3. Generates text with that edit made on the prompt only.

In the default model the answer stays Paris up to resid_post.22 and becomes Rome at resid_post.23: it is block 23 that
brings the country to the last token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch import Tensor

from unweave import LM
from unweave.lm.taps import At


def next_tokens(lm: LM, logits: Tensor | None, n: int = 5) -> str:
    """The likeliest tokens after the last position of logits [1, P, V], with their probabilities."""
    assert logits is not None
    found = logits[0, -1].softmax(-1).topk(n)
    texts = lm.token_strings(found.indices)
    return "   ".join(f"{text!r} {value:.3f}" for text, value in zip(texts, found.values.tolist(), strict=True))


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="catalogue name, hub id, folder or .gguf file")
    parser.add_argument("--site", default="resid_post.23")
    parser.add_argument("--prompt", default="The capital of France is the city of")
    parser.add_argument("--other", default="The capital of Italy is the city of")
    parser.add_argument("--max-new-tokens", type=int, default=30)
    options = parser.parse_args(args)

    lm = LM.load(options.model)
    site = lm.site(options.site)  # an error that lists what there is, if the model has no such site
    clean, other = lm.tokenize(options.prompt), lm.tokenize(options.other)

    with lm.taps(read=[site], stop=site) as seen:
        lm(other)
    borrowed = seen[site][0, -1]  # [d_model]

    def patch(x: Tensor, at: At) -> Tensor | None:
        """The other prompt's activation at the prompt's last token; None leaves tokens written later alone."""
        if at.step > 0:
            return None
        new = x.clone()  # edits return a new tensor
        new[:, -1] = borrowed
        return new

    print(f"{lm!r} at {site}\n")
    print(f"unedited  {next_tokens(lm, lm(clean))}")
    with lm.taps(edit={site: patch}):
        print(f"patched   {next_tokens(lm, lm(clean))}\n")
    length = options.max_new_tokens
    print(f"unedited  {lm.generate(options.prompt, chat=False, max_new_tokens=length)!r}")
    print(f"patched   {lm.generate(options.prompt, edit={site: patch}, chat=False, max_new_tokens=length)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
