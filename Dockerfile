# The CPU image. function.yaml names its tag as the base image to which Nuclio adds its processor.
# By itself it serves the function over plain HTTP:
#     docker run --rm -p 127.0.0.1:8070:8070 cvat.pytorch.facebookresearch.sam2_tracker.base
FROM python:3.11.13-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/opt/huggingface

RUN groupadd --gid 1000 sam2 && useradd --uid 1000 --gid 1000 --create-home sam2

# Nuclio copies the function's folder here
WORKDIR /opt/nuclio

# What changes least comes first: PyTorch, the other packages, the weights, the code.
# An extra index, because PyTorch's own lacks the pinned setuptools. Of equal versions pip prefers
# the one with a local part (+cpu); the check stops a build that got a CUDA wheel nevertheless.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements-torch.txt requirements.txt deploy/check_torch_index.py /opt/requirements/
RUN python /opt/requirements/check_torch_index.py "$TORCH_INDEX" \
        /opt/requirements/requirements-torch.txt \
    && pip install --extra-index-url "$TORCH_INDEX" \
        --requirement /opt/requirements/requirements-torch.txt \
    && python -c "import torch; assert torch.version.cuda is None, 'this wheel is with CUDA'"
RUN SAM2_BUILD_CUDA=0 pip install --no-build-isolation \
        --requirement /opt/requirements/requirements.txt

# The model whose weights are downloaded into the image; those of `micro` are in weights/.
ARG SAM2_MODEL_ID=facebook/sam2.1-hiera-tiny
COPY deploy/download_weights.py /opt/requirements/
RUN python /opt/requirements/download_weights.py "$SAM2_MODEL_ID"
ENV SAM2_MODEL_ID=$SAM2_MODEL_ID \
    HF_HUB_OFFLINE=1

COPY weights/ weights/
COPY interaction/ interaction/
COPY *.py ./
# files of a checkout that was made with a strict umask are readable to root only
RUN chmod -R a+rX /opt/nuclio

# A number, so that Kubernetes can check that it is not root
USER 1000:1000
EXPOSE 8070
# Without proxies, because http_proxy in the container must not apply to 127.0.0.1.
# Nuclio replaces this health check with its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-c", \
    "from urllib.request import ProxyHandler as P, build_opener as b; b(P({})).open('http://127.0.0.1:8070/healthz', timeout=4)"]
CMD ["python", "local_server.py", "--host", "0.0.0.0", "--port", "8070"]
