"""`gpuconv.grad`: the six functions end to end, against the definitions and the identities.

test_torch.py compares them with PyTorch's autograd.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases, grad, reference
from gpuconv.cases import CASES, Case
from gpuconv.problem import (
    DTYPES,
    ArraySpec,
    BiasGradientProblem,
    ConvProblem,
    Op,
    WeightGradientProblem,
    numpy_dtype,
)
from tests.api.test_functional import MAKES, SETTINGS, Touchy, draw, swapped, unaligned
from tests.api.test_problem import BAD_CALLS, VALID

Array = npt.NDArray[Any]
OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")
ARGUMENTS = ("input", "weight", "bias")


def gradient(argument: str, p: ConvProblem, x: Any, w: Any, u: Any, **settings: Any) -> Any:
    """The gradient of the output's product with u in an argument."""
    function = getattr(grad, f"{p.op}_{argument}")
    if argument == "input":
        return function(p.input_shape, w, u, **settings)
    if argument == "weight":
        return function(x, p.weight_shape, u, **settings)
    return function(u, **({"out": settings["out"]} if "out" in settings else {}))


def expected(argument: str, p: ConvProblem, x: Array, w: Array, u: Array) -> reference.Sums:
    if argument == "input":
        return reference.input_gradient(p, w, u)
    if argument == "weight":
        q = WeightGradientProblem.of(p)
        return reference.weight_gradient(q, *q.sides(x, u))
    return reference.bias_gradient(BiasGradientProblem.of(p), u)


def shape_of(argument: str, p: ConvProblem) -> tuple[int, ...]:
    return {"input": p.input_shape, "weight": p.weight_shape, "bias": (p.C_out,)}[argument]


def problem_of(op: str, **changes: Any) -> ConvProblem:
    """The problem of the valid call, without bias."""
    given = {**VALID[op], **changes}
    dtype = given.pop("dtype", "float32")
    shapes = [ArraySpec(given.pop(name), dtype) for name in ("input", "weight")]
    given.pop("bias")
    return ConvProblem.of(op, *shapes, **given)


def integers(p: ConvProblem, seed: int = 0) -> tuple[Array, Array, Array]:
    """input, weight and grad_output of integers from -2 to 2."""
    shapes = (p.input_shape, p.weight_shape, p.output_shape)
    return tuple(draw(shape, p.dtype, seed + i) for i, shape in enumerate(shapes))  # type: ignore[return-value]


