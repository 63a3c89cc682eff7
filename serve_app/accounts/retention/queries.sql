-- Named queries of the retention; loaded by serve_app/accounts/retention/. What stands in braces
-- is put there by the code: names of our own tables, and how a row is found to be held.

-- name: partitions
-- Partitions of $1 of which every month is past after $2 days and $3 months, the oldest first.
select format('%I.%I', n.nspname, c.relname) as name, bound.ends_at,
       pg_total_relation_size(c.oid) as size_bytes
from pg_inherits i
join pg_class c on c.oid = i.inhrelid
join pg_namespace n on n.oid = c.relnamespace
cross join lateral (
    select substring(pg_get_expr(c.relpartbound, c.oid) from $re$ TO \('([^']+)'\)$re$)::timestamptz
) as bound (ends_at)
where i.inhparent = to_regclass($1::text)
  and bound.ends_at <= (now() at time zone 'UTC' - make_interval(days => $2, months => $3))
                       at time zone 'UTC'
order by bound.ends_at;

-- name: default_partition
select format('%I.%I', n.nspname, c.relname)
from pg_inherits i
join pg_class c on c.oid = i.inhrelid
join pg_namespace n on n.oid = c.relnamespace
where i.inhparent = to_regclass($1::text) and pg_get_expr(c.relpartbound, c.oid) = 'DEFAULT';

-- name: count
select count(*) as all_rows, count(*) filter (where {held}) as held_rows from {partition} p;

-- name: keep_out_holds
-- Who sets a hold waits for the end of this: a hold that was answered is kept.
lock table comp_ai.legal_holds in share mode;

-- name: take_turn
-- Until the end of the transaction: of several runners one works on a partition.
select pg_advisory_xact_lock(hashtextextended('comp_ai.retention', 0)), to_regclass($1::text);

-- name: lock_to_drop
-- The partition first: who waits for a reader of it holds up nobody else.
lock table {partition}, only {table} in access exclusive mode;

-- name: lock_to_empty
lock table {partition} in access exclusive mode;

-- name: some_are_held
select exists (select from {partition} p where {held});

-- name: drop_partition
drop table {partition};

-- name: set_held_aside
create temporary table held_rows on commit drop as select p.* from {partition} p where {held};

-- name: empty_partition
truncate {partition};

-- name: put_held_back
insert into {partition} select * from held_rows;

-- name: count_stray
select count(*) from {partition} p
where p.{time} < (now() at time zone 'UTC' - make_interval(days => $1, months => $2))
                 at time zone 'UTC'
  and not {held};

-- name: sweep_stray
-- Rows of a month that went before they came: PostgreSQL keeps them in the default partition.
delete from {partition}
where ctid = any(array(
    select p.ctid from {partition} p
    where p.{time} < (now() at time zone 'UTC' - make_interval(days => $1, months => $2))
                     at time zone 'UTC'
      and not {held}
    limit $3));

-- name: oldest_age_s
select extract(epoch from now() - ({oldest}))::double precision;
