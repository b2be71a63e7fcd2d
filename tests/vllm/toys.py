"""Toy models that vLLM loads, with bundles that trip some of their answers, and what transformers
says of them."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_decode.activations.tap import ActivationTap
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.canary import CanaryRecord
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.prompts.batch import from_ids
from safe_decode.testing.bundles import bundle_for, random_probe, threshold_between
from safe_decode.testing.models import ASSISTANT, BOS, END, USER, byte_tokenizer, tiny_model

N_NEW = 24
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "vocab_size": 272,  # nine ids more than the tokenizer uses
    "initializer_range": 0.1,
}
_OWN = {
    "qwen3": {"head_dim": 32},
    # Of three layers all would have a sliding window, and no layer would keep every position.
    "gemma3": {"head_dim": 32, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
}


@dataclass(frozen=True)
class Toy:
    """A model on the disk.

    Attributes:
        model: Its folder.
        bundle: Folder of its bundle; some of `prompts` trip.
        prompts: Ids, each an open turn; half of them with a begun answer.
    """

    family: str
    model: Path
    bundle: Path
    prompts: tuple[tuple[int, ...], ...]

    def loaded(self) -> tuple[object, object]:
        """The model and tokenizer, as transformers reads them."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(self.model)


def make_toy(family: str, folder: Path) -> Toy:
    """Write a toy and its bundle."""
    own = _OWN.get(family, {})
    tiny_model(family, **_SIZES, **own).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    toy = Toy(family, folder / "model", folder / "bundle", prompts_of(12))
    save_bundle(toy, toy.bundle)
    return toy


def save_bundle(toy: Toy, folder: Path, **changes: object) -> ProbeBundle:
    """Write a bundle for a toy, whose threshold lies among the peaks of its answers."""
    model, tokenizer = toy.loaded()
    canary = CanaryRecord.of(
        model,
        tokenizer,
        random_probe(),
        prompt="What is a probe?",
        response="A probe reads.",
        tolerance=1e-3,
    )
    bundle = bundle_for(model, tokenizer, canary=canary, holdback=0)
    decoder = SafeDecoder(model, tokenizer, bundle, redirect="flag")
    peaks = [max(solo(decoder, ids)[1]) for ids in toy.prompts]
    certificate = bundle_for(model, tokenizer, threshold=threshold_between(peaks)).certificates
    bundle = dataclasses.replace(bundle, certificates=certificate, **changes)
    bundle.save(folder)
    return bundle


def prompts_of(n: int, *, seed: int = 0, common: int = 40, own: int = 6) -> tuple:
    """Draw prompts of text with a common beginning; every second answer is begun."""
    draw = random.Random(seed)
    text = [draw.randrange(40, 120) for _ in range(common)]
    prompts = []
    for i in range(n):
        mine = [draw.randrange(40, 120) for _ in range(own + i % 5)]
        begun = [draw.randrange(40, 120) for _ in range(3 * (i % 2))]
        prompts.append((BOS, USER, *text, *mine, END, ASSISTANT, *begun))
    return tuple(prompts)


def solo(decoder: SafeDecoder, prompt: tuple[int, ...], n: int = N_NEW) -> tuple[list, list]:
    """Ids and statistics of an answer that transformers writes under a processor of ours.

    As in the engine, one forward more than the cap has tokens, so that the last one is judged, and
    no end behind a refusal.
    """
    inputs = torch.tensor([prompt])
    with decoder.processor(inputs, redirect=decoder.policy.redirect) as handle:
        steps = handle.logits_processor._steps

        def is_over(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] > len(prompt) + n and not steps.scripts])

        output = decoder.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=n + 60,
            do_sample=False,
            suppress_tokens=SIGNALS,
            logits_processor=[handle.logits_processor],
            stopping_criteria=[handle.stopping_criteria, is_over],
        )
    (trace,) = handle.traces
    ids = output[0, len(prompt) :].tolist()
    ids = ids[:-1] if trace.tripped else ids[:n]
    return ids, [step.statistic for step in trace.steps]


SIGNALS = [271, 270]
"""The last two ids, which the tokenizer does not use and the engine keeps for itself."""


def scores_of(toy: Toy, bundle: ProbeBundle, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The logits of every position of whole sequences, [n, K] each, in one forward each."""
    model, _ = toy.loaded()
    found = []
    for ids in sequences:
        with torch.no_grad(), ActivationTap(model, bundle.probe.sites).listening() as beats:
            beats.keep_last(len(ids))
            model(input_ids=torch.tensor([ids]), use_cache=False)
            found.append(bundle.probe(beats.take()[0]))
    return found


def watched_from(toy: Toy, prompt: tuple[int, ...]) -> int:
    """The first position of a prompt that is judged."""
    _, tokenizer = toy.loaded()
    seen = from_ids(tokenizer, torch.tensor([prompt]), torch.ones(1, len(prompt)).long())
    return len(prompt) - seen.scanned[0]
