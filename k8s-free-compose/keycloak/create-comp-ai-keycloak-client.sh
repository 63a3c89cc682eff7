#!/usr/bin/env bash
# Makes the clients of Comp AI in a realm of Keycloak, or brings them up to date.
#
# What they are stands in realm/comp-ai.json; here it goes to a realm that already exists, through
# Keycloak's admin REST API. A second run changes nothing. A secret is printed when its client is
# made, and with --new-secret; never else.
#
#   create-comp-ai-keycloak-client.sh [--new-secret] [--demo-users on|off]
#
#   KEYCLOAK_URL             base URL of Keycloak, such as https://id.example.com
#   KEYCLOAK_REALM           the realm (default lianel)
#   COMP_AI_PUBLIC_URL       public address of Comp AI, without a slash at its end
#   KEYCLOAK_ADMIN           an administrator of Keycloak; asked for where it is not set
#   KEYCLOAK_ADMIN_PASSWORD  its password; asked for where it is not set
#   KEYCLOAK_ADMIN_REALM     the realm of the administrator (default master)
#
# --new-secret replaces the secrets: whoever uses the old ones must get the new ones.
# --demo-users on enables the demo users with passwords made now; off disables them.
#
# Needs bash, curl and jq.
set -euo pipefail

DEFINITION="$(dirname "${BASH_SOURCE[0]}")/realm/comp-ai.json"
readonly DEFINITION
readonly SERVICE=comp-ai-service
readonly BROWSER=comp-ai-browser

say() { printf '%s\n' "$*" >&2; }

die() {
    say "create-comp-ai-keycloak-client: $*"
    exit 2
}

# Nothing secret goes on a command line, where every user of the machine could read it.
sign_in() {
    local answer
    answer=$(
        jq -rn '"grant_type=password&client_id=admin-cli"
            + "&username=\(env.KEYCLOAK_ADMIN | @uri)&password=\(env.KEYCLOAK_ADMIN_PASSWORD | @uri)"' |
            curl --silent --show-error --fail --data @- \
                "$KEYCLOAK_URL/realms/$KEYCLOAK_ADMIN_REALM/protocol/openid-connect/token"
    ) || die "Keycloak at $KEYCLOAK_URL does not let $KEYCLOAK_ADMIN in"
    TOKEN=$(jq -er .access_token <<<"$answer")
}

# api METHOD PATH [JSON]: one call below the realm; prints the answer.
api() {
    local method=$1 path=$2 body=()
    if (($# > 2)); then
        body=(--header 'Content-Type: application/json' --data @-)
    fi
    curl --silent --show-error --fail-with-body --request "$method" \
        --header @<(printf 'Authorization: Bearer %s\n' "$TOKEN") \
        "${body[@]}" "$KEYCLOAK_URL/admin/realms/$KEYCLOAK_REALM$path" <<<"${3-}" ||
        die "$method $path failed"
}

encode() { jq -rn --arg text "$1" '$text | @uri'; }

# definition FILTER: a part of the realm file, with the public address put in.
definition() {
    jq -c --arg url "$COMP_AI_PUBLIC_URL" \
        "walk(if type == \"string\" then gsub(\"\\\\$\\\\{COMP_AI_PUBLIC_URL\\\\}\"; \$url) else . end) | $1" \
        "$DEFINITION"
}

id_of_client() { api GET "/clients?clientId=$(encode "$1")" | jq -r '.[0].id // empty'; }

# Keycloak keeps these as sets.
same() {
    jq -en --argjson have "$1" --argjson want "$2" \
        'def sets: (.redirectUris, .webOrigins) |= (if . then sort else . end);
         ($have | sets) as $have | ($have * ($want | sets)) == $have' >/dev/null
}

ensure_client() {
    local name=$1 want id have
    want=$(definition ".clients[] | select(.clientId == \"$name\")")
    id=$(id_of_client "$name")
    if [[ -z $id ]]; then
        api POST /clients "$want" >/dev/null
        id=$(id_of_client "$name")
        say "client $name: made"
        print_secret "$name" "$(api GET "/clients/$id/client-secret")"
        return
    fi
    # Without the secret, which an update then leaves as it is.
    have=$(api GET "/clients/$id" | jq -c 'del(.secret)')
    want=$(jq -c 'del(.protocolMappers)' <<<"$want")
    if ! same "$have" "$want"; then
        api PUT "/clients/$id" "$(jq -cn --argjson have "$have" --argjson want "$want" '$have * $want')" >/dev/null
        say "client $name: brought up to date"
    fi
    if [[ $NEW_SECRET == yes ]]; then
        print_secret "$name" "$(api POST "/clients/$id/client-secret" '{}')"
    fi
}

# The only thing on stdout.
print_secret() {
    case $1 in
        "$SERVICE") jq -r '"COMP_AI_KEYCLOAK_CLIENT_SECRET=\(.value)"' <<<"$2" ;;
        *) jq -r --arg client "$1" '"# secret of \($client)\n\(.value)"' <<<"$2" ;;
    esac
}

ensure_mappers() {
    local name=$1 id have mapper title found
    id=$(id_of_client "$name")
    have=$(api GET "/clients/$id/protocol-mappers/models")
    while read -r mapper; do
        title=$(jq -r .name <<<"$mapper")
        found=$(jq -c --arg title "$title" '[.[] | select(.name == $title)][0] // empty' <<<"$have")
        if [[ -z $found ]]; then
            api POST "/clients/$id/protocol-mappers/models" "$mapper" >/dev/null
            say "client $name: mapper $title made"
        elif ! same "$found" "$mapper"; then
            api PUT "/clients/$id/protocol-mappers/models/$(jq -r .id <<<"$found")" \
                "$(jq -cn --argjson have "$found" --argjson want "$mapper" '$have * $want')" >/dev/null
            say "client $name: mapper $title brought up to date"
        fi
    done < <(definition ".clients[] | select(.clientId == \"$name\") | .protocolMappers[]")
}

