"""Frames around a decoder: pipelines, accelerate, wrappers, copies, and code written for models."""

import copy
import logging
import pickle

import pytest
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TextStreamer, pipeline

from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.errors import PromptError, UnsupportedError
from safe_decode.testing.bundles import (
    REFUSAL,
    bundle_for,
    decoder_for,
    peaks,
    threshold_between,
)

CHAT = [{"role": "user", "content": "hello"}]
PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def piped(decoder, tokenizer, **options):
    options = {"device": "cpu", **options}
    return pipeline("text-generation", model=decoder, tokenizer=tokenizer, **options)


def half_tripping(llama, tokenizer, prompts, **options):
    """A decoder that refuses some of the prompts and not others."""
    flagged = decoder_for(llama, tokenizer, redirect="flag").generate(prompts, **options)
    return decoder_for(
        llama, tokenizer, redirect="refuse", threshold=threshold_between(peaks(flagged))
    )


@pytest.mark.parametrize("given", ["hello", PROMPTS, CHAT, [CHAT, CHAT]])
def test_an_untripped_pipeline_says_what_it_says_with_the_bare_model(llama, tokenizer, given):
    decoder = decoder_for(llama, tokenizer)
    guarded = piped(decoder, tokenizer)(given, **GREEDY)
    assert guarded == piped(llama, tokenizer)(given, **GREEDY)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_refuses_the_rows_that_trip_and_no_others(llama, tokenizer, batch_size):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    decoder = half_tripping(llama, tokenizer, chats, **GREEDY)
    wanted = decoder.generate(chats, **GREEDY)
    assert {trace.tripped for trace in wanted.traces} == {True, False}
    found = piped(decoder, tokenizer)(
        chats, batch_size=batch_size, return_full_text=False, **GREEDY
    )
    texts = [rows[0]["generated_text"] for rows in found]
    assert texts == wanted.texts and any(REFUSAL in text for text in texts)


def test_a_pipeline_returns_the_chat_with_what_the_reader_gets(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=-1e9)
    ((row),) = piped(decoder, tokenizer)(CHAT, **GREEDY)
    assert row["generated_text"] == [*CHAT, {"role": "assistant", "content": REFUSAL}]
    begun = [*CHAT, {"role": "assistant", "content": "Sure"}]
    ((row),) = piped(decoder, tokenizer)(begun, **GREEDY)
    assert row["generated_text"][-1]["content"].endswith(REFUSAL)


def test_a_pipeline_streams_what_the_guard_releases(llama, tokenizer, capsys):
    decoder = decoder_for(llama, tokenizer, redirect="refuse", threshold=-1e9)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    piped(decoder, tokenizer)(CHAT, streamer=streamer, **GREEDY)
    assert REFUSAL in capsys.readouterr().out


def test_a_pipeline_gives_several_sequences_and_ids(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    found = piped(decoder, tokenizer)("hello", return_tensors=True, **options)
    torch.manual_seed(0)
    assert found == piped(llama, tokenizer)("hello", return_tensors=True, **options)
    assert len(found) == 3


def test_a_pipeline_does_not_call_a_decoder_unsupported(llama, tokenizer):
    heard = []
    logger = logging.getLogger("transformers.pipelines.base")
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(listener)
    try:
        piped(decoder_for(llama, tokenizer), tokenizer)
        assert not heard
        logger.error("The model 'Other' is not supported for text-generation.")
        assert len(heard) == 1
    finally:
        logger.removeHandler(listener)


def test_a_pipeline_says_what_it_holds(llama, tokenizer):
    assert "SafeDecoder" in repr(piped(decoder_for(llama, tokenizer), tokenizer))


def test_a_decoder_is_not_moved(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    assert decoder.to("cpu") is decoder and decoder.eval() is decoder
    assert decoder.to(torch.float32) is decoder and decoder.to(device="cpu") is decoder
    for asked in (("meta",), ("cpu", torch.float16), (torch.bfloat16,)):
        with pytest.raises(UnsupportedError, match="Move the model first and wrap it there"):
            decoder.to(*asked)


def test_data_parallel_is_refused_by_its_name(llama, tokenizer):
    bundle = bundle_for(llama, tokenizer)
    with pytest.raises(UnsupportedError, match=r"DataParallel=True is refused.*model\.module"):
        SafeDecoder(DataParallel(llama), tokenizer, bundle)
    around = DataParallel(SafeDecoder(llama, tokenizer, bundle))
    with pytest.raises(UnsupportedError, match="DataParallel"):
        around(torch.ones(1, 3, dtype=torch.int64))
    inside = SafeDecoder(DataParallel(llama).module, tokenizer, bundle)
    assert inside.generate("hello", **GREEDY).texts


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_wrappers_are_refused_by_their_names(llama, tokenizer):
    bundle = bundle_for(llama, tokenizer)
    with pytest.raises(UnsupportedError, match="DistributedDataParallel=True is refused"):
        SafeDecoder(DistributedDataParallel(llama), tokenizer, bundle)
    with pytest.raises(UnsupportedError, match="DistributedDataParallel would run the model"):
        DistributedDataParallel(SafeDecoder(llama, tokenizer, bundle))


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "FSDPModule"])
def test_sharded_models_are_refused_by_their_names(llama, tokenizer, name):
    # The real classes want a device mesh; what is looked at is the name in the class's ancestry.
    sharded = type(name, (torch.nn.Module,), {})()
    sharded.module, sharded.config = llama, llama.config
    with pytest.raises(UnsupportedError, match=f"{name}=True is refused"):
        SafeDecoder(sharded, tokenizer, bundle_for(llama, tokenizer))


