# The server and its page (docs/serve.md), on CPUs:
#
#   docker build -t grun .
#   docker run --rm -p 127.0.0.1:8000:8000 -e GRUN_API_KEY=KEY -e GRUN_OWNER_KEY=OWNERS_KEY \
#       -v "$PWD/MODEL:/model:ro" -v "$PWD/STORE:/store" grun model.path=/model adapter=/store
#
# For NVIDIA GPUs: docker build --build-arg TORCH=https://pypi.org/simple -t grun . (PyPI's torch brings CUDA; run with
# --gpus all).
# The process runs as user 10001, who must be able to write to the store for requests to be added and withdrawn.
FROM python:3.11-slim

ARG TORCH=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH" -r requirements.txt

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY grun grun
COPY pyvene_custom pyvene_custom
COPY baselines baselines
RUN pip install --no-cache-dir --no-deps . \
    && useradd --uid 10001 --create-home grun

USER 10001
WORKDIR /home/grun
ENV PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 MPLCONFIGDIR=/tmp/matplotlib
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# An answer in progress is finished after SIGTERM: stop with `docker stop -t 300`.
ENTRYPOINT ["grun", "serve", "host=0.0.0.0", "port=8000"]
