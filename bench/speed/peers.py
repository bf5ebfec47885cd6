"""PyTorch's and causal-conv1d's way to compute a problem: what gpuconv is compared with."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

from gpuconv.peers import Function, Refused, conv_by_trimming, is_symmetric
from gpuconv.problem import ConvProblem

from ..modes import Direction
from .measure import Absent


@cache
def optional_module(name: str) -> ModuleType | None:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def plain(problem: ConvProblem, direction: Direction) -> Function:
    """PyTorch's own function of a pass, of (input, weight, bias or grad_output).

    Raises:
        Refused: there is none.
    """
    return conv_by_trimming(problem) if direction == "forward" else backward(problem, direction)


def backward(problem: ConvProblem, direction: Direction) -> Function:
    """The gradient of the input or the weight as autograd computes it: (input, weight, grad_output) -> gradient.

    Where the padding of conv1d differs between the sides, that of torch.nn.functional.pad and a convolution without.

    Raises:
        Refused: the padding of conv_transpose1d differs between the sides, or the data are complex.
    """
    import torch
    from torch.nn import functional

    p = problem
    if p.is_complex:
        raise Refused("autograd composes complex gradients of real ones")
    if p.transposed and not is_symmetric(p):
        raise Refused("the padding differs between the sides")
    padding = p.padding_left if is_symmetric(p) else 0
    wanted = [direction == "grad_input", direction == "grad_weight", False]

    def function(x: Any, w: Any, dy: Any) -> Any:
        given = x if is_symmetric(p) else functional.pad(x, p.padding)
        gradients = torch.ops.aten.convolution_backward(
            dy, given, w, None, [p.stride], [padding], [p.dilation], p.transposed, [p.output_padding], p.groups, wanted
        )
        gradient = gradients[wanted.index(True)]
        if given is x or direction == "grad_weight":
            return gradient
        return gradient[..., p.padding_left : p.padding_left + p.L_in]

    return function


def conv_by_padding(problem: ConvProblem) -> Function:
    """The same by torch.nn.functional.pad and a convolution without padding.

    Raises:
        Refused: the padding is symmetric, or the operation transposed: there is nothing to pad.
    """
    from torch.nn import functional

    p = problem
    if p.transposed or is_symmetric(p):
        raise Refused("the padding is the same on both sides")
    return lambda x, w, b: functional.conv1d(functional.pad(x, p.padding), w, b, p.stride, 0, p.dilation, p.groups)


def conv_channels_last(problem: ConvProblem, *, convert: bool) -> Function:
    """The 2-D operation of height 1 in channels_last.

    Args:
        problem: the problem.
        convert: take and return contiguous NCL tensors, the conversions included. Otherwise input and weight are
            (N, C, 1, L) tensors in channels_last already, and so is the result: `to_channels_last` makes them.

    Raises:
        Refused: the padding differs between the sides.
    """
    import torch
    from torch.nn import functional

    p = problem
    if not is_symmetric(p):
        raise Refused("the padding differs between the sides")
    function: Function
    if p.transposed:
        function = partial(
            functional.conv_transpose2d, stride=(1, p.stride), padding=(0, p.padding_left),
            output_padding=(0, p.output_padding), groups=p.groups, dilation=(1, p.dilation),
        )  # fmt: skip
    else:
        function = partial(
            functional.conv2d, stride=(1, p.stride), padding=(0, p.padding_left), dilation=(1, p.dilation),
            groups=p.groups,
        )  # fmt: skip
    if not convert:
        return function

    def converting(x: Any, w: Any, b: Any) -> Any:
        y = function(to_channels_last(x), to_channels_last(w), b)
        return y.contiguous(memory_format=torch.contiguous_format).squeeze(2)

    return converting


def to_channels_last(tensor: Any) -> Any:
    """An (A, B, L) tensor as (A, B, 1, L) in channels_last."""
    import torch

    return tensor.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def causal_conv(problem: ConvProblem) -> Function:
    """causal_conv1d_fn, for the depthwise causal convolutions it is made for.

    Raises:
        Absent: the package is not installed.
        Refused: it does not offer the problem.
    """
    module = optional_module("causal_conv1d")
    if module is None:
        raise Absent("causal-conv1d is not installed")
    p = problem
    if p.transposed or p.groups != p.C_in or p.C_out != p.C_in:
        raise Refused("only depthwise conv1d")
    if not (2 <= p.K <= 4 and p.stride == p.dilation == 1 and p.padding == (p.K - 1, 0)):
        raise Refused("only K from 2 to 4, stride 1, dilation 1, causal")
    if p.dtype not in ("float16", "bfloat16", "float32"):
        raise Refused(f"not for {p.dtype}")
    function = module.causal_conv1d_fn
    return lambda x, w, b: function(x, w.reshape(p.C_out, p.K), b)


@dataclass(frozen=True, slots=True)
class CudnnSettings:
    """The switches of torch.backends.cudnn that decide what a convolution runs."""

    allow_tf32: bool = False
    deterministic: bool = False

    def context(self) -> Any:
        """A context in which they hold, with PyTorch's own search among cuDNN's engines."""
        import torch

        return torch.backends.cudnn.flags(
            enabled=True, benchmark=True, deterministic=self.deterministic, allow_tf32=self.allow_tf32
        )
