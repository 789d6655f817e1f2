"""The one training loop: what finetune, distill, quantize-qat and recovery after pruning run.

Devices, mixed precision and DDP are accelerate's: under `torchrun --nproc-per-node N` each process takes its share of every batch, and
gradients are averaged, so the loss curve is that of one process at the same batch (batch normalization, whose statistics are of a
process's own share, is the exception, as everywhere). After every epoch the whole state is written to `context.resume`: a killed run
goes on from there, and since the order and every random number of an epoch are drawn from (seed, epoch), it ends with the same weights.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.errors import MissingDependency, PreconditionError, TrainingError
from deploycc.passes._feeder import Feeder, TrainBatch
from deploycc.passes._layout import channels_last, usual_order
from deploycc.passes._training_pass import TrainingOptions
from deploycc.passes._training_run import Run

if TYPE_CHECKING:
    import torch
    from torch import nn

    Objective = Callable[[nn.Module, TrainBatch], torch.Tensor]

ONE_AXIS = 1  # biases and scales of norms are not decayed


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came out of a training.

    Attributes:
        module: the trained module, in eval mode, with the weights of the best epoch.
        curves: one row per epoch: epoch (from 1), loss, lr, and the metric on the held-out samples or None.
        notes: for the receipt.
    """

    module: nn.Module
    curves: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def require_accelerate(name: str) -> None:
    """Raise MissingDependency when accelerate is not installed."""
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependency(f"{name} needs accelerate, which is not installed", fix="pip install 'deploycc[train]'")


def fit(
    module: nn.Module,
    objective: Objective,
    *,
    options: TrainingOptions,
    feeder: Feeder,
    context: Context,
    what: str,
    score: Callable[[nn.Module], float] | None = None,
    metric: str = "top1",
    by_loss: bool = False,
    or_start: bool = False,
    after_step: Callable[[nn.Module], None] | None = None,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
    frozen: Callable[[int], Sequence[str]] | None = None,
) -> Fitted:
    """Train `module` in place.

    Args:
        module: a copy that may be changed.
        objective: the mean loss of a batch.
        options: epochs, optimizer, schedule …
        feeder: the samples.
        context: seed, progress, where to keep the state.
        what: the name that progress shows.
        score: of the module on held-out samples, larger is better; without it the last epoch is kept.
        metric: what `score` is called.
        by_loss: the best epoch is the one with the lowest loss on the held-out samples: against a teacher it is far less noisy than
            shares of right answers, each of which is one sample.
        or_start: the weights it begins with are kept when no epoch is better.
        after_step: runs after every optimizer step (clamps, masks).
        on_epoch: runs before every epoch, in train mode (schedules of observers).
        frozen: names of the parameters that stay as they are in an epoch.

    Raises:
        TrainingError: the loss is NaN or Inf before an epoch is finished; a batch does not fit into memory.
        PreconditionError: a batch that cannot be divided among the processes, a precision that the device lacks.
    """
    import torch

    _use_cores()
    last = channels_last(module, tuple(tensor[:2] for tensor in next(feeder.epoch(0)).inputs))
    accelerator = _accelerator(options)
    optimizer = _optimizer(module, options)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    run = Run(accelerator, module, optimizer, options, feeder.steps(accelerator.num_processes), _masks(module, feeder.artifact), last)
    start = run.restore(context.resume)

    def merit(value: float | None) -> float | None:
        """Of the weights as they are; larger is better, None where nothing is held out."""
        if value is None or not by_loss:
            return value
        with torch.no_grad():
            losses = [float(objective(module, run.placed(batch))) * len(batch.inputs[0]) for batch in feeder.held_out()]
        return -sum(losses) / len(feeder.held)

    if or_start and score and not run.best:
        run.start = score(module.eval())
        run.keep(-1, merit(run.start) or 0.0)
    with torch.random.fork_rng(devices=[]):
        for epoch in range(start, options.epochs):
            torch.manual_seed(hash((context.seed, epoch, accelerator.process_index)) % (1 << 31))
            module.train()
            still = set(frozen(epoch)) if frozen else set()
            _rest(module, still)
            if on_epoch:
                on_epoch(epoch, module)
            stopped = _epoch(run, wrapped, objective, feeder, epoch, still, after_step, context, what)
            if stopped:
                run.note(stopped)
                break
            module.eval()
            value = score(module) if score else None
            run.finish(epoch, value, metric, merit(value))
            run.save(context.resume, epoch)
            if options.patience is not None and epoch - run.best_epoch >= options.patience:
                stalled = "the held-out loss has not fallen" if by_loss else f"{metric} has not risen"
                run.note(f"stopped after epoch {epoch + 1}: {stalled} for {options.patience} epochs")
                break
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # mixed precision put a cast around forward
        vars(module).pop(name, None)
    module.load_state_dict(run.best)
    if score and run.best_epoch + 1 < len(run.curves):
        value = run.start if run.best_epoch < 0 else run.curves[run.best_epoch]["metric"]
        told = f"{metric} {value:.4g} on {len(feeder.held)} held-out samples"
        better = (
            "no epoch was better than the start, whose weights are kept" if run.best_epoch < 0 else f"epoch {run.best_epoch + 1} is kept"
        )
        run.note(f"{better}: {told}")
    if last:
        usual_order(module)
    return Fitted(module.cpu().eval(), tuple(run.curves), tuple(run.notes))


