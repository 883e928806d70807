"""Under ``transformers.Trainer`` one callback does what a loop of one's own would."""

import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

import triton_sparsity as ts
from forks import fork_ranks
from tiny_models import FAMILIES, Examples, llama

BLOCKS = ts.Block(16, 16)
HALF = ts.PolynomialSchedule(target_level=0.5, target_epoch=1)
BY_STEP = ts.PolynomialSchedule(
    target_level=0.75, target_epoch=2, update_per_optimizer_step=True, power=3.0
)
ALGORITHMS = {
    "by step": ts.MagnitudeSparsityConfig(pattern=BLOCKS, schedule=BY_STEP),
    "ramp": ts.MagnitudeSparsityConfig(
        pattern=BLOCKS,
        schedule=ts.RampSchedule(
            target_level=0.75, begin=0.25, end=2.25, every=0.25, unit="epoch", shape="cosine"
        ),
    ),
    "wanda": ts.MagnitudeSparsityConfig(weight_importance="wanda", schedule=HALF),
    "snip_momentum": ts.MagnitudeSparsityConfig(weight_importance="snip_momentum", schedule=HALF),
    "rigl": ts.RigLConfig(level=0.5, t_end=20, delta_t=4, pattern=BLOCKS),
    "rb": ts.RBSparsityConfig(pattern=BLOCKS, schedule=HALF),
    "movement": ts.MovementSparsityConfig(
        warmup_start_epoch=0,
        warmup_end_epoch=2,
        steps_per_epoch=8,
        importance_regularization_factor=0.1,
        init_importance_threshold=-0.1,
        enable_structured_masking=False,
    ),
    "sr_ste": ts.SRSTEConfig(t_end=20),
    "hard movement": ts.MovementSparsityConfig(
        pattern=BLOCKS,
        schedule=ts.RampSchedule(target_level=0.75, begin=0.5, end=2, every=0.25, unit="epoch"),
    ),
    "composite": [
        ts.RigLConfig(level=0.5, t_end=20, delta_t=4, target_scopes="model.layers.0"),
        ts.MagnitudeSparsityConfig(schedule=BY_STEP, target_scopes="model.layers.1"),
    ],
    # all of some weights is pruned, so that they are zero when training is resumed
    "whole weights": ts.MagnitudeSparsityConfig(
        schedule=ts.PolynomialSchedule(target_level=0.9, target_epoch=0),
        weight_importance="wanda",
        pool="global",
    ),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:at level .* pruned to nothing"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def arguments(folder, **changes):
    given = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return hf.TrainingArguments(output_dir=str(folder), **given | changes)


class Stop(hf.TrainerCallback):
    """Breaks training off in the middle of a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder, callback, *, model=None, resume=None, stop=None, data=None, **changes):
    """Train a model, which takes dropout's numbers from the generator; return the Trainer."""
    torch.manual_seed(0)
    model = llama(attention_dropout=0.1) if model is None else model
    trainer = hf.Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=data or Examples(),
        eval_dataset=Examples(count=32),
        callbacks=[callback] + ([] if stop is None else [Stop(stop)]),
    )
    if stop is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def level_of(model, scope="layers"):
    weights = [p for name, p in model.named_parameters() if scope in name and p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_one_line_trains_to_the_target_and_strips(tmp_path):
    config = ts.MagnitudeSparsityConfig(schedule=BY_STEP)
    callback = ts.TransformersCallback(config)
    assert callback.controller is None
    trainer = train(tmp_path, callback)
    # 16 batches an epoch are 8 optimiser steps
    assert callback.controller.scheduler.current_step == trainer.state.max_steps - 1 == 23
    assert callback.controller.scheduler.current_epoch == 2
    assert level_of(trainer.model) == pytest.approx(0.75, abs=1e-4)
    assert {type(m).__module__ for m in trainer.model.modules()}.isdisjoint({"triton_sparsity"})
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    levels = [entry["sparsity_level"] for entry in logged]
    assert levels == sorted(levels)
    assert levels[-1] == pytest.approx(0.75, abs=1e-4)
    for entry in logged:
        low, high = entry["sparsity_level_min"], entry["sparsity_level_max"]
        assert low <= entry["sparsity_level"] <= high
        assert 0 <= entry["mask_churn"] < 1
    assert logged[1]["mask_churn"] > 0
    summary = callback.statistics.magnitude_sparsity.model_statistics
    assert summary.sparsity_level_for_layers == pytest.approx(0.75, abs=1e-4)


def test_callbacks_behind_it_see_the_figures(tmp_path):
    seen = []

    class Reporter(hf.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=HALF))
    trainer = hf.Trainer(
        llama(), arguments(tmp_path), train_dataset=Examples(), callbacks=[callback, Reporter()]
    )
    trainer.train()
    assert all("sparsity_level" in logs for logs in seen if "loss" in logs)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "by step" else pytest.param(name, marks=pytest.mark.slow)
        for name in ALGORITHMS
    ],
)
@pytest.mark.filterwarnings("ignore:training has ended at level")
def test_a_run_resumed_within_an_epoch_ends_bit_for_bit_the_same(name, tmp_path):
    config, save = ALGORITHMS[name], {"save_strategy": "steps", "save_steps": 5}
    whole = train(tmp_path / "whole", ts.TransformersCallback(config), **save)
    train(tmp_path / "parts", ts.TransformersCallback(config), stop=13, **save)
    resumed = train(tmp_path / "parts", ts.TransformersCallback(config), resume=True, **save)
    assert_same(whole.model, resumed.model)
    assert level_of(whole.model) > 0.1
    # the means of the losses since the last log, the first of which began before the checkpoint
    logged = [
        {e["step"]: (e["loss"], e["sparsity_level"], e["mask_churn"]) for e in history[:-1]}
        for history in (whole.state.log_history, resumed.state.log_history)
    ]
    assert all(logged[0][step] == logged[1][step] for step in (16, 20, 24))


