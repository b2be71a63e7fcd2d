"""One impossible number in a card, its digests mended, and the bundle does not load."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.files import CALIBRATION, CARD, card_digest
from safe_decode.bundle.numpy_runtime import NumpyBundle
from safe_decode.certificate import Certificate
from safe_decode.demo.embedded_pair import artefact
from safe_decode.errors import BundleCorruptError, CertificateError
from safe_decode.evidence import Evidence
from safe_decode.policy.reasoning import ReasoningSpans
from safe_decode.policy.self_check import HeaderCheck
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.bundles import ENVELOPE, random_bundle, random_probe

IMPOSSIBLE = {
    "alpha": [0.0, -0.01, 1.0, 0.9],
    "delta": [0.0, -0.05, 0.99, 0.3, 1.0],
    "n": [-1, 0, 8, 999.5],
    "j": [-2, 2000],
    "max_new_tokens": [0, -64, 64.5, 65, 100_000],
    "temperature": [-1.0],
    "top_p": [0.0, -0.5, 1.01],
    "top_k": [-1, 0.5],
    "holdback_tokens": [-1, 1_000_000, 0.5],
    "smoothing": [0.0, -0.1, 1.5],
    "scale": [0.0, -1.0, 1e-300],
    "drift": [-0.1],
    "window": [0, 10**9, 1.5],
    "hits": [0, 10**9],
    "tolerance": [0.0, -1e-3, 50.0],
    "turn_start": [0, -1, 10**6],
    "ids": [-1, 10**9, 0.5],
    "layer": [-1, 99, 0.5],
    "channels": [-1],
    "every_tokens": [0, 10**9],
    "max_looks": [0, 10**9],
    "default_alpha": [0.02, -1.0],
}
"""Values that are impossible for one entry alone; beyond float32 is impossible for all."""
BEYOND = st.sampled_from([1e300, -1e300, 3.5e38, -3.5e38, 10**40])


def evidence(n, source, length=64):
    return Evidence(source, (min(length, 64),) * n, (length,) * n)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A bundle that has every part, saved."""
    rng = np.random.default_rng(0)

    def certified(n, alpha, population="benign", source="on-policy"):
        return Certificate.compute(
            rng.normal(size=n).astype(np.float32).tolist(),
            alpha=alpha,
            delta=0.05,
            population=population,
            envelope=ENVELOPE,
            evidence=evidence(n, source),
        )

    bundle = random_bundle(
        tiny_model(),
        byte_tokenizer(),
        certificates=(
            certified(1_000, 0.01),
            certified(500, 0.05, "hard_negative", "off-policy"),
        ),
        header_check=HeaderCheck(random_probe(), 1.0, (certified(400, 0.01),)),
        reasoning=ReasoningSpans("<think>", "</think>", (certified(400, 0.01),)),
    )
    place = tmp_path_factory.mktemp("rich") / "bundle"
    bundle.save(place)
    return place


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def numbers(card):
    """Paths of all numbers that decide something."""
    judged = {name: value for name, value in card.items() if name not in ("schema", "provenance")}
    return list(leaves(judged))


def changed(place, folder, path, value):
    """Copy a bundle with one number changed and the card's digest mended."""
    target = Path(folder, "forged")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place, target)
    card = json.loads((target / CARD).read_text("utf-8"))
    spot = card
    for step in path[:-1]:
        spot = spot[step]
    spot[path[-1]] = value
    card["digest"] = card_digest(card)
    (target / CARD).write_text(json.dumps(card), "utf-8")
    return target


def word_for(path):
    """What the error has to say: where a probe reads is refused as a whole, too."""
    name = name_of(path).removeprefix("default_")
    return f"{name}|sites" if name in ("layer", "channels") else name


