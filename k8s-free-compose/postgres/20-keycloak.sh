#!/usr/bin/env bash
# Once, when the database is made, and only with compose.keycloak.yaml: Keycloak's role and database.
set -euo pipefail

if [[ -z ${KEYCLOAK_DATABASE:-} ]]; then exit 0; fi
psql --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\set password `cat /run/secrets/keycloak_db_password`
create role keycloak login password :'password' nosuperuser nocreatedb nocreaterole;
create database keycloak owner keycloak;
revoke all on database keycloak from public;
SQL
