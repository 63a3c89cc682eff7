#!/usr/bin/env bash
# In the container of compose.keycloak.yaml, once after its first start: gives the client
# comp-ai-browser the secret that oauth2-proxy has.
#
#   docker compose exec keycloak bash /opt/comp-ai/set-browser-secret.sh
set -euo pipefail

realm=${KEYCLOAK_REALM:-lianel}
config=$(mktemp)
trap 'rm -f "$config" "$config.json"' EXIT
# Nothing secret goes on a command line.
kcadm() { /opt/keycloak/bin/kcadm.sh "$@" --config "$config"; }
KC_CLI_PASSWORD=$(</run/secrets/keycloak_admin_password)
export KC_CLI_PASSWORD
kcadm config credentials --server http://127.0.0.1:8080 --realm master --user admin
client=$(kcadm get clients --target-realm "$realm" --query clientId=comp-ai-browser \
    --fields id --format csv --noquotes)
printf '{"secret": "%s"}' "$(</run/secrets/oauth2_client_secret)" >"$config.json"
kcadm update "clients/$client" --target-realm "$realm" --file "$config.json" --merge
echo "comp-ai-browser has the secret of oauth2-proxy"