def name_of(path):
    return [step for step in path if isinstance(step, str)][-1]


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_number_that_is_impossible_is_refused_by_name(rich, tmp_path, data):
    path = data.draw(st.sampled_from(numbers(json.loads((rich / CARD).read_text("utf-8")))))
    name = name_of(path)
    own = IMPOSSIBLE.get(name, [])
    value = data.draw(st.one_of(BEYOND, st.sampled_from(own)) if own else BEYOND)
    with pytest.raises(BundleCorruptError, match=word_for(path)):
        ProbeBundle.load(changed(rich, tmp_path, path, value))


def test_every_number_of_the_card_has_been_thought_of(rich):
    """A new entry has to be given its range here, and so in `plausible`."""
    named = {name_of(path) for path in numbers(json.loads((rich / CARD).read_text("utf-8")))}
    unbounded = {"threshold", "first_threshold", "start", "offset", "low_mark"}
    assert named == set(IMPOSSIBLE) | unbounded


def test_each_impossible_value_is_refused(rich, tmp_path):
    """The whole list, once each, at the first place where the name stands."""
    card = json.loads((rich / CARD).read_text("utf-8"))
    first = {}
    for path in numbers(card):
        first.setdefault(name_of(path), path)
    for name, values in IMPOSSIBLE.items():
        for value in values:
            with pytest.raises(BundleCorruptError, match=word_for(first[name])):
                ProbeBundle.load(changed(rich, tmp_path, first[name], value))


def with_arrays(place, folder, change):
    target = Path(folder, "arrays")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place, target)
    arrays = load_file(target / CALIBRATION)
    change(arrays)
    save_file(arrays, target / CALIBRATION)
    card = json.loads((target / CARD).read_text("utf-8"))
    digest = hashlib.sha256((target / CALIBRATION).read_bytes()).hexdigest()
    card["files"][CALIBRATION] = digest
    card["digest"] = card_digest(card)
    (target / CARD).write_text(json.dumps(card), "utf-8")
    return target


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: a["maxima_0"].view(-1)[:1].fill_(1e300), "maxima"),
        (lambda a: a["maxima_0"].view(-1)[:1].fill_(-1e300), "maxima"),
        (lambda a: a["maxima_0"].view(-1)[:1].fill_(torch.inf), "maxima"),
        (lambda a: a.update(maxima_0=a["maxima_0"][:-1]), "n="),
        (lambda a: a["lengths_0"].view(-1)[:1].fill_(-1), "length=-1"),
        (lambda a: a["lengths_0"].view(-1)[:1].fill_(65), "length=65 and reach=64"),
        (lambda a: a["reaches_0"].view(-1)[:1].fill_(63), "length=64 and reach=63"),
        (lambda a: a["reaches_0"].fill_(10**7), "reaches"),
        (lambda a: (a["reaches_0"][:1].fill_(9), a["lengths_0"][:1].fill_(9)), "max_new_tokens=64"),
        (lambda a: a.update(lengths_0=a["lengths_0"].double() - 0.5), "lengths hold"),
        (lambda a: a.update(lengths_0=a["lengths_0"][:-1]), "lengths of 999 draws"),
        (lambda a: a.pop("reaches_0"), "'reaches_0' is missing"),
    ],
)
def test_impossible_maxima_and_lengths_are_refused(rich, tmp_path, change, named):
    with pytest.raises(BundleCorruptError, match=named):
        ProbeBundle.load(with_arrays(rich, tmp_path, change))


def test_the_portable_reader_believes_no_more(llama, tokenizer, tmp_path):
    random_bundle(llama, tokenizer).save(tmp_path / "b")
    for path, value in (
        (("certificates", 0, "threshold"), 9.0),
        (("certificates", 0, "delta"), 0.99),
        (("monitor", "scale", 0), 1e-300),
    ):
        with pytest.raises(BundleCorruptError, match=name_of(path)):
            NumpyBundle.load(changed(tmp_path / "b", tmp_path, path, value))
    with pytest.raises(BundleCorruptError, match="maxima"):
        NumpyBundle.load(
            with_arrays(tmp_path / "b", tmp_path, lambda a: a["maxima_0"].fill_(1e300))
        )


