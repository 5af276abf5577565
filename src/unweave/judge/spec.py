"""Which chat model judges, and how much it may be asked. Nothing here imports torch or a client."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Literal
from urllib.parse import urlsplit

from unweave.core.errors import UnweaveError
from unweave.core.refs import Content
from unweave.core.rules import above, at_least
from unweave.core.spec import Spec, operational
from unweave.judge.secrets import Secret

DEFAULT_JUDGE = "qwen2.5-coder-1.5b-instruct"


@dataclass(frozen=True, kw_only=True)
class JudgeSpec(Spec):
    """The chat model that judges: one that runs here, or one behind an OpenAI-compatible address."""

    model: Annotated[str, Content("unweave.core.contents:tree_of", named=True)] = DEFAULT_JUDGE
    """A catalogue name, hub id, folder or GGUF file; with base_url the name that the server knows it by."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server, e.g. https://api.openai.com/v1; without it the model runs here."""
    api_key_env: str | None = None
    """The environment variable that holds the server's key; the address must then be https, or this machine's own. The
    key itself is never stored; without it none is sent."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What a model that runs here computes in; by default float32, the fastest on most CPUs."""
    max_new_tokens: Annotated[int, at_least(1)] = 160
    """Length of a reply at most."""
    logprobs: bool | None = None
    """Whether to ask a server for the log-probabilities of its numbers (20 alternatives each), from which expected
    ratings follow; not every server gives them. A model that runs here always does."""
    budget_requests: Annotated[int | None, at_least(1)] = operational(None)
    """Prompts to ask at most before stopping; kept replies are free, and asking again goes on from there."""
    budget_tokens: Annotated[int | None, at_least(1)] = operational(None)
    """Tokens to use at most, of prompts and replies together, before stopping; what is under way is still finished.
    Where a server does not say how many there were, they are estimated, rather too many."""
    at_once: Annotated[int, at_least(1)] = operational(8)
    """Requests in flight, or prompts in one batch of a model that runs here."""
    timeout: Annotated[float | None, above(0)] = operational(None)
    """Seconds that a server has for one reply, all tries together and waiting between them aside; by default 120."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inapplicable = ("dtype",) if self.base_url is not None else ("api_key_env", "timeout", "logprobs")
        kind = "server" if self.base_url is not None else "model that runs here"
        for name in inapplicable:
            if getattr(self, name) is not None:
                remedy = f"leave {name} out, or {'leave' if self.base_url else 'give'} base_url"
                raise UnweaveError(f"{name} does not apply to a {kind}", where="judge", remedy=remedy)
        if self.base_url is not None:
            _check_url(self.base_url)
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            what = "api_key_env must be the name of an environment variable, in capitals"
            remedy = "e.g. OPENAI_API_KEY; put the key itself into that variable only"
            raise UnweaveError(what, where="judge.api_key_env", remedy=remedy)
        if self.api_key_env is not None and self.base_url is not None and not _keeps_secrets(self.base_url):
            what = "the key would be sent to another machine unencrypted"
            remedy = "use an https address; http is for this machine only (localhost), or without api_key_env"
            raise UnweaveError(what, where="judge.base_url", remedy=remedy)
        _check_no_key(self)


def _keeps_secrets(url: str) -> bool:
    """Whether what is sent there can be read by nobody on the way: by https, or because it stays on this machine."""
    return urlsplit(url).scheme == "https" or is_this_machine(url)


def is_this_machine(url: str) -> bool:
    """Whether an address is one of this machine's own."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, and nobody knows whose
        return False


def _check_url(url: str) -> None:
    """Refuses invalid addresses, and those that could carry a secret into files and messages. Nor are they repeated:
    an invalid address may be a key."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # invalid brackets and ports
        fine = False
    if not fine or not url.isprintable() or " " in url:  # half a surrogate pair is not printable
        raise UnweaveError(
            "this is not an http or https address", where="judge.base_url", remedy="e.g. http://127.0.0.1:8000/v1"
        )
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        what = "base_url must be a plain address, without user, password or query"
        remedy = "put the key into an environment variable and name it with judge.api_key_env"
        raise UnweaveError(what, where="judge.base_url", remedy=remedy)


def _check_no_key(spec: JudgeSpec) -> None:
    """Refuses a key that stands in a field besides its variable: fields are written to files."""
    key = os.environ.get(spec.api_key_env or "", "").strip()
    for name in ("model", "base_url"):
        if Secret(key).is_whole_in(getattr(spec, name) or ""):
            what = f"{name} holds the key of {spec.api_key_env}, and would be written to files"
            remedy = f"leave the key out of {name}; it is taken from the variable"
            raise UnweaveError(what, where=f"judge.{name}", remedy=remedy)