ensure_roles() {
    local id have role
    id=$(id_of_client "$SERVICE")
    have=$(api GET "/clients/$id/roles")
    while read -r role; do
        if ! jq -e --argjson role "$role" 'any(.[]; .name == $role.name)' <<<"$have" >/dev/null; then
            api POST "/clients/$id/roles" "$role" >/dev/null
            say "role $(jq -r .name <<<"$role"): made"
        fi
    done < <(definition ".roles.client[\"$SERVICE\"][]")
}

# add_roles PLACE NAMES: give the roles of the service's client that are not yet at PLACE.
add_roles() {
    local id missing
    id=$(id_of_client "$SERVICE")
    missing=$(jq -cn --argjson want "$2" --argjson have "$(api GET "$1/clients/$id")" \
        --argjson all "$(api GET "/clients/$id/roles")" \
        '[$all[] | select(.name as $name | ($want | index($name)) and ($have | all(.name != $name)))]')
    if [[ $missing != '[]' ]]; then
        api POST "$1/clients/$id" "$missing" >/dev/null
        say "$1: roles given"
    fi
}

ensure_service_account() {
    local user
    user=$(api GET "/clients/$(id_of_client "$SERVICE")/service-account-user" | jq -er .id)
    add_roles "/users/$user/role-mappings" \
        "$(definition ".users[] | select(.serviceAccountClientId == \"$SERVICE\") | .clientRoles[\"$SERVICE\"]")"
}

ensure_scope() {
    add_roles "/clients/$(id_of_client "$BROWSER")/scope-mappings" \
        "$(definition ".clientScopeMappings[\"$SERVICE\"][] | select(.client == \"$BROWSER\") | .roles")"
}

id_of_user() { api GET "/users?exact=true&username=$(encode "$1")" | jq -r '.[0].id // empty'; }

switch_demo_users() {
    local user name id
    while read -r user; do
        name=$(jq -r .username <<<"$user")
        id=$(id_of_user "$name")
        if [[ $1 == off ]]; then
            if [[ -n $id ]]; then
                api PUT "/users/$id" '{"enabled": false}' >/dev/null
                say "user $name: disabled"
            fi
            continue
        fi
        if [[ -z $id ]]; then
            api POST /users "$(jq -c 'del(.groups)' <<<"$user")" >/dev/null
            id=$(id_of_user "$name")
        fi
        enable_demo_user "$id" "$name" "$user"
    done < <(definition '.users[] | select(.username | startswith("demo-"))')
}

enable_demo_user() {
    local id=$1 name=$2 user=$3 password
    password=$(head -c 18 /dev/urandom | base64 | tr '+/' '-_')
    add_roles "/users/$id/role-mappings" "$(definition ".groups as \$groups | $user
        | [.groups[] as \$path | \$groups[] | select(\"/\" + .name == \$path)
            | .clientRoles[\"$SERVICE\"][]]")"
    api PUT "/users/$id/reset-password" "$(PASSWORD=$password jq -n '{type: "password", temporary: false, value: env.PASSWORD}')" >/dev/null
    api PUT "/users/$id" '{"enabled": true}' >/dev/null
    printf '# password of %s\n%s\n' "$name" "$password"
}

read_options() {
    NEW_SECRET=no
    DEMO_USERS=
    while (($# > 0)); do
        case $1 in
            --new-secret) NEW_SECRET=yes ;;
            --demo-users)
                DEMO_USERS=${2-}
                [[ $DEMO_USERS == on || $DEMO_USERS == off ]] || die "--demo-users is '$DEMO_USERS'; allowed: on, off"
                shift
                ;;
            *) die "unknown option $1; allowed: --new-secret, --demo-users on|off" ;;
        esac
        shift
    done
}

read_settings() {
    : "${KEYCLOAK_URL:?is the base URL of Keycloak, such as https://id.example.com}"
    : "${COMP_AI_PUBLIC_URL:?is the public address of Comp AI, such as https://comp-ai.example.com}"
    KEYCLOAK_URL=${KEYCLOAK_URL%/}
    COMP_AI_PUBLIC_URL=${COMP_AI_PUBLIC_URL%/}
    KEYCLOAK_REALM=${KEYCLOAK_REALM:-lianel}
    KEYCLOAK_ADMIN_REALM=${KEYCLOAK_ADMIN_REALM:-master}
    if [[ -z ${KEYCLOAK_ADMIN-} ]]; then
        read -rp 'Administrator of Keycloak: ' KEYCLOAK_ADMIN
    fi
    if [[ -z ${KEYCLOAK_ADMIN_PASSWORD-} ]]; then
        read -rsp "Password of $KEYCLOAK_ADMIN: " KEYCLOAK_ADMIN_PASSWORD
        say
    fi
    export KEYCLOAK_ADMIN KEYCLOAK_ADMIN_PASSWORD
}

main() {
    local tool
    read_options "$@"
    for tool in curl jq; do
        command -v "$tool" >/dev/null || die "$tool is not installed"
    done
    read_settings
    sign_in
    ensure_client "$SERVICE"
    ensure_roles
    ensure_mappers "$SERVICE"
    ensure_service_account
    ensure_client "$BROWSER"
    ensure_mappers "$BROWSER"
    ensure_scope
    if [[ -n $DEMO_USERS ]]; then
        switch_demo_users "$DEMO_USERS"
    fi
    say "realm $KEYCLOAK_REALM: done"
}

main "$@"