def test_sampling_at_temperature_zero_is_refused(rich, tmp_path):
    target = changed(rich, tmp_path, ("certificates", 0, "envelope", "do_sample"), True)
    ProbeBundle.load(target)
    again = changed(target, tmp_path / "again", ("certificates", 0, "envelope", "temperature"), 0.0)
    with pytest.raises(BundleCorruptError, match="temperature=0.0"):
        ProbeBundle.load(again)


def test_names_that_stand_twice_and_hidden_infinities_are_refused(rich, tmp_path):
    target = changed(rich, tmp_path, ("default_alpha",), 0.01)
    text = (target / CARD).read_text("utf-8")
    (target / CARD).write_text(text.replace("{", '{"default_alpha": 0.5, ', 1))
    with pytest.raises(BundleCorruptError, match="names 'default_alpha' twice"):
        ProbeBundle.load(target)
    (target / CARD).write_text(text.replace('"drift": 0.0', '"drift": 1e999'))
    with pytest.raises(BundleCorruptError, match="1e999, wanted finite numbers"):
        ProbeBundle.load(target)
    (target / CARD).write_text("[" * 100_000)
    with pytest.raises(BundleCorruptError):
        ProbeBundle.load(target)


def test_half_of_the_evidence_is_refused(rich, tmp_path):
    target = changed(rich, tmp_path, ("certificates", 0, "reaches"), None)
    with pytest.raises(BundleCorruptError, match="records source and lengths alone"):
        ProbeBundle.load(target)


def test_a_stricter_level_never_has_the_lower_threshold(llama, tokenizer, tmp_path):
    """Of the same maxima, with deltas so far apart that the order turns."""
    maxima = np.random.default_rng(0).normal(size=1_000).tolist()
    pair = tuple(
        Certificate.compute(
            maxima, alpha=alpha, delta=delta, population="benign", envelope=ENVELOPE
        )
        for alpha, delta in ((0.01, 0.2), (0.0105, 1e-4))
    )
    assert pair[0].threshold < pair[1].threshold
    with pytest.raises(BundleCorruptError, match="wanted at most that, from the same maxima"):
        random_bundle(llama, tokenizer, certificates=pair).save(tmp_path / "b")


def test_a_bundle_that_would_not_load_is_not_written(llama, tokenizer, tmp_path):
    bundle = random_bundle(llama, tokenizer)
    with pytest.raises(BundleCorruptError, match="holdback_tokens=5000"):
        replace(bundle, holdback_tokens=5_000).save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_bundles_of_earlier_schemas_load_and_say_that_nothing_is_recorded():
    """The embedded one was made before writers and lengths were recorded."""
    bundle = ProbeBundle.load(artefact("bundle"))
    card = json.loads(Path(artefact("bundle"), CARD).read_text("utf-8"))
    assert card["schema"] < 3 and "source" not in card["certificates"][0]
    assert {one.evidence.source for one in bundle.all_certificates} == {"unrecorded"}
    assert {one.supported_cap for one in bundle.all_certificates} == {None}
    assert bundle.digest == card["digest"], "what is read is written again as it was"


def test_the_cap_rule():
    """Own responses reach their cap; of others, as many as certify have to reach it."""
    own = Evidence("on-policy", (1, 7, 64), (64, 64, 64))
    assert own.supported_cap(3) == 64
    assert Evidence("on-policy", (1, 7), (64, 40)).supported_cap(1) == 40
    texts = tuple(range(1, 101))
    assert Evidence("off-policy", texts, texts).supported_cap(1) == 100
    assert Evidence("off-policy", texts, texts).supported_cap(30) == 71
    assert Evidence("off-policy", texts, texts).supported_cap(100) == 1
    with pytest.raises(CertificateError, match="lengths are recorded with their source"):
        Evidence("unrecorded", (1,), (1,))
    with pytest.raises(CertificateError, match="source='mine' is not one of"):
        Evidence("mine", (1,), (1,))
