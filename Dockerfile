# The images of Ensemble Operator: docker build --target operator|gateway|worker .
#
# Each is the base, one layer of the packages that its extra needs at the versions of constraints.txt, and one layer of
# our code. Both live in the virtual environment /opt/ensemble, whose *.dist-info folders tell scanners what is there.
# For another build of torch, give its requirement and its index:
#   --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Where a build stage cannot install a C compiler with apt-get, leave our code uncompiled: --build-arg COMPILED=
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
ENV PIP_CONSTRAINT=/build/constraints.txt
WORKDIR /build
COPY images/install.py constraints.txt ./

FROM build AS requirements
COPY pyproject.toml ./
RUN python3 install.py requirements /requirements

FROM build AS operator-packages
COPY --from=requirements /requirements/operator.txt ./
RUN python3 install.py packages operator

FROM build AS gateway-packages
COPY --from=requirements /requirements/gateway.txt ./
RUN python3 install.py packages gateway

FROM build AS worker-packages
COPY --from=requirements /requirements/worker.txt ./
ARG TORCH=torch==2.13.0
RUN python3 install.py packages worker

FROM build AS code
ARG COMPILED=1
ENV HATCH_BUILD_HOOKS_ENABLE=${COMPILED}
RUN [ -z "${COMPILED}" ] || python3 install.py compiler
COPY --from=requirements /requirements/build.txt ./
RUN python3 -m venv --without-pip /opt/ensemble && python3 -m pip install --requirement build.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY operator operator
COPY worker worker
RUN python3 install.py code /code

# A name for the uid: kopf and torch ask for one. Nothing is written but to the volumes that a pod mounts.
FROM ${BASE} AS base
RUN echo 'ensemble:x:65532:65532:Ensemble Operator:/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'ensemble:x:65532:' >> /etc/group
ENV PATH=/opt/ensemble/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    USER=ensemble HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
ARG BASE
ARG VERSION=0.1.0
LABEL org.opencontainers.image.vendor="Ensemble Operator" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.base.name="${BASE}"

FROM base AS operator
LABEL org.opencontainers.image.title="ensemble-operator" \
      org.opencontainers.image.description="The control plane of InferenceEnsembles"
COPY --from=operator-packages /opt/ensemble /opt/ensemble
COPY --from=code /code/operator /opt/ensemble/code
USER 65532:65532
ENTRYPOINT ["python", "-m", "ensemble_operator"]
CMD ["operator"]

FROM base AS gateway
LABEL org.opencontainers.image.title="ensemble-gateway" \
      org.opencontainers.image.description="Takes the requests of an ensemble, dispatches batches, combines the answers"
COPY --from=gateway-packages /opt/ensemble /opt/ensemble
COPY --from=code /code/gateway /opt/ensemble/code
USER 65532:65532
ENTRYPOINT ["python", "-m", "ensemble_gateway"]

FROM base AS worker
LABEL org.opencontainers.image.title="ensemble-worker" \
      org.opencontainers.image.description="Owns one device and runs the members of an ensemble that are placed on it"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-packages /opt/ensemble /opt/ensemble
COPY --from=code /code/worker /opt/ensemble/code
USER 65532:65532
ENTRYPOINT ["python", "-m", "ensemble_worker"]
