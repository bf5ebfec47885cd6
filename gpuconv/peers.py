"""The computation of a problem in PyTorch, for comparison with gpuconv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from .fusion import FUSED_ARRAYS, Activation
from .problem import ConvProblem

Function = Callable[[Any, Any, Any], Any]

# The largest permitted norm(y - y*)/norm(y*) of a peer. Peers have no error bound; these are some ten times what
# correct implementations reach, and far below the effect of a wrong tap or channel.
PEER_TOLERANCE = {
    "float32": 1e-4,
    "tf32": 5e-3,
    "bfloat16": 2e-2,
    "float16": 3e-3,
    "float64": 1e-12,
    "complex64": 1e-4,
    "complex128": 1e-12,
}


class Refused(Exception):  # noqa: N818 - not an error: the reason is reported
    """The implementation cannot compute this problem."""


def is_symmetric(problem: ConvProblem) -> bool:
    """Whether the padding is one number, as torch.nn.functional needs it."""
    return problem.padding_left == problem.padding_right


def conv_by_trimming(problem: ConvProblem) -> Function:
    """torch.nn.functional's operation on NCL tensors: (input, weight, bias) -> output.

    PyTorch pads both sides alike. For other paddings this does what models do: pad both sides by the larger one and
    slice the output.

    Raises:
        Refused: no slice of the symmetric result is the result.
    """
    from torch.nn import functional

    p = problem
    if p.transposed:
        trim = min(p.padding_left, p.padding_right)
        function: Function = partial(
            functional.conv_transpose1d, stride=p.stride, padding=trim, output_padding=p.output_padding,
            groups=p.groups, dilation=p.dilation,
        )  # fmt: skip
        first = p.padding_left - trim
    else:
        pad = max(p.padding_left, p.padding_right)
        function = partial(functional.conv1d, stride=p.stride, padding=pad, dilation=p.dilation, groups=p.groups)
        first, rest = divmod(pad - p.padding_left, p.stride)
        if rest:
            raise Refused("the padding differs between the sides by no multiple of the stride")
    if is_symmetric(p):
        return function
    return lambda x, w, b: function(x, w, b)[..., first : first + p.L_out]


def layer(problem: ConvProblem) -> Callable[..., Any]:
    """A whole call: (input, weight, bias, arrays of `fusion.FUSED_ARRAYS` in order) -> output.

    Padding that differs between the sides, or in another mode than zeros, is a `torch.nn.functional.pad` before it, as
    in models; what gpuconv fuses are separate functions before and after it.

    Raises:
        Refused: PyTorch has no such padding.
    """
    import torch
    from torch.nn import functional

    p, f = problem, problem.fuses
    if p.padding_mode == "symmetric":
        raise Refused("torch.nn.functional.pad has no mode symmetric")
    if p.transposed or (p.padding_mode == "zeros" and is_symmetric(p)):
        convolve = conv_by_trimming(p)
    else:
        pad = partial(functional.pad, pad=p.padding, mode="constant" if p.padding_mode == "zeros" else p.padding_mode)
        without = partial(functional.conv1d, stride=p.stride, dilation=p.dilation, groups=p.groups)

        def convolve(x: Any, w: Any, b: Any) -> Any:
            return without(pad(x), w, b)

    def activated(y: Any, activation: Activation | None, alpha: Any, beta: Any) -> Any:
        if activation is None:
            return y
        name, parameter = activation.name, activation.parameter
        if name == "snake":
            alpha, beta = alpha[:, None], (alpha if beta is None else beta)[:, None]
            return y + torch.sin(alpha * y) ** 2 / beta
        if name in ("leaky_relu", "elu"):
            return getattr(functional, name)(y, parameter)
        if name in ("gelu", "gelu_tanh"):
            return functional.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
        return getattr(torch if name in ("tanh", "sigmoid") else functional, name)(y)

    def compute(x: Any, w: Any, b: Any, fused: Sequence[Any]) -> Any:
        given = dict(zip(FUSED_ARRAYS, fused, strict=True))
        x = activated(x, f.input_activation, given["input_activation_alpha"], given["input_activation_beta"])
        y = convolve(x, w, b)
        if f.has_residual:
            y = y + given["residual"]
        return activated(y, f.activation, given["activation_alpha"], given["activation_beta"])

    return compute


def prepare(
    problem: ConvProblem, arrays: Sequence[Any], fused: Sequence[Any], on_gpu: bool, opened: ExitStack
) -> Callable[[], Any]:
    """PyTorch's call on tensors that share the memory of the arrays.

    Args:
        problem: what to compute.
        arrays: input, weight, and bias or None; a real weight with complex data is converted to a complex one.
        fused: those of `fusion.FUSED_ARRAYS`, in order.
        on_gpu: whether they are CuPy arrays, otherwise NumPy arrays.
        opened: the contexts that the call needs are entered here.

    Raises:
        Refused: PyTorch is not installed, has no CUDA, or cannot compute the problem.
    """
    try:
        import torch
    except ImportError:
        raise Refused("PyTorch is not installed") from None
    if on_gpu and not torch.cuda.is_available():
        raise Refused("this PyTorch has no CUDA")

    def tensor(array: Any) -> Any:
        if array is None:
            return None
        is_bfloat16 = array.dtype.name == "bfloat16"  # it cannot be exchanged, so it goes as integers
        plain = array.view("uint16") if is_bfloat16 else array
        exchanged = torch.utils.dlpack.from_dlpack(plain) if on_gpu else torch.from_numpy(plain)
        return exchanged.view(torch.bfloat16) if is_bfloat16 else exchanged

    opened.enter_context(torch.inference_mode())
    if on_gpu:
        allow_tf32 = problem.precision == "tf32"
        opened.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allow_tf32))
    x, weight, bias = map(tensor, arrays)
    return partial(layer(problem), x, weight.to(x.dtype), bias, [tensor(array) for array in fused])
