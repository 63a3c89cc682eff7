#!/usr/bin/env bash
# Once, when the database is made: our role, which owns our database and may make nothing else.
set -euo pipefail

# The password comes from its file within psql: it stands on no command line and in no log.
psql --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set role="$COMP_AI_ROLE" --set database="$COMP_AI_DATABASE" <<'SQL'
\set password `cat /run/secrets/postgres_password`
create role :"role" login password :'password' nosuperuser nocreatedb nocreaterole;
create database :"database" owner :"role";
revoke all on database :"database" from public;
-- What the exporter reads of the server's state.
grant pg_monitor to :"role";
SQL
