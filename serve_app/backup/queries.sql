-- Named queries of backups; loaded by serve_app/backup/contents.py and keyring.py.

-- name: tables
-- Partitions are counted with their parent.
select c.relname::text as name
from pg_class c
where c.relnamespace = to_regnamespace($1) and c.relkind in ('r', 'p') and not c.relispartition
order by 1;

-- name: has_installation
select to_regclass('comp_ai.installation') is not null;

-- name: server
select current_setting('server_version_num')::integer as number,
       (select pg_get_userbyid(nspowner)::text from pg_namespace where nspname = 'comp_ai') as owner;

-- name: installation
select id from comp_ai.installation;

-- name: migrations
select lpad(version::text, 4, '0') || '_' || name as label
from comp_ai.schema_migrations order by version;

-- name: other_sessions
-- Whoever else is in this database: a service that runs writes to it.
select count(*) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid()
  and backend_type = 'client backend';

-- name: encrypted
select coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false);

-- name: keys_of
-- One JSON array of all rows of a table; bytea comes out in hexadecimal.
select coalesce(json_agg(t), '[]')::text from comp_ai_keys.{table} t;

-- name: put_keys
insert into comp_ai_keys.{table} ({columns})
select {columns} from json_populate_recordset(null::comp_ai_keys.{table}, $1::json);

-- name: columns_of_keys
select attname::text as name from pg_attribute
where attrelid = to_regclass('comp_ai_keys.' || quote_ident($1))
  and attnum > 0 and not attisdropped;

-- name: erasures
-- Changes with every erasure, at its start and at its end.
select count(*), count(finished_at), max(erased_at), max(finished_at) from comp_ai_keys.erasures;

-- name: damage
-- Of a scratch database alone: what a bad day leaves. Requests are gone, and all keys with them.
truncate comp_ai.requests cascade;
drop schema comp_ai_keys cascade;
