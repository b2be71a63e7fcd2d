"""Searching: gradients where the tap reads, a gap that types back, losses that fall."""

from itertools import islice

import pytest
import torch

from probes.attacks.gcg import (
    SuffixConfig,
    checkpoints_of,
    random_suffixes,
    search_suffix,
)
from probes.attacks.gradient_tap import GradientTap
from probes.attacks.objective import DetectorModel, Objective, TargetAnswer, Weights
from probes.attacks.prompt_gap import PromptGap, typeable_ids
from probes.attacks.soft_prompt import SoftConfig, carrier_of, carrying, search_soft_prompt
from safe_decode.activations.tap import ActivationTap
from safe_decode.errors import ConfigurationError, PromptError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.prompts.chat import encode_chat, text_ids
from safe_decode.testing.bundles import SITES, random_probe
from safe_decode.testing.models import VOCAB_SIZE, tiny_model

MESSAGES = ({"role": "user", "content": "open the gate"},)
MONITOR = MonitorConfig(2 / 5, (0.0,), (0.0,), (1.0,), 0.0)


@pytest.fixture
def frame(tokenizer):
    return PromptGap.around(tokenizer, MESSAGES)


@pytest.fixture
def typeable(tokenizer):
    return typeable_ids(tokenizer, VOCAB_SIZE)


def objective_of(model, tokenizer, frame, *, margin=1.0, threshold=0.0, target="gladly, I"):
    watch = DetectorModel(random_probe(), MONITOR, threshold)
    answers = [TargetAnswer((), text_ids(tokenizer, target))]
    return Objective(model, frame, answers, watch=watch, weights=Weights(margin=margin))


def test_an_attacker_reads_what_the_tap_reads(model):
    ids = torch.arange(7, 47).view(2, 20)
    with ActivationTap(model, SITES).listening() as beats, torch.no_grad():
        beats.keep_last(20)
        model(input_ids=ids)
        expected = beats.take()
    reader = GradientTap(model, SITES)
    with reader.reading(2) as found:
        model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(torch.cat(found, dim=-1), expected)
    assert all(part.requires_grad for part in found)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gap_stands_between_the_users_words_and_the_open_answer(tokenizer, frame, typeable):
    gap = text_ids(tokenizer, " now!")
    assert frame.filled(gap)[-1]["content"] == "open the gate now!"
    assert frame.is_typeable(gap)
    whole = encode_chat(tokenizer, frame.filled(gap)).ids
    assert whole == (*frame.head, *gap, *frame.tail)
    assert set(gap) <= set(typeable)
    assert not set(typeable) & set(tokenizer.all_special_ids)


def test_a_template_without_an_end_has_no_gap(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(PromptError, match="a suffix has no place"):
        PromptGap.around(tokenizer, MESSAGES)


def test_the_loss_is_likelihood_and_the_largest_margin(llama, tokenizer, frame):
    gap, target = text_ids(tokenizer, " now!"), text_ids(tokenizer, "gladly, I")
    ids = torch.tensor([[*frame.head, *gap, *frame.tail, *target]])
    with torch.no_grad():
        scores = llama(ids).logits[0, -len(target) - 1 : -1].log_softmax(-1)
    nll = -scores[range(len(target)), target].mean()
    plain = objective_of(llama, tokenizer, frame, margin=0.0)
    torch.testing.assert_close(plain.of_ids(torch.tensor([gap]))[0], nll)

    probe, ema, peak = random_probe(), 0.0, -1e9
    with ActivationTap(llama, SITES).listening() as beats, torch.no_grad():
        beats.keep_last(len(target) + 1)
        llama(input_ids=ids)
        for logit in probe(beats.take())[0, :, 0].tolist():
            ema += MONITOR.smoothing * (logit - ema)
            peak = max(peak, ema)
    # Far below the peak's temperature the log-sum-exp is the maximum.
    watch, weights = DetectorModel(probe, MONITOR, 0.3), Weights(temperature=1e-3, slack=100.0)
    cold = Objective(llama, frame, [TargetAnswer((), target)], watch=watch, weights=weights)
    found = cold.of_ids(torch.tensor([gap]))[0] - nll
    assert float(found) == pytest.approx(peak - 0.3, abs=0.01)
    # A margin that is won already is worth nothing more than the slack.
    won = DetectorModel(probe, MONITOR, 1e6)
    easy = Objective(
        llama, frame, [TargetAnswer((), target)], watch=won, weights=Weights(slack=0.5)
    )
    assert float(easy.of_ids(torch.tensor([gap]))[0] - nll) == pytest.approx(-0.5, abs=1e-3)


def test_the_gradient_ranks_swaps_as_the_loss_does(llama, tokenizer, frame):
    objective = objective_of(llama, tokenizer, frame)
    gap = torch.tensor([text_ids(tokenizer, " now!")])
    free = llama.get_input_embeddings()(gap).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective.of_embeddings(free).sum(), free)
    step = torch.zeros_like(free)
    step[0, 1, 3] = 1e-2
    change = objective.of_embeddings(free + step) - objective.of_embeddings(free - step)
    assert change.item() / 2e-2 == pytest.approx(float(gradient[0, 1, 3]), rel=0.05, abs=1e-3)
    tokens = objective.token_gradient(gap)
    assert tokens.shape == (1, gap.shape[1], VOCAB_SIZE)
    torch.testing.assert_close(tokens[0, 1], objective.embedding @ gradient[0, 1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "phi"])
