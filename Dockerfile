# gpuconv on an NVIDIA GPU. `docker run --rm --gpus all IMAGE` proves the kernels right on that GPU.
#
# The base image has Python and nothing of CUDA: the driver comes from the host, CuPy, NVRTC and CUDA's headers as wheels.
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
# What the host's container runtime puts in: the driver's part for computing, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /dist /dist
# Nothing here needs a GPU. The base image's own pip installs, so that the environment needs none.
RUN python3 -m venv --without-pip /opt/gpuconv \
    && python3 -m pip --python /opt/gpuconv/bin/python install "$(echo /dist/gpuconv-*.whl)[audio,bf16,cli,cuda13]"
ENV PATH=/opt/gpuconv/bin:$PATH

# Kernels that are compiled when they first run. Mount a volume here to keep them from one container to the next.
ENV CUPY_CACHE_DIR=/var/cache/gpuconv
RUN useradd --create-home --no-log-init --uid 10001 gpuconv \
    && install --directory --owner=gpuconv --group=gpuconv "$CUPY_CACHE_DIR"

# Kernels that the image holds compiled: `docker build --build-arg WARMUP="--arch sm_90 --dtype float16" .`
ENV GPUCONV_CACHE_DIR=/opt/gpuconv/kernels
ARG WARMUP=""
# hadolint ignore=SC2086
RUN test -z "$WARMUP" || { gpuconv warmup $WARMUP && chmod -R a+rX "$GPUCONV_CACHE_DIR"; }
VOLUME ["/var/cache/gpuconv"]

# By number, so that Kubernetes' runAsNonRoot can check it.
USER 10001
WORKDIR /home/gpuconv
CMD ["gpuconv", "verify", "--device", "gpu"]
