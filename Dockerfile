# Build: docker build . --tag flowgen
# Run:   docker run --rm --gpus all --volume "$PWD:/work" flowgen train model=glow
# Without a GPU: docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu . --tag flowgen
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /flowgen/
RUN pip install --no-cache-dir -c /flowgen/constraints.txt torch
COPY pyproject.toml README.md LICENSE /flowgen/
COPY flowgen /flowgen/flowgen
COPY conf /flowgen/conf
RUN pip install --no-cache-dir -c /flowgen/constraints.txt /flowgen
WORKDIR /work
ENTRYPOINT ["flowgen"]
CMD ["--help"]
