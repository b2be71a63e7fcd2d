"""Frozen units are bit-identical after training; the rest, and a random set, is not."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from probes.finetuning.located_freezes import RedundantUnitBudget, SafetyFreeze, safety_setting
from probes.finetuning.unit_weights import complement, owned_weights
from probes.location.units import CATEGORIES, Ratios, UnitScores, assign
from safe_decode.activations.architecture import anatomy_of
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.testing.models import D_FF, N_HEADS, N_LAYERS, tiny_model

RATIOS = Ratios(redundant=0.2, safety=0.1, utility=0.1)


def located(model, seed=0, ranking="joint"):
    """Every unit of a tiny model, with random scores."""
    sizes = [(layer, kind) for layer in range(N_LAYERS) for kind in (0, 1)]
    counts = [D_FF if kind else N_HEADS for _, kind in sizes]
    rng = np.random.default_rng(seed)
    scores = UnitScores(
        layer=np.repeat([layer for layer, _ in sizes], counts).astype(np.int32),
        kind=np.repeat([kind for _, kind in sizes], counts).astype(np.uint8),
        index=np.concatenate([np.arange(count) for count in counts]).astype(np.int32),
        i_s=rng.normal(size=sum(counts)).astype(np.float32),
        i_u=rng.normal(size=sum(counts)).astype(np.float32),
        head_dim=anatomy_of(model).head_dim,
    )
    return assign(scores, RATIOS, ranking=ranking)


def bits(model, slices):
    """The bits of some weights, by parameter."""
    parameters, found = dict(model.named_parameters()), {}
    for part in slices:
        values = parameters[part.name].detach()
        if part.indices is not None:
            values = values.index_select(part.dim, part.indices)
        found[part.name] = values.clone().contiguous().view(torch.uint8)
    return found


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


class Rows(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, row):
        ids = torch.arange(7 + row, 23 + row)
        return {"input_ids": ids, "labels": ids}


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5, **options)


def loop(model, optimizer, steps=3, *, accumulate=2, clip=0.5):
    """A plain loop with gradient accumulation and clipping; returns the norms clipped."""
    model.train()
    norms = []
    for step in range(steps):
        for micro in range(accumulate):
            ids = torch.arange(16).reshape(1, 16) + 7 + 3 * step + micro
            (model(ids, labels=ids).loss / accumulate).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_units_are_bit_identical_and_all_else_moves(model, dtype):
    model.to(dtype)
    freeze = SafetyFreeze(located(model))
    frozen = freeze.frozen_weights(model)
    rest = complement(model, frozen)
    before, others = bits(model, frozen), bits(model, rest)
    optimizer = adamw(model)
    with freeze.applied(model, optimizer):
        loop(model, optimizer)
    assert changed(before, bits(model, frozen)) == set()
    assert changed(others, bits(model, rest)) == set(others)
    assert freeze.n_frozen(model) > 100


def test_a_random_set_that_is_not_frozen_moves(llama):
    units = located(llama)
    control = owned_weights(llama, located(llama, seed=5).only("SCU"))
    free = bits(llama, control)
    freeze, optimizer = SafetyFreeze(units), adamw(llama)
    with freeze.applied(llama, optimizer):
        loop(llama, optimizer)
    assert changed(free, bits(llama, control)) == set(free)


def test_masked_gradients_alone_would_not_hold_weights_still(llama):
    # What `test_frozen_units_are_bit_identical` would miss if nothing ever pushed them.
    freeze, optimizer = SafetyFreeze(located(llama)), adamw(llama)
    frozen = freeze.frozen_weights(llama)
    before = bits(llama, frozen)
    with freeze.applied(llama, adamw(llama)):  # the optimizer that steps is not the one held
        loop(llama, optimizer, steps=1)
        assert changed(before, bits(llama, frozen)) == set(before)  # by weight decay alone
    assert changed(before, bits(llama, frozen)) == set()


def test_old_momentum_does_not_move_frozen_units(llama):
    freeze, optimizer = SafetyFreeze(located(llama)), adamw(llama)
    loop(llama, optimizer)
    frozen = freeze.frozen_weights(llama)
    before = bits(llama, frozen)
    with freeze.applied(llama, optimizer):
        loop(llama, optimizer)
    assert changed(before, bits(llama, frozen)) == set()
    loop(llama, optimizer, steps=1)  # let go: it moves again
    assert changed(before, bits(llama, frozen)) == set(before)


def test_training_equals_a_model_whose_frozen_weights_are_constants():
    """Clipping norms, moments and free weights are those of brute force by masks."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    freeze, optimizer = SafetyFreeze(located(model)), adamw(model)
    with freeze.applied(model, optimizer):
        norms = loop(model, optimizer)

    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in twin.named_parameters()}
    for part in freeze.frozen_weights(twin):
        masks[part.name].index_fill_(part.dim, part.indices, True)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    twin_optimizer, twin_norms = adamw(twin), []
    for step in range(3):
        for micro in range(2):
            ids = torch.arange(16).reshape(1, 16) + 7 + 3 * step + micro
            (twin(ids, labels=ids).loss / 2).backward()
        for name, parameter in twin.named_parameters():
            parameter.grad[masks[name]] = 0
        twin_norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)))
        twin_optimizer.step()
        twin_optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter[masks[name]] = start[name][masks[name]]
    assert norms == pytest.approx(twin_norms)
    for (name, mine), (_, its) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine, its, msg=name)
        assert not bool(optimizer.state[mine]["exp_avg"][masks[name]].any()), name


