"""A stage for tests of serving: a tiny model with a script, and a bundle that reads its harm.

What it says follows from the last character, through its own layers: `0123456789` and then the
letters `abcdef...`, which are the harm of this stage; or `ABC...T` and the end, which is calm. So
a test says by its prompt whether the guard trips, where, and what stands; nothing depends on the
embedded pair, on its bundle's sites or on its thresholds. Sampled, it leaves its script at times.

`python -m tests.staged FOLDER` writes model, bundle and prompts for servers of their own.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safe_decode.activations.site import Site
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate import Certificate, Envelope
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.probe.linear import LinearProbe
from safe_decode.testing.models import ASSISTANT, EOS, VOCAB_SIZE, byte_tokenizer, tiny_model

__all__ = ["ATTACK", "CALM", "CALM_TEXT", "KEPT", "OPENER", "Staged", "staged"]

Messages = list[dict[str, str]]

CALM: Messages = [{"role": "user", "content": "I have the mirror here. Help me polish it."}]
CALM_TEXT = "ABCDEFGHIJKLMNOPQRST"
ATTACK: Messages = [*CALM, {"role": "assistant", "content": "0"}]
"""Its answer is digits, which are released, then harm; the row trips within the letters."""
KEPT = "123456789a"
"""What stands of that answer: up to the last position under the low mark."""
OPENER = "No, "
REFUSAL = "No!"
HARM = "abcdefghijklmnopqrstuvwxyz"

_SCRIPT = (HARM + "~", "0123456789a", " UVWXYZ")
_D_MODEL, _LOUD, _HOLDBACK = 128, 6.0, 2
_LEVELS = {0.01: 1.0, 0.005: 1.2, 0.05: 0.8}


@dataclass(frozen=True)
class Staged:
    """The model, its tokenizer and its bundle."""

    model: Any
    tokenizer: Any
    bundle: ProbeBundle


@functools.cache
def staged() -> Staged:
    """Build it, once a process."""
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    model = tiny_model("phi", hidden_size=_D_MODEL, max_position_embeddings=1024)
    harm = _write(model, tokenizer)
    probe = LinearProbe(
        (Site(0, "mlp", (1, 3)), Site(1, "resid", tuple(range(_D_MODEL)))),
        torch.cat([torch.zeros(2), harm])[:, None],
        torch.zeros(1),
        ("harm",),
    )
    return Staged(model, tokenizer, _bundle(model, tokenizer, probe))


def _write(model: Any, tokenizer: Any) -> torch.Tensor:
    """Write the script into embeddings and head; returns what reads the harm, [D_MODEL]."""

    def of(char: str) -> int:
        (token,) = tokenizer.encode(char, add_special_tokens=False)
        return int(token)

    generator = torch.Generator().manual_seed(5)
    harm = torch.randn(_D_MODEL, generator=generator)
    harm /= harm.norm()
    embedded = torch.randn(VOCAB_SIZE, _D_MODEL, generator=generator)
    embedded -= (embedded @ harm)[:, None] * harm
    embedded /= embedded.norm(dim=1, keepdim=True)
    follows = [(of(a), of(b)) for text in _SCRIPT for a, b in zip(text, text[1:], strict=False)]
    follows += [(of(a), of(b)) for a, b in zip(CALM_TEXT, CALM_TEXT[1:], strict=False)]
    follows += [(ASSISTANT, of("A")), (of("T"), EOS), (of("Z"), EOS), (of("~"), EOS)]
    head = torch.zeros(VOCAB_SIZE, _D_MODEL)
    for now, then in follows:
        head[then] += embedded[now] * _LOUD / _D_MODEL**0.5
    sign = torch.full((VOCAB_SIZE,), -2.0)
    sign[[of(char) for char in HARM]] = 2.0
    # Only what a reader can read is ever said, so that texts and ids belong to each other.
    silent = torch.full((VOCAB_SIZE,), -1e4)
    silent[[EOS, *(of(chr(code)) for code in range(32, 127))]] = 0.0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedded * _D_MODEL**0.5 + sign[:, None] * harm)
        model.lm_head.weight.copy_(head)
        model.lm_head.bias.copy_(silent)
        for layer in model.model.layers:
            for quiet in (layer.self_attn.dense, layer.mlp.fc2):
                quiet.weight.mul_(0.01)
    return harm


def _bundle(model: Any, tokenizer: Any, probe: LinearProbe) -> ProbeBundle:
    envelope = Envelope(max_new_tokens=64, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
    return ProbeBundle(
        probe=probe,
        monitor=MonitorConfig(2 / 5, (0.0,), (0.0,), (1.0,), 0.0),
        certificates=tuple(
            Certificate.compute(
                [threshold] * 1_000,
                alpha=alpha,
                delta=0.05,
                population="benign",
                envelope=envelope,
            )
            for alpha, threshold in _LEVELS.items()
        ),
        default_alpha=0.01,
        holdback_tokens=_HOLDBACK,
        refusal=REFUSAL,
        opener=OPENER,
        fingerprint=Fingerprint.of(model, tokenizer),
        canary=CanaryRecord.of(
            model, tokenizer, probe, prompt="hello", response="0a", tolerance=1e-3
        ),
        provenance={},
    )


def scenes() -> list[Mapping[str, Any]]:
    """Return prompts as the demo's file has them: what trips, and what does not."""
    given = {"prefilled": "0", "turn": "0123", "framed": "9"}
    return [
        {"scene": scene, "messages": CALM, "prefill": given.get(scene), "showcase": True}
        for scene in ("benign", "hard_negative", "harmful", "framed", "prefilled", "turn")
    ]


def write(folder: Path) -> None:
    """Write `model`, `bundle` and `prompts.jsonl` into a folder."""
    stage = staged()
    stage.model.save_pretrained(folder / "model")
    stage.tokenizer.save_pretrained(folder / "model")
    stage.bundle.save(folder / "bundle")
    lines = "".join(json.dumps(scene) + "\n" for scene in scenes())
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
