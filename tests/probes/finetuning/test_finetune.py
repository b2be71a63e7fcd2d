"""`safe-decode finetune`: in full and LoRA, frozen units untouched, checkpoints and resume."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from probes.data.conversations import Conversation
from probes.finetuning.finetune import FinetuneConfig, encode_for_training, pad_batch
from probes.finetuning.presets import freeze_of, units_of
from probes.finetuning.unit_weights import owned_weights
from probes.location.random_sets import iou
from safe_decode.cli.main import app
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.testing.models import EOS, byte_tokenizer, tiny_model
from tests.probes.finetuning.test_freeze import bits, changed, located

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    model = tiny_model("llama")
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    located(model).save(root / "units")
    rows = [{"prompt": f"the {n}", "response": f"it is {n}"} for n in range(12)]
    (root / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return root


def run(folder, out, *more):
    fixed = ("--data", folder / "data.jsonl", "--model", folder / "model", "--out", out)
    sizes = ("--batch-size", 4, "--learning-rate", 0.01, "--weight-decay", 0.1)
    return CliRunner().invoke(app, ["finetune", *map(str, (*fixed, *sizes, *more))])


def frozen_and_free(folder, out):
    """Which parameters changed inside and outside the safety-critical units."""
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (folder / "model", out))
    units = located(before)
    inside = owned_weights(before, units.only("SCU"))
    others = owned_weights(before, units.only("UCU"))
    return [changed(bits(before, part), bits(after, part)) for part in (inside, others)]


@pytest.mark.parametrize("how", [(), ("--lora-rank", 4)])
def test_frozen_units_come_through_and_the_rest_learns(folder, tmp_path, how):
    result = run(folder, tmp_path / "out", "--freeze", folder / "units", "--json", *how)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["steps"] == 3
    assert 0 < told["frozen_entries"] < told["trained_entries"]
    inside, others = frozen_and_free(folder, tmp_path / "out")
    assert inside == set()
    assert others
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == 3
    assert (tmp_path / "out" / "adapter").is_dir() == bool(how)


@pytest.mark.parametrize("how", [(), ("--lora-rank", 4)])
def test_a_run_goes_on_from_its_checkpoint(folder, tmp_path, how):
    out = tmp_path / "out"
    options = ("--freeze", folder / "units", "--save-steps", 2, "--json", *how)
    assert run(folder, out, *options).exit_code == 0
    line = run(folder, out, *options)
    assert line.exit_code == 2
    assert "is not empty" in line.stderr
    again = run(folder, out, *options, "--epochs", 2, "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["steps"] == 6
    assert frozen_and_free(folder, out)[0] == set()
    other = run(folder, out, *options, "--setting", "ii", "--epochs", 3, "--resume")
    assert other.exit_code == 2
    told = "has moved it already" if how else "the checkpoint's run began with frozen weights"
    assert told in other.stderr


def test_people_see_what_was_held(folder, tmp_path):
    result = run(folder, tmp_path / "out", "--freeze", folder / "units", "--setting", "redundant")
    assert result.exit_code == 0, result.output
    assert "held still" in result.stdout


def test_nothing_to_resume_and_a_lot_without_units_are_refused(folder, tmp_path):
    nothing = run(folder, tmp_path / "out", "--resume")
    assert "holds no checkpoint" in nothing.stderr
    assert "without --freeze" in run(folder, tmp_path / "a", "--random-control", 1).stderr


def test_the_prompt_carries_no_loss_and_the_end_does(llama, tokenizer):
    row = Conversation(messages=({"role": "user", "content": "the 1"},), response="ok", group="a")
    (encoded,) = encode_for_training(llama, tokenizer, [row], max_length=99)
    learnt = [i for i in encoded["labels"] if i != -100]
    assert tokenizer.decode(learnt[:-1]) == "ok"
    assert learnt[-1] == EOS
    batch = pad_batch([encoded, {"input_ids": [9], "labels": [9]}], 0)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(encoded["input_ids"]), 1]
    assert batch["labels"][1].tolist() == [9] + [-100] * (len(encoded["labels"]) - 1)
    assert batch["input_ids"].dtype == torch.int64
    with pytest.raises(DataError, match="max_length=3"):
        encode_for_training(llama, tokenizer, [row], max_length=3)


@pytest.mark.parametrize("setting", ["scu", "i", "ii", "redundant"])
def test_a_lot_holds_as_many_units_of_each_layer_and_kind(llama, setting):
    units = located(llama)
    named, lot = units_of(units, setting), units_of(units, setting, random_seed=1)

    def numbers(part):
        pairs = list(zip(part.layer.tolist(), part.kind.tolist(), strict=True))
        return {pair: pairs.count(pair) for pair in pairs}

    assert numbers(named) == numbers(lot)
    assert iou(named, lot) < 1
    assert freeze_of(units, setting, random_seed=1).n_frozen(llama) > 0
    with pytest.raises(ConfigurationError, match="setting='iii'"):
        units_of(units, "iii")
    with pytest.raises(ConfigurationError, match="epochs=0"):
        FinetuneConfig(epochs=0)
