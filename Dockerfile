# One image for CPU, GPU or TPU, chosen by its requirements:
#   docker build --build-arg REQUIREMENTS=requirements-tpu.txt \
#     -t deltanet_jax:tpu .
#   docker run --rm -v "$PWD/runs:/mnt/runs" deltanet_jax:tpu --help
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid 1000 trainer
WORKDIR /deltanet_jax

# before the sources: a change there installs nothing again
ARG REQUIREMENTS=requirements.txt
COPY requirements*.txt ./
RUN pip install --no-cache-dir -r "$REQUIREMENTS"

COPY configs configs
COPY deltanet_jax deltanet_jax
COPY launch launch

USER trainer
ENTRYPOINT ["python", "-m", "launch.train"]
