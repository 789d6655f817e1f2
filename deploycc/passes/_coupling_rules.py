"""Which rule carries labels through which operator: `RULES[name](coupling, node)` returns the result's Value(s); None = not understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deploycc.passes._coupling_align import elementwise, first_only
from deploycc.passes._coupling_layers import added_product, attention, convolution, einsum, embedding, linear, product
from deploycc.passes._coupling_moves import indexed, joined, made_here, moved, moved_as, padded, picked, sliced, stacked, windows
from deploycc.passes._coupling_norms import along_axis, channel_norm, group_norm, layer_norm, pooling, prelu, reduction

if TYPE_CHECKING:
    from torch import fx

    from deploycc.passes._coupling import Coupling

Rule = Callable[["Coupling", "fx.Node"], Any]
_UNARY = (
    *("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "selu", "celu"),
    *("mish", "softplus", "clamp", "clamp_min", "clamp_max", "exp", "log", "sqrt", "rsqrt", "neg", "abs", "pow", "square", "reciprocal"),
    *("dropout", "feature_dropout", "alpha_dropout", "native_dropout", "dropout2d", "clone", "contiguous", "to", "type_as", "detach"),
    *(
        "alias",
        "erf",
        "sin",
        "cos",
        "log1p",
        "float",
        "logit",
        "log2",
        "detach_copy",
        "zero",
        "fill",
        "sign",
        "lift_fresh_copy",
        "bernoulli",
        "threshold",
    ),
    *("zeros_like", "ones_like", "_to_copy", "log_sigmoid", "softsign", "floor", "round", "ceil", "logical_not", "expm1", "rrelu"),
)
_NARY = (
    *("add", "sub", "mul", "div", "maximum", "minimum", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "rsub", "true_divide", "eq"),
    *("ne", "lt", "le", "gt", "ge", "__and__", "__or__", "logical_and", "logical_or", "copy", "remainder", "floor_divide", "multiply"),
    *("atan2",),
)
_POOLING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "grid_sampler"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact2d"),
)
_MOVES = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "chunk", "split", "split_with_sizes"),
    *("narrow", "expand", "roll", "flip", "repeat", "unsqueeze", "squeeze", "pixel_shuffle", "pixel_unshuffle", "unfold"),
    *("tensor_split", "movedim", "swapaxes", "channel_shuffle", "repeat_interleave", "tile", "moveaxis", "mT"),
    *("numpy_T", "adjoint", "swapdims", "rot90"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, first_only),
    **dict.fromkeys(_NARY, elementwise),
    **dict.fromkeys(_POOLING, pooling),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution),
    **dict.fromkeys(("matmul", "bmm", "mm"), product),
    **dict.fromkeys(("addmm", "baddbmm"), added_product),
    **dict.fromkeys(("batch_norm", "instance_norm"), channel_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "var_mean", "std_mean"), reduction),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "linalg_vector_norm", "glu"), along_axis),
    "linear": linear,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "group_norm": group_norm,
    "embedding": embedding,
    "prelu": prelu,
    **dict.fromkeys(_MOVES, moved),
    **dict.fromkeys(("view_as", "reshape_as", "expand_as"), moved_as),
    **dict.fromkeys(("select", "unbind"), picked),
    **dict.fromkeys(("index", "index_select"), indexed),
    **dict.fromkeys(("pad", "constant_pad_nd"), padded),
    **dict.fromkeys(("cat", "concat"), joined),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "arange", "linspace"), made_here),
    "slice": sliced,
    "stack": stacked,
    "im2col": windows,
}
