# Where trainings run: serves a deployment, or is a worker of a Prefect work pool. docs/operations.md says how.
#
#     docker build --tag nestune .                                  PyTorch as pip finds it
#     docker build --tag nestune --build-arg ACCELERATOR=cuda .     fails unless that can do CUDA
#
# PIP_EXTRA_INDEX_URL: where pip finds another build of PyTorch, such as the much smaller one for CPUs only.
ARG BASE=python:3.11-slim-bookworm

# What nestune needs: a layer that changes only with pyproject.toml and constraints.txt.
FROM ${BASE} AS packages
ARG ACCELERATOR=cpu
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -m venv /opt/venv
# PyTorch comes first and pinned, so that no other package chooses its build.
ARG PIP_EXTRA_INDEX_URL=
RUN pip install "$(grep '^torch==' constraints.txt)" \
    && python -c "import sys, torch; sys.exit(sys.argv[1] == 'cuda' and not torch.version.cuda and \
        f'ACCELERATOR is cuda, and PyTorch {torch.__version__} knows no CUDA: see PIP_EXTRA_INDEX_URL')" "$ACCELERATOR"
RUN mkdir -p src/nestune \
    && pip install --constraint constraints.txt '.[cuda,s3,servers]' \
    && pip uninstall --yes nestune

FROM packages AS wheel
COPY src/ src/
RUN pip wheel --no-deps --wheel-dir /wheel .

FROM ${BASE}
# Git: DVC's, and the commit that a version is tagged with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 nestune \
    && install --directory --owner nestune /project
COPY --from=packages /opt/venv /opt/venv
# With these, Prefect's worker and a served deployment both answer at port 8080 of the container how they are.
ENV PATH=/opt/venv/bin:$PATH \
    OMP_NUM_THREADS=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PREFECT_RUNNER_SERVER_ENABLE=true \
    PREFECT_RUNNER_SERVER_HOST=127.0.0.1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=true
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps /wheel/nestune-*.whl
USER 1000
WORKDIR /project
COPY --chown=nestune flows/ flows/
COPY --chown=nestune configs/ configs/
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=9)"]
CMD ["prefect", "worker", "start", "--pool", "nestune", "--type", "process", "--with-healthcheck"]
