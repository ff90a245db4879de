# syntax=docker/dockerfile:1
# For NVIDIA GPUs: the pipelines on NVIDIA's own Triton image.
#   docker build -f docker/gpu.Dockerfile -t fullpipe:gpu .
# 26.07 or newer: older ones have known holes, and calls between models could deadlock before it.
ARG TRITON_TAG=26.07
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}-py3

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp/cache

WORKDIR /opt/fullpipe
COPY . .
# In place (--editable), so that templates, backends and the demo checkpoint are found beside it.
RUN pip install --editable '.[models,cache]' \
    && groupadd --system --gid 10001 fullpipe \
    && useradd --system --uid 10001 --gid 10001 --home-dir /tmp --shell /usr/sbin/nologin fullpipe \
    && install --directory --owner=10001 --group=10001 /repository /gateway

USER 10001:10001
EXPOSE 8000 8001 8002
VOLUME ["/repository"]
HEALTHCHECK --interval=5s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fullpipe"]
CMD ["serve", "/repository/models", "--triton", "/opt/tritonserver", "--host", "0.0.0.0", "--sealed"]
