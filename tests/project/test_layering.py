"""The rules of the house, enforced by reading the files: who may import whom, and what a kernel file may contain."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gpuconv
from gpuconv import cases
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import FAMILIES, Family, Layout
from gpuconv.problem import DTYPES, BiasGradientProblem, ConvProblem, WeightGradientProblem
from gpuconv.source import assemble, directory, pack_params, params_fields
from tests.plans import FORWARD_FAMILIES, GRADIENT_FAMILIES, kernel_of, refusal_of, with_zeros

PACKAGE = Path(gpuconv.__file__).resolve().parent

# From the ground up: a module imports only from earlier rows, and modules in one row do not import each other.
LAYERS = (
    ("text", "wav"),
    ("dtypes", "device", "edge", "extents"),
    ("arguments", "costs"),
    ("fusion",),
    ("problem.base",),
    ("problem.forward",),
    ("problem.gradients", "problem.parts"),
    ("problem",),
    ("overlap",),
    ("reference.activations", "cpu.limits", "source", "journal"),
    ("reference.sums",),
    ("reference.fft",),
    ("reference.definition",),
    ("reference",),
    ("cpu.arrays",),
    ("cpu.geometry", "cpu.costs", "cpu.threads", "cpu.correlation"),
    ("cpu.blocking", "cpu.non_finite", "cpu.bias_gradient", "cpu.weight_sums"),
    ("cpu.taps",),
    ("cpu.*",),
    ("cpu.windows",),
    ("cpu.choice",),
    ("cpu.edges",),
    ("cpu.weight_gradient", "cpu.fused"),
    ("cpu",),
    ("families.base",),
    ("families.product", "families.arithmetic"),
    ("families.offsets", "families.mma_costs", "families.mma_tiles", "families.mma_window"),
    ("families.weight_boxes", "families.weight_gradient_sides"),
    ("families.mma_packing",),
    ("families.append", "families.tiles", "families.depthwise", "families.mma", "families.slices"),
    ("families.passes", "families.weight_gradient_window"),
    ("families.edges", "families.fused", "families.weight_gradient_costs"),
    ("families.lengths",),
    ("families.windows",),
    ("families.conv1d_depthwise_push",),
    ("families.*",),
    ("families",),
    ("dispatch", "cubins"),
    ("runtime.gpu",),
    ("runtime.arrays",),
    ("runtime.kernels",),
    ("runtime.prepared",),
    ("runtime.executor",),
    ("runtime",),
    ("fft.plan", "interchange"),
    ("fft.costs", "fft.executor"),
    ("fft.choice",),
    ("fft",),
    ("memory", "tasks", "lengths", "caches", "real_taps"),
    ("sample_runs",),
    ("calls",),
    ("functional",),
    ("checkpoint", "pieces"),
    ("parameters", "explanation"),
    ("nn", "grad", "signal.arrays", "chunked", "dask", "explain", "files", "gpus", "report"),
    ("signal.fft",),
    ("signal.convolution",),
    ("signal.filters",),
    ("signal",),
    ("cases.derived", "cases.data", "peers"),
    ("cases.table",),
    ("cases",),
    ("checks.target", "npy", "sigpy", "testing", "stream.window", "torch.tensors", "compile", "layers"),
    ("checks.subject", "stream.base"),
    ("checks.forward", "checks.gradients", "checks.layers", "checks.lengths", "stream.*"),
    ("checks", "stream", "pytest_plugin", "measure"),
    ("checks.families",),
    ("torch.operators",),
    ("torch.functions",),
    ("torch.patching",),
    ("torch",),
    ("verify",),
    ("cli.parser", "cli.terminal", "cli.options", "cli.errors"),
    ("cli.gpu",),
    ("cli.*",),
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    """The modules of the package by dotted name, without the package's own name in front."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer(module: str) -> int:
    """The row of `LAYERS` that a module belongs to."""
    for row, names in enumerate(LAYERS):
        if module in names:
            return row
    package, _, _ = module.partition(".")
    rows = [row for row, names in enumerate(LAYERS) if f"{package}.*" in names]
    assert rows, f"gpuconv/{module.replace('.', '/')}.py has no place in the order of layers"
    return rows[0]


def is_bridge(module: str) -> bool:
    """Whether a module is of gpuconv.torch."""
    return module == "torch" or module.startswith("torch.")


def imports(module: str) -> Iterator[tuple[int, str, bool]]:
    """The imports of a module: (line, what, whether it is the package's own, then without the package's name)."""
    path = MODULES[module]
    parts = module.split(".") if module else []
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            base = node.module or ""
            names = [f"{base}.{a.name}" if base == "gpuconv" else base for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["gpuconv", *package[: len(package) - node.level + 1], *filter(None, [node.module])])
            names = [
                f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("gpuconv.") in MODULES else base
                for a in node.names
            ]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            yield (node.lineno, rest, True) if root == "gpuconv" else (node.lineno, name, False)


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_only_upwards(module: str) -> None:
    row = layer(module)
    wrong = [
        f"line {line}: imports gpuconv.{name}"
        for line, name, own in imports(module)
        if own and name and layer(name) >= row
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_the_package_itself_gives_only_its_version(module: str) -> None:
    """`from . import x` names a module; anything else in gpuconv/__init__.py would be an import downwards."""
    path = MODULES[module]
    depth = module.count(".") + (2 if path.name == "__init__.py" else 1)  # of the dots that mean the package
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is None and node.level == depth
        for alias in node.names
    }
    assert {name for name in names if name not in MODULES} <= {"__version__"}


