#!/usr/bin/env bash
# Draws one picture with curl alone: `Accept: image/png` makes the answer the picture itself.
set -euo pipefail
address="${HELIOGRAPH_URL:-http://127.0.0.1:8000}"

curl --fail-with-body -sS "$address/v1/generate" \
  -H 'Content-Type: application/json' \
  -H 'Accept: image/png' \
  -d '{"prompt": "a red circle on a blue background", "steps": 25, "seed": 7}' \
  -o curl.png
echo "curl.png"
