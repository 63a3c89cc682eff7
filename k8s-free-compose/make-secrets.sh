#!/usr/bin/env bash
# Makes the secrets of an installation that are not there yet; never changes one that is.
#
#   make-secrets.sh [FOLDER]     ./secrets where none is given
#
# The files may be read by all, because each container runs as another user; the folder may be
# entered by its owner alone, and Docker hands each container only the files that it names.
set -euo pipefail

folder=${1:-$(dirname "${BASH_SOURCE[0]}")/secrets}
mkdir -p "$folder"
chmod 0700 "$folder"

made=0

# keep NAME COMMAND…: what the command prints becomes the secret.
keep() {
    local file=$folder/$1
    shift
    if [[ -s $file ]]; then return; fi
    # No newline at its end: not every program takes it off.
    printf '%s' "$("$@")" >"$file.new"
    chmod 0444 "$file.new"
    mv "$file.new" "$file"
    made=$((made + 1))
    printf 'made: %s\n' "$file" >&2
}

random_hex() { od -An -vtx1 -N "$1" /dev/urandom | tr -d ' \n'; }
random_base64() { head -c "$1" /dev/urandom | base64 -w 0; }
# oauth2-proxy takes 32 bytes in the alphabet for URLs.
random_cookie() { random_base64 32 | tr '+/' '-_'; }

keep postgres_password random_hex 32
keep postgres_admin_password random_hex 32
# What seals prompts and answers. Keep a copy elsewhere: without it they are lost.
keep master_key random_base64 32
keep ray_token random_hex 32
# For the first sign-in; take it away once other keys exist.
keep api_key random_hex 32
keep keycloak_admin_password random_hex 24
keep keycloak_db_password random_hex 32
keep oauth2_client_secret random_hex 24
keep oauth2_cookie_secret random_cookie
keep grafana_admin_password random_hex 24
keep grafana_db_password random_hex 24
if ((made == 0)); then printf 'all secrets are there: %s\n' "$folder" >&2; fi
