"""State dictionaries from files, for one layer of a model, and with weights that are normalised."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuconv import nn
from gpuconv.problem import numpy_dtype

FILES = ("state.npz", "state.safetensors")


def save(path: Path, state: dict[str, Any]) -> None:
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        from safetensors.numpy import save_file

        save_file(state, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_states_load_from_files(tmp_path: Path, name: str, dtype: str) -> None:
    source, target = nn.Conv1d(2, 3, 4, rng=0, dtype=dtype), nn.Conv1d(2, 3, 4, rng=1, dtype=dtype)
    save(tmp_path / name, source.state_dict())
    for path in (tmp_path / name, str(tmp_path / name)):
        target.weight[...] = 0
        assert target.load_state_dict(path) == ([], [])
        assert target.weight.dtype == numpy_dtype(dtype)
        np.testing.assert_array_equal(target.weight, source.weight)
        np.testing.assert_array_equal(target.bias, source.bias)
    target.weight[...] = 1  # a copy: the file is closed and may be replaced


@pytest.mark.parametrize("name", FILES)
def test_a_prefix_chooses_one_layer_of_a_model(tmp_path: Path, name: str) -> None:
    layers = {f"encoder.conv{i}.": nn.Conv1d(2, 3, 4, rng=i) for i in range(3)}
    state = {prefix + key: array for prefix, layer in layers.items() for key, array in layer.state_dict().items()}
    save(tmp_path / name, state)
    for prefix, layer in layers.items():
        for source in (state, tmp_path / name):
            target = nn.Conv1d(2, 3, 4, rng=9)
            target.load_state_dict(source, prefix=prefix)
            np.testing.assert_array_equal(target.weight, layer.weight)
    target = nn.Conv1d(2, 3, 5)
    message = (
        "Conv1d.load_state_dict: the state does not fit Conv1d(2, 3, kernel_size=(5,), stride=(1,)): "
        '"encoder.conv1.weight" must have shape (3, 2, 5), got (3, 2, 4)'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        target.load_state_dict(tmp_path / name, prefix="encoder.conv1.")
    with pytest.raises(
        ValueError, match=r'missing "weight"; .*; prefix="encoder.conv0." would choose one of 3 layers$'
    ):
        target.load_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match=r': missing "decoder.weight"; missing "decoder.bias"$'):
        target.load_state_dict(tmp_path / name, prefix="decoder.")
    with pytest.raises(TypeError, match="prefix must be a str, got int 3"):
        target.load_state_dict(tmp_path / name, prefix=3)  # type: ignore[arg-type]


def test_the_many_unknown_entries_of_a_model_are_counted() -> None:
    state = {f"layer{i}": np.zeros(1) for i in range(2000)}
    with pytest.raises(ValueError, match=r'unknown "layer19"; 1980 more unknown$') as caught:
        nn.Conv1d(2, 3, 4).load_state_dict(state)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "keys", [("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{i}" for i in (0, 1))]
)
@pytest.mark.parametrize("axes", [(1, 2), (0, 2), (0, 1), None])
@pytest.mark.parametrize("name", [None, *FILES])
def test_a_normalised_weight_is_folded(
    tmp_path: Path, keys: tuple[str, str], axes: tuple[int, ...] | None, name: str | None
) -> None:
    direction = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    norm = np.sqrt((direction.astype(float) ** 2).sum(axis=axes, keepdims=axes is not None))
    magnitude = np.asarray(3 * norm, np.float32)
    state: Any = {keys[0]: magnitude, keys[1]: direction, "bias": np.arange(3.0, dtype=np.float32)}
    if name is not None:
        save(tmp_path / name, state)
        state = tmp_path / name
    layer = nn.Conv1d(2, 3, 4)
    assert layer.load_state_dict(state) == ([], [])
    np.testing.assert_allclose(layer.weight, 3 * direction, rtol=3e-7)


def test_a_complex_normalised_weight_keeps_its_phases() -> None:
    direction = np.array([[[3j, 4]]])
    layer = nn.Conv1d(1, 1, 2, dtype="complex128", bias=False)
    layer.load_state_dict({"weight_g": np.full((1, 1, 1), 10.0), "weight_v": direction})
    np.testing.assert_allclose(layer.weight, [[[6j, 8]]])


def test_what_is_wrong_with_a_normalised_weight_is_named() -> None:
    layer = nn.Conv1d(2, 3, 4)
    state = {"weight_g": np.ones((3, 1, 1)), "weight_v": np.ones((3, 2, 4)), "bias": np.ones(3)}
    for key, value, says in (
        ("weight_g", np.ones((2, 1, 1)), '"a.weight_g" must have shape (3, 1, 1), got (2, 1, 1)'),
        ("weight_g", np.ones(3), '"a.weight_g" must have shape (3, 2, 4), got (3,)'),
        ("weight_v", np.ones((3, 2, 5)), '"a.weight_v" must have shape (3, 2, 4), got (3, 2, 5)'),
        ("weight_g", [1.0], '"a.weight_g" must be an array, got list'),
    ):
        wrong = {f"a.{name}": array for name, array in {**state, key: value}.items()}
        with pytest.raises(ValueError, match=re.escape(f": {says}") + "$"):
            layer.load_state_dict(wrong, prefix="a.")
    with pytest.raises(ValueError, match=r'missing "weight"; unknown "weight_g"$'):
        layer.load_state_dict({"weight_g": np.ones((3, 1, 1)), "bias": np.ones(3)})
    with pytest.raises(ValueError, match=r'unknown "weight_g"; unknown "weight_v"$'):
        layer.load_state_dict({**state, "weight": np.ones((3, 2, 4))})


@pytest.mark.torch
@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("form", ["weight_norm", "parametrizations.weight_norm"])
@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose1d"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_normalised_layers_of_pytorch_load(name: str, form: str, dim: int | None) -> None:
    import torch

    theirs = getattr(torch.nn, name)(4, 6, 3).double()
    normalise = torch.nn.utils.weight_norm if form == "weight_norm" else torch.nn.utils.parametrizations.weight_norm
    normalise(theirs, dim=dim)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    layer = getattr(nn, name)(4, 6, 3, dtype="float64")
    layer.load_state_dict(theirs.state_dict())
    x = np.random.default_rng(0).standard_normal((2, 4, 20))
    np.testing.assert_allclose(layer(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    layer = nn.Conv1d(2, 3, 400)
    weight, whole = layer.weight.copy(), nn.Conv1d(2, 3, 400)
    save(path, whole.state_dict())
    data = path.read_bytes()
    for length in (0, 4, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"^Conv1d.load_state_dict: {re.escape(str(path))} is damaged: "):
            layer.load_state_dict(path)
    np.testing.assert_array_equal(layer.weight, weight)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        layer.load_state_dict(tmp_path / f"nowhere-{name}")


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    save(path, nn.Conv1d(2, 3, 400).state_dict())
    data = bytearray(path.read_bytes())
    data[1000] ^= 1  # in the samples of the first entry, which has a checksum
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf'"weight" cannot be read from {re.escape(str(path))}: .*CRC'):
        nn.Conv1d(2, 3, 400).load_state_dict(path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "state.npz", weight=np.array([[[print]]]), bias=np.zeros(1))
    with pytest.raises(ValueError, match=r'"weight" cannot be read from .*: Object arrays cannot be loaded'):
        nn.Conv1d(1, 1, 1).load_state_dict(tmp_path / "state.npz")
    with pytest.raises(
        ValueError, match=r'must end in .npz or .safetensors, got "m.pt"; PyTorch\'s own files hold pickled'
    ):
        nn.Conv1d(1, 1, 1).load_state_dict("m.pt")
    np.save(tmp_path / "one.npy", np.zeros(1))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="is damaged: "):
        nn.Conv1d(1, 1, 1).load_state_dict(tmp_path / "one.npz")


def test_what_reads_safetensors_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    save(path, nn.Conv1d(2, 3, 4).state_dict())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package safetensors: pip install -e '.\[safetensors\]'"):
        nn.Conv1d(2, 3, 4).load_state_dict(path)
