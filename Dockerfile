# Images with everything installed.
#     docker build --target cpu -t dft .         # then: docker run --rm dft bash scripts/quickstart.sh
#     docker build --target cuda -t dft-cuda .   # then: docker run --rm --gpus all --ipc host --ulimit memlock=-1 \
#         -v /models:/models -v "$PWD/outputs:/dft/outputs" -e MODEL=/models/Qwen3-8B -e DATA=examples/data \
#         -e OUTPUT_DIR=outputs/mine dft-cuda bash scripts/train.sh
# --ipc host: NCCL and data loaders share memory. pip's settings can be given with --build-arg, for example an index
# with CPU builds of torch, which are gigabytes smaller: --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.11-slim AS cpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /dft
RUN python3 -m venv .venv
ENV PATH=/dft/.venv/bin:$PATH EXTRAS=adapters PIP_NO_CACHE_DIR=1
# the packages first, so that a change of the code doesn't install them again
COPY requirements.txt constraints.txt ./
RUN pip install -r requirements.txt -c constraints.txt
COPY . .
RUN bash scripts/setup.sh
CMD ["bash"]

# CUDA's compiler is for DeepSpeed's operators (offloading); its major version is that of the PyTorch in constraints.txt
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /dft
RUN python3 -m venv .venv
ENV PATH=/dft/.venv/bin:$PATH EXTRAS=adapters PIP_NO_CACHE_DIR=1
COPY requirements.txt constraints.txt ./
# FlashAttention 4 is for Hopper and Blackwell GPUs; others use the kernels inside PyTorch
RUN pip install -r requirements.txt "flash-attn-4[cu13]>=4.0.0b36" -c constraints.txt
COPY . .
RUN bash scripts/setup.sh
CMD ["bash"]
