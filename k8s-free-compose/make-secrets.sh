#!/usr/bin/env bash
# Makes the secrets of an installation that are not there yet; never changes one that is.
#
#   make-secrets.sh [FOLDER]     ./secrets where none is given
#
# The files may be read by all, because each container runs as another user; the folder may be
# entered by its owner alone, and Docker hands each container only the files that it names.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
folder=${1:-$here/secrets}
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

# PostgreSQL's certificate, of a CA for it alone. The CA's key is for the next certificate, and no
# container gets it. With files of one's own in their place nothing here is made.
ca_days=7300
certificate_days=3650
work=$(mktemp -d "$folder/.new.XXXXXX")
trap 'rm -rf "$work"' EXIT

say() { printf '%s\n' "$*" >&2; }

# openssl COMMAND ARGUMENT…: quietly, unless it fails.
run_openssl() {
    if ! openssl "$@" >"$work/said" 2>&1; then
        say "openssl $1 failed:"
        cat "$work/said" >&2
        exit 1
    fi
}

# take MODE NAME…: what is ready becomes the secret of that name.
take() {
    local mode=$1 name
    shift
    for name in "$@"; do
        chmod "$mode" "$work/$name"
        mv -f "$work/$name" "$folder/$name"
        made=$((made + 1))
        say "made: $folder/$name"
    done
}

new_key() { run_openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/$1"; }

make_ca() {
    if [[ -s $folder/postgres_tls_certificate ]]; then
        say "$folder/postgres_tls_certificate is there and its CA is not: put the CA's certificate"
        say "into postgres_ca, or remove the certificate to have both made anew"
        exit 1
    fi
    new_key postgres_ca_key
    printf '%s\n' '[req]' 'distinguished_name = name' 'x509_extensions = ca' '[name]' '[ca]' \
        'basicConstraints = critical, CA:TRUE, pathlen:0' \
        'keyUsage = critical, keyCertSign, cRLSign' 'subjectKeyIdentifier = hash' >"$work/config"
    run_openssl req -x509 -new -sha256 -days "$ca_days" -subj "/CN=Comp AI PostgreSQL CA" \
        -config "$work/config" -key "$work/postgres_ca_key" -out "$work/postgres_ca"
    take 0400 postgres_ca_key
    take 0444 postgres_ca
}

# The names by which our server is reached: the service's, and on the head of several hosts this
# host's address.
node_address() {
    if [[ -n ${COMP_AI_NODE_ADDRESS:-} ]]; then
        printf '%s' "$COMP_AI_NODE_ADDRESS"
    elif [[ -r $here/.env ]]; then
        sed -n 's/^COMP_AI_NODE_ADDRESS=//p' "$here/.env" | tail -n 1
    fi
}

names() {
    local address kind=DNS
    address=$(node_address)
    if [[ $address =~ ^[0-9.]+$ || $address == *:* ]]; then kind=IP; fi
    printf '%s' "DNS:postgres${address:+, $kind:$address}"
}

make_certificate() {
    new_key postgres_tls_key
    printf '%s\n' 'basicConstraints = critical, CA:FALSE' 'keyUsage = critical, digitalSignature' \
        'extendedKeyUsage = serverAuth' 'subjectKeyIdentifier = hash' \
        'authorityKeyIdentifier = keyid' "subjectAltName = $(names)" >"$work/extensions"
    printf '%s\n' '[req]' 'distinguished_name = name' '[name]' >"$work/config"
    run_openssl req -new -sha256 -subj "/CN=postgres" -config "$work/config" \
        -key "$work/postgres_tls_key" -out "$work/request"
    run_openssl x509 -req -sha256 -days "$certificate_days" -in "$work/request" \
        -CA "$folder/postgres_ca" -CAkey "$folder/postgres_ca_key" -CAserial "$work/serial" \
        -CAcreateserial -extfile "$work/extensions" -out "$work/postgres_tls_certificate"
    take 0444 postgres_tls_key postgres_tls_certificate
    say "$(names), $(valid_until postgres_tls_certificate)"
}

valid_until() {
    printf 'valid until %s' "$(openssl x509 -noout -enddate -in "$folder/$1" | cut -d= -f2)"
}

if [[ ! -s $folder/postgres_ca ]]; then make_ca; fi
if [[ ! -s $folder/postgres_tls_certificate ]]; then make_certificate; fi
for name in postgres_ca postgres_tls_certificate; do
    if ! openssl x509 -noout -checkend $((90 * 86400)) -in "$folder/$name" >/dev/null; then
        say "$name ends soon, $(valid_until "$name"): see docs/deployment.md, PostgreSQL's certificate"
    fi
done
if ((made == 0)); then printf 'all secrets are there: %s\n' "$folder" >&2; fi
