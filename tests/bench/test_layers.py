"""The benchmark layers: their data, and the roofline floors against figures worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.layers import FILE, Ceilings, load, valid_flops
from gpuconv.problem import ConvProblem

LAYERS = {layer.name: layer for layer in load()}

# Round rates, so that the floors can be worked out by hand: 1 TB/s, 10 and 100 TFLOP/s.
CEILINGS = Ceilings(
    "round figures", 1e12, {"float32": 10e12, "tf32": 50e12, "float16": 100e12, "bfloat16": 100e12, "float64": 5e12}
)


def test_all_layers_load() -> None:
    assert len(LAYERS) == 81
    assert {layer.forward.op for layer in LAYERS.values()} == {"conv1d", "conv_transpose1d"}


@pytest.mark.parametrize(
    ("name", "precision", "elements", "operations"),
    [
        # A pointwise layer has no padding: every number is a product of the settings.
        (
            "convtasnet.pw_128to512",
            "float32",
            8 * 128 * 4001 + 512 * 128 + 512 + 8 * 512 * 4001,
            2 * 8 * 512 * 4001 * 128,
        ),
        # Depthwise and causal, K = 4: tap k misses the first 3 - k outputs, 6 of 4*2048 pairs in all.
        (
            "mamba_2p8b.conv_k4_b1",
            "bfloat16",
            5120 * 2048 + 5120 * 4 + 5120 + 5120 * 2048,
            2 * 5120 * (4 * 2048 - 6),
        ),
        # K = 3, padding 1, stride 2, 3000 -> 1500: output 0 misses one tap; output 1499 reads 2997 to 2999.
        (
            "whisper_base.conv2_b1",
            "tf32",
            512 * 3000 + 512 * 512 * 3 + 512 + 512 * 1500,
            2 * 512 * 512 * (3 * 1500 - 1),
        ),
        # Transposed without padding: each of 862 inputs meets all 1024 taps.
        (
            "waveglow.mel_upsample_k1024s256",
            "float16",
            80 * 862 + 80 * 80 * 1024 + 80 + 80 * 221440,
            2 * 80 * 80 * 862 * 1024,
        ),
        # "same" with an even kernel, K = 40, padding (19, 20): tap k misses |k - 19| of the 512 outputs.
        (
            "inceptiontime.k40_same",
            "float64",
            64 * 32 * 512 + 32 * 32 * 40 + 64 * 32 * 512,
            2 * 64 * 32 * 32 * (40 * 512 - (19 * 20 // 2 + 20 * 21 // 2)),
        ),
    ],
)
def test_floor_against_hand_computed_values(name: str, precision: str, elements: int, operations: int) -> None:
    itemsize = {"float64": 8, "float16": 2, "bfloat16": 2}.get(precision, 4)
    seconds = max(elements * itemsize / 1e12, operations / CEILINGS.flops_per_second[precision])
    assert LAYERS[name].floor(precision, CEILINGS) == pytest.approx(seconds, rel=1e-12)


def test_both_sides_of_the_roofline_occur() -> None:
    pointwise, depthwise = LAYERS["convtasnet.pw_128to512"], LAYERS["mamba_2p8b.conv_k4_b1"]
    assert pointwise.floor("float32", CEILINGS) == valid_flops(pointwise.problem()) / 10e12
    assert depthwise.floor("float32", CEILINGS) == depthwise.problem().bytes() / 1e12


def test_complex_data_use_the_rate_of_their_parts() -> None:
    layer = LAYERS["conformer_l.pw1_512to1024"]
    assert layer.floor("complex64", CEILINGS) == pytest.approx(4 * layer.floor("float32", CEILINGS))


def test_floor_of_a_smaller_batch() -> None:
    layer = LAYERS["conformer_l.pw1_512to1024"]
    assert layer.floor("float32", CEILINGS, batch=4) == pytest.approx(layer.floor("float32", CEILINGS) / 4)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="round figures: no rate for int8, only for float32, tf32"):
        LAYERS["convtasnet.pw_128to512"].floor("int8", CEILINGS)


def test_padding_of_causal_and_same_layers() -> None:
    assert LAYERS["mamba_2p8b.conv_k4_b1"].problem().padding == (3, 0)
    assert LAYERS["inceptiontime.k40_same"].problem().padding == (19, 20)


def test_valid_flops_by_counting() -> None:
    for problem in (
        ConvProblem("conv1d", 2, 4, 6, 11, 3, 2, 3, 1, 2, 2),
        ConvProblem("conv_transpose1d", 3, 4, 2, 5, 4, 3, 2, 4, 2, 2, 1, "complex64"),
    ):
        p = problem
        fine, coarse = (p.L_out, p.L_in) if p.transposed else (p.L_in, p.L_out)
        pairs = sum(
            0 <= q * p.stride - p.padding_left + k * p.dilation < fine for q in range(coarse) for k in range(p.K)
        )
        assert valid_flops(p) == (8 if p.is_complex else 2) * p.N * p.C_out * p.C_in_g * pairs


def test_batch_within_limits() -> None:
    layer = LAYERS["conformer_l.pw1_512to1024"]
    one = layer.problem(batch=1)
    assert layer.batch_within(layer.problem().bytes(), layer.problem().flops()) == layer.batch
    assert layer.batch_within(2**62, 3 * one.flops()) == 3
    assert layer.batch_within(one.bytes(), 2**62) == 1
    assert layer.batch_within(one.bytes() - 1, 2**62) is None


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def rows() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stride": "3"},
            r"layers\.csv, line 2 \(whisper_base\.conv2_b1\): L_out is 1500, but the settings give 1000",
        ),
        ({"padding_left": "2", "padding_right": "0"}, r"padding 1, but padding_left and padding_right are \(2, 0\)"),
        ({"has_bias": "1"}, "not a layer: '1'"),
        ({"groups": "1.0"}, "not a layer: invalid literal"),
        ({"op": "conv2d"}, "op must be one of conv1d, conv_transpose1d, got 'conv2d'"),
        ({"speed": "1"}, "expected the columns name, op, .*, got .*speed"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    file = write(tmp_path / "layers.csv", [rows()[0] | change])
    with pytest.raises(ValueError, match=message):
        load(file)


def test_doubled_names_are_refused(tmp_path: Path) -> None:
    first, second, *_ = rows()
    with pytest.raises(ValueError, match=r"more than once: whisper_base\.conv2_b1"):
        load(write(tmp_path / "layers.csv", [first, second, first]))
