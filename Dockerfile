# syntax=docker/dockerfile:1
# One image for each engine: docker build --build-arg ENGINE=cpu|gpu .
# It holds what uv.lock names, torch's build for the engine and this source, and runs as a user
# without rights on a root file system that may be read-only: it writes to /tmp,
# /var/lib/comp-ai and /models only.

# Python 3.11.16 on Debian 12, by content. The tag only tells people what it is.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# The server's own image, as in compose.yaml: pg_dump must not be older than the server.
ARG POSTGRES_IMAGE=postgres:18-bookworm@sha256:1961f96e6029a02c3812d7cb329a3b03a3ac2bb067058dec17b0f5596aca9296

# pg_dump and pg_restore for backups over TLS, which those of the embedded server cannot speak,
# and the libpq that they were built with. Both images are Debian 12.
FROM ${POSTGRES_IMAGE} AS postgres
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN install -D -t /programs/bin "/usr/lib/postgresql/${PG_MAJOR}"/bin/{pg_dump,pg_restore}; \
    install -D -m 0644 -t /programs/lib /usr/lib/*-linux-gnu/libpq.so.5

FROM ${PYTHON_IMAGE} AS build
ARG ENGINE=cpu
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /app
# What does not change with the source, so that a new release does not install anew. The packages
# are empty here: the environment only points to them.
COPY pyproject.toml uv.lock README.md LICENSE ./
COPY configs/torch-cpu.txt configs/
COPY .ci/setup .ci/
RUN mkdir serve_app deployments && touch serve_app/__init__.py deployments/__init__.py
# torch's CPU build comes from PyTorch's own index, or from UV_FIND_LINKS.
ARG UV_FIND_LINKS
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=cache,target=/root/.cache/pip \
    COMP_AI_ENGINE="${ENGINE}" COMP_AI_DEV=no UV_FIND_LINKS="${UV_FIND_LINKS}" .ci/setup

FROM ${PYTHON_IMAGE} AS runtime
ARG ENGINE=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY --from=postgres /programs /usr/local
# The engine's own libraries, and those of libpq and pg_dump; the build stops where one of these
# lacks a library or TLS. On a GPU Triton compiles its launchers when a model starts, and
# needs a C compiler for it. The versions are those of Debian's point release in the base.
# hadolint ignore=DL3008
RUN packages=(libnuma1 libgssapi-krb5-2 libldap-2.5-0 liblz4-1 libzstd1); \
    if [[ "${ENGINE}" == gpu ]]; then packages+=(gcc libc6-dev); fi; \
    apt-get update; \
    apt-get install -y --no-install-recommends "${packages[@]}"; \
    rm -rf /var/lib/apt/lists/*; \
    ldconfig; \
    pg_dump --version; \
    pg_restore --version; \
    ldd /usr/local/bin/pg_dump | grep -F 'libpq.so.5 => /usr/local/lib/'; \
    ldd /usr/local/lib/libpq.so.5 | grep -F 'libssl.so.3 => /'; \
    groupadd --gid 10001 comp-ai; \
    useradd --uid 10001 --gid 10001 --home-dir /var/lib/comp-ai --no-create-home \
        --shell /usr/sbin/nologin comp-ai; \
    install -d -o comp-ai -g comp-ai -m 0700 /var/lib/comp-ai; \
    install -d -o comp-ai -g comp-ai /models /backups /etc/comp-ai-nginx /tls /webroot
WORKDIR /app
COPY --from=build /app/.venv .venv
COPY migrations migrations
COPY configs configs
COPY k8s-free-compose/nginx/comp-ai.conf.template k8s-free-compose/nginx/
COPY pyproject.toml LICENSE ./
COPY serve_app serve_app
COPY deployments deployments

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=https://github.com/lianel/comp-ai
LABEL org.opencontainers.image.title="Comp AI" \
      org.opencontainers.image.description="The completions service that a company runs for itself" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      ai.comp.engine="${ENGINE}"

ENV PATH=/app/.venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/comp-ai \
    COMP_AI_HOME=/var/lib/comp-ai \
    COMP_AI_MODEL_PATH=/models \
    COMP_AI_BACKUP_PATH=/backups \
    XDG_CACHE_HOME=/var/lib/comp-ai/cache \
    VLLM_CACHE_ROOT=/var/lib/comp-ai/cache/vllm \
    TRITON_CACHE_DIR=/var/lib/comp-ai/cache/triton
USER 10001:10001
VOLUME ["/var/lib/comp-ai", "/models"]
EXPOSE 3002
# The gateway answers some time after Ray: weights are loaded beside it.
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m --retries=3 \
    CMD ["python", "-m", "serve_app.health_check"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["comp-ai"]
CMD ["head", "--config", "configs/local-cpu.yaml"]