def _epoch(
    run: Run,
    wrapped: nn.Module,
    objective: Objective,
    feeder: Feeder,
    epoch: int,
    still: set[str],
    after_step: Callable[[nn.Module], None] | None,
    context: Context,
    what: str,
) -> str:
    """One pass over the samples; why it stopped, or empty text."""
    accelerator, options = run.accelerator, run.options
    total = 0.0
    for step, batch in enumerate(feeder.epoch(epoch, accelerator.process_index, accelerator.num_processes)):
        lr = run.set_lr(epoch * run.steps + step)
        try:
            with accelerator.autocast():
                loss = objective(wrapped, run.placed(batch))
            if loss.dim() != 0:
                raise PreconditionError(f"the loss has the shape {list(loss.shape)}, not one number", fix="return its mean from the loss")
            value = float(accelerator.reduce(loss.detach().clone(), "mean"))
            if not math.isfinite(value):
                return run.broken(value, epoch, step, lr)
            run.optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
        except (MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            raise _too_large(run, wrapped, objective, batch, options.batch) from error
        for name, parameter in run.module.named_parameters():
            if name in still:
                parameter.grad = None
        if options.clip_norm is not None:
            accelerator.clip_grad_norm_(run.module.parameters(), options.clip_norm)
        run.optimizer.step()
        run.mask()
        if after_step:
            after_step(run.module)
        total += value
        note = f"epoch {epoch + 1}/{options.epochs}, loss {total / (step + 1):.4f}{run.latest()}"
        context.progress(what, epoch * run.steps + step + 1, options.epochs * run.steps, note)
    run.loss = total / run.steps
    return ""


def _use_cores() -> None:
    """All cores of this process's share; a session may have left PyTorch with one."""
    import torch

    from deploycc.runtime.machine import available_cores

    asked = os.environ.get("OMP_NUM_THREADS", "")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(int(asked) if asked.isdigit() and int(asked) else max(1, available_cores() // processes))


def _accelerator(options: TrainingOptions) -> Any:
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if options.precision == "fp16" and not torch.cuda.is_available():
        raise PreconditionError("precision=fp16 cannot be had here: it needs a GPU", fix="use precision=no, or bf16")
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]  (it is one per process, and keeps the precision of the first)
    return Accelerator(mixed_precision=options.precision, cpu=not torch.cuda.is_available())


def _optimizer(module: nn.Module, options: TrainingOptions) -> Any:
    """One group of parameters for each (factor of the rate, decayed or not)."""
    import torch

    scales = options.scales()
    used: set[str] = set()
    groups: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.requires_grad_(True)
        hit = next(((glob, factor) for glob, factor in scales if fnmatchcase(name, glob)), None)
        used |= {hit[0]} if hit else set()
        groups.setdefault((hit[1] if hit else 1.0, parameter.dim() > ONE_AXIS), []).append(parameter)
    if unused := [glob for glob, _ in scales if glob not in used]:
        names = ", ".join(name for name, _ in list(module.named_parameters())[:3])
        raise PreconditionError(f"lr-scale: no parameter is called '{unused[0]}'", fix=f"the names are like {names}")
    listed = [
        {"params": params, "scale": scale, "weight_decay": options.weight_decay if decayed else 0.0}
        for (scale, decayed), params in groups.items()
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov and options.momentum > 0)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(listed, lr=options.lr, momentum=options.momentum)
    return (torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW)(listed, lr=options.lr)


def _rest(module: nn.Module, still: set[str]) -> None:
    """Layers of which every parameter is frozen keep their statistics too."""
    for path, layer in module.named_modules():
        own = [f"{path}.{name}".lstrip(".") for name, _ in layer.named_parameters()]
        if own and all(name in still for name in own):
            layer.eval()


def _masks(module: nn.Module, artifact: Artifact) -> dict[str, torch.Tensor]:
    return {name: (module.get_parameter(name) != 0).to(module.get_parameter(name).dtype) for name in artifact.sparse}


def _is_memory(error: BaseException) -> bool:
    import torch

    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "not enough memory" in str(error) or "out of memory" in str(error).lower()


def _too_large(run: Run, wrapped: nn.Module, objective: Objective, batch: TrainBatch, size: int) -> TrainingError:
    """The error for a batch that memory does not hold, with the size that it does hold."""
    world = run.accelerator.num_processes
    rows = len(batch.inputs[0]) // 2
    while rows >= 1:
        part = TrainBatch(
            tuple(tensor[:rows] for tensor in batch.inputs),
            None if batch.labels is None else batch.labels[:rows],
            tuple(tensor[:rows] for tensor in batch.teacher_inputs),
        )
        try:
            run.optimizer.zero_grad(set_to_none=True)
            run.accelerator.backward(objective(wrapped, run.placed(part)))
        except (MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            rows //= 2
            continue
        return TrainingError(f"a batch of {size} does not fit into memory; {rows * world} does", fix=f"use batch={rows * world}")
    return TrainingError("not even a batch of one sample fits into memory", fix="free memory, or use a smaller input")


def trainable(artifact: Artifact) -> nn.Module:
    """A copy of an artifact's module that may be trained."""
    return copy.deepcopy(artifact.model)