def inner(a: Array, b: Array) -> complex:
    return complex(np.vdot(b.astype(np.complex128), a.astype(np.complex128)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_adjoints_exactly(case: Case, dtype: str) -> None:
    """The operation is a linear map of its input, of its weight and of its bias; each has its adjoint."""
    p = case.at(dtype)
    x, w, u = integers(p)
    b = draw((p.C_out,), dtype, 5)
    keywords = dict(case.settings)
    y = getattr(gpuconv, p.op)(x, w, **keywords)
    of_product = inner(y, u)
    assert inner(x, gradient("input", p, x, w, u, **keywords)) == of_product
    assert inner(w, gradient("weight", p, x, w, u, **keywords)) == of_product
    assert inner(b, gradient("bias", p, x, w, u)) == inner(np.broadcast_to(b[:, None], y.shape), u)


@pytest.mark.parametrize("case", CASES[::13], ids=lambda case: case.name)
def test_finite_differences(case: Case) -> None:
    """The loss is half the squared output, so its gradient with respect to the output is the output."""
    p = case.at("float64")
    rng = np.random.default_rng(0)
    arguments = {"input": p.input_shape, "weight": p.weight_shape, "bias": (p.C_out,)}
    arrays = {name: rng.standard_normal(shape) for name, shape in arguments.items()}
    keywords = dict(case.settings)

    def output() -> Array:
        return getattr(gpuconv, p.op)(*arrays.values(), **keywords)  # type: ignore[no-any-return]

    y = output()
    for name, array in arrays.items():
        result = gradient(name, p, arrays["input"], arrays["weight"], y, **keywords)
        for index in rng.choice(array.size, 3) if array.size else ():
            at = np.unravel_index(index, array.shape)
            value, losses = array[at], []
            for step in (1e-3, -1e-3):
                array[at] = value + step
                losses.append(float(np.sum(output() ** 2)) / 2)
            array[at] = value
            assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(result[at], rel=1e-6, abs=1e-6)
    assert len(CASES[::13]) >= 10


def test_inputs_that_no_window_contains_get_zeros() -> None:
    """Behind the last window, in front of a cut and between windows that are further apart than they are long."""
    for L_in, K, stride, padding in ((20, 3, 7, 0), (20, 2, 5, (1, 0)), (13, 1, 4, 0), (9, 3, 100, 0)):
        p = problem_of("conv1d", input=(2, 4, L_in), weight=(6, 2, K), stride=stride, padding=padding)
        u = np.ones(p.output_shape, np.float32)
        out = np.full(p.input_shape, np.nan, np.float32)
        grad.conv1d_input(p.input_shape, np.ones(p.weight_shape, np.float32), u, stride, padding, groups=2, out=out)
        touched = np.zeros(L_in, bool)
        for l_out in range(p.L_out):
            for l_in in range(l_out * stride - p.padding_left, l_out * stride - p.padding_left + K):
                touched[max(l_in, 0) : l_in + 1] = True
        assert not touched.all()
        np.testing.assert_array_equal(out != 0, np.broadcast_to(touched, out.shape))


def test_outputs_behind_the_last_tap_are_cut() -> None:
    """An output padding of a stride or more, which only a dilation allows: the last outputs are the bias alone."""
    p = problem_of("conv_transpose1d", stride=2, dilation=5, output_padding=4)
    assert p.adjoint().padding_right < 0
    x, w, u = integers(p)
    settings: dict[str, Any] = {"stride": 2, "dilation": 5, "output_padding": 4, "groups": 2}
    result = gradient("input", p, x, w, u, **settings)
    np.testing.assert_array_equal(result, expected("input", p, x, w, u).exact())
    u[..., -4:] = np.nan
    for argument in ("input", "weight"):
        np.testing.assert_array_equal(
            np.isfinite(gradient(argument, p, x, w, u, **settings)), np.ones(shape_of(argument, p), bool)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_sizes_give_zeros(dtype: str) -> None:
    for case in CASES:
        if "zero" not in case.tags:
            continue
        p = case.at(dtype)
        x, w, u = integers(p)
        for argument in ARGUMENTS:
            result = gradient(argument, p, x, w, u, **dict(case.settings))
            assert result.shape == shape_of(argument, p)
            np.testing.assert_array_equal(result, expected(argument, p, x, w, u).exact())
    for op in OPS:
        bias = getattr(grad, f"{op}_bias")
        np.testing.assert_array_equal(bias(draw((0, 3, 5), dtype)), np.zeros(3))
        np.testing.assert_array_equal(bias(draw((2, 3, 0), dtype)), np.zeros(3))
        assert bias(draw((0, 5), dtype)).shape == (0,)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_sample_equals_a_batch_of_one(op: str, argument: str, dtype: str) -> None:
    shape = VALID[op]["input"]
    single, batch = (problem_of(op, input=s, dtype=dtype, **SETTINGS[op]) for s in (shape[1:], (1, *shape[1:])))
    x, w, u = integers(single)
    result = gradient(argument, single, x, w, u, **SETTINGS[op])
    whole = gradient(argument, batch, x[None], w, u[None], **SETTINGS[op])
    assert result.dtype == numpy_dtype(dtype)
    np.testing.assert_array_equal(result, whole[0] if argument == "input" else whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_non_finite_values_stay_in_their_terms(case: Case, dtype: str) -> None:
    p = case.at(dtype)
    data = cases.random_data(p, 0, "nonfinite")
    u = cases.random_grad_output(p, 0)
    if u.size:
        u.reshape(-1)[u.size // 2] = -np.inf
    for argument in ARGUMENTS:
        result = gradient(argument, p, data.input, data.weight, u, **dict(case.settings))
        assert expected(argument, p, data.input, data.weight, u).within_bound(result).all()


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
@pytest.mark.parametrize("dtype", ["float32", "complex128", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_arrays_may_lie_in_memory_in_any_way(op: str, dtype: str, make: Callable[[Array], Array]) -> None:
    p = problem_of(op, dtype=dtype, **SETTINGS[op])
    given = [make(a) for a in integers(p)]
    plain = [np.array(np.asarray(a), dtype=numpy_dtype(dtype), order="C") for a in given]
    before = [np.asarray(a).tobytes() for a in given]
    for argument in ARGUMENTS:
        result = gradient(argument, p, *given, **SETTINGS[op])
        assert type(result) is np.ndarray
        assert result.dtype == numpy_dtype(dtype)
        assert result.dtype.isnative
        np.testing.assert_array_equal(result, gradient(argument, p, *plain, **SETTINGS[op]))
    assert [np.asarray(a).tobytes() for a in given] == before


# name: (how the memory of `out` is made of a pattern of its shape, how `out` is made of the memory).
PLACES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "contiguous": (lambda a: a, lambda a: a),
    "every other": (lambda a: np.repeat(a, 2, axis=-1), lambda a: a[..., 1::2]),
    "reversed": (lambda a: a, lambda a: a[..., ::-1]),
    "Fortran order": (lambda a: np.ascontiguousarray(a.T), lambda a: a.T),
    "byte-swapped": (swapped, lambda a: a),
    "unaligned": (unaligned, lambda a: a),
    "subclass": (lambda a: a, lambda a: a.view(Touchy)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_out_is_filled_and_its_neighbours_are_not(op: str, dtype: str, argument: str, place: str) -> None:
    p = problem_of(op, dtype=dtype, **SETTINGS[op])
    arrays = integers(p)
    right = gradient(argument, p, *arrays, **SETTINGS[op])
    make, view = PLACES[place]
    memory = make((np.arange(right.size) % 251 + 1).reshape(right.shape).astype(right.dtype))
    before = memory.copy()
    out = view(memory)
    assert gradient(argument, p, *arrays, **SETTINGS[op], out=out) is out
    np.testing.assert_array_equal(np.asarray(out), right)
    np.copyto(np.asarray(out), np.asarray(view(before)))
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("op", OPS)
def test_a_wrong_out_is_refused(op: str, argument: str) -> None:
    p = problem_of(op, **SETTINGS[op])
    arrays = integers(p)
    shape = shape_of(argument, p)
    first = "input" if argument == "weight" else "grad_output"

    def refused(out: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match="^" + re.escape(f"{op}_{argument}: {says}") + "$"):
            gradient(argument, p, *arrays, **SETTINGS[op], out=out)

    longer = (*shape[:-1], shape[-1] + 1)
    refused(np.zeros(longer, np.float32), ValueError, f"out must have shape {shape}, got {longer}")
    refused(np.zeros(shape), TypeError, f"out must have the dtype of {first}, float32, got float64")
    frozen = np.zeros(shape, np.float32)
    frozen.flags.writeable = False
    refused(frozen, ValueError, "out must be writeable, got a read-only array")
    refused([[0.0]], TypeError, "out must be a NumPy or CuPy array, got list; pass np.asarray(out)")
    u = arrays[2].reshape(-1)[: int(np.prod(shape))]
    if u.size == np.prod(shape):
        refused(u.reshape(shape), ValueError, "out must not overlap grad_output, but they share memory")


NOT_OF_GRADIENTS = ("bias", "input None", "weight None")


@pytest.mark.parametrize("argument", ["input", "weight"])
@pytest.mark.parametrize(
    ("op", "changes", "error", "says"),
    [
        bad
        for bad in BAD_CALLS
        if not any(name in str(bad.id) for name in NOT_OF_GRADIENTS)
        and all(math.prod(max(n, 1) for n in bad.values[1].get(name, ())) < 10**6 for name in ("input", "weight"))
    ],
)
def test_what_the_operation_refuses_its_gradients_refuse(
    op: str, changes: dict[str, Any], error: type[Exception], says: tuple[str, ...], argument: str
) -> None:
    given = {**VALID[op], **changes}
    given.pop("bias")
    shapes = [given.pop("input"), given.pop("weight")]
    x, w = (np.zeros(shape, np.float32) for shape in shapes)
    u = np.zeros((2, 6, 8), np.float32)
    function = getattr(grad, f"{op}_{argument}")
    first = (shapes[0], w) if argument == "input" else (x, shapes[1])
    with pytest.raises(error) as caught:
        function(*first, u, **given)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{op}_{argument}: ")
    wanted = [part.replace(f"{argument} must have", f"{argument}_size must have", 1) for part in says]
    assert [w for w, part in zip(wanted, says, strict=True) if w not in message and part not in message] == [], message


BAD_SIZES: dict[str, tuple[Any, type[Exception], str]] = {
    "an int": (5, TypeError, "must be the extents {layout}, got int 5"),
    "an array": (np.zeros(3), TypeError, "must be the extents {layout}, got ndarray"),
    "a float": ((2, 4, 3.0), TypeError, "must be the extents {layout}, got float 3.0"),
    "a bool": ((2, True, 3), TypeError, "must be the extents {layout}, got the bool True"),
    "negative": ((2, -1, 3), ValueError, "must be at least 0, got -1"),
    "too many": ((1, 2, 3, 4), ValueError, "must have shape {layout}, got 4 dimensions: (1, 2, 3, 4)"),
}


@pytest.mark.parametrize(("size", "error", "says"), BAD_SIZES.values(), ids=BAD_SIZES.keys())
@pytest.mark.parametrize("op", OPS)
def test_bad_sizes_are_refused(op: str, size: Any, error: type[Exception], says: str) -> None:
    x, w, u = integers(problem_of(op))
    weight_layout = "(C_out, C_in/groups, K)" if op == "conv1d" else "(C_in, C_out/groups, K)"
    for argument, layout in (("input", "(N, C_in, L_in) or (C_in, L_in)"), ("weight", weight_layout)):
        first = (size, w) if argument == "input" else (x, size)
        wanted = f"{op}_{argument}: {argument}_size {says.format(layout=layout)}"
        with pytest.raises(error, match="^" + re.escape(wanted)):
            getattr(grad, f"{op}_{argument}")(*first, u, groups=2)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_grad_output_is_refused(op: str) -> None:
    p = problem_of(op, **SETTINGS[op])
    x, w, u = integers(p)
    for argument, other in (("input", "weight"), ("weight", "input")):
        name = f"{op}_{argument}"

        def refused(wrong: Any, error: type[Exception], says: str) -> None:
            with pytest.raises(error, match="^" + re.escape(f"{name}: {says}")):  # noqa: B023
                gradient(argument, p, x, w, wrong, **SETTINGS[op])  # noqa: B023

        shape = p.output_shape
        refused(u[..., 1:], ValueError, f"grad_output must have the output's shape {shape}, got {u[..., 1:].shape}")
        refused(u[0], ValueError, f"grad_output must have the output's shape {shape}, got {u[0].shape}")
        says = f"{other} and grad_output must share one dtype, got {other} float32, grad_output float64; "
        says += f"pass grad_output.astype({other}.dtype)"
        refused(u.astype(np.float64), TypeError, says)
        refused(u.astype(np.int64), TypeError, 'grad_output must have one of the dtypes "float16"')
        refused(None, TypeError, "grad_output must be a NumPy or CuPy array, got NoneType")
    with pytest.raises(TypeError, match=f'^{op}_input: weight must have one of the dtypes "float16"'):
        gradient("input", p, x, w.astype(np.int64), u, **SETTINGS[op])
    with pytest.raises(TypeError, match=f'^{op}_weight: input must have one of the dtypes "float16"'):
        gradient("weight", p, x.astype(np.int64), w, u, **SETTINGS[op])
    with pytest.raises(TypeError, match=f"^{op}_input: weight must be a NumPy or CuPy array, got PreparedWeight"):
        gradient("input", p, x, gpuconv.prepare(w), u, **SETTINGS[op])
    bias = getattr(grad, f"{op}_bias")
    layout = r"\(N, C_out, L_out\) or \(C_out, L_out\)"
    with pytest.raises(ValueError, match=rf"^{op}_bias: grad_output must have shape {layout}, got 1 dimension: \(3,\)"):
        bias(np.zeros(3))
    with pytest.raises(TypeError, match=f'^{op}_bias: grad_output must have one of the dtypes "float16"'):
        bias(u.astype(np.int32))


def test_tf32_is_a_precision_of_float32_input_gradients() -> None:
    p = problem_of("conv1d", precision="tf32")
    x, w, u = integers(p)
    result = gradient("input", p, x, w, u, groups=2, precision="tf32")
    np.testing.assert_array_equal(result, expected("input", p, x, w, u).exact())
    assert p.adjoint().precision == "tf32"
    with pytest.raises(ValueError, match=r"^conv1d_input: precision must be one of"):
        gradient("input", p, x, w, u, groups=2, precision="half")


SOME_CASES = [
    case
    for case in CASES
    if case.name
    in (
        "k3", "k5", "stride_exceeds_k", "padding_exceeds_input", "padding_same_strided", "depthwise", "unbatched",
        "no_length", "no_samples", "no_input_channels", "up_stride_exceeds_k", "up_output_padding_dilated",
        "up_padding_pair", "up_groups2", "up_no_length", "up_unbatched", "up_padding_same_stride_exceeds_k",
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
def test_cupy_gives_the_same_as_numpy(cupy: Any, dtype: str) -> None:
    """Data are integers, so results agree bit for bit. The second call finds the plan of the first."""
    assert len(SOME_CASES) == 17
    for case in SOME_CASES:
        p = case.at(dtype)
        arrays = integers(p)
        for argument in ARGUMENTS:
            right = gradient(argument, p, *arrays, **dict(case.settings))
            for make in (cupy.asarray, lambda a: cupy.asarray(np.repeat(a, 2, axis=-1))[..., ::2]):
                given = [make(a) for a in arrays]
                for _ in range(2):
                    result = gradient(argument, p, *given, **dict(case.settings))
                    np.testing.assert_array_equal(result.get(), right)
                np.testing.assert_array_equal(given[1].get(), arrays[1])


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_out_on_a_gpu(cupy: Any, op: str, argument: str) -> None:
    p = problem_of(op, dtype="complex64", **SETTINGS[op])
    arrays = integers(p)
    right = gradient(argument, p, *arrays, **SETTINGS[op])
    given = [cupy.asarray(a) for a in arrays]
    whole = cupy.asarray(np.full((*right.shape[:-1], 2 * right.shape[-1]), 7, right.dtype))
    out = whole[..., 1::2]
    assert gradient(argument, p, *given, **SETTINGS[op], out=out) is out
    np.testing.assert_array_equal(out.get(), right)
    np.testing.assert_array_equal(whole.get()[..., ::2], np.full(right.shape, 7))
    name = {"input": "weight", "weight": "input", "bias": "grad_output"}[argument]
    memory = {"weight": given[1], "input": given[0], "grad_output": given[2]}[name]
    for _ in range(2):
        with pytest.raises(TypeError, match="all arrays must be of one kind and on one device"):
            gradient(argument, p, *given, **SETTINGS[op], out=np.zeros(right.shape, right.dtype))
    if memory.size >= right.size and argument != "bias":
        inside = memory.reshape(-1)[: right.size].reshape(*right.shape)
        with pytest.raises(ValueError, match=f"^{op}_{argument}: out must not overlap {name}"):
            gradient(argument, p, *given, **SETTINGS[op], out=inside)


@pytest.mark.gpu
def test_conjugated_weights_are_a_copy(cupy: Any) -> None:
    """The weights themselves are never changed, whatever they look like in memory."""
    p = problem_of("conv1d", dtype="complex64", **SETTINGS["conv1d"])
    x, w, u = integers(p)
    w = w + 1j
    right = gradient("input", p, x, w, u, **SETTINGS["conv1d"])
    for weight in (cupy.asarray(w), cupy.asarray(np.ascontiguousarray(w.T)).T):
        result = gradient("input", p, None, weight, cupy.asarray(u), **SETTINGS["conv1d"])
        np.testing.assert_array_equal(result.get(), right)
        np.testing.assert_array_equal(weight.get(), w)


@pytest.mark.gpu
def test_tf32_weight_gradients_are_summed_on_tensor_cores(cupy: Any, launched: list[str]) -> None:
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("no TF32 here")
    p = WeightGradientProblem("conv1d", 2, 16, 8, 160, 160, 3, padding_left=1, precision="tf32")
    rng = np.random.default_rng(0)
    coarse, fine = (rng.standard_normal(shape).astype(np.float32) for shape in (p.coarse_shape, p.fine_shape))
    x, u = cupy.asarray(fine), cupy.asarray(coarse)
    found = grad.conv1d_weight(x, p.weight_shape, u, padding=1, precision="tf32").get()
    assert launched[0] == "weight_gradient_mma"
    bounded = reference.weight_gradient(p, coarse, fine).within_bound
    assert bounded(found).all()
    on_cpu = grad.conv1d_weight(fine, p.weight_shape, coarse, padding=1, precision="tf32")
    assert bounded(on_cpu).all()
    assert 2.0**-16 < np.abs(found - on_cpu).max() / np.abs(on_cpu).max() < 2.0**-8
    for arguments in ((x, p.weight_shape, u), (fine, p.weight_shape, coarse)):
        with pytest.raises(ValueError, match="precision must be one of"):
            grad.conv1d_weight(*arguments, padding=1, precision="tf16")


def test_a_subclass_is_never_asked_for_its_own_arithmetic() -> None:
    p = problem_of("conv1d", **SETTINGS["conv1d"])
    arrays = [a.view(Touchy) for a in integers(p)]
    for argument in ARGUMENTS:
        assert type(gradient(argument, p, *arrays, **SETTINGS["conv1d"])) is np.ndarray
