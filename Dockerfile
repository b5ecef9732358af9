# docker build -t megashear . && docker run --gpus all -v /data:/data megashear megashear env
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/megashear
RUN python3 -m venv "$VIRTUAL_ENV"
ENV PATH="$VIRTUAL_ENV/bin:$PATH"
COPY . /opt/source
RUN pip install --no-cache-dir "/opt/source[logs,parquet]" && megashear --version
WORKDIR /data
