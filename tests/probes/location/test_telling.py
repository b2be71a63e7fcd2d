"""Channels that tell: found within sources, by means of responses, of every layer at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes.activations.teacher_forcing import encode_response
from probes.data.conversations import Conversation
from probes.location.telling import telling_channels
from safe_decode.activations.tap import ActivationTap
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.testing.models import byte_tokenizer, tiny_model


def row(number, text, *, harmful):
    return Conversation(
        messages=({"role": "user", "content": f"Say {number}"},),
        response=text,
        group=str(number),
        response_harmful=harmful,
    )


def rows_of(n=24):
    """Harmful rows hold an x in both sources; the style of a source says nothing of harm."""
    rng = np.random.default_rng(0)
    found, sources = [], []
    for number in range(2 * n):
        harmful, source = number % 2 == 1, "first" if number < n else "second"
        text = "".join(rng.choice(list("abcdefgh"), size=12))
        text = ("Q" if source == "second" else "") + text + ("x" * 12 if harmful else "y" * 12)
        found.append(row(number, text, harmful=harmful))
        sources.append(source)
    return found, sources


def by_hand(model, tokenizer, rows, sources, sites, tokens):
    tap, means = ActivationTap(model, sites), []
    for one in rows:
        encoded = encode_response(tokenizer, one)
        ids = torch.tensor([encoded.ids[: encoded.turn_start + tokens]])
        with tap.listening() as beats, torch.no_grad():
            beats.keep_last(ids.shape[1] - encoded.turn_start)
            model(input_ids=ids, use_cache=False)
            means.append(beats.take()[0].double().mean(dim=0).numpy())
    values, labels = np.stack(means), np.asarray([one.response_harmful for one in rows])
    total = 0
    for name in sorted(set(sources)):
        own = np.asarray(sources) == name
        high, low = values[own & labels], values[own & ~labels]
        spread = np.sqrt((high.var(axis=0) + low.var(axis=0)) / 2)
        total = total + (high.mean(axis=0) - low.mean(axis=0)) / spread
    return np.abs(total) / 2


@pytest.mark.parametrize("tokens", [128, 16])
def test_a_channel_tells_what_means_within_sources_say(tokens):
    model, tokenizer = tiny_model(), byte_tokenizer()
    rows, sources = rows_of()
    found = telling_channels(model, tokenizer, rows, sources, tokens=tokens)
    assert {site.kind for site in found.sites} == {"attn", "mlp"}
    assert found.sources == ("first", "second") and found.responses == len(rows)
    expected = by_hand(model, tokenizer, rows, sources, found.sites, tokens)
    np.testing.assert_allclose(found.apart, expected, rtol=1e-3, atol=1e-3)


def test_the_channels_that_tell_most_are_named_as_sites():
    model, tokenizer = tiny_model(), byte_tokenizer()
    rows, sources = rows_of()
    found = telling_channels(model, tokenizer, rows, sources)
    most = found.most(10)
    assert sum(len(site.channels) for site in most) == 10
    places = {
        (site.layer, site.kind, channel): value
        for site, start in zip(
            found.sites, np.cumsum([0, *(len(s.channels) for s in found.sites)]), strict=False
        )
        for channel, value in zip(site.channels, found.apart[start:], strict=False)
    }
    chosen = [places[s.layer, s.kind, c] for s in most for c in s.channels]
    assert sorted(chosen) == sorted(found.apart)[-10:]
    with pytest.raises(ConfigurationError, match="count=0"):
        found.most(0)


def test_a_source_with_one_label_says_nothing_of_channels():
    model, tokenizer = tiny_model(), byte_tokenizer()
    rows, sources = rows_of()
    calm = [row(1000 + n, "z" * 20, harmful=False) for n in range(12)]
    found = telling_channels(model, tokenizer, [*rows, *calm], [*sources, *["third"] * 12])
    assert found.sources == ("first", "second")
    again = telling_channels(model, tokenizer, rows, sources)
    np.testing.assert_allclose(found.apart, again.apart, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="none of the sources"):
        telling_channels(model, tokenizer, calm, ["third"] * 12)


def test_rows_are_drawn_by_their_groups_and_their_order_does_not_matter():
    model, tokenizer = tiny_model(), byte_tokenizer()
    rows, sources = rows_of(60)
    few = telling_channels(model, tokenizer, rows, sources, most_rows=80)
    assert few.responses == 80
    turned = telling_channels(model, tokenizer, rows[::-1], sources[::-1], most_rows=80)
    np.testing.assert_allclose(few.apart, turned.apart, rtol=1e-4, atol=1e-4)