def test_the_layers_name_no_module_twice() -> None:
    names = [name for row in LAYERS for name in row]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", [name for name in MODULES if not is_bridge(name)])
def test_only_numpy_is_needed_at_import(module: str) -> None:
    """Everything else is imported inside functions.

    gpuconv.torch, which nothing imports, is all about PyTorch, and the plugin, which pytest imports, about pytest.
    """
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {node.lineno for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)}
    foreign = {
        f"line {line}: {name}"
        for line, name, own in imports(module)
        if not own and line not in inside and name.split(".")[0] not in {*sys.stdlib_module_names, "numpy"}
    }
    if module == "pytest_plugin":
        foreign = {entry for entry in foreign if not entry.endswith(": pytest")}
    assert foreign == set()


def test_what_computes_needs_nothing_of_what_verifies() -> None:
    verifies = {"cases", "checks", "measure", "peers", "verify"}
    for module in MODULES:
        if module.split(".")[0] not in verifies and module not in ("", "cli.bench", "cli.verify"):
            found = {name.split(".")[0] for _, name, own in imports(module) if own}
            assert not verifies & found, module


def test_pytorch_is_imported_by_its_bridge_alone() -> None:
    """Inside functions, too, but for what gpuconv is compared with; and no module of gpuconv imports the bridge."""
    for module in MODULES:
        found = {(name.split(".")[0], own) for _, name, own in imports(module)}
        if module == "peers":
            found.discard(("torch", False))
        if not is_bridge(module):
            assert not {("torch", False), ("torch", True)} & found, module
    foreign = {
        name.split(".")[0] for module in MODULES if is_bridge(module) for _, name, own in imports(module) if not own
    }
    assert foreign - set(sys.stdlib_module_names) == {"numpy", "torch"}


def test_cupy_is_imported_by_the_runtime_alone() -> None:
    for module, path in MODULES.items():
        statements = [
            line for line, name, own in imports(module) if not own and name.split(".")[0] in ("cupy", "cupyx")
        ]
        assert (module == "runtime.gpu") == bool(statements), f"{module}: lines {statements}"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        dynamic = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and any(isinstance(a, ast.Constant) and str(a.value).startswith("cupy") for a in node.args)
        ]
        assert dynamic == [], module


def test_kernels_are_made_by_the_runtime_alone() -> None:
    mentions = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("RawKernel", "RawModule", "ElementwiseKernel")
    ]
    assert mentions == ["runtime.kernels"] * 2


CUDA_FILES = sorted(directory().glob("*.cu*"))
# Kernels beside those of families.
HELPERS = {
    "append_samples",
    "conv1d_depthwise_push",
    "pack_weight",
    "pack_mma_weight",
    "pack_im2col_weight",
    "pack_col2im_weight",
    "sum_slices",
    "conv1d_edges",
    "conv_transpose1d_fold",
    "conv1d_ends",
    "conv_transpose1d_ends",
    "write_samples",
    "activate",
}
EVERY_FAMILY: tuple[Family[Any], ...] = FAMILIES