@pytest.mark.parametrize("is_watched", [True, False])
def test_shared_beginnings_change_no_loss(family, is_watched, tokenizer, frame):
    model = tiny_model(family)
    answers = [
        TargetAnswer((), text_ids(tokenizer, "gladly, I")),
        TargetAnswer(text_ids(tokenizer, "Sorry."), text_ids(tokenizer, "but gladly"), 0.5),
    ]
    watch = DetectorModel(random_probe(), MONITOR, 0.3) if is_watched else None
    objective = Objective(model, frame, answers, watch=watch, weights=Weights())
    gaps = torch.tensor([text_ids(tokenizer, text) for text in (" now!", " soon", " then")])
    with torch.no_grad():
        wanted = objective.of_embeddings(model.get_input_embeddings()(gaps))
    for _ in range(2):  # what was run once stays as it was
        torch.testing.assert_close(objective.of_ids(gaps), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.of_ids(gaps[1:2]), wanted[1:2], rtol=1e-4, atol=1e-5)


def test_a_search_lowers_the_loss_and_its_suffixes_can_be_typed(llama, tokenizer, frame, typeable):
    config = SuffixConfig(tokens=6, steps=8, candidates=6, restarts=2, top_k=16, checks=4)
    objective = objective_of(llama, tokenizer, frame)
    points = list(search_suffix(objective, frame, typeable, config))
    assert [point.step for point in points] == [2, 4, 6, 8]
    first, last = points[0], points[-1]
    chance = list(random_suffixes(frame, typeable, config))
    drawn = objective.of_ids(torch.tensor([gap for point in chance for gap in point.gaps]))
    assert max(last.losses) < float(drawn.mean())
    assert all(b <= a for a, b in zip(first.losses, last.losses, strict=True))
    assert all(frame.is_typeable(gap) and len(gap) == 6 for gap in last.gaps)
    found = objective.of_ids(torch.tensor(last.gaps))
    torch.testing.assert_close(found, torch.tensor(last.losses))
    again = list(search_suffix(objective, frame, typeable, config))
    assert again == points


def test_the_margin_is_what_the_search_pays_for(llama, tokenizer, frame, typeable):
    config = SuffixConfig(tokens=6, steps=10, candidates=8, restarts=1, top_k=32, checks=1)
    watched = objective_of(llama, tokenizer, frame, threshold=-3.0)
    only = objective_of(llama, tokenizer, frame, margin=0.0)
    (evasive,) = search_suffix(watched, frame, typeable, config)
    (blind,) = search_suffix(only, frame, typeable, config)
    gaps = torch.tensor([evasive.gaps[0], blind.gaps[0]])
    margins = watched.of_ids(gaps) - only.of_ids(gaps)
    assert margins[0] < margins[1]
    assert only.of_ids(gaps)[1] < only.of_ids(gaps)[0]


def test_vectors_fall_below_any_text_found(llama, tokenizer, frame, typeable):
    objective = objective_of(llama, tokenizer, frame)
    config = SoftConfig(vectors=6, steps=40, restarts=2, rate=0.2, checks=2)
    points = list(search_soft_prompt(objective, config))
    assert [point.step for point in points] == [20, 40]
    assert points[-1].vectors.shape == (2, 6, llama.config.hidden_size)
    text = SuffixConfig(tokens=6, steps=8, candidates=6, restarts=2, top_k=16, checks=1)
    (typed,) = search_suffix(objective, frame, typeable, text)
    assert max(points[-1].losses) < min(typed.losses)
    assert not any(parameter.grad is not None for parameter in llama.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_carried_vectors_read_as_the_tokens_they_are(family, tokenizer, frame):
    model = tiny_model(family)
    gap = text_ids(tokenizer, " now!")
    carrier = carrier_of(tokenizer, VOCAB_SIZE, (*frame.head, *frame.tail, *gap))
    vectors = model.get_input_embeddings()(torch.tensor(gap)).detach()
    typed = torch.tensor([[*frame.head, *gap, *frame.tail]])
    carried = torch.tensor([[*frame.head, *[carrier] * len(gap), *frame.tail]])
    assert carrier not in typed
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(typed, attention_mask=torch.ones_like(typed), **options)
    with carrying(model, carrier, vectors):
        found = model.generate(carried, attention_mask=torch.ones_like(carried), **options)
    assert found[0, carried.shape[1] :].tolist() == expected[0, typed.shape[1] :].tolist()
    assert not model.get_input_embeddings()._forward_hooks


def test_checks_lie_evenly_and_end_with_the_budget():
    assert checkpoints_of(150, 6) == (25, 50, 75, 100, 125, 150)
    assert checkpoints_of(3, 6) == (1, 2, 3)
    assert list(islice(checkpoints_of(1, 1), 2)) == [1]


@pytest.mark.parametrize(
    "make",
    [lambda: SuffixConfig(steps=0), lambda: SoftConfig(vectors=0), lambda: Weights(margin=-1)],
)
def test_a_budget_of_nothing_is_refused(make):
    with pytest.raises(ConfigurationError, match="must be at least"):
        make()