def test_a_budget_trains_redundant_units_and_nothing_else(model):
    units = located(model)
    budget, optimizer = RedundantUnitBudget(units), adamw(model)
    own = owned_weights(model, units.only("RU"), shared="all")
    rest = complement(model, own)
    moving, before = bits(model, own), bits(model, rest)
    with budget.applied(model, optimizer):
        loop(model, optimizer)
    assert changed(before, bits(model, rest)) == set()
    assert changed(moving, bits(model, own)) == set(moving)
    assert budget.n_frozen(model) < sum(p.numel() for p in model.parameters())
    # What is frozen whole costs the optimizer no moments.
    assert len(optimizer.state) == len({part.name for part in own})


def test_a_budget_never_moves_a_row_that_another_head_shares():
    model = tiny_model("gemma")  # one key-value head serves all four
    units = located(model)
    assert 0 < int((units.only("RU").kind == 0).sum()) < N_LAYERS * N_HEADS
    own = owned_weights(model, RedundantUnitBudget(units).units, shared="all")
    assert not any("k_proj" in part.name for part in own)


@pytest.mark.parametrize(
    ("setting", "shares"), [("i", {"SCU": 1.0, "CU": 0.06}), ("ii", {"SCU": 1.0, "CU": 1.0})]
)
def test_the_papers_settings_freeze_their_shares(llama, setting, shares):
    units = located(llama)
    frozen = safety_setting(units, setting).units
    for category, count in units.counts().items():
        share = shares.get(category, 0.0)
        assert frozen.counts()[category] == round(share * count)
    excess = units.i_s - units.i_u
    complex_units = units.category == CATEGORIES.index("CU")
    top = np.sort(excess[complex_units])[-frozen.counts()["CU"] :]
    kept = frozen.only("CU")
    np.testing.assert_array_equal(np.sort(kept.i_s - kept.i_u), top)


def test_the_top_complex_units_follow_the_ranking_of_location(llama):
    units = located(llama, ranking="separate")
    frozen = SafetyFreeze(units, complex_share=0.25).units.only("CU")
    for kind in (0, 1):
        here = int((units.only("CU").kind == kind).sum())
        assert int((frozen.kind == kind).sum()) == round(0.25 * here)


def test_a_copy_in_cpu_memory_holds_as_well(llama):
    freeze, optimizer = SafetyFreeze(located(llama), offload=True), adamw(llama)
    before = bits(llama, freeze.frozen_weights(llama))
    with freeze.applied(llama, optimizer):
        loop(llama, optimizer)
    assert changed(before, bits(llama, freeze.frozen_weights(llama))) == set()


def test_hooks_are_gone_and_weights_are_back_after_an_exception(llama):
    freeze, optimizer = SafetyFreeze(located(llama)), adamw(llama)
    before = bits(llama, freeze.frozen_weights(llama))
    with pytest.raises(ZeroDivisionError), freeze.applied(llama, optimizer):
        loop(llama, optimizer, steps=1)
        with torch.no_grad():
            llama.model.layers[0].mlp.down_proj.weight.mul_(2)
        raise ZeroDivisionError
    assert changed(before, bits(llama, freeze.frozen_weights(llama))) == set()
    ids = torch.arange(7, 23).reshape(1, 16)
    llama(ids, labels=ids).loss.backward()
    assert bool((llama.model.layers[0].mlp.down_proj.weight.grad != 0).all())


# -- transformers.Trainer --------------------------------------------------------------------


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.5,
        "max_grad_norm": 0.5,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**values, **changes})


