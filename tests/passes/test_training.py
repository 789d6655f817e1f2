"""The training loop and the passes on it: what is learned, kept, resumed and refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training_rows import QUICK, Rows, artifact, context, net, top1

from deploycc.core.contract import Dataset
from deploycc.core.data import Data
from deploycc.errors import DataError, DataNeeded, MissingDependency, PreconditionError, TrainingError
from deploycc.forms.module import ModuleForm
from deploycc.passes import _train
from deploycc.passes._feeder import Feeder
from deploycc.passes._losses import label_loss, regression
from deploycc.passes._train import fit
from deploycc.passes._training_pass import TrainingOptions
from deploycc.passes.distill import Distill
from deploycc.passes.finetune import Finetune, find_head, with_head

# --- losses


def test_label_losses_are_the_formulas():
    scores, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    logs = torch.log_softmax(scores, 1)
    assert label_loss("auto", labels)(scores, labels).item() == pytest.approx(-(logs[0, 0] + logs[1, 0]).item() / 2)
    smooth = label_loss("cross-entropy", labels, smoothing=0.2)(scores, labels).item()
    assert smooth == pytest.approx(-(0.9 * logs[:, 0] + 0.1 * logs[:, 1]).mean().item())
    bce = label_loss("bce", labels)(scores, labels).item()
    hot = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    by_hand = -(hot * torch.log(torch.sigmoid(scores)) + (1 - hot) * torch.log(1 - torch.sigmoid(scores))).mean()
    assert bce == pytest.approx(by_hand.item(), rel=1e-5)
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert label_loss("auto", values)(scores, values).item() == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert regression(values + 1, values).item() == pytest.approx(1 / 0.25)
    weighted = label_loss("auto", torch.tensor([0, 1]), class_weights=(3.0, 1.0))(scores, torch.tensor([0, 1])).item()
    assert weighted == pytest.approx(-(3 * logs[0, 0] + logs[1, 1]).item() / 4)


def test_mse_of_class_indices_is_refused():
    with pytest.raises(PreconditionError, match="array labels"):
        label_loss("mse", torch.tensor([1]))


# --- schedule and options


def test_learning_rates_follow_their_formulas():
    cosine = TrainingOptions(epochs=4, lr=1.0, min_lr=0.2)
    assert cosine.lr_at(0, 10) == 1.0
    assert cosine.lr_at(20, 10) == pytest.approx(0.2 + 0.5 * 0.8 * (1 + math.cos(math.pi / 2)))
    assert cosine.lr_at(40, 10) == pytest.approx(0.2)
    warm = TrainingOptions(epochs=4, lr=1.0, warmup=1.0)
    assert [warm.lr_at(step, 4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    step = TrainingOptions(epochs=9, lr=1.0, schedule="step", step_epochs=3, decay=0.5)
    assert [step.lr_at(epoch * 2, 2) for epoch in (0, 2, 3, 6)] == [1.0, 1.0, 0.5, 0.25]
    assert TrainingOptions(epochs=3, lr=1.0, schedule="exponential", decay=0.5).lr_at(4, 2) == pytest.approx(0.25)
    assert TrainingOptions(epochs=3, lr=0.3, schedule="constant").lr_at(5, 2) == 0.3


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 0}, {"batch": 0}, {"step_epochs": 0}, {"samples": 1}, {"patience": 0}, {"lr": 0.0}, {"lr": math.inf}, {"decay": 0.0},
        {"clip_norm": -1.0}, {"momentum": 1.0}, {"holdout": 1.0}, {"weight_decay": -1.0}, {"min_lr": 1.0}, {"warmup": 5.0},
        {"patience": 2, "holdout": 0.0}, {"lr_scale": ("features",)}, {"lr_scale": ("a:-1",)},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=r"is |must|needs|takes"):
        TrainingOptions(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"loss": "hinge"}, {"label_smoothing": 1.0}, {"loss": "mse", "class_weights": (1.0,)}, {"classes": 1}, {"freeze": 9},
    ],
)  # fmt: skip
def test_options_of_finetune_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=r"is |belong"):
        Finetune(**given)


@pytest.mark.parametrize("given", [{"alpha": 2.0}, {"temperature": 0.0}, {"loss": "hinge"}, {"features": ("a:",)}, {"attention": (":b",)}])
def test_options_of_distill_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match="is "):
        Distill(**given)


# --- fine-tuning


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_finetune_learns_and_leaves_the_model_it_was_given_alone(optimizer):
    before = artifact()
    kept = ModuleForm().digest(before.model)
    after = Finetune(**{**QUICK, "lr": 0.1 if optimizer == "sgd" else 0.03}, optimizer=optimizer)(before, context(before))
    assert top1(after) > 0.8 > top1(before)
    assert ModuleForm().digest(before.model) == kept
    assert not after.model.training
    assert [row["epoch"] for row in after.details["curves"]] == [1, 2, 3, 4, 5, 6]
    assert after.details["curves"][-1]["loss"] < after.details["curves"][0]["loss"]
    assert after.edits == ()


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    def train(seed):
        return ModuleForm().digest(Finetune(**QUICK)(artifact(), context(seed=seed)).model)

    assert train(0) == train(0)
    assert train(0) != train(1)


def test_a_new_head_has_the_classes_and_is_told_as_an_edit():
    before = artifact()
    ready = with_head(before, 7, "", 0)
    assert ready.signature.outputs[0].shape == (1, 7)
    assert ready.edits[0]["layers"] == {"3": {"attributes": {"out_features": 7}, "tensors": {"weight": [7, 16], "bias": [7]}}}
    assert torch.equal(ready.model[0].weight, before.model[0].weight)
    assert ModuleForm().digest(with_head(before, 7, "3", 0).model) == ModuleForm().digest(ready.model)
    after = Finetune(**QUICK, classes=7, freeze=6)(before, context(before))
    assert after.signature.outputs[0].shape == (1, 7)
    assert torch.equal(after.model[0].weight, before.model[0].weight)  # frozen for all six epochs
    assert not torch.equal(after.model[3].weight, ready.model[3].weight)
    with pytest.raises(PreconditionError, match="no linear layer or convolution gives 9"):
        find_head(before.model, 9)
    with pytest.raises(PreconditionError, match="head='1' is no linear"):
        with_head(before, 7, "1", 0)


def test_rates_by_name_and_unknown_names():
    before = artifact()
    after = Finetune(**QUICK, lr_scale=("0.*:0",))(before, context(before))
    assert torch.equal(after.model[0].weight, before.model[0].weight)
    assert not torch.equal(after.model[3].weight, before.model[3].weight)
    with pytest.raises(PreconditionError, match="no parameter is called 'stem"):
        Finetune(**QUICK, lr_scale=("stem.*:1",))(before, context(before))


def test_zeros_of_sparse_weights_stay():
    module = net()
    with torch.no_grad():
        module[0].weight[::2] = 0
    before = replace(artifact(module), sparse=("0.weight",))
    after = Finetune(**QUICK)(before, context(before))
    assert torch.equal(after.model[0].weight == 0, before.model[0].weight == 0)
    assert not torch.equal(after.model[0].weight, before.model[0].weight)
    assert after.sparse == ("0.weight",)


def test_the_users_own_loss_is_called():
    def loss(outputs, labels):
        return (outputs[:, 0] - 3).square().mean()

    after = Finetune(**QUICK, loss="mine.py:loss")(artifact(), context(code={"mine.py:loss": loss}.get))
    with torch.no_grad():
        assert after.model(torch.from_numpy(Rows(50, 3).x))[:, 0].mean().item() == pytest.approx(3, abs=0.3)
    with pytest.raises(PreconditionError, match="not one number"):
        Finetune(**QUICK, loss="mine.py:loss")(artifact(), context(code=lambda _: lambda outputs, _: outputs))
    with pytest.raises(PreconditionError, match="cannot be imported here"):
        Finetune(**QUICK, loss="mine.py:loss")(artifact(), context())


def test_training_stops_early_and_keeps_the_best_epoch():
    scores = iter([0.5, 0.9, 0.7, 0.6, 0.5, 0.4])
    seen = []

    def score(module):
        seen.append({key: value.clone() for key, value in module.state_dict().items()})
        return next(scores)

    made = artifact()
    options = TrainingOptions(**QUICK, patience=2)
    ready = context(made)
    feeder = Feeder(made, ready, options)
    fitted = fit(
        net(), lambda module, batch: label_loss("auto", batch.labels)(module(*batch.inputs), batch.labels),
        options=options, feeder=feeder, context=ready, what="t", score=score,
    )  # fmt: skip
    assert len(fitted.curves) == 4
    assert all(torch.equal(value, seen[1][key]) for key, value in fitted.module.state_dict().items())
    assert any("has not risen" in note for note in fitted.notes)
    assert any("epoch 2 is kept: top1 0.9" in note for note in fitted.notes)


def test_with_a_teacher_the_lowest_held_out_loss_chooses_the_epoch_and_not_a_lucky_metric():
    made = artifact()
    ready = context(made)
    options = TrainingOptions(**{**QUICK, "epochs": 4, "holdout": 0.2})
    feeder = Feeder(made, ready, options)
    metrics, losses, states = iter((0.9, 0.5, 0.5, 0.5)), [], []

    def objective(module, batch):
        return label_loss("auto", batch.labels)(module(*batch.inputs), batch.labels)

    def score(module):
        with torch.no_grad():
            losses.append(sum(float(objective(module, batch)) * len(batch.inputs[0]) for batch in feeder.held_out()))
        states.append({key: value.clone() for key, value in module.state_dict().items()})
        return next(metrics)

    fitted = fit(net(), objective, options=options, feeder=feeder, context=ready, what="t", score=score, by_loss=True)
    best = losses.index(min(losses))
    assert best != 0
    assert all(torch.equal(value, states[best][key]) for key, value in fitted.module.state_dict().items())


# --- what can go wrong


def test_without_training_data_or_labels():
    made = artifact()
    without = replace(context(made), data=Data(Dataset("d", {"val": Rows(32)})))
    with pytest.raises(DataNeeded, match="needs training data") as error:
        Finetune(**QUICK)(made, without)
    assert "train/" in error.value.fix
    with pytest.raises(DataNeeded, match="finetune needs labels"):
        Finetune(**QUICK)(made, context(made, Rows(labelled=False)))
    with pytest.raises(DataNeeded, match=r"alpha=0\.5 asks for labels"):
        Distill(**QUICK, alpha=0.5)(made, context(made, Rows(labelled=False)))


def test_labels_outside_the_head_and_of_two_kinds():
    with pytest.raises(DataError, match="label 9, but the model has 4 classes"):
        Finetune(**QUICK)(artifact(), context(rows=Rows(label=(9,))))

    class Mixed(Rows):
        def label(self, index):
            return (0,) if index % 2 else np.zeros(4, np.float32)

    with pytest.raises(DataError, match="some labels are classes"):
        Finetune(**QUICK)(artifact(), context(rows=Mixed()))
    with pytest.raises(PreconditionError, match="2 class-weights for 4 classes"):
        Finetune(**QUICK, class_weights=(1.0, 1.0))(artifact(), context())


def test_several_accepted_classes_are_a_target_over_all_of_them():
    made, options = artifact(), TrainingOptions(**QUICK)
    batch = next(iter(Feeder(made, context(made, Rows(label=(1, 2))), options).epoch(0)))
    assert batch.labels[0].tolist() == [0.0, 0.5, 0.5, 0.0]


def test_array_labels_are_regressed_on():
    class Targets(Rows):
        def label(self, index):
            return np.repeat(self.x[index], 2)

    made = artifact()
    after = Finetune(**QUICK)(made, context(made, Targets()))
    assert after.details["curves"][-1]["loss"] < 0.3 * after.details["curves"][0]["loss"]
    assert after.details["curves"][-1]["name"] == "minus-mse"


def test_a_loss_that_becomes_nan_keeps_the_best_epoch_or_says_where():
    made, options = artifact(), TrainingOptions(**QUICK)
    ready = context(made)
    feeder = Feeder(made, ready, options)
    calls = []

    def breaking(at):
        calls.clear()

        def objective(module, batch):
            calls.append(1)
            return module(*batch.inputs).mean() * (math.nan if len(calls) == at else 1.0)

        return objective

    steps = feeder.steps()
    fitted = fit(net(), breaking(steps + 3), options=options, feeder=feeder, context=ready, what="t")
    assert len(fitted.curves) == 1
    assert any("the loss is nan at step 3 of epoch 2, learning rate" in note for note in fitted.notes)
    assert all(torch.isfinite(value).all() for value in fitted.module.state_dict().values())
    with pytest.raises(TrainingError, match=r"nan at step 2 of epoch 1, learning rate 0\.0999") as error:
        fit(net(), breaking(2), options=options, feeder=feeder, context=ready, what="t")
    assert "lr=0.01" in error.value.fix


def test_a_batch_that_memory_does_not_hold_names_one_that_it_does():
    made, options = artifact(), TrainingOptions(epochs=1, batch=64)
    ready = context(made)

    def hungry(most):
        def objective(module, batch):
            if len(batch.inputs[0]) > most:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate")
            return module(*batch.inputs).mean()

        return objective

    with pytest.raises(TrainingError, match="a batch of 64 does not fit into memory; 16 does") as error:
        fit(net(), hungry(20), options=options, feeder=Feeder(made, ready, options), context=ready, what="t")
    assert "batch=16" in error.value.fix
    with pytest.raises(TrainingError, match="not even a batch of one"):
        fit(net(), hungry(0), options=options, feeder=Feeder(made, ready, options), context=ready, what="t")

    def other(module, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(net(), other, options=options, feeder=Feeder(made, ready, options), context=ready, what="t")


def test_quantized_models_and_missing_packages_are_refused(monkeypatch):
    from deploycc.core.artifact import QuantInfo

    made = replace(artifact(), quant=QuantInfo("static", "int8", "uint8", True, False, "minmax"))
    with pytest.raises(PreconditionError, match="trains float weights"):
        Finetune(**QUICK)(made, context())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="accelerate"):
        Finetune(**QUICK)(artifact(), context())


def test_mixed_precision_leaves_a_plain_float_model():
    after = Finetune(**QUICK, precision="bf16")(artifact(), context())
    assert top1(after) > 0.85
    assert "forward" not in vars(after.model)
    assert torch.equal(after.model(torch.ones(1, 2)), nn.Sequential(*after.model)(torch.ones(1, 2)))


def test_a_precision_that_the_device_lacks_and_a_batch_that_does_not_divide():
    if not torch.cuda.is_available():
        with pytest.raises(PreconditionError, match="precision=fp16 cannot be had here"):
            Finetune(**QUICK, precision="fp16")(artifact(), context())
    made, options = artifact(), TrainingOptions(batch=31)
    with pytest.raises(PreconditionError, match="31 cannot be divided among 2 processes"):
        Feeder(made, context(made), options).steps(2)


# --- resuming


def test_a_training_killed_in_any_epoch_ends_with_the_same_weights(tmp_path, monkeypatch):
    made, ready = artifact(), context()
    whole = Finetune(**QUICK)(made, ready)
    real = _train._epoch

    for killed in range(3):
        folder = tmp_path / str(killed)

        def dying(run, wrapped, objective, feeder, epoch, *rest, killed=killed):
            if epoch == killed:
                iterator = iter(feeder.epoch(epoch))
                objective(wrapped, next(iterator)).backward()  # some work of the epoch is done, and lost
                raise KeyboardInterrupt
            return real(run, wrapped, objective, feeder, epoch, *rest)

        monkeypatch.setattr(_train, "_epoch", dying)
        with pytest.raises(KeyboardInterrupt):
            Finetune(**QUICK)(made, replace(ready, resume=folder))
        started = []
        monkeypatch.setattr(_train, "_epoch", lambda *args, started=started: started.append(args[4]) or real(*args))
        resumed = Finetune(**QUICK)(made, replace(ready, resume=folder))
        assert started == list(range(killed, 6))
        assert ModuleForm().digest(resumed.model) == ModuleForm().digest(whole.model)
        assert resumed.details == whole.details
