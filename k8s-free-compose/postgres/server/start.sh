#!/usr/bin/env bash
# Starts the image's server. PostgreSQL takes a key only where nobody but its user may read it, and
# a secret of Compose is a file that all may read: the key is copied to where it is ours alone.
set -euo pipefail

install -m 0600 /run/secrets/postgres_tls_key /run/postgresql/tls.key
exec docker-entrypoint.sh "$@"
