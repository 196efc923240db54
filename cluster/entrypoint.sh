#!/bin/sh
# Runs a command with secrets that come as files: NAME_FILE names the file whose content NAME shall be.
# Ray and the libraries below us read these from the environment only.
set -eu
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY PGPASSWORD; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
exec "$@"