def test_what_modules_have_is_refused_in_words_and_absent_to_hasattr(llama, tokenizer):
    decoder = decoder_for(llama, tokenizer)
    for name in ("parameters", "forward", "state_dict", "train", "register_forward_hook"):
        assert not hasattr(decoder, name)
        with pytest.raises(UnsupportedError, match=f"{name} of a SafeDecoder is refused"):
            getattr(decoder, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = decoder.nonsense


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_what_to_do_instead(llama, tokenizer, how):
    decoder = decoder_for(llama, tokenizer)
    with pytest.raises(UnsupportedError, match="wrap the same model again.*load the model"):
        how(decoder)
    assert decoder.generate("hello", max_new_tokens=2).texts


def ids_of(tokenizer, text="hello"):
    return tokenizer(text, return_tensors="pt")["input_ids"]


def test_ids_may_stand_in_the_first_place_as_for_a_model(llama, tokenizer):
    decoder, ids = decoder_for(llama, tokenizer), ids_of(tokenizer)
    theirs = llama.generate(ids, **GREEDY)
    mine = decoder.generate(ids, **GREEDY)
    assert torch.equal(mine.sequences, theirs)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[:, 3:], theirs[:, 3:])
    assert mine.tolist() == theirs.tolist() and mine.shape == theirs.shape and len(mine) == 1
    assert tokenizer.decode(mine[0]) == tokenizer.decode(theirs[0])
    assert tokenizer.batch_decode(list(mine)) == tokenizer.batch_decode(list(theirs))
    *_, end = decoder.stream(ids, **GREEDY)
    assert end.text == mine.texts[0]


def test_two_sets_of_ids_are_refused(llama, tokenizer):
    decoder, ids = decoder_for(llama, tokenizer), ids_of(tokenizer)
    with pytest.raises(PromptError, match="exactly one of them"):
        decoder.generate(ids, input_ids=ids)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_decoder_passes_through_accelerate_untouched(llama, tokenizer, accelerator):
    decoder = decoder_for(llama, tokenizer)
    assert accelerator.prepare(decoder) is decoder
    assert accelerator.unwrap_model(decoder) is decoder
    assert decoder.generate("hello", **GREEDY).texts


def test_a_model_that_accelerate_has_prepared_is_guarded(llama, tokenizer, accelerator):
    bundle = bundle_for(llama, tokenizer)
    wanted = SafeDecoder(llama, tokenizer, bundle).generate(PROMPTS, **GREEDY)
    prepared = accelerator.unwrap_model(accelerator.prepare(llama)).eval()
    found = SafeDecoder(prepared, tokenizer, bundle).generate(PROMPTS, **GREEDY)
    assert torch.equal(found.sequences, wanted.sequences)


def test_mixed_precision_of_accelerate_is_refused_until_it_is_taken_off(llama, tokenizer):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    bundle = bundle_for(llama, tokenizer)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare(llama).eval()
        with pytest.raises(UnsupportedError, match="mixed_precision=True is refused"):
            SafeDecoder(prepared, tokenizer, bundle)
        plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert SafeDecoder(plain, tokenizer, bundle).generate("hello", **GREEDY).texts
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_dispatched_with_hooks_is_guarded(llama, tokenizer):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    bundle = bundle_for(llama, tokenizer)
    wanted = SafeDecoder(llama, tokenizer, bundle).generate(PROMPTS, **GREEDY)
    names = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    dispatched = accelerate.dispatch_model(
        llama, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True
    )
    assert hasattr(dispatched.lm_head, "_hf_hook")
    found = SafeDecoder(dispatched, tokenizer, bundle).generate(PROMPTS, **GREEDY)
    assert torch.equal(found.sequences, wanted.sequences)
    assert list(map(str, found.traces)) == list(map(str, wanted.traces))
    decoder = SafeDecoder(dispatched, tokenizer, bundle)
    assert decoder.hf_device_map == dispatched.hf_device_map
    ((row,),) = piped(decoder, tokenizer, device=None)([[*CHAT]], **GREEDY)
    assert row["generated_text"][-1]["content"] == wanted.texts[0]


def test_a_model_that_is_offloaded_whole_is_refused_in_words(llama, tokenizer):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    bundle = bundle_for(llama, tokenizer)
    offloaded = accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="meta device=True is refused: all of the model is"):
        SafeDecoder(offloaded, tokenizer, bundle)


def test_trl_generates_through_a_decoder(llama, tokenizer, accelerator):
    utils = pytest.importorskip("trl.models.utils", reason="trl is not installed")
    decoder = decoder_for(llama, tokenizer)
    with utils.unwrap_model_for_generation(decoder, accelerator) as unwrapped:
        ids = ids_of(tokenizer)
        assert unwrapped.generate(input_ids=ids, **GREEDY)[:, ids.shape[1] :].shape[1] > 0
