# gpuconv on an NVIDIA GPU. `docker run --rm --gpus all IMAGE` verifies the kernels on that GPU.
#
# The base image has Python but no part of CUDA: the driver comes from the host; CuPy, NVRTC and CUDA's headers are wheels.
ARG PYTHON_IMAGE=python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM ${PYTHON_IMAGE} AS python
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

FROM python AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cuda_src cuda_src
COPY gpuconv gpuconv
RUN python3 -m pip wheel --no-deps --wheel-dir /dist .

FROM python AS runtime
# What the host's container runtime adds: the compute libraries of the driver, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /dist /dist
# This needs no GPU. The base image's pip installs into the environment, which therefore needs no pip of its own.
RUN python3 -m venv --without-pip /opt/gpuconv \
    && python3 -m pip --python /opt/gpuconv/bin/python install "$(echo /dist/gpuconv-*.whl)[audio,bf16,cli,cuda13]"
ENV PATH=/opt/gpuconv/bin:$PATH

# The cache of kernels that are compiled when they first run. Mount a volume here to keep them between containers.
ENV CUPY_CACHE_DIR=/var/cache/gpuconv
RUN useradd --create-home --no-log-init --uid 10001 gpuconv \
    && install --directory --owner=gpuconv --group=gpuconv "$CUPY_CACHE_DIR"

# Kernels compiled when the image is built: `docker build --build-arg WARMUP="--arch sm_90 --dtype float16" .`
ENV GPUCONV_CACHE_DIR=/opt/gpuconv/kernels
ARG WARMUP=""
# hadolint ignore=SC2086
RUN test -z "$WARMUP" || { gpuconv warmup $WARMUP && chmod -R a+rX "$GPUCONV_CACHE_DIR"; }
VOLUME ["/var/cache/gpuconv"]

# A number, so that Kubernetes can check it for runAsNonRoot.
USER 10001
WORKDIR /home/gpuconv
CMD ["gpuconv", "verify", "--device", "gpu"]
