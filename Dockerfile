# The server, as a user that owns nothing. Build: docker build -t safe-decode .
# Run: docker run --read-only --tmpfs /tmp -p 8000:8000 safe-decode
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY safe_decode safe_decode
COPY probes probes
COPY bundles bundles
RUN python -m venv /opt/safe-decode \
    && /opt/safe-decode/bin/pip install --no-cache-dir --constraint constraints.txt '.[serving]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin safe-decode
COPY --from=build /opt/safe-decode /opt/safe-decode
# A tokenizer is no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/safe-decode/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TOKENIZERS_PARALLELISM=false \
    PYTHONDONTWRITEBYTECODE=1 \
    SAFE_DECODE_HOST=0.0.0.0
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# The embedded model shows scores and the bare model on its page; a public server hides both.
ENTRYPOINT ["safe-decode", "serve"]
CMD ["--hide-scores", "--set", "expose_bare=false"]
