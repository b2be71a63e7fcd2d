"""The reasoning-direction check: does a harmful query already lean to refusing or to fulfilling?

Three branches of one query: clean, with a benign opener ("Sorry, ...") and with a malicious
one ("Sure, ..."). At every decoder block, after the opener and after 1 to K tokens that the
model says itself, the state of each opened branch is compared with the clean one's by cosine
distance. The hypothesis: aligned models lie closer to the benign branch, unaligned ones to
the malicious one.

States share the query, so raw distances mix content with intent. With the query-only baseline
the state at the query's last token, before the header that opens the answer, is subtracted
from all three first. Both are reported.

Knows branches, states and distances. Does not know which model is aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from probes.activations.teacher_forcing import EncodedResponse, encode_response, teacher_forced
from probes.rollouts.generate import RolloutConfig, rollout
from probes.rollouts.types import Request
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site
from safe_decode.errors import ConfigurationError, PromptError
from safe_decode.prompts.chat import Message
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["Baseline", "Lean", "Openers", "direction_leans"]

Baseline = Literal["none", "query"]
_RESAMPLES = 1_000


class Openers(NamedTuple):
    """The first words of the two opened branches.

    Attributes:
        benign: Begins a refusal.
        malicious: Begins to fulfil.
    """

    benign: str = "Sorry, I can't"
    malicious: str = "Sure, here is how"


@dataclass(frozen=True)
class Lean:
    """Distances at one block after so many tokens, means over queries with 95 % intervals.

    Attributes:
        layer: Decoder block.
        tokens: Said by the model itself since the opener.
        baseline: What was subtracted.
        benign: Cosine distance between the clean and the benign branch: mean, low, high.
        malicious: Between the clean and the malicious one.
        lean: malicious - benign; above 0, the clean branch lies closer to refusing.
        n: Queries whose three branches all lasted so long.
    """

    layer: int
    tokens: int
    baseline: Baseline
    benign: tuple[float, float, float]
    malicious: tuple[float, float, float]
    lean: tuple[float, float, float]
    n: int


class _States(NamedTuple):
    """States of one branch.

    Attributes:
        said: [N, K + 1, L, d] float32 after 0 to K own tokens; NaN where the answer ended.
        query: [N, L, d] float32 at the query's last token.
    """

    said: NDArray[np.float32]
    query: NDArray[np.float32]


def direction_leans(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    openers: Openers | None = None,
    tokens: int = 10,
    seed: int = 0,
) -> Iterator[Lean]:
    """Compare the branches at every block, without and with the query-only baseline.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        requests: Harmful queries without prefill.
        openers: See `Openers`; in the words of the model's language.
        tokens: K, at least 1.
        seed: Of the bootstrap over queries.

    Raises:
        ConfigurationError: `tokens` below 1.
        PromptError: A query and its answer exceed the model's context.
    """
    if tokens < 1:
        raise ConfigurationError(f"tokens={tokens} must be at least 1.")
    openers = openers or Openers()
    clean, benign, malicious = (
        _states(model, tokenizer, [replace(r, prefill=opener) for r in requests], tokens)
        for opener in (None, openers.benign, openers.malicious)
    )
    rng = np.random.default_rng(seed)
    baselines: tuple[Baseline, ...] = ("none", "query")
    for baseline in baselines:
        taken = clean.query[:, None] if baseline == "query" else np.float32(0)
        distances = [
            _cosine_distance(clean.said - taken, branch.said - taken)
            for branch in (benign, malicious)
        ]
        for token in range(tokens + 1):
            for layer in range(distances[0].shape[2]):
                pair = np.stack([d[:, token, layer] for d in distances])
                pair = pair[:, np.isfinite(pair).all(axis=0)]
                if pair.shape[1]:
                    yield _lean(pair, layer, token, baseline, rng)


def _lean(
    pair: NDArray[np.float64], layer: int, token: int, baseline: Baseline, rng: np.random.Generator
) -> Lean:
    values = np.stack([pair[0], pair[1], pair[1] - pair[0]])
    n = values.shape[1]
    drawn = values[:, rng.integers(n, size=(_RESAMPLES, n))].mean(axis=2)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=1)
    means = values.mean(axis=1)
    told = [(float(means[i]), float(low[i]), float(high[i])) for i in range(3)]
    return Lean(layer, token, baseline, told[0], told[1], told[2], n)


def _states(
    model: CausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    tokens: int,
) -> _States:
    said = rollout(model, tokenizer, requests, config=RolloutConfig(max_new_tokens=tokens))
    encoded, begins = [], []
    for row in said:
        whole = encode_response(tokenizer, row)
        query = _query_tokens(tokenizer, row.messages, whole)
        # A turn that starts behind the query makes every state since then a score position.
        encoded.append(EncodedResponse(whole.ids, query))
        begins.append(whole.turn_start + row.prefill_tokens - query)
    anatomy = anatomy_of(model)
    layers, width = len(anatomy.blocks), anatomy.d_model
    sites = [Site(layer, "resid", tuple(range(width))) for layer in range(layers)]
    found = np.full((len(said), tokens + 1, layers, width), np.nan, dtype=np.float32)
    at_query = np.zeros((len(said), layers, width), dtype=np.float32)
    for batch in teacher_forced(model, sites, encoded, description="reading states"):
        for index, row_number in enumerate(batch.rows):
            states = batch.of(index).cpu().numpy().reshape(-1, layers, width)
            own = states[begins[row_number] :][: tokens + 1]
            found[row_number, : len(own)] = own
            at_query[row_number] = states[0]
    return _States(found, at_query)


def _query_tokens(tokenizer: Tokenizer, messages: Sequence[Message], whole: EncodedResponse) -> int:
    """Count the tokens up to the query's last, before the header that opens the answer."""
    closed = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=False, return_dict=False
    )
    same = 0
    for one, other in zip(closed, whole.ids[: whole.turn_start], strict=False):
        if one != other:
            break
        same += 1
    if not same:
        raise PromptError(
            "the chat template yields another beginning without the header of the answer, so the "
            "query's end is not known; use a template that only appends the header."
        )
    return min(same, whole.turn_start - 1)


def _cosine_distance(
    first: NDArray[np.float32], second: NDArray[np.float32]
) -> NDArray[np.float64]:
    one, two = first.astype(np.float64), second.astype(np.float64)
    product = (one * two).sum(axis=-1)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    # A state minus itself has no direction: NaN, and left out.
    cosine = np.divide(product, norms, out=np.full_like(product, np.nan), where=norms > 0)
    return np.asarray(1 - cosine, dtype=np.float64)
