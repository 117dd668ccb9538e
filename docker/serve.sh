#!/usr/bin/env bash
# Starts Triton with the APIs that no client needs locked by a key that nobody is told, and with backend processes' shared
# memory so large that it need not grow, which crashes Triton under load (server #8882). Arguments go to tritonserver.
set -euo pipefail
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
restricted="shared-memory,model-repository,statistics,trace,logging:admin-key=${key}"
exec tritonserver \
    --http-restricted-api="${restricted}" \
    --grpc-restricted-protocol="${restricted}" \
    --exit-timeout-secs=20 \
    --backend-config=python,shm-default-byte-size=67108864 \
    --backend-config=python,stub-timeout-seconds=600 \
    "$@"
