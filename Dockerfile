# CPU:  docker build -t segmentation .
# CUDA: docker build -t segmentation --build-arg BASE=pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime .
ARG BASE=python:3.12-slim
FROM ${BASE}

WORKDIR /segmentation
COPY requirements.txt .
# A base that brings torch keeps its build: the requirements are ranges.
RUN python3 -m pip install --no-cache-dir -r requirements.txt
COPY . .

# Runs and data live outside the image: docker run -v $PWD/saved:/segmentation/saved -v /data:/data segmentation ...
VOLUME ["/segmentation/saved"]
ENTRYPOINT ["python3"]
CMD ["train.py", "--config", "config.json"]