def code(text: str) -> str:
    """A CUDA source without comments and the contents of string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


@pytest.mark.parametrize("path", CUDA_FILES, ids=lambda path: path.name)
def test_cuda_sources_include_each_other_alone(path: Path) -> None:
    headers = {path.name for path in CUDA_FILES if path.suffix == ".cuh"}
    text = path.read_text(encoding="utf-8")
    includes = re.findall(r"^[ \t]*#[ \t]*include\b.*", text, re.MULTILINE)
    assert set(includes) <= {f'#include "{name}"' for name in headers}
    assert text.count("#pragma once") == (path.suffix == ".cuh")


@pytest.mark.parametrize("path", [p for p in CUDA_FILES if p.name != "ptx.cuh"], ids=lambda path: path.name)
def test_instructions_are_wrapped_in_one_place(path: Path) -> None:
    assert (
        re.findall(
            r"\basm\b|\b__shared__\b|\b__\w+_r[nzdu]\b|\b__shfl\w*|\b__half\w*", code(path.read_text(encoding="utf-8"))
        )
        == []
    )


def files_with(pattern: str) -> set[str]:
    return {path.name for path in CUDA_FILES if re.search(pattern, code(path.read_text(encoding="utf-8")))}


def test_results_are_rounded_in_one_place_for_layers_and_in_one_for_gradients() -> None:
    """Activated inputs are rounded in one place, too."""
    assert files_with(r"scalar::round\(") == {"finish.cuh", "input.cuh", "slices.cuh"}


def test_the_edge_of_the_input_is_known_in_one_place() -> None:
    length = r"(\w+\.)?L_(in|fine)\b"
    assert files_with(rf"[^<]<=?\s*{length}|{length}\s*[<>]|>=?\s*{length}|is_index\([^;]*{length}") == set()
    assert "edge.cuh" in files_with(r"is_index\(position, L\)")


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_a_family_has_one_name(family: Family[Any]) -> None:
    """The kernel's file and the kernel function are called like the family, as is its module, unless two share one."""
    module = type(family).__module__.removeprefix("gpuconv.")
    own = [other.name for other in EVERY_FAMILY if type(other).__module__ == type(family).__module__]
    assert module == f"families.{family.name}" or len(own) == 2
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or ""
    assert docstring.startswith(f"{' and '.join(own)}: ")
    kernel = directory() / f"{family.name}.cu"
    assert kernel.read_text(encoding="utf-8").startswith(f"// {family.name}: ")
    functions = re.findall(
        r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", code(kernel.read_text(encoding="utf-8"))
    )
    assert functions == [family.name]
    assert re.fullmatch(rf"{family.kind}_[a-z0-9]+(_[a-z0-9]+)*", family.name)
    kernels = {config.kernel for config in family.configs(Device.from_arch("sm_90"))}
    assert kernels - HELPERS == {family.name}


def test_every_family_file_and_every_kernel_file_is_in_the_list() -> None:
    names = [family.name for family in EVERY_FAMILY]
    assert len(names) == len(set(names))
    shared = {name for row in LAYERS for name in row}
    files = {name.removeprefix("families.") for name in MODULES if name.startswith("families.") and name not in shared}
    assert files == {type(family).__module__.rpartition(".")[2] for family in EVERY_FAMILY}
    assert {path.stem for path in CUDA_FILES if path.suffix == ".cu"} == {*names, *HELPERS}


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_a_kernel_reads_the_macros_that_its_family_gives(family: Family[Any]) -> None:
    for config in {config for arch in ARCHITECTURES for config in family.configs(Device.from_arch(arch))}:
        text = code(assemble(config.kernel, {}))
        read = set(re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]*[A-Z0-9]\b|\bDTYPE\b|\bVEC\b|\bPREFETCH\b", text))
        defaults = set(re.findall(r"#\s*ifndef (\w+)\s+#\s*define \1\b", text))
        read -= set(re.findall(r"#\s*define\s+(\w+)", text))
        read -= {
            "HAS_RESIDUAL",
            "ACTIVATION_PARAMETER",
            "INPUT_ACTIVATION",
            "INPUT_ACTIVATION_PARAMETER",
            "MOVES_WINDOW",
        }  # of fused plans, and of pushes
        assert {name for name, _ in config.macros} - defaults == read


def problems(op: str) -> Iterator[ConvProblem]:
    """The case table's problems of an operation, and extreme ones."""
    yield from (case.problem for case in cases.CASES if case.problem.op == op and 0 not in case.problem.output_shape)
    for dtype in DTYPES:
        yield ConvProblem(op, 1, 1, 1, 1, 1, dtype=dtype, has_bias=True, batched=False)
        yield ConvProblem(op, 70_000, 3, 70_000, 50, 7, 2, 3, 3, 2, dtype=dtype)
        yield ConvProblem(op, 1, 2, 2, 2**40, 3, 2**20 if op == "conv1d" else 3, groups=2, dtype=dtype)
        yield ConvProblem(op, 1, 1, 1, 2**33, 2, 3, dilation=2**31 - 1, dtype=dtype)


def assert_is_taken(family: Family[Any], problem: Any) -> None:
    layout = Layout.contiguous(problem)
    for device in map(Device.from_arch, ARCHITECTURES):
        assert refusal_of(family, problem, layout, device) is None, str(problem)
        config, launch = kernel_of(family, problem, layout, device)
        assert with_zeros(config) in set(family.configs(device))
        assert tuple(name for name, _ in launch.params) == params_fields(family.name)
        assert launch.grid <= 2**31 - 1
        pack_params(dict(launch.params), launch.index_bits)


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_the_last_family_of_each_operation_refuses_nothing(op: str) -> None:
    last = [family for family in FORWARD_FAMILIES if family.kind == op][-1]
    for problem in problems(op):
        assert_is_taken(last, problem)


@pytest.mark.parametrize("op", ["weight_gradient", "bias_gradient"])
def test_the_last_family_of_each_gradient_refuses_nothing(op: str) -> None:
    last = [family for family in GRADIENT_FAMILIES if family.kind == op][-1]
    for forward in (*problems("conv1d"), *problems("conv_transpose1d")):
        bias = BiasGradientProblem.of(forward)
        problem = WeightGradientProblem.of(forward) if op == "weight_gradient" else bias
        if not problem.is_empty:
            assert_is_taken(last, problem)
