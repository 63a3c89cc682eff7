-- Usage: what was asked and what it cost, added up by minute, hour and day.
--
-- Whoever inserts requests also appends what they add to usage_pending, in the same transaction,
-- by a trigger: so the release before this one is counted too, and a row that is there already
-- (a repeated batch) adds nothing. The upkeep folds pending rows into the tables by time. Usage is
-- always the folded and the pending together.

alter table comp_ai.requests
    add column cost_micros bigint not null default 0,
    add column counted boolean not null default false;
-- From here on: the rows that are there keep false, without being written anew.
alter table comp_ai.requests alter column counted set default true;

comment on column comp_ai.requests.cost_micros is
    'in millionths of the currency, by the prices when it began; 0 before these were kept';
comment on column comp_ai.requests.counted is
    'false: from before the usage tables, and added to them by the upkeep, a day at a time';

-- Append-only, so no two writers ever wait for each other here.
create table comp_ai.usage_pending (
    id                      bigint            generated always as identity primary key,
    bucket                  timestamptz       not null,
    principal_id            varchar(255)      collate "C" not null,
    model                   varchar(100)      collate "C" not null,
    api_key_id              uuid              not null,
    completed               boolean           not null,
    replica_id              text,
    requests                bigint            not null,
    prompt_tokens           bigint            not null,
    completion_tokens       bigint            not null,
    cost_micros             bigint            not null,
    duration_ms             double precision  not null,
    first_tokens            bigint            not null,
    time_to_first_token_ms  double precision  not null
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

comment on column comp_ai.usage_pending.bucket is 'the minute, in UTC';

create table comp_ai.usage_minute (
    bucket                  timestamptz       not null,
    principal_id            varchar(255)      collate "C" not null,
    model                   varchar(100)      collate "C" not null,
    api_key_id              uuid              not null,
    completed               boolean           not null,
    requests                bigint            not null,
    prompt_tokens           bigint            not null,
    completion_tokens       bigint            not null,
    cost_micros             bigint            not null,
    duration_ms             double precision  not null,
    first_tokens            bigint            not null,
    time_to_first_token_ms  double precision  not null,
    primary key (bucket, principal_id, model, api_key_id, completed)
) partition by range (bucket);

comment on column comp_ai.usage_minute.bucket is 'start of the time that the row adds up, in UTC';
comment on column comp_ai.usage_minute.principal_id is 'empty: nobody was signed in';
comment on column comp_ai.usage_minute.model is 'empty: none was asked for';
comment on column comp_ai.usage_minute.api_key_id is 'all zeros: none was used';
comment on column comp_ai.usage_minute.completed is 'the outcome: completed, or any other';
comment on column comp_ai.usage_minute.first_tokens is 'requests that have a time to first token';
create index usage_minute_by_principal on comp_ai.usage_minute (principal_id, bucket);
create index usage_minute_by_key on comp_ai.usage_minute (api_key_id, bucket);

create table comp_ai.usage_hour (like comp_ai.usage_minute including all)
    partition by range (bucket);
create table comp_ai.usage_day (like comp_ai.usage_minute including all)
    partition by range (bucket);
create table comp_ai.usage_minute_default partition of comp_ai.usage_minute default;
create table comp_ai.usage_hour_default partition of comp_ai.usage_hour default;
create table comp_ai.usage_day_default partition of comp_ai.usage_day default;

-- The same without the callers: small, of nobody in particular, and kept.
create table comp_ai.usage_hour_by_model (
    bucket                  timestamptz       not null,
    model                   varchar(100)      collate "C" not null,
    completed               boolean           not null,
    requests                bigint            not null,
    prompt_tokens           bigint            not null,
    completion_tokens       bigint            not null,
    cost_micros             bigint            not null,
    duration_ms             double precision  not null,
    first_tokens            bigint            not null,
    time_to_first_token_ms  double precision  not null,
    primary key (bucket, model, completed)
);
create table comp_ai.usage_day_by_model (like comp_ai.usage_hour_by_model including all);

-- Whole tokens by replica, to compare with what its engine counted.
create table comp_ai.replica_usage (
    replica_id         text         not null,
    model              varchar(100) collate "C" not null,
    requests           bigint       not null,
    prompt_tokens      bigint       not null,
    completion_tokens  bigint       not null,
    updated_at         timestamptz  not null default now(),
    primary key (replica_id, model)
);


create function comp_ai.append_usage() returns trigger
language plpgsql as $$
begin
    insert into comp_ai.usage_pending (
        bucket, principal_id, model, api_key_id, completed, replica_id, requests, prompt_tokens,
        completion_tokens, cost_micros, duration_ms, first_tokens, time_to_first_token_ms)
    select date_trunc('minute', created_at, 'UTC'), coalesce(principal_id, ''),
           coalesce(model, ''), coalesce(api_key_id, '00000000-0000-0000-0000-000000000000'),
           outcome = 'completed', replica_id, count(*), sum(prompt_tokens),
           sum(completion_tokens), sum(cost_micros), sum(duration_ms),
           count(time_to_first_token_ms), coalesce(sum(time_to_first_token_ms), 0)
    from inserted
    group by 1, 2, 3, 4, 5, 6;
    return null;
end
$$;

-- Of whole statements, and of inserts into the parent alone: rows that are moved from one
-- partition to another, or back into one, were counted when they came.
create trigger requests_append_usage after insert on comp_ai.requests
    referencing new table as inserted
    for each statement execute function comp_ai.append_usage();


-- Days of which rows from before this are not added up yet: the upkeep takes them one by one.
-- Doing it here would hold up the writers, who wait for this migration, for as long as it took.
create table comp_ai.usage_backfill (
    day  timestamptz  primary key
);

insert into comp_ai.usage_backfill (day)
select generate_series(
    date_trunc('day', min(created_at), 'UTC'), date_trunc('day', max(created_at), 'UTC'), '1 day')
from comp_ai.requests;


-- As before, and for tables that are partitioned by another column than created_at.
create or replace function comp_ai.ensure_month_partition(parent text, month_start date)
returns void language plpgsql as $$
declare
    name  text := format('%s_y%sm%s', parent, to_char(month_start, 'YYYY'), to_char(month_start, 'MM'));
    lower_bound timestamptz := month_start::timestamp at time zone 'UTC';
    upper_bound timestamptz := (month_start + interval '1 month') at time zone 'UTC';
    key text;
begin
    if to_regclass(format('comp_ai.%I', name)) is not null then
        return;
    end if;
    select a.attname into strict key
    from pg_partitioned_table p
    join pg_attribute a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
    where p.partrelid = format('comp_ai.%I', parent)::regclass;
    -- Writers wait from here to the commit: a row that slipped into the default partition
    -- between the move and the attachment would make the attachment fail.
    execute format('lock table comp_ai.%I in share row exclusive mode', parent);
    if to_regclass(format('comp_ai.%I', name)) is not null then
        return;  -- another session made it while we waited
    end if;
    execute format('create table comp_ai.%I (like comp_ai.%I including all)', name, parent);
    execute format(
        'with moved as (delete from comp_ai.%I where %I >= $1 and %I < $2 returning *) '
        'insert into comp_ai.%I select * from moved', parent || '_default', key, key, name)
        using lower_bound, upper_bound;
    execute format(
        'alter table comp_ai.%I attach partition comp_ai.%I for values from (%L) to (%L)',
        parent, name, lower_bound, upper_bound);
end
$$;

-- Make the monthly partitions of every table that has some, for `months` months, the first of
-- them the month of `from_month`. Safe to repeat and to run twice at once.
create function comp_ai.ensure_partitions(from_month date, months integer) returns void
language plpgsql as $$
begin
    if months is null or months not between 1 and 120 then
        raise exception 'months is %, allowed: 1 to 120', months using errcode = '22023';
    end if;
    for step in 0 .. months - 1 loop
        perform comp_ai.ensure_month_partition(
            parent, (date_trunc('month', from_month::timestamp) + make_interval(months => step))::date)
        from comp_ai.partitioned_tables() as parent;
    end loop;
end
$$;

create function comp_ai.partitioned_tables() returns setof name
language sql stable as $$
    select c.relname
    from pg_partitioned_table p
    join pg_class c on c.oid = p.partrelid
    where c.relnamespace = 'comp_ai'::regnamespace and p.partstrat = 'r' and p.partdefid <> 0
    order by c.relname
$$;
