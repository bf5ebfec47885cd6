# gpuconv on an NVIDIA GPU. `docker run --rm --gpus all IMAGE` proves the kernels right on that GPU.
#
# The base image prepares the container for the host's driver; CuPy, NVRTC and CUDA's headers come as wheels.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143

FROM ${CUDA_IMAGE} AS python
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Ubuntu's archive drops a package version when the next one arrives, so a pinned version would break the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cuda_src cuda_src
COPY gpuconv gpuconv
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-deps --wheel-dir /dist .

FROM python AS runtime
COPY --from=build /dist /dist
# Nothing here needs a GPU: the kernels are compiled for the GPU at hand when they first run.
RUN python3 -m venv /opt/gpuconv \
    && /opt/gpuconv/bin/pip install "$(echo /dist/gpuconv-*.whl)[audio,bf16,cli,cuda13]"
ENV PATH=/opt/gpuconv/bin:$PATH

# Compiled kernels. Mount a volume here to keep them from one container to the next.
ENV CUPY_CACHE_DIR=/var/cache/gpuconv
RUN useradd --create-home --no-log-init --uid 10001 gpuconv \
    && install --directory --owner=gpuconv --group=gpuconv "$CUPY_CACHE_DIR"
VOLUME ["/var/cache/gpuconv"]

# By number, so that Kubernetes' runAsNonRoot can check it.
USER 10001
WORKDIR /home/gpuconv
CMD ["gpuconv", "verify", "--device", "gpu"]
