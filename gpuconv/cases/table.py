"""The shared case table.

Every case is small: the same table runs on a CPU emulator of the GPU, for every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import MAX_STEP
from ..fusion import Fusion
from ..problem import ArraySpec, ConvProblem, Op
from .derived import in_format


@dataclass(frozen=True, slots=True)
class Case:
    """A named problem.

    Attributes:
        name: unique in the table.
        problem: float32; `at` gives it another number format.
        settings: the keyword arguments of the public function, as a user would write them ("same", output_size, ...).
        tags: what the case tests; the first one is its group.
        fusion: what the check of fusion fuses with it; None for a random choice.
    """

    name: str
    problem: ConvProblem
    settings: tuple[tuple[str, Any], ...]
    tags: tuple[str, ...]
    fusion: Fusion | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the samples of another batch of the layer, none longer than L_in; empty for most cases."""
        return _LENGTHS.get(self.name, ())

    def at(self, number_format: str) -> ConvProblem:
        """The case's problem in another number format, one of `NUMBER_FORMATS`."""
        return in_format(self.problem, number_format)


def _conv(
    name: str, N: int, C_in: int, C_out: int, L_in: int, K: int, *tags: str,
    bias: bool = True, batched: bool = True, groups: int = 1, **settings: Any,
) -> Case:  # fmt: skip
    weight_shape = (C_out, C_in // groups, K)
    return _case(name, "conv1d", (N, C_in, L_in), weight_shape, C_out, tags, bias, batched, groups, settings)


def _transposed(
    name: str, N: int, C_in: int, C_out: int, L_in: int, K: int, *tags: str,
    bias: bool = True, batched: bool = True, groups: int = 1, **settings: Any,
) -> Case:  # fmt: skip
    weight_shape = (C_in, C_out // groups, K)
    return _case(name, "conv_transpose1d", (N, C_in, L_in), weight_shape, C_out, tags, bias, batched, groups, settings)


def _case(
    name: str,
    op: Op,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    C_out: int,
    tags: tuple[str, ...],
    bias: bool,
    batched: bool,
    groups: int,
    settings: dict[str, Any],
) -> Case:
    if groups != 1:
        settings["groups"] = groups
    problem = ConvProblem.of(
        op,
        ArraySpec(input_shape if batched else input_shape[1:], "float32"),
        ArraySpec(weight_shape, "float32"),
        ArraySpec((C_out,), "float32") if bias else None,
        **settings,
    )
    return Case(name, problem, tuple(settings.items()), tags)


# Arguments: name, N, C_in, C_out, L_in, K, group, further tags, settings.
CASES: tuple[Case, ...] = (
    # Kernel lengths.
    _conv("k1", 2, 8, 12, 37, 1, "kernel"),
    _conv("k2_even", 2, 6, 10, 50, 2, "kernel", padding=1),
    _conv("k3", 3, 8, 8, 40, 3, "kernel", padding=1),
    _conv("k5", 2, 12, 7, 61, 5, "kernel", padding=2, bias=False),
    _conv("k31", 1, 4, 6, 70, 31, "kernel", padding=15),
    _conv("k64_even", 1, 3, 5, 100, 64, "kernel", padding=32),
    _conv("k_longer_than_input", 2, 2, 3, 20, 45, "kernel", padding=(30, 17)),
    _conv("k_equals_input", 3, 4, 6, 25, 25, "kernel"),
    _conv("k_depthwise_longer_than_input", 1, 4, 4, 40, 131, "kernel", "depthwise", groups=4, padding=65),
    _conv("k513", 1, 1, 2, 600, 513, "kernel", bias=False),
    _conv("k25_to_2_channels", 2, 50, 2, 40, 25, "kernel", padding=4),
    # Strides.
    _conv("docs_example", 2, 16, 33, 50, 3, "stride", stride=2),
    _conv("stride_equals_k", 2, 5, 6, 47, 3, "stride", stride=3),
    _conv("stride_exceeds_k", 2, 5, 6, 48, 3, "stride", stride=4),
    _conv("stride7_pair", 2, 4, 9, 90, 5, "stride", stride=7, padding=(3, 1)),
    _conv("stride_exceeds_input", 2, 3, 4, 30, 3, "stride", stride=1000),
    _conv("stride2_k1", 2, 7, 5, 41, 1, "stride", stride=2, bias=False),
    # Dilations.
    _conv("dilation2", 2, 6, 8, 45, 3, "dilation", dilation=2, padding=2),
    _conv("dilation3_k4", 2, 6, 5, 52, 4, "dilation", dilation=3, padding=(4, 5)),
    _conv("dilation4_stride6", 2, 4, 6, 70, 5, "dilation", dilation=4, stride=6, padding=8),
    _conv("dilation3_stride2", 2, 4, 6, 64, 5, "dilation", dilation=3, stride=2, padding=6),
    _conv("dilation_spans_input", 2, 3, 4, 101, 2, "dilation", dilation=100),
    # Every form of padding.
    _conv("padding_sequence", 2, 4, 5, 33, 4, "padding", padding=[2], stride=(2,)),
    _conv("padding_left_only", 2, 4, 5, 33, 4, "padding", padding=(3, 0)),
    _conv("padding_right_only", 2, 4, 5, 33, 4, "padding", padding=(0, 5)),
    _conv("padding_valid", 2, 4, 5, 33, 4, "padding", padding="valid"),
    _conv("padding_same_odd", 2, 4, 5, 33, 5, "padding", padding="same"),
    _conv("padding_same_even", 2, 4, 5, 33, 4, "padding", padding="same"),
    _conv("padding_same_even_dilated", 2, 4, 5, 40, 6, "padding", padding="same", dilation=3),
    _conv("padding_same_strided", 2, 4, 5, 34, 5, "padding", padding="same", stride=2),
    _conv("padding_same_strided_even", 2, 4, 5, 35, 4, "padding", padding="same", stride=3),
    _conv("padding_same_stride_exceeds_k", 2, 4, 5, 35, 3, "padding", padding="same", stride=4),
    _conv("padding_causal", 2, 4, 5, 33, 4, "padding", padding="causal"),
    _conv("padding_causal_dilated", 2, 4, 5, 50, 3, "padding", padding="causal", dilation=8),
    _conv("padding_causal_strided", 2, 4, 5, 41, 6, "padding", padding="causal", stride=2),
    _conv("padding_exceeds_k", 2, 4, 5, 20, 3, "padding", padding=9),
    _conv("padding_exceeds_input", 2, 3, 4, 5, 3, "padding", padding=(11, 8), stride=2),
    _conv("padding_of_4_outputs", 2, 48, 4, 8, 12, "padding", padding=(11, 9)),
    # Padding modes other than zeros.
    _conv("reflect_stem", 2, 1, 24, 60, 7, "mode", padding=3, padding_mode="reflect"),
    _conv("reflect_same", 2, 4, 5, 33, 4, "mode", padding="same", padding_mode="reflect"),
    _conv("reflect_shortest", 2, 5, 6, 2, 3, "mode", padding=1, padding_mode="reflect"),
    _conv("reflect_dense", 2, 20, 36, 50, 7, "mode", "dense", stride=3, padding=(9, 4), padding_mode="reflect"),
    _conv("reflect_long_sum", 1, 144, 17, 20, 52, "mode", "dense", padding=(19, 14), padding_mode="reflect"),
    _conv("symmetric_strided", 2, 12, 3, 41, 6, "mode", stride=4, padding=(7, 5), padding_mode="symmetric"),
    _conv(
        "symmetric_dense_groups", 1, 40, 36, 30, 5, "mode", "dense",
        groups=2, dilation=2, padding=(30, 7), bias=False, padding_mode="symmetric",
    ),
    _conv("replicate_causal", 2, 16, 32, 40, 3, "mode", dilation=4, padding="causal", padding_mode="replicate"),
    _conv("replicate_exceeds_input", 2, 3, 4, 5, 3, "mode", padding=(11, 8), stride=2, padding_mode="replicate"),
    _conv(
        "circular_depthwise", 2, 6, 12, 48, 7, "mode", "depthwise",
        groups=6, padding=3, dilation=2, padding_mode="circular",
    ),
    _conv("circular_whole_input", 1, 8, 12, 9, 5, "mode", padding=9, padding_mode="circular"),
    _conv("circular_unbatched", 1, 6, 8, 21, 3, "mode", batched=False, padding=1, padding_mode="circular"),
    _conv("circular_valid", 2, 4, 5, 33, 4, "mode", padding="valid", padding_mode="circular"),
    # Groups.
    _conv("groups2", 2, 8, 6, 44, 3, "groups", groups=2, padding=1),
    _conv("groups3_odd_channels", 1, 33, 66, 19, 3, "groups", groups=3),
    _conv("groups4_strided", 2, 16, 8, 60, 5, "groups", groups=4, stride=2, padding=2),
    _conv("depthwise", 2, 13, 13, 65, 3, "groups", "depthwise", groups=13, padding=1),
    _conv("depthwise_multiplier", 2, 6, 18, 50, 5, "groups", "depthwise", groups=6, padding=2),
    _conv("depthwise_strided_dilated", 2, 10, 10, 77, 4, "groups", "depthwise", groups=10, stride=2, dilation=2),
    _conv("depthwise_long_dilated", 1, 6, 6, 141, 5, "groups", "depthwise", groups=6, dilation=3, padding=(4, 9)),
    _conv("depthwise_stride8", 2, 6, 6, 90, 9, "groups", "depthwise", groups=6, stride=8, padding=(5, 3)),
    _conv("depthwise_long_kernel", 2, 3, 6, 300, 130, "groups", "depthwise", groups=3, padding=(70, 21)),
    _conv("groups3_long_kernel", 2, 9, 51, 83, 21, "groups", groups=3, stride=3, dilation=3, padding=(40, 22)),
    _conv("groups_to_one_each", 2, 12, 4, 40, 3, "groups", groups=4, bias=False),
    _conv("groups2_to_3_each", 1, 96, 6, 24, 18, "groups", groups=2),
    # Channel counts off the usual multiples.
    _conv("one_channel", 3, 1, 1, 71, 9, "channels", padding=4),
    _conv("one_input_channel", 2, 1, 48, 40, 7, "channels", padding=3),
    _conv("one_output_channel", 2, 48, 1, 40, 7, "channels", padding=3),
    _conv("channels_17_33", 2, 17, 33, 21, 3, "channels", padding=1),
    _conv("channels_66_48", 1, 66, 48, 18, 3, "channels", padding=1),
    _conv("channels_64_128", 1, 64, 128, 40, 3, "channels", padding=1),
    _conv("channels_129_5", 1, 129, 5, 40, 3, "channels", padding=1),
    _conv("channels_67_1", 1, 67, 1, 70, 48, "channels"),
    # Enough channels and terms for tensor cores in every number format.
    _conv("dense_stride3", 2, 20, 36, 50, 7, "dense", stride=3, padding=(9, 4)),
    _conv("dense_dilation5", 2, 36, 20, 41, 3, "dense", dilation=5, padding=(11, 3)),
    _conv("dense_groups3", 1, 51, 63, 47, 5, "dense", groups=3, stride=2, dilation=3, padding=6, bias=False),
    # So many terms that tensor cores sum them in segments, one block for each; the last segment is shorter.
    _conv("dense_long_sum", 1, 144, 17, 6, 52, "dense", padding=26),
    # Lengths.
    _conv("length1", 4, 5, 6, 1, 1, "length"),
    _conv("length1_padded", 2, 5, 6, 1, 3, "length", padding=1),
    _conv("length1_output", 1, 12, 20, 7, 5, "length", padding=(0, 1), stride=4),
    _conv("length127", 1, 4, 6, 127, 3, "length", padding=1),
    _conv("length128", 1, 4, 6, 128, 3, "length", padding=1),
    _conv("length129", 1, 4, 6, 129, 3, "length", padding=1),
    _conv("length1025", 1, 2, 2, 1025, 3, "length", padding=1),
    # Zero sizes.
    _conv("no_samples", 0, 3, 4, 20, 3, "zero"),
    _conv("no_output_channels", 2, 3, 0, 20, 3, "zero"),
    _conv("no_input_channels", 2, 0, 4, 20, 3, "zero"),
    _conv("no_input_channels_no_bias", 2, 0, 4, 20, 3, "zero", bias=False),
    _conv("no_length", 2, 3, 4, 0, 3, "zero", padding=2),
    # Without the batch axis.
    _conv("unbatched", 1, 6, 8, 39, 3, "unbatched", batched=False, padding=1),
    _conv("unbatched_same_strided", 1, 5, 7, 46, 4, "unbatched", batched=False, padding="same", stride=2, bias=False),
    # Layers of real models, with fewer channels and shorter signals.
    _conv("wav2vec2_stem", 2, 1, 40, 263, 10, "model", stride=5, bias=False),
    _conv("wav2vec2_pos_conv", 1, 32, 32, 12, 128, "model", groups=4, padding=64),
    _conv("whisper_conv1", 1, 20, 48, 30, 3, "model", padding=1),
    _conv("whisper_conv2", 1, 48, 48, 32, 3, "model", stride=2, padding=1),
    _conv("hifigan_resblock", 1, 16, 16, 60, 11, "model", dilation=5, padding=25),
    _conv("wavenet_dilated", 1, 16, 32, 90, 2, "model", dilation=32, padding="causal"),
    _conv("mamba_dw", 2, 40, 40, 70, 4, "model", "depthwise", groups=40, padding="causal"),
    _conv("conformer_dw", 2, 24, 24, 53, 31, "model", "depthwise", groups=24, padding=15),
    _conv("hyena_dw", 2, 4, 4, 140, 140, "model", "depthwise", groups=4, padding="causal", bias=False),
    _conv("convnext_dw", 1, 10, 10, 90, 7, "model", "depthwise", groups=10, padding=3),
    _conv("quartznet_dw", 2, 6, 6, 150, 75, "model", "depthwise", groups=6, padding=37),
    _conv("bigvgan_alias_down", 2, 6, 6, 97, 12, "model", "depthwise", groups=6, stride=2, bias=False),
    _conv("convtasnet_encoder", 2, 1, 32, 160, 16, "model", stride=8, padding=8, bias=False),
    _conv("encodec_down", 1, 16, 32, 80, 16, "model", stride=8, padding=(8, 0)),
    _conv("sincnet", 2, 1, 8, 500, 251, "model", stride=10, bias=False),
    _conv("stft", 1, 1, 65, 640, 128, "model", stride=64, bias=False),
    _conv("resample", 2, 1, 16, 450, 48, "model", stride=44, bias=False),
    _conv("bpnet_head", 1, 34, 2, 60, 75, "model", padding=37),
    _conv("tacotron2_location", 1, 2, 32, 50, 31, "model", padding=15, bias=False),
    _conv("attnsleep", 2, 1, 20, 220, 80, "model", stride=10, padding=40, bias=False),
    _conv("enformer_stem", 2, 4, 24, 60, 15, "model", padding=7),
    _conv("mimi_stream", 1, 36, 20, 24, 16, "model", stride=8),
    _conv("diffusion_policy_mid", 1, 60, 24, 4, 5, "model", padding=2),
    _conv("htdemucs_stem", 2, 2, 48, 160, 8, "model", stride=4, padding=2),
    _conv("bpnet_head_49_5", 2, 49, 5, 20, 17, "model", padding=(9, 4)),
    _transposed("up_k1", 2, 8, 12, 37, 1, "kernel"),
    _transposed("up_k3", 2, 8, 6, 40, 3, "kernel", padding=1),
    _transposed("up_long_kernel", 2, 6, 20, 41, 23, "kernel", groups=2, dilation=2, padding=(9, 21)),
    _transposed("up_filters", 2, 2, 24, 60, 17, "kernel", padding="same"),
    _transposed("up_filters_dilated", 1, 4, 9, 30, 9, "kernel", dilation=5, output_padding=3, bias=False),
    _transposed("up_k64_even", 1, 3, 8, 40, 64, "kernel", padding=20, bias=False),
    _transposed("up_stride2_k4", 2, 8, 6, 30, 4, "stride", stride=2, padding=1),
    _transposed("up_stride_equals_k", 2, 6, 8, 25, 3, "stride", stride=3),
    _transposed("up_stride_exceeds_k", 2, 6, 8, 20, 2, "stride", stride=5),
    _transposed("up_stride3_k1", 2, 6, 8, 20, 1, "stride", stride=3, bias=False),
    _transposed("up_stride5_k68", 2, 49, 2, 11, 68, "stride", stride=5, padding=3, output_padding=2, bias=False),
    _transposed("up_dilation2", 2, 6, 8, 40, 3, "dilation", dilation=2, padding=2),
    _transposed("up_dilation2_stride2", 2, 6, 8, 25, 3, "dilation", dilation=2, stride=2),
    _transposed("up_dilation3_stride2", 2, 6, 8, 25, 5, "dilation", dilation=3, stride=2, padding=3),
    _transposed("up_dilation4_stride6", 2, 4, 6, 18, 5, "dilation", dilation=4, stride=6, padding=2),
    _transposed("up_dilation6_stride4", 2, 4, 6, 18, 5, "dilation", dilation=6, stride=4, padding=(1, 7)),
    _transposed("up_padding_pair", 2, 6, 5, 22, 5, "padding", stride=2, padding=(1, 3)),
    _transposed("up_padding_valid", 2, 6, 5, 22, 5, "padding", stride=2, padding="valid"),
    _transposed("up_padding_same", 2, 6, 5, 22, 3, "padding", padding="same"),
    _transposed("up_padding_same_strided", 2, 6, 5, 22, 4, "padding", stride=2, padding="same"),
    _transposed("up_padding_same_odd_total", 2, 6, 5, 22, 5, "padding", stride=2, padding="same"),
    _transposed("up_padding_same_stride_exceeds_k", 2, 6, 5, 22, 2, "padding", stride=5, padding="same"),
    _transposed("up_padding_exceeds_k", 2, 4, 5, 30, 3, "padding", stride=2, padding=(8, 11)),
    _transposed("up_output_padding", 2, 6, 5, 20, 3, "padding", stride=2, padding=1, output_padding=1),
    _transposed("up_output_padding_dilated", 2, 4, 5, 20, 3, "padding", stride=2, dilation=5, output_padding=4),
    _transposed("up_output_size", 2, 6, 5, 20, 4, "padding", stride=3, padding=1, output_size=60),
    _transposed("up_padding_of_4_outputs", 2, 48, 4, 12, 12, "padding", padding=(13, 2)),
    _transposed("up_groups2", 2, 8, 6, 24, 4, "groups", groups=2, stride=2, padding=1),
    _transposed("up_groups3_odd_channels", 1, 33, 21, 18, 3, "groups", groups=3, stride=2),
    _transposed("up_depthwise", 2, 11, 11, 40, 4, "groups", "depthwise", groups=11, stride=2, padding=1),
    _transposed("up_depthwise_multiplier", 2, 5, 15, 30, 3, "groups", "depthwise", groups=5, stride=2),
    _transposed("up_depthwise_stride1", 2, 7, 7, 45, 9, "groups", "depthwise", groups=7, padding=4),
    _transposed("up_depthwise_dilated", 2, 6, 6, 31, 5, "groups", "depthwise", groups=6, stride=4, dilation=6),
    _transposed("up_depthwise_long_dilated", 1, 6, 6, 130, 5, "groups", "depthwise", groups=6, dilation=3, padding=2),
    _transposed("up_groups2_to_2_each", 1, 96, 4, 20, 24, "groups", groups=2),
    _transposed("up_one_input_channel", 2, 1, 33, 30, 6, "channels", stride=3, padding=1),
    _transposed("up_one_output_channel", 2, 48, 1, 30, 6, "channels", stride=3, padding=1),
    _transposed("up_channels_64_64", 1, 64, 64, 40, 4, "channels", stride=2, padding=1),
    _transposed("up_channels_17_66", 1, 17, 66, 15, 3, "channels", stride=2),
    _transposed("up_channels_52_4", 2, 52, 4, 20, 15, "channels", padding=7),
    _transposed("up_dense_stride3", 2, 24, 12, 19, 7, "dense", stride=3, padding=(2, 5)),
    _transposed("up_dense_dilation3", 1, 36, 20, 22, 3, "dense", dilation=3, padding=4),
    _transposed("up_dense_dilation6_stride4", 1, 36, 18, 11, 5, "dense", dilation=6, stride=4, padding=(1, 7)),
    _transposed("up_dense_groups2", 1, 64, 40, 13, 5, "dense", groups=2, stride=2, padding=2, output_padding=1),
    _transposed("up_dense_long_sum", 1, 144, 9, 5, 104, "dense", stride=2, padding=51),
    _transposed("up_length1", 2, 5, 6, 1, 4, "length", stride=2, padding=1),
    _transposed("up_length127", 1, 3, 4, 64, 1, "length", stride=2),
    _transposed("up_length128", 1, 3, 4, 64, 4, "length", stride=2, padding=1),
    _transposed("up_length129", 1, 3, 4, 65, 3, "length", stride=2, padding=1),
    _transposed("up_no_samples", 0, 3, 4, 20, 3, "zero"),
    _transposed("up_no_output_channels", 2, 3, 0, 20, 3, "zero"),
    _transposed("up_no_input_channels", 2, 0, 4, 20, 3, "zero", stride=2),
    _transposed("up_no_length", 2, 3, 4, 0, 5, "zero", stride=2),
    _transposed("up_unbatched", 1, 6, 8, 21, 4, "unbatched", batched=False, stride=2, padding=1),
    _transposed("hifigan_up", 1, 24, 16, 20, 16, "model", stride=8, padding=4),
    _transposed("bigvgan_alias_up", 2, 12, 12, 40, 12, "model", "depthwise", groups=12, stride=2, bias=False),
    _transposed(
        "styletts2_pool", 2, 9, 9, 20, 3, "model", "depthwise", groups=9, stride=2, padding=1, output_padding=1
    ),
    _transposed("convtasnet_decoder", 2, 32, 1, 30, 16, "model", stride=8, padding=8, bias=False),
    _transposed("snac_up", 1, 20, 12, 16, 14, "model", stride=7, padding=4, output_padding=1),
    _transposed("waveglow_upsample", 1, 8, 8, 12, 64, "model", stride=16),
    _transposed("bpnet_head_gradient", 2, 2, 34, 20, 75, "model", padding=37),
    _transposed("istft", 1, 65, 1, 8, 128, "model", stride=64, bias=False),
    _transposed("minirocket_gradient", 2, 52, 1, 90, 9, "model", dilation=8, padding=32, bias=False),
    _transposed("enformer_gradient", 1, 60, 4, 20, 15, "model", padding=7),
)  # fmt: skip

_LENGTHS = {
    "dense_stride3": (50, 0, 23, 37),
    "circular_depthwise": (48, 3, 20, 41),
    "padding_same_strided": (34, 1, 20, 20),
    "up_dense_dilation3": (22, 0, 7, 12),
    "up_long_kernel": (5, 41, 0, 18),
}

_FAR = MAX_STEP  # twice this value, truncated to a signed 32-bit integer, is -2

# Positions that do not fit 32 bits, on small arrays: GPUs compute these with 64-bit indices. All taps except one lie
# far outside of the input; if a position were truncated to 32 bits, some of them would appear two positions away.
WIDE_CASES: tuple[Case, ...] = (
    _conv("wide_filters", 2, 3, 20, 30, 23, "wide", dilation=_FAR, padding=11 * _FAR),
    _conv("wide_dense", 2, 36, 20, 30, 5, "wide", dilation=_FAR, padding=2 * _FAR),
    _conv("wide_stem", 2, 2, 40, 30, 5, "wide", dilation=_FAR, padding=2 * _FAR),
    _conv("wide_narrow", 2, 12, 3, 30, 5, "wide", dilation=_FAR, padding=(2 * _FAR - 5, 2 * _FAR + 2)),
    _conv("wide_stride", 2, 36, 20, 30, 3, "wide", stride=_FAR, padding=(2 * _FAR, 1)),
    _conv("wide_depthwise", 2, 6, 12, 30, 3, "wide", "depthwise", groups=6, stride=_FAR, padding=(2 * _FAR, 1)),
    _conv("wide_long_sum", 1, 144, 17, 30, 52, "wide", stride=_FAR, padding=(2 * _FAR, 25)),
    _transposed("up_wide_long_sum", 1, 144, 17, 9, 52, "wide", dilation=_FAR, padding=(26 * _FAR, 25 * _FAR)),
    _transposed("up_wide_dense", 2, 36, 20, 20, 5, "wide", dilation=_FAR, padding=2 * _FAR),
    _transposed("up_wide_narrow", 2, 12, 3, 20, 5, "wide", dilation=_FAR, padding=2 * _FAR),
    _transposed("up_wide_stride", 2, 36, 20, 3, 5, "wide", stride=_FAR, padding=(2 * _FAR - 4, 1)),
    _transposed("up_wide_depthwise", 2, 6, 12, 20, 5, "wide", "depthwise", groups=6, dilation=_FAR, padding=2 * _FAR),
)


def select(filter: str | None = None) -> tuple[Case, ...]:
    """The cases of `CASES` and `WIDE_CASES` whose name contains `filter`, or whose tag or op it is; None selects all.

    Raises:
        ValueError: no case matches.
    """
    every = (*CASES, *WIDE_CASES)
    if filter is None:
        return every
    chosen = tuple(case for case in every if filter in case.name or filter in case.tags or filter == case.problem.op)
    if not chosen:
        raise ValueError(f"filter {filter!r} matches no case: neither part of a name, nor a tag, nor an operation")
    return chosen


def quick_pairs(formats: Sequence[str]) -> tuple[tuple[str, Case], ...]:
    """A selection of (number format, case), in the order of formats and table: of six formats, a fifth of all pairs.

    It has every case in at least one format, and every kind of case in every format; with a single format it is the
    whole table. A kind is an operation and a group of cases, such as (conv1d, "padding"). The cases of a kind use the
    formats in turn.
    """
    kinds: dict[tuple[Op, str], list[Case]] = {}
    every = select()
    for case in every:
        kinds.setdefault((case.problem.op, case.tags[0]), []).append(case)
    chosen = {
        (formats[(shift + i) % len(formats)], cases[i % len(cases)].name)
        # Without the shift, the first cases of all kinds would share a format.
        for shift, cases in enumerate(kinds.values())
        for i in range(max(len(cases), len(formats)))
    }
    return tuple((name, case) for name in formats for case in every if (name, case.name) in chosen)
