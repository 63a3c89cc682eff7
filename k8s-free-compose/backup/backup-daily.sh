#!/usr/bin/env bash
# Makes a backup every day at COMP_AI_BACKUP_AT (UTC, 04:10 where not set), for ever. One that
# fails is tried again after 15 minutes. A container's command, or a terminal's.
set -euo pipefail

at=${COMP_AI_BACKUP_AT:-04:10}
retry_s=900

if ! date -u -d "today $at" +%s >/dev/null 2>&1; then
  echo "COMP_AI_BACKUP_AT is '$at'; allowed: a time of day, such as 04:10" >&2
  exit 2
fi

# So that a stop of the container does not wait for the sleep.
trap 'exit 143' TERM INT

pause() {
  sleep "$1" &
  wait $!
}

until_next() {
  local now next
  now=$(date -u +%s)
  next=$(date -u -d "today $at" +%s)
  if ((next <= now)); then
    next=$(date -u -d "tomorrow $at" +%s)
  fi
  echo $((next - now))
}

while true; do
  pause "$(until_next)"
  until comp-ai backup create; do
    pause "$retry_s"
  done
done
