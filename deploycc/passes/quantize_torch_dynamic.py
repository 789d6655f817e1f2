"""Dynamic int8 quantization of a module's linear layers for PyTorch's own engines: transformers, without calibration data.

    activation   quint8, one scale per tensor, from the tensor's own range, at every call
    weight       qint8, q = round(w / s_c), |q| ≤ m, s_c = max |w_c| / m;   m = 127, or 63 with the target's reduce_range

The module stays a module: nothing is traced, so models that quantize-torch cannot trace (BERT of transformers) are quantized too.
Convolutions, products of two activations and the projections inside torch.nn.MultiheadAttention stay in float. A layer whose input spans
less than 0.008 loses it: PyTorch cuts dynamic scales off below 6.1e-5.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.errors import NothingToDo, UnknownName
from deploycc.passes import _torch_prepared
from deploycc.passes._dynamic_worth import refuse_convolutions
from deploycc.passes._rounding import quantized_weight

if TYPE_CHECKING:
    from torch import nn

ASKED = "it was asked for (skip)"


@dataclass(frozen=True)
class QuantizeTorchDynamic(Pass):
    """Integer weights of linear layers, whose activations are quantized at run time, for PyTorch's fbgemm and qnnpack engines.

    Attributes:
        skip: names of linear layers to leave in float.
    """

    name: ClassVar[str] = "quantize-torch-dynamic"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    effect: ClassVar = LOSSY

    skip: tuple[str, ...] = ()

    @classmethod
    def rescue(cls, pipeline: Pipeline, target: Target) -> Pipeline | None:
        """In place of quantize-torch."""
        return pipeline.replaced("quantize-torch", lambda body: cls())

    def requires(self, artifact: Artifact, context: Context) -> None:
        """An engine of PyTorch's that is here, quint8 activations, qint8 weights, a float model with most work outside convolutions."""
        import torch

        from deploycc.forms._torch_macs import operator_macs
        from deploycc.forms.module import example_sizes, example_tensors

        _torch_prepared.require_engine(self.name, artifact, context)
        example = example_tensors(artifact.signature, example_sizes(artifact.model, artifact.signature.inputs))
        work = operator_macs(artifact.model, example) or ()
        modules = dict(artifact.model.named_modules())
        convolutions = sum(item.macs for item in work if isinstance(modules.get(item.where), torch.nn.modules.conv._ConvNd))
        refuse_convolutions(convolutions / (sum(item.macs for item in work) or 1), "quantize-torch")

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where there is no linear layer; UnknownName for a layer to skip that is not there."""
        from deploycc.forms.module import example_sizes, example_tensors
        from deploycc.passes import _torch_ao
        from deploycc.runtime.sessions.torchscript import using_engine

        quant, engine = context.target.quant, context.target.backend
        model: nn.Module = copy.deepcopy(artifact.model)
        layers = _torch_ao.linear_layers(model)
        if unknown := [name for name in self.skip if name not in layers]:
            raise UnknownName(f"skip: the model has no linear layer '{unknown[0]}'", fix=f"its linear layers are {', '.join(layers)}")
        chosen = {name: layer for name, layer in layers.items() if name not in self.skip}
        if not chosen:
            raise NothingToDo(f"{self.name} finds no linear layer", fix="leave it out, or use quantize-torch")
        most = _torch_prepared.REDUCED if quant.reduce_range else _torch_prepared.FULL
        with using_engine(engine):
            made: dict[int, nn.Module] = {}
            for name, layer in chosen.items():  # a layer may be called by several names
                if id(layer) not in made:
                    weight = layer.weight.detach().numpy()
                    _, scales = quantized_weight(weight, most, per_channel=quant.per_channel, pair_limit=None, keep_sums=False)
                    made[id(layer)] = _torch_ao.dynamic_linear(layer, scales)
                model.set_submodule(name, made[id(layer)])
        vars(model)["quantized_engine"] = engine  # the backend refuses another one
        example = example_tensors(artifact.signature, example_sizes(model, artifact.signature.inputs))
        left = _torch_prepared.left_float(model, example, dict.fromkeys(self.skip, ASKED), "only linear layers have a dynamic kernel")
        left = tuple(dict.fromkeys(left))  # attention multiplies several times in one module
        notes = [f"{len(chosen)} linear layers for {engine}, their activations quantized at run time"]
        notes += [f"left in float: {name}: {reason}" for name, reason in left]
        info = QuantInfo("torch-dynamic", "int8", "uint8", quant.per_channel, quant.reduce_range, calibration="none", left_float=left)
        return artifact.evolve(model, quant=info, notes=tuple(notes))
