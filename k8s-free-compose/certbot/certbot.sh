#!/bin/sh
# Keeps the certificate of DOMAIN, and lays it where nginx reads it: /tls/fullchain.pem, key.pem.
# certbot's own files, the account among them, stay in /tls/letsencrypt.
set -eu

take() {
    cp "$1/fullchain.pem" /tls/fullchain.pem.new
    (umask 077 && cp "$1/privkey.pem" /tls/key.pem.new)
    mv /tls/key.pem.new /tls/key.pem
    mv /tls/fullchain.pem.new /tls/fullchain.pem
}

set -- --domain "$DOMAIN"
if [ -n "$MORE" ]; then set -- "$@" --domain "$MORE"; fi

while :; do
    if certbot certonly --non-interactive --agree-tos --keep-until-expiring \
        --webroot --webroot-path /webroot --cert-name "$DOMAIN" "$@" --expand --email "$EMAIL" \
        --server "$SERVER" --config-dir /tls/letsencrypt --work-dir /tmp/work --logs-dir /tmp/logs; then
        live=/tls/letsencrypt/live/$DOMAIN
        cmp -s "$live/fullchain.pem" /tls/fullchain.pem || take "$live"
        pause=43200
    else
        # Let's Encrypt allows few failures an hour.
        pause=3600
    fi
    # A signal ends the pause.
    sleep "$pause" &
    wait $!
done
