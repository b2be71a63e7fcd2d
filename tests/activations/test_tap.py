"""Capture equals the oracle; only the listener's own forwards are heard; nothing stays."""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.site import Site
from safe_decode.activations.tap import ActivationTap, unwatched
from safe_decode.errors import BeatError, ConfigurationError, UnsupportedError
from safe_decode.testing.models import (
    D_MODEL,
    FAMILIES,
    MORE_FAMILIES,
    N_LAYERS,
    VOCAB_SIZE,
    tiny_model,
)

ALL_RESID = tuple(range(D_MODEL))
SITES = (Site(2, "resid", (0, 5, 6)), Site(0, "mlp", (1, 3)), Site(1, "attn", (4, 5, 6, 7)))
"""Given out of order: features come as mlp 0, attn 1, resid 2."""


def random_ids(batch: int = 2, seq: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(7, VOCAB_SIZE, (batch, seq), generator=torch.Generator().manual_seed(seed))


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def oracle(model: nn.Module) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Every input of the projections, by independent hooks."""
    seen: dict[tuple[int, str], Tensor] = {}
    anatomy = anatomy_of(model)
    handles = [
        anatomy.module(layer, kind).register_forward_pre_hook(
            lambda _m, args, key=(layer, kind): seen.update({key: args[0].detach().clone()})
        )
        for layer in range(N_LAYERS)
        for kind in ("attn", "mlp")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "mixtral"])
def test_resid_equals_output_hidden_states(family: str) -> None:
    model, ids = tiny_model(family), random_ids()
    tap = ActivationTap(model, [Site(layer, "resid", ALL_RESID) for layer in range(N_LAYERS)])
    with torch.inference_mode(), tap.listening() as beats:
        beats.keep_last(None)
        states = model(ids, output_hidden_states=True).hidden_states
        features = beats.take().unflatten(-1, (N_LAYERS, D_MODEL))
        # The library's last hidden state has the final norm applied, ours has not.
        for layer in range(N_LAYERS - 1):
            torch.testing.assert_close(features[:, :, layer], states[layer + 1], rtol=0, atol=0)
        final_norm = [m for n, m in model.named_modules() if n.endswith(("norm", "ln_f"))]
        normed = {"opt": "model.decoder.final_layer_norm", "phi": "model.final_layernorm"}
        normed |= {"gpt_neox": "gpt_neox.final_layer_norm"}
        norm = model.get_submodule(normed[family]) if family in normed else final_norm[-1]
        torch.testing.assert_close(norm(features[:, :, -1]), states[-1], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_attn_and_mlp_equal_the_input_of_the_projection(family: str) -> None:
    model, ids = tiny_model(family), random_ids()
    anatomy = anatomy_of(model)
    keys = [(layer, kind) for layer in range(N_LAYERS) for kind in ("attn", "mlp")]
    sites = [Site(la, k, tuple(range(anatomy.width(la, k)))) for la, k in keys]
    tap = ActivationTap(model, sites)
    with torch.no_grad(), oracle(model) as seen, tap.listening() as beats:
        beats.keep_last(None)
        model(ids)
        features = beats.take()
    wanted = torch.cat([seen[key].view(2, 7, -1) for key in keys], dim=-1)
    torch.testing.assert_close(features, wanted, rtol=0, atol=0)


def test_features_come_in_the_order_of_sorted_sites() -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    with torch.no_grad(), oracle(model) as seen, tap.listening() as beats:
        handle = model.model.layers[2].register_forward_hook(
            lambda _m, _a, out: seen.update({(2, "resid"): out.detach().clone()})
        )
        model(ids)
        handle.remove()
        features = beats.take()
    assert features.shape == (2, 1, 9)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[:, :, :2], seen[0, "mlp"][:, -1:, [1, 3]])
    torch.testing.assert_close(features[:, :, 2:6], seen[1, "attn"][:, -1:, 4:8])
    torch.testing.assert_close(features[:, :, 6:], seen[2, "resid"][:, -1:, [0, 5, 6]])


@pytest.mark.parametrize("n_positions", [1, 4, 7, 50, None])
def test_the_last_positions_are_kept(n_positions: int | None) -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    with torch.no_grad(), tap.listening() as beats:
        beats.keep_last(None)
        model(ids)
        everything = beats.take()
        beats.keep_last(n_positions)
        model(ids)
        assert beats.positions == 7
        kept = beats.take()
    wanted = min(n_positions or 7, 7)
    assert kept.shape[1] == wanted
    assert torch.equal(kept, everything[:, -wanted:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_is_visited_is_what_is_taken(family: str) -> None:
    model, ids = tiny_model(family), random_ids()
    tap = ActivationTap(model, [*SITES, Site(1, "resid", ALL_RESID)])
    shown: dict[int, Tensor] = {}

    def visit(index: int, activation: Tensor) -> None:
        shown[index] = activation.clone()

    with torch.no_grad():
        with tap.listening() as beats:
            beats.keep_last(None)
            model(ids)
            wanted = beats.take()
        with tap.visiting(visit) as visits:
            model(ids)
            visits.require_one_each()
    assert count_hooks(model) == 0
    assert torch.equal(torch.cat([shown[index] for index in range(4)], dim=-1), wanted)


def test_visits_are_counted_and_shown_no_longer_than_they_are_open() -> None:
    model, ids = tiny_model(), random_ids()
    tap, shown = ActivationTap(model, SITES), list[int]()
    with torch.no_grad(), tap.visiting(lambda index, _: shown.append(index)) as visits:
        with pytest.raises(BeatError, match="no forward passed"):
            visits.require_one_each()
        model(ids)
        model(ids)
        with pytest.raises(BeatError, match="2 forwards passed the tap, wanted one"):
            visits.require_one_each()
        with unwatched():
            model(ids)
        assert len(shown) == 6
        visits.close()
        model(ids)
    assert len(shown) == 6


def test_chunked_prefill_concatenates_and_keeps_across_chunks() -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    with torch.no_grad(), tap.listening() as beats:
        beats.keep_last(5)
        model(ids)
        whole = beats.take()
        cache = None
        for chunk in ids.split(2, dim=1):
            cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
        assert (beats.forwards, beats.positions) == (4, 7)
        chunked = beats.take()
        assert (beats.forwards, beats.positions) == (0, 0)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_generate_beats_once_a_token() -> None:
    model, ids = tiny_model(), random_ids(batch=1)
    tap = ActivationTap(model, SITES)
    taken: list[tuple[int, tuple[int, ...]]] = []

    def beat(_ids: Tensor, scores: Tensor) -> Tensor:
        taken.append((beats.forwards, tuple(beats.take().shape)))
        return scores

    with tap.listening() as beats:
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, logits_processor=[beat])
    assert taken == [(1, (1, 1, 9))] * 5


def test_half_precision_yields_float32_without_gradient() -> None:
    model, ids = tiny_model().to(torch.bfloat16), random_ids()
    with ActivationTap(model, SITES).listening() as beats:
        model(ids)  # with gradients on
        features = beats.take()
    assert features.dtype == torch.float32
    assert not features.requires_grad


def overwrite_output(_module: nn.Module, _args: tuple[Tensor], output: Tensor) -> None:
    output.zero_()


def overwrite_input(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> None:
    args[0].zero_()


@pytest.mark.parametrize("seq", [1, 7])
def test_later_in_place_changes_do_not_reach_the_features(seq: int) -> None:
    model, ids = tiny_model(), random_ids(seq=seq)
    projection = model.model.layers[2].mlp.down_proj
    sites = [Site(2, "mlp", (1, 3)), Site(2, "resid", ALL_RESID)]
    with torch.no_grad(), ActivationTap(model, sites).listening() as beats:
        model(ids)
        clean = beats.take()
        handles = [
            projection.register_forward_hook(overwrite_input),
            model.model.layers[2].register_forward_hook(overwrite_output),
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        assert torch.equal(beats.take(), clean)


# --- isolation


def test_forwards_outside_or_internal_write_nothing() -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    with torch.no_grad(), tap.installed():
        model(ids)
        with tap.listening() as beats:
            with unwatched():
                model(ids)
            assert beats.forwards == 0
            model(ids)
            assert beats.forwards == 1
            with unwatched(), tap.listening() as inner:
                model(ids)
                assert inner.forwards == 1
            assert beats.forwards == 1
        model(ids)
    assert beats.forwards == 0


def test_a_second_listener_in_one_context_shadows_the_first() -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    with torch.no_grad(), tap.listening() as outer:
        with tap.listening() as inner:
            model(ids)
            assert (inner.forwards, outer.forwards) == (1, 0)
        model(ids)
        assert outer.forwards == 1


@pytest.mark.parametrize("shared_tap", [True, False])
def test_two_threads_and_a_stranger_on_one_model_are_isolated(shared_tap: bool) -> None:
    model = tiny_model()
    other_sites = SITES if shared_tap else (Site(1, "resid", (2, 9)),)
    first = ActivationTap(model, SITES)
    second = first if shared_tap else ActivationTap(model, other_sites)
    prompts = {first: [random_ids(1, 5, s) for s in range(20)]}
    runs = [(first, prompts[first]), (second, [random_ids(3, 4, 100 + s) for s in range(20)])]

    def heard(tap: ActivationTap, batches: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), tap.listening() as beats:
            out = []
            for ids in batches:
                model(ids)
                out.append(beats.take())
            return out

    alone = [heard(*run) for run in runs]
    together: list[list[Tensor] | None] = [None, None]
    failures: list[BaseException] = []
    barrier = threading.Barrier(3)

    def work(index: int) -> None:
        try:
            barrier.wait(timeout=30)
            together[index] = heard(*runs[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    with torch.no_grad(), first.installed():
        barrier.wait(timeout=30)
        for seed in range(20):  # the stranger: no context of any tap
            model(random_ids(2, 6, 200 + seed))
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    for solo, shared in zip(alone, together, strict=True):
        assert shared is not None
        assert all(torch.equal(a, b) for a, b in zip(solo, shared, strict=True))
    assert count_hooks(model) == 0


def test_one_context_closed_in_another_hears_no_more() -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    context = contextvars.copy_context()
    listening = tap.listening()
    beats = context.run(listening.__enter__)
    with torch.no_grad():
        context.run(model, ids)
        assert beats.forwards == 1
        listening.__exit__(None, None, None)  # in this context, not in the one entered
        with tap.installed():
            context.run(model, ids)
    assert beats.forwards == 0
    assert count_hooks(model) == 0


# --- nothing stays


def test_hooks_are_installed_once_and_go_with_the_last_to_leave() -> None:
    model = tiny_model()
    tap = ActivationTap(model, SITES)
    assert count_hooks(model) == 0
    with tap.installed(), tap.listening(), tap.listening():
        assert count_hooks(model) == len(SITES)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_hooks_and_buffers_are_gone_after_failure(error: type[BaseException]) -> None:
    model, ids = tiny_model(), random_ids()
    tap = ActivationTap(model, SITES)
    with pytest.raises(error), tap.listening() as beats:
        model(ids)
        piece = weakref.ref(beats._heard[0][1])
        raise error
    assert count_hooks(model) == 0
    gc.collect()
    assert piece() is None


def test_a_tap_leaves_nothing_on_the_model_and_can_be_collected() -> None:
    model, ids = tiny_model(), random_ids()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    tap = ActivationTap(model, SITES)
    with torch.no_grad(), tap.listening() as beats:
        model(ids)
        beats.take()
    gone = weakref.ref(tap)
    del tap, beats
    gc.collect()
    assert gone() is None
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_a_failed_installation_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    tap = ActivationTap(model, SITES)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(model.model.layers[2], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no more hooks"), tap.installed():
        raise AssertionError("entered")
    assert count_hooks(model) == 0


# --- beats


def test_take_without_a_forward_is_a_beat_error() -> None:
    with (
        ActivationTap(tiny_model(), SITES).listening() as beats,
        pytest.raises(BeatError, match="no forward passed the tap"),
    ):
        beats.take()


def test_a_removed_hook_is_named() -> None:
    model, ids = tiny_model(), random_ids()
    with torch.no_grad(), ActivationTap(model, SITES).listening() as beats:
        model(ids)
        beats.take()
        model.model.layers[1].self_attn.o_proj._forward_pre_hooks.clear()
        model(ids)
        assert beats.forwards == 0
        with pytest.raises(BeatError, match=r"attn of layer 1 \(0\) fired less often"):
            beats.take()


def test_a_failed_forward_is_a_beat_error_and_then_forgotten() -> None:
    model, ids = tiny_model(), random_ids()
    with torch.no_grad(), ActivationTap(model, SITES).listening() as beats:
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        handle.remove()
        with pytest.raises(BeatError, match="fired less often"):
            beats.take()
        model(ids)
        assert beats.take().shape == (2, 1, 9)


def test_discard_forgets_a_second_forward() -> None:
    model, ids = tiny_model(), random_ids()
    with torch.no_grad(), ActivationTap(model, SITES).listening() as beats:
        model(ids)
        model(ids)
        assert beats.forwards == 2
        beats.discard()
        assert (beats.forwards, beats.positions) == (0, 0)


def test_forwards_of_different_batch_sizes_are_a_beat_error() -> None:
    model = tiny_model()
    with torch.no_grad(), ActivationTap(model, SITES).listening() as beats:
        model(random_ids(2))
        model(random_ids(3))
        with pytest.raises(BeatError, match="wanted one batch size"):
            beats.take()


# --- refusals


def test_sites_outside_the_model_are_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ConfigurationError, match=r"layer=40 is outside this model's 0\.\.2"):
        ActivationTap(model, [Site(40, "resid", (0,))])
    with pytest.raises(ConfigurationError, match=r"channel 64 of mlp of layer 0 .* 0\.\.63"):
        ActivationTap(model, [Site(0, "mlp", (0, 64))])
    with pytest.raises(UnsupportedError, match="experts are fused"):
        ActivationTap(tiny_model("mixtral"), [Site(0, "mlp", (0,))])


def test_keep_last_refuses_to_keep_nothing() -> None:
    with (
        ActivationTap(tiny_model(), SITES).listening() as beats,
        pytest.raises(ConfigurationError, match="n_positions=0 keeps nothing"),
    ):
        beats.keep_last(0)
