# syntax=docker/dockerfile:1
# Without a GPU: a slim image with the tritonserver that comes from PyPI. Keep it behind the gateway.
#   docker build -f docker/cpu.Dockerfile -t fullpipe:cpu .
ARG PYTHON_TAG=3.11-slim-bookworm
FROM python:${PYTHON_TAG}

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp/cache

# openssl makes a certificate where none is given.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssl \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fullpipe
COPY . .
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt --index-url "${TORCH_INDEX}" torch \
    && pip install --constraint constraints.txt --editable '.[server,cache]' \
    && groupadd --system --gid 10001 fullpipe \
    && useradd --system --uid 10001 --gid 10001 --home-dir /tmp --shell /usr/sbin/nologin fullpipe \
    && install --directory --owner=10001 --group=10001 /repository /gateway

USER 10001:10001
EXPOSE 8000 8001 8002
VOLUME ["/repository"]
HEALTHCHECK --interval=5s --timeout=3s --start-period=5m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fullpipe"]
CMD ["serve", "/repository/models", "--host", "0.0.0.0", "--sealed"]
