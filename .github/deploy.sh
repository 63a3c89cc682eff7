#!/usr/bin/env bash
# Brings TAG to the host over SSH: pull, migrate, up, ps, smoke test; back to the tag before where
# it does not serve. deploy-comp-ai-service.yml says what the variables are.
#
# A migration is not undone: the release before works on the newer schema (docs/operations.md).
set -euo pipefail

: "${DEPLOY_SSH_KEY:?}" "${DEPLOY_HOST:?}" "${DEPLOY_USER:?}" "${DEPLOY_HOST_KEY:?}"
: "${DEPLOY_PATH:?}" "${DEPLOY_SMOKE_URL:?}" "${TAG:?}"
# How often and how long apart the public address is asked; a model takes its time to load.
tries=${SMOKE_TRIES:-60}
pause_s=${SMOKE_PAUSE_S:-10}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 077
printf '%s\n' "$DEPLOY_SSH_KEY" >"$work/key"
printf '%s\n' "$DEPLOY_HOST_KEY" >"$work/known_hosts"

say() { printf 'deploy: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# It goes into a command on the host and into a file there.
[[ $TAG =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$ ]] || die "TAG is no tag: $TAG"
[[ $DEPLOY_PATH =~ ^/[A-Za-z0-9_./-]+$ ]] || die "DEPLOY_PATH is no absolute path: $DEPLOY_PATH"

# Only the key that is pinned is the host's.
on_host() {
    ssh -i "$work/key" -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=yes \
        -o UserKnownHostsFile="$work/known_hosts" -o GlobalKnownHostsFile=/dev/null \
        -o ServerAliveInterval=30 "$DEPLOY_USER@$DEPLOY_HOST" "$@"
}

# compose TAG WORD…: the variable of the shell wins over that of .env.
compose() {
    local tag=$1
    shift
    on_host "cd '$DEPLOY_PATH' && COMP_AI_TAG='$tag' docker compose $*"
}

current_tag() { on_host "sed -n 's/^COMP_AI_TAG=//p' '$DEPLOY_PATH/.env'"; }

keep_tag() { on_host "sed -i 's/^COMP_AI_TAG=.*/COMP_AI_TAG=$1/' '$DEPLOY_PATH/.env'"; }

# A completion can be served: /ready says so of every model.
serves() {
    local try answer
    for ((try = 1; try <= tries; try++)); do
        if answer=$(curl --fail --silent --show-error --max-time 15 \
            "$DEPLOY_SMOKE_URL/ready" 2>"$work/why"); then
            say "it serves: $answer"
            return 0
        fi
        sleep "$pause_s"
    done
    say "it does not serve: $(<"$work/why")"
    return 1
}

start() {
    compose "$1" up --detach --remove-orphans --wait --wait-timeout 1500 && serves
}

before=$(current_tag)
[[ -n $before ]] || die "there is no COMP_AI_TAG in $DEPLOY_PATH/.env"
say "from $before to $TAG"
compose "$TAG" pull --quiet
# While the release before still serves, which works on the newer schema.
compose "$TAG" run --rm --no-TTY migrate
if start "$TAG"; then
    keep_tag "$TAG"
    compose "$TAG" ps
    say "done: $TAG"
    exit 0
fi
compose "$TAG" ps --all || true
compose "$TAG" logs --no-color --tail 200 comp-ai-service || true
say "going back to $before"
start "$before" || die "neither $TAG nor $before serves"
die "$TAG does not serve; $before serves again"
