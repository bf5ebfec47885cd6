"""What `import gpuconv` loads and costs, and that what it puts off is there when it is used."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gpuconv

PACKAGE = Path(gpuconv.__file__).parent


def fresh(script: str, **environment: str) -> Any:
    """What a script prints as JSON in a new interpreter, which may keep compiled modules."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_loads_only_what_a_first_call_needs() -> None:
    loaded = fresh(
        "import numpy, sys; before = set(sys.modules); import gpuconv, json; print(json.dumps([*sys.modules]))"
    )
    own = {name.removeprefix("gpuconv.") for name in loaded if name.startswith("gpuconv.")}
    late = {
        "cases",
        "chunked",
        "cli",
        "compile",
        "cpu",
        "cubins",
        "dispatch",
        "explain",
        "explanation",
        "families",
        "files",
        "grad",
        "nn",
        "reference",
        "signal",
        "stream",
        "testing",
        "verify",
    }
    assert "functional" in own
    assert own & late == set()
    assert {"argparse", "concurrent.futures", "cupy", "logging", "ml_dtypes", "rich", "xml"} & set(loaded) == set()


def test_import_takes_a_third_of_numpys_time_at_most(tmp_path: Path) -> None:
    """The CPU time beyond NumPy's; before modules were loaded late it was 0.9 of it."""
    script = """
import json, time
start = time.process_time()
import numpy
middle = time.process_time()
import gpuconv
print(json.dumps([middle - start, time.process_time() - middle]))
"""
    times = [fresh(script, PYTHONPYCACHEPREFIX=str(tmp_path)) for _ in range(9)]
    numpys, ours = (min(column) for column in zip(*times, strict=True))
    assert ours <= numpys / 3


@pytest.mark.parametrize(
    "before",
    [
        "import gpuconv",
        "import gpuconv.verify, gpuconv.explain, gpuconv.compile",
        "from gpuconv.verify import CHECKS; from gpuconv.explain import DIRECTIONS; import gpuconv",
        "import gpuconv; gpuconv.verify, gpuconv.explain, gpuconv.is_compiled; import gpuconv.verify, gpuconv.compile",
        "import gpuconv, importlib; importlib.reload(importlib.import_module('gpuconv.verify'))",
        "import gpuconv.cli",
        "from gpuconv import *; import gpuconv",
    ],
)
def test_functions_that_are_loaded_late_stay_functions(before: str) -> None:
    """Each is a function in the module of its own name, which an import must not put in its place."""
    script = f"""
{before}
import json
names = ("compile", "explain", "is_compiled", "verify")
from gpuconv import compile, explain, is_compiled, verify
found = [compile, explain, is_compiled, verify]
print(json.dumps([type(f).__name__ for f in [*(getattr(gpuconv, n) for n in names), *found]]))
"""
    assert fresh(script) == ["function"] * 8


def test_every_public_name_is_there() -> None:
    namespace: dict[str, Any] = {}
    exec("from gpuconv import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(gpuconv.__all__)
    assert set(gpuconv.__all__) <= set(dir(gpuconv))
    modules = {name for name in gpuconv.__all__ if isinstance(namespace[name], ModuleType)}
    assert modules == {"chunked", "grad", "nn", "reference", "signal", "sigpy", "stream", "testing"}
    for name in gpuconv.__all__:
        assert namespace[name] is getattr(gpuconv, name)
        assert name in modules or inspect.isfunction(namespace[name])
    assert set(gpuconv.__all__) <= set(fresh("import gpuconv, json; print(json.dumps(dir(gpuconv)))"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'gpuconv' has no attribute 'conv2d'$"):
        _ = gpuconv.conv2d  # type: ignore[attr-defined]
    for name in ("dask", "torch"):
        script = f"import gpuconv, json; print(json.dumps(hasattr(gpuconv, {name!r})))"
        assert fresh(script) is False
        script = f"""
import gpuconv, json
try:
    gpuconv.{name}
except AttributeError as error:
    print(json.dumps(str(error)))
"""
        assert fresh(script) == f"module 'gpuconv' has no attribute '{name}'; write: import gpuconv.{name}"
    with pytest.raises(ImportError, match="cannot import name 'conv2d' from 'gpuconv'"):
        exec("from gpuconv import conv2d")


def test_without_pytorch_its_bridge_says_how_to_install_it() -> None:
    script = """
import json, sys
sys.modules["torch"] = None
try:
    import gpuconv.torch
except ModuleNotFoundError as error:
    print(json.dumps(str(error)))
"""
    hint = "pip install -e '.[torch]' in a checkout of gpuconv"
    assert fresh(script) == f"gpuconv.torch needs PyTorch: {hint}"


def test_type_checkers_see_the_names_that_are_loaded_late() -> None:
    """They read the imports under `if TYPE_CHECKING`, and must not see a `__getattr__` that makes any name good."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                seen.update((alias.name, statement.module or "") for alias in statement.names)
    assert not [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    expected = dict.fromkeys(gpuconv._LAZY_MODULES, "") | gpuconv._LAZY_FUNCTIONS
    assert seen == expected
