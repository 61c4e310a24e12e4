# The demo by default, and every command of the project; docs/clusters.md has the commands. For GPUs build with
# BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 and an empty TORCH_INDEX.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
# The index of PyTorch's CPU build. Without it pip takes the CUDA build, which brings its libraries along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Versions are those of the base image's distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/abdominal-ct-synthesis
COPY . .
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" PIP_NO_CACHE_DIR=1 make .venv/installed

# A home and a name for any user, because containers also run with --user.
ENV PATH=/opt/abdominal-ct-synthesis/.venv/bin:$PATH \
    HOME=/tmp \
    LOGNAME=anybody
CMD ["make", "demo"]
