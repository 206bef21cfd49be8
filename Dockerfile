# CPU:  docker build -t convexprune .
# CUDA: docker build -t convexprune --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg PIP_EXTRA_INDEX_URL= .
# Run:  docker run --rm -v "$PWD:/data" convexprune convexprune prune /data/MODEL --dataset /data/text.txt --output /data/OUT
# Test: docker build -t convexprune-test --target test . && docker run --rm convexprune-test
# A container without a command runs a command of the README: the first one, or in the stage `test` the second.
ARG BASE=python:3.12-slim
FROM ${BASE} AS base
# torch compiles kernels where it finds a compiler; images of CUDA have no Python.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && { python3 -c 'import ensurepip' || apt-get install -y --no-install-recommends python3 python3-venv python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /convexprune
COPY . .
# torch without CUDA; empty: as PyPI has it, with CUDA.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PATH=/convexprune/.venv/bin:$PATH

FROM base AS test
RUN python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[test]'
CMD [".venv/bin/python", "-m", "pytest", "-q"]

FROM base
RUN python3 -m venv .venv && .venv/bin/pip install --quiet .
CMD [".venv/bin/convexprune", "prune"]