@pytest.mark.slow
def test_rb_reaches_its_target_by_a_loss_that_no_trainer_adds(tmp_path):
    config = ts.RBSparsityConfig(pattern=BLOCKS, schedule=HALF)
    trainer = train(tmp_path, ts.TransformersCallback(config), num_train_epochs=5)
    assert level_of(trainer.model) == pytest.approx(0.5, abs=0.05)
    assert not any("scores" in name for name, _ in trainer.model.named_parameters())


class Ordered(hf.Trainer):
    """Takes the data in their order."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_it_trains_as_a_loop_of_ones_own(tmp_path):
    config = ts.MagnitudeSparsityConfig(pattern=BLOCKS, schedule=HALF)
    options = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    torch.manual_seed(0)
    trainer = Ordered(
        llama(),
        arguments(tmp_path, lr_scheduler_type="constant", **options),
        train_dataset=Examples(),
        callbacks=[ts.TransformersCallback(config)],
    )
    trainer.train()

    torch.manual_seed(0)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    controller = ts.create_controller(model, config)
    for _ in range(3):
        controller.scheduler.epoch_step()
        for batch in torch.utils.data.DataLoader(Examples(), 4):
            controller.scheduler.step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs = trainer.model.state_dict()
    for name, tensor in controller.strip().state_dict().items():
        assert torch.equal(tensor == 0, theirs[name] == 0), name
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)


def pretrained(folder):
    """A model that is good while it is dense."""
    torch.manual_seed(0)
    model = llama()
    options = arguments(folder, num_train_epochs=8, learning_rate=5e-3)
    hf.Trainer(model, options, train_dataset=Examples(count=128)).train()
    return model


@pytest.mark.slow
def test_no_checkpoint_is_the_best_before_the_target_is_reached(tmp_path):
    schedule = ts.PolynomialSchedule(target_level=0.97, target_epoch=2, freeze_epoch=3)
    # a layer may be pruned to nothing, so that the model does not recover
    config = ts.MagnitudeSparsityConfig(schedule=schedule, maximum_level=1.0)
    trainer = train(
        tmp_path / "sparse",
        ts.TransformersCallback(config),
        model=pretrained(tmp_path / "dense"),
        num_train_epochs=5,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    losses = {e["epoch"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    # dense it was better than it will ever be again
    assert min(losses, key=losses.get) < 3
    best = min((epoch for epoch in losses if epoch >= 3), key=losses.get)
    saved = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.best_metric == losses[best]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert level_of(trainer.model) == pytest.approx(0.97, abs=1e-3)
    assert_same(trainer.model, hf.AutoModelForCausalLM.from_pretrained(saved))


def test_the_best_checkpoint_comes_back_under_its_own_masks(tmp_path):
    # the masks go on changing after the best checkpoint, which is the first
    schedule = ts.PolynomialSchedule(target_level=0.5, target_epoch=0, freeze_epoch=9)
    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=schedule), strip=False)
    ages = iter(range(9))
    torch.manual_seed(0)
    trainer = hf.Trainer(
        llama(),
        arguments(
            tmp_path,
            learning_rate=0.05,
            save_strategy="epoch",
            eval_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="age",
            greater_is_better=False,
        ),
        train_dataset=Examples(),
        eval_dataset=Examples(count=8),
        compute_metrics=lambda _: {"age": next(ages)},
        callbacks=[callback],
    )
    trainer.train()
    best, last = (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        for step in (8, 24)
    )
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-8"
    weights = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(last.state_dict()[weights] == 0, best.state_dict()[weights] == 0)
    assert_same(callback.controller.strip(), best)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:left dense, because")
def test_every_family_trains_and_loads_again_without_us(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    config = ts.MagnitudeSparsityConfig(
        pattern=BLOCKS, schedule=ts.PolynomialSchedule(target_level=0.5, target_epoch=0)
    )
    data = Examples(family, count=16)
    callback = ts.TransformersCallback(config)
    trainer = train(tmp_path, callback, model=model, data=data, num_train_epochs=1)
    trainer.save_model(str(tmp_path / "model"))
    again = type(model).from_pretrained(tmp_path / "model")
    assert_same(trainer.model, again)
    zeros = sum(int((p == 0).sum()) for p in again.parameters())
    assert zeros > 0.2 * sum(p.numel() for p in again.parameters())


COMPILE = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("by step", {"bf16": True}),
        ("rb", {"gradient_checkpointing": True}),
        ("by step", COMPILE),
        ("rb", COMPILE),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.filterwarnings("ignore:training has ended at level")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_it_works_with_what_the_trainer_offers(name, options, tmp_path):
    callback = ts.TransformersCallback(ALGORITHMS[name])
    trainer = train(tmp_path, callback, model=llama(), **options)
    assert level_of(trainer.model) > 0.1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_base_under_adapters_gets_sparse_and_adapters_do_not(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    model = peft.get_peft_model(llama(), config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "masking parameters that are frozen")
        callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=HALF))
        trainer = train(tmp_path, callback, model=model)
    adapters = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all((p != 0).all() for p in adapters)
    base = trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert (base.base_layer.weight == 0).float().mean() > 0.3


def train_a_rank(folder):
    arguments = hf.TrainingArguments(
        output_dir=folder, num_train_epochs=2, per_device_train_batch_size=4, report_to=[],
        disable_tqdm=True, use_cpu=True, ddp_backend="gloo", save_strategy="no",
    )  # fmt: skip

    def trained(config):
        torch.manual_seed(0)
        model, callback = llama(), ts.TransformersCallback(config)
        data = Examples(count=32)
        hf.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        return model.state_dict()

    found = {"weights": trained(ALGORITHMS["wanda"])}
    with pytest.raises(ValueError, match="rb_sparsity must be trained by one process, got 2"):
        trained(ts.RBSparsityConfig(schedule=HALF))
    torch.save(found, f"{folder}/rank{arguments.process_index}.pt")


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_learn_no_masks(tmp_path):
    for rank in fork_ranks(2, train_a_rank, tmp_path, folder=tmp_path):
        rank.lines()
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    ours, theirs = (one["weights"] for one in found)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    weight = ours["model.layers.0.mlp.up_proj.weight"]
    assert (weight == 0).any()


# what is refused


def refused(folder, message, callback, error=ValueError, **options):
    """Expect an error as training begins, and the model as it was."""
    torch.manual_seed(0)
    model = options.pop("model", None) or llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    resume, file = options.pop("resume", None), options.pop("file", "")
    trainer = hf.Trainer(
        model, arguments(folder, **options), train_dataset=Examples(), callbacks=[callback]
    )
    with pytest.raises(error, match=re.escape(message)) as caught:
        trainer.train(resume_from_checkpoint=resume)
    assert str(file) in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    if resume is None:
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_options_that_make_no_sense_are_refused_at_once():
    config = ts.MagnitudeSparsityConfig(schedule=HALF)
    with pytest.raises(ValueError, match="score_lr must be positive and finite, got 0"):
        ts.TransformersCallback(config, score_lr=0)
    with pytest.raises(ValueError, match="calibration_batches must be an integer from 1, got 0"):
        ts.TransformersCallback(config, calibration_batches=0)
    with pytest.raises(TypeError, match="config must be a configuration"):
        ts.TransformersCallback("magnitude")


@pytest.mark.filterwarnings("ignore:.*before the schedule has")
def test_a_model_that_has_a_controller_is_refused(tmp_path):
    model = llama()
    config = ts.MagnitudeSparsityConfig(schedule=HALF)
    controller = ts.create_controller(model, config)
    refused(
        tmp_path,
        "is under the masks of another controller",
        ts.TransformersCallback(config),
        model=model,
    )
    controller.strip(do_copy=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": "full_shard"}, "the weights must be whole on every process, got fsdp="),
        ({"fp16": True}, "rb_sparsity must be trained without a gradient scaler, got fp16=True"),
    ],
    ids=["fsdp", "fp16"],
)
def test_arguments_that_do_not_go_with_masks_are_refused(options, message, tmp_path):
    config = ts.RBSparsityConfig(schedule=HALF)
    callback = ts.TransformersCallback(config)
    given = arguments(tmp_path)
    for name, value in options.items():
        setattr(given, name, value)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(given, hf.TrainerState(), hf.TrainerControl(), model=llama())


def test_an_importance_by_gradients_wants_a_loss(tmp_path):
    class NoLabels(Examples):
        def __getitem__(self, index):
            return {"input_ids": super().__getitem__(index)["input_ids"]}

    config = ts.MagnitudeSparsityConfig(weight_importance="snip", schedule=HALF)
    trainer = hf.Trainer(
        llama(),
        arguments(tmp_path),
        train_dataset=NoLabels(),
        callbacks=[ts.TransformersCallback(config)],
        compute_loss_func=lambda outputs, labels, **_: outputs.logits.square().mean(),
    )
    with pytest.raises(ValueError, match="needs the model to return a loss"):
        trainer.train()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a sparse run's checkpoints, and one with a dense run's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save = {"save_strategy": "steps", "save_steps": 5}
    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=HALF))
    train(folder / "sparse", callback, **save)
    torch.manual_seed(7)
    options = arguments(folder / "dense", **save)
    hf.Trainer(llama(), options, train_dataset=Examples()).train()
    return folder


@pytest.mark.slow
def test_a_checkpoint_without_a_state_is_refused_unless_told_so(checkpoints, tmp_path):
    config = ts.MagnitudeSparsityConfig(schedule=HALF)
    dense = shutil.copytree(checkpoints / "dense", tmp_path / "dense")
    refused(
        dense,
        "the checkpoint to resume from must have a sparsity state",
        ts.TransformersCallback(config),
        resume=True,
    )
    callback = ts.TransformersCallback(config, resume_without_state=True)
    trainer = train(dense, callback, resume=str(dense / "checkpoint-10"))
    # the level of the epoch that was resumed in, and on from there
    assert level_of(trainer.model) == pytest.approx(0.5, abs=1e-4)
    assert callback.controller.scheduler.current_epoch == 2


def test_a_state_of_another_run_is_refused(checkpoints, tmp_path):
    mixed = shutil.copytree(checkpoints / "dense", tmp_path / "mixed")
    name = "checkpoint-20"
    shutil.copy(checkpoints / "sparse" / name / "sparsity_state.pt", mixed / name)
    refused(
        mixed,
        "the sparsity state is not of the weights that were loaded",
        ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=HALF)),
        resume=str(mixed / name),
    )


def test_a_state_is_found_where_it_is_said_to_be(checkpoints, tmp_path):
    config = ts.MagnitudeSparsityConfig(schedule=HALF)
    folder = checkpoints / "sparse" / "checkpoint-20"
    elsewhere = tmp_path / "elsewhere"
    refused(elsewhere, str(elsewhere), ts.TransformersCallback(config), resume=str(folder))
    callback = ts.TransformersCallback(config, resume_from=folder)
    trainer = train(elsewhere, callback, resume=str(folder))
    assert level_of(trainer.model) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "got a damaged file"),
        (lambda path: torch.save([1], path), "load_state: state must be a mapping"),
        (
            lambda path: torch.save(torch.load(path) | {"version": 9}, path),
            "state['version'] must be 1, got 9",
        ),
        (
            lambda path: torch.save(torch.load(path) | {"controller": {}}, path),
            "load_state: state must have 'magnitude_sparsity'",
        ),
    ],
    ids=["cut off", "no state", "version", "no controller"],
)
def test_a_damaged_state_is_refused_by_the_name_of_its_file(
    damage, message, checkpoints, tmp_path
):
    folder = shutil.copytree(checkpoints / "sparse", tmp_path / "sparse")
    path = folder / "checkpoint-20" / "sparsity_state.pt"
    damage(path)
    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=HALF))
    refused(folder, message, callback, resume=str(path.parent), file=path)


def test_a_target_that_training_cannot_reach_is_said_at_the_start_and_at_the_end(tmp_path):
    late = ts.PolynomialSchedule(target_level=0.5, target_epoch=90)
    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=late))
    start = "level 0.5 in epoch 90, counted from 0, but training ends after 3 epochs"
    with (
        pytest.warns(UserWarning, match="training has ended at level 0.0"),
        pytest.warns(UserWarning, match=start),
    ):
        train(tmp_path, callback)


def test_a_ramp_by_steps_that_training_cannot_end_is_said_at_the_start(tmp_path):
    late = ts.RampSchedule(target_level=0.5, end=500)
    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=late))
    start = "level 0.5 in step 500, counted from 0, but training ends after 24 steps"
    with (
        pytest.warns(UserWarning, match="training has ended at level"),
        pytest.warns(UserWarning, match=start),
    ):
        train(tmp_path, callback)


@pytest.mark.slow
def test_a_second_training_makes_a_controller_of_its_own(tmp_path):
    callback = ts.TransformersCallback(ts.MagnitudeSparsityConfig(schedule=HALF))
    trainer = train(tmp_path, callback)
    first = callback.controller
    trainer.train()
    assert callback.controller is not first
    assert level_of(trainer.model) == pytest.approx(0.5, abs=1e-4)


def test_a_state_file_reads_as_plain_tensors(checkpoints):
    folder = checkpoints / "sparse" / "checkpoint-20"
    state = torch.load(folder / "sparsity_state.pt", weights_only=True)
    assert state["epoch"] == json.loads((folder / "trainer_state.json").read_text())["epoch"] // 1
    assert [path.name for path in folder.glob("sparsity_state*")] == ["sparsity_state.pt"]
