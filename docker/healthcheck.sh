#!/usr/bin/env bash
# Healthy means that a real request is answered through every step: Triton's own readiness outlives a dead backend.
set -euo pipefail
curl --fail --silent --show-error --max-time 8 --output /dev/null \
    "$1/v2/models/generate/generate" --data '{"text_input": "ping", "max_tokens": 1, "cache": "off"}'
