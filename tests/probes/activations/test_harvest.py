"""Harvest: activations of a response are those of a lone forward, however it is batched."""

import os
import signal
import warnings

import numpy as np
import pytest
import torch

from probes.activations.harvest import harvest, harvest_to, score_responses
from probes.activations.teacher_forcing import encode_response, onset_token, teacher_forced
from probes.data.conversations import Conversation
from safe_decode.activations.site import Site, n_features
from safe_decode.errors import ConfigurationError, DataError, PromptError
from safe_decode.probe.linear import LinearProbe
from safe_decode.testing.models import tiny_model

SITES = (Site(0, "resid", (0, 3, 31)), Site(1, "attn", (2, 5)), Site(2, "mlp", (1, 60)))
RESID = tuple(Site(layer, "resid", tuple(range(32))) for layer in (0, 1))


def conversations(n=7, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        prompt = "p" * int(rng.integers(1, 30))
        ids = tuple(int(i) for i in rng.integers(10, 250, size=int(rng.integers(0, 40))))
        rows.append(
            Conversation(
                messages=({"role": "user", "content": prompt},),
                response="x",
                group=str(row),
                response_ids=ids,
            )
        )
    return rows


def test_features_equal_the_hidden_states_of_a_lone_forward(model, tokenizer):
    rows = conversations()
    features = harvest(model, tokenizer, rows, RESID, tokens_per_batch=200)
    for row, found in zip(rows, features.responses, strict=True):
        encoded = encode_response(tokenizer, row)
        with torch.no_grad():
            out = model(torch.tensor([encoded.ids]), output_hidden_states=True)
        # hidden_states[l + 1] is the output of block l; s_0 is the last template token.
        expected = torch.cat(out.hidden_states[1:3], dim=-1)[0, encoded.turn_start - 1 :]
        assert len(found) == len(row.response_ids) + 1
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_the_company(model, tokenizer):
    rows = conversations(12)
    together = harvest(model, tokenizer, rows, SITES, tokens_per_batch=2000)
    alone = harvest(model, tokenizer, rows, SITES, tokens_per_batch=1)
    turned = harvest(model, tokenizer, rows[::-1], SITES, tokens_per_batch=300)
    for a, b, c in zip(together.responses, alone.responses, turned.responses[::-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-4)
    assert max(float(np.abs(a).max()) for a in together.responses) > 0.1


def test_scores_equal_the_probe_on_harvested_features(llama, tokenizer):
    rows = conversations()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_features(SITES), 2, generator=generator)
    probe = LinearProbe(SITES, weight, torch.tensor([0.5, -1.0]), ("a", "b"))
    done = []
    logits = score_responses(llama, tokenizer, rows, probe, on_batch=done.append)
    assert sum(done) == len(rows)
    for found, values in zip(logits, harvest(llama, tokenizer, rows, SITES).responses, strict=True):
        torch.testing.assert_close(found, probe(torch.from_numpy(values)), rtol=1e-4, atol=1e-4)


def test_shards_hold_what_memory_holds_and_survive_an_interruption(llama, tokenizer, tmp_path):
    rows = conversations(10)
    expected = harvest(llama, tokenizer, rows, SITES, storage="float16")

    def again():
        return harvest_to(tmp_path, llama, tokenizer, rows, SITES, responses_per_shard=4)

    first = again()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "features-00000.npy",
        "features-00001.npy",
        "features-00002.npy",
        "harvest.json",
    ]
    kept = (tmp_path / "features-00000.npy").stat().st_mtime_ns
    (tmp_path / "features-00001.npy").unlink()
    for found in (first, again()):
        for a, b in zip(found.responses, expected.responses, strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-3, atol=1e-3)
    assert (tmp_path / "features-00000.npy").stat().st_mtime_ns == kept
    with pytest.raises(DataError, match="holds a harvest of another model"):
        harvest_to(tmp_path, llama, tokenizer, rows[1:], SITES, responses_per_shard=4)
    with pytest.raises(DataError, match="holds a harvest of another model"):
        harvest_to(tmp_path, tiny_model(seed=1), tokenizer, rows, SITES, responses_per_shard=4)


def test_a_harvest_that_was_killed_goes_on(llama, tokenizer, tmp_path):
    rows = conversations(10)

    def run():
        return harvest_to(tmp_path, llama, tokenizer, rows, SITES, responses_per_shard=4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        forwards = []

        def kill(*_):
            forwards.append(1)
            if len(forwards) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        llama.register_forward_hook(kill)
        run()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[0] == "features-00000.npy"
    assert names[1].endswith(".part")  # half of the second shard
    kept = (tmp_path / "features-00000.npy").stat().st_mtime_ns
    expected = harvest(llama, tokenizer, rows, SITES, storage="float16")
    for a, b in zip(run().responses, expected.responses, strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=2e-3, atol=1e-3)
    assert (tmp_path / "features-00000.npy").stat().st_mtime_ns == kept
    assert not list(tmp_path.glob("*.part"))


def test_no_hook_is_left_and_a_half_written_shard_is_not_taken(llama, tokenizer, tmp_path):
    def fail(*_):
        raise RuntimeError("the device was lost")

    handle = llama.get_decoder().layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the device was lost"):
        harvest_to(tmp_path, llama, tokenizer, conversations(), SITES)
    handle.remove()
    assert [p.name for p in tmp_path.iterdir()] == ["harvest.json"]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]
    assert sum(hooks) == 0


def test_text_without_ids_is_read_as_the_assistants_turn(llama, tokenizer):
    row = Conversation(messages=({"role": "user", "content": "Hi"},), response="Öl!", group="a")
    encoded = encode_response(tokenizer, row)
    assert tokenizer.decode(encoded.ids[encoded.turn_start :]) == "Öl!"
    assert encoded.n_scores == 5  # four bytes and s_0
    assert harvest(llama, tokenizer, [row], SITES).responses[0].shape == (5, 7)


def test_the_onset_token_is_the_one_that_completes_the_onset_character(tokenizer):
    text = "aÖb harm"
    for onset_char, expected in ((0, 0), (1, 2), (2, 3), (4, 5), (7, 8)):
        row = Conversation(
            messages=({"role": "user", "content": "Hi"},),
            response=text,
            group="a",
            response_harmful=True,
            onset_char=onset_char,
        )
        assert onset_token(tokenizer, row, encode_response(tokenizer, row)) == expected
    short = Conversation(
        messages=({"role": "user", "content": "Hi"},),
        response=text,
        group="a",
        onset_char=7,
        response_ids=(100, 101),
    )
    with pytest.raises(DataError, match="do not spell the response"):
        onset_token(tokenizer, short, encode_response(tokenizer, short))


def test_what_cannot_be_run_is_refused(llama, tokenizer):
    long = Conversation(
        messages=({"role": "user", "content": "Hi"},),
        response="x",
        group="a",
        response_ids=(50,) * 300,
    )
    with pytest.raises(PromptError, match="has 306 tokens, the model's context 256"):
        harvest(llama, tokenizer, [long], SITES)
    encoded = [encode_response(tokenizer, row) for row in conversations()]
    with pytest.raises(ConfigurationError, match="call model.eval"):
        next(teacher_forced(llama.train(), SITES, encoded, description=""))


def test_float16_refuses_what_it_cannot_hold(llama, tokenizer):
    with torch.no_grad():
        llama.get_decoder().layers[0].mlp.down_proj.weight.mul_(1e9)
    with pytest.raises(DataError, match="does not fit float16"):
        harvest(llama, tokenizer, conversations(), SITES, storage="float16")