def trained(model, tmp_path, *callbacks, resume=None, **changes):
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **changes),
        train_dataset=Rows(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lean", [False, True])
def test_the_trainer_holds_frozen_units(family, lean, tmp_path):
    """Lean: bf16 autocast, and activations computed anew in the backward pass."""
    model = tiny_model(family)
    if lean:
        model.activation_checkpointing_enable()
    freeze = SafetyFreeze(located(model))
    frozen = freeze.frozen_weights(model)
    rest = complement(model, frozen)
    before, others = bits(model, frozen), bits(model, rest)
    trained(model, tmp_path, freeze, bf16=lean)
    assert changed(before, bits(model, frozen)) == set()
    assert changed(others, bits(model, rest)) == set(others)


def test_the_trainer_keeps_to_the_redundant_budget(llama, tmp_path):
    budget = RedundantUnitBudget(located(llama))
    rest = budget.frozen_weights(llama)
    before, start = bits(llama, rest), llama.model.layers[0].mlp.up_proj.weight.clone()
    trained(llama, tmp_path, budget)
    assert changed(before, bits(llama, rest)) == set()
    assert not torch.equal(start, llama.model.layers[0].mlp.up_proj.weight)


def test_resuming_from_a_checkpoint_equals_a_run_in_one_go(tmp_path):
    through, resumed = tiny_model("llama"), tiny_model("llama")
    freeze = SafetyFreeze(located(through))
    frozen = freeze.frozen_weights(through)
    before = bits(through, frozen)
    trained(through, tmp_path, freeze)
    with torch.no_grad():  # what is loaded from the checkpoint replaces this
        resumed.model.layers[0].mlp.down_proj.weight.zero_()
    trained(
        resumed, tmp_path, SafetyFreeze(located(through)), resume=str(tmp_path / "checkpoint-2")
    )
    assert changed(before, bits(resumed, frozen)) == set()
    for mine, its in zip(through.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


def test_resuming_with_other_frozen_units_is_refused(llama, tmp_path):
    trained(llama, tmp_path, SafetyFreeze(located(llama)))
    other = SafetyFreeze(located(llama, seed=1))
    with pytest.raises(ConfigurationError, match="resume with the units and options it began with"):
        trained(tiny_model("llama"), tmp_path, other, resume=str(tmp_path / "checkpoint-2"))


def test_a_run_that_raised_can_be_run_again(llama, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise ZeroDivisionError

    freeze = SafetyFreeze(located(llama))
    before = bits(llama, freeze.frozen_weights(llama))
    with pytest.raises(ZeroDivisionError):
        trained(llama, tmp_path, freeze, Fails())
    trained(llama, tmp_path, freeze, save_strategy="no")
    assert changed(before, bits(llama, freeze.frozen_weights(llama))) == set()


# -- what is refused -------------------------------------------------------------------------


def test_adapters_are_refused_before_training(llama):
    llama.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(2, 2)
    with (
        pytest.raises(UnsupportedError, match="q_proj carries an adapter"),
        SafetyFreeze(located(llama)).applied(llama, adamw(llama)),
    ):
        pass


def test_an_optimizer_of_another_model_is_refused(llama):
    freeze = SafetyFreeze(located(llama))
    other = adamw(tiny_model("llama"))
    with (
        pytest.raises(ConfigurationError, match="of this very model"),
        freeze.applied(llama, other),
    ):
        pass
    with pytest.raises(ConfigurationError, match="no optimizer"), freeze.applied(llama):
        pass


def test_one_object_holds_one_model_at_a_time(llama):
    freeze = SafetyFreeze(located(llama))
    with (
        freeze.applied(llama, adamw(llama)),
        pytest.raises(ConfigurationError, match="holds a model already"),
        freeze.applied(llama, adamw(llama)),
    ):
        pass
    with pytest.raises(ConfigurationError, match="after training began"):
        freeze.on_optimizer_step(None, None, None)


def test_sharded_training_is_refused(llama, tmp_path):
    args = arguments(tmp_path)
    args.fsdp = ["full_shard"]
    with pytest.raises(UnsupportedError, match="train in one process"):
        SafetyFreeze(located(llama)).on_train_begin(args, None, None, model=llama)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"categories": ()}, "not a non-empty sequence"),
        ({"categories": "SCU"}, "not a non-empty sequence"),
        ({"categories": ("SCU", "CU"), "complex_share": 0.1}, "0 where categories holds CU"),
        ({"complex_share": 1.5}, "complex_share=1.5 must be in 0..1"),
    ],
)
def test_contradicting_options_are_refused(llama, options, told):
    with pytest.raises(ConfigurationError, match=told):
        SafetyFreeze(located(llama), **options)


def test_freezing_nothing_is_refused(llama):
    with pytest.raises(ConfigurationError, match=r"hold none of categories=\('SCU',\)"):
        SafetyFreeze(located(llama).only("RU"))
    with pytest.raises(ConfigurationError, match="setting='iii'"):
        safety_setting(located(llama), "iii")
