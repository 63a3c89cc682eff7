#!/usr/bin/env bash
# Prints what makes the role by which Grafana reads usage, for psql as a superuser in our database:
#
#   monitoring/grafana/usage-reader.sh secrets/grafana_db_password | psql --dbname comp_ai
#
# After `comp-ai migrate`. Run again it sets the password anew. The role reads the sums of usage
# and nothing else: no request, no prompt, no key. The password goes through the pipe alone.
set -euo pipefail

password=$(<"${1:?the file that holds the role\'s password}")
if [[ ! $password =~ ^[A-Za-z0-9_-]+$ ]]; then
    printf 'usage-reader: the password may hold letters, digits, _ and - alone\n' >&2
    exit 2
fi

printf "\\\\set ON_ERROR_STOP on\n\\\\set password '%s'\n" "$password"
cat <<'SQL'
begin;
select 'create role comp_ai_usage_reader'
where not exists (select from pg_roles where rolname = 'comp_ai_usage_reader')
\gexec
alter role comp_ai_usage_reader with login nosuperuser nocreatedb nocreaterole noinherit
    connection limit 5 password :'password';
alter role comp_ai_usage_reader set default_transaction_read_only = on;
-- A dashboard that asks for too much gives up, rather than the service.
alter role comp_ai_usage_reader set statement_timeout = '30s';
grant connect on database :"DBNAME" to comp_ai_usage_reader;
grant usage on schema comp_ai to comp_ai_usage_reader;
grant select on comp_ai.usage_minute, comp_ai.usage_hour, comp_ai.usage_day,
    comp_ai.usage_hour_by_model, comp_ai.usage_day_by_model to comp_ai_usage_reader;
commit;
SQL
