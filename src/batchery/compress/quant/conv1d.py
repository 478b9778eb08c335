# SPDX-License-Identifier: Apache-2.0
"""transformers' `Conv1D`, the linear layer of GPT-2's family, which stores its weight transposed.

    y = x · W + bias        W (K, N): what `nn.Linear` has as (N, K)

Quantisers see the transpose, `(N, K)`, without a copy; so groups lie along the inputs as in any
other layer, and files have the tensors that they have for an `nn.Linear`, by the layer's own name.
A four-bit layer in the place of one remembers that, and its dense form is a `Conv1D` again.
"""

from typing import Any

import torch
from torch import Tensor, nn

from batchery._core.validate import import_extra

__all__ = ["TransposedLinear", "as_conv1d", "as_linear", "is_conv1d", "linear_weight"]


class TransposedLinear(nn.Linear):
    """An `nn.Linear` that stands for a `Conv1D` and shares its parameters; see `as_linear`.

    Examples:
        >>> from transformers.pytorch_utils import Conv1D
        >>> as_linear(Conv1D(3, 4))
        TransposedLinear(in_features=4, out_features=3, bias=True)
    """


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is transformers' `Conv1D`, without importing it.

    Examples:
        >>> from transformers.pytorch_utils import Conv1D
        >>> is_conv1d(Conv1D(3, 4)), is_conv1d(nn.Conv1d(4, 3, 1))
        (True, False)
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(module: nn.Module) -> Tensor | None:
    """Return the weight `(N, K)` of an `nn.Linear` or a `Conv1D` in place, None of any other.

    Examples:
        >>> from transformers.pytorch_utils import Conv1D
        >>> linear_weight(Conv1D(3, 4)).shape, linear_weight(nn.Linear(4, 3)).shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    return module.get_parameter("weight").detach().t() if is_conv1d(module) else None


def as_linear(conv: nn.Module) -> TransposedLinear:
    """Return a `Conv1D` as a linear layer of the same memory.

    Examples:
        >>> from transformers.pytorch_utils import Conv1D
        >>> conv, x = Conv1D(3, 4), torch.randn(2, 4)
        >>> bool(torch.allclose(as_linear(conv)(x), conv(x)))
        True
    """
    weight: Any = linear_weight(conv)
    linear = TransposedLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = conv.get_parameter("bias")
    return linear.train(conv.training)


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """Return a linear layer with a bias as a `Conv1D`; the weight is copied.

    Examples:
        >>> linear, x = nn.Linear(4, 3), torch.ones(2, 4)
        >>> conv = as_conv1d(linear)
        >>> conv, torch.allclose(conv(x), linear(x))
        (Conv1D(nf=3, nx=4), True)
    """
    home = import_extra("transformers.pytorch_utils", "hf", "QuantLinear")
    with torch.device("meta"):
        conv: nn.Module = home.Conv1D(linear.out_features, linear.in_features)
    weight = linear.weight.detach().t().contiguous()
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)
