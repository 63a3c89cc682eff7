-- The accounts: what was asked, by whom, and what it cost; and the API keys.
-- The runner in serve_app/database.py makes the schema comp_ai and runs this in one transaction.

-- One row for each request, whatever its end. No CHECK on outcome or principal_kind: a row that
-- a newer release wrote to its spool must not be refused after a rollback.
create table comp_ai.requests (
    id                      uuid             not null,
    created_at              timestamptz      not null,
    request_id              varchar(128)     not null,
    route                   text             not null,
    status                  integer          not null,
    outcome                 text             not null,
    error_code              text,
    principal_id            varchar(255),
    principal_kind          text,
    api_key_id              uuid,
    client_address          text,
    model                   varchar(100),
    stream                  boolean          not null default false,
    finish_reason           text,
    prompt_tokens           integer          not null default 0 check (prompt_tokens >= 0),
    completion_tokens       integer          not null default 0 check (completion_tokens >= 0),
    auth_ms                 double precision,
    limits_ms               double precision,
    queue_ms                double precision,
    time_to_first_token_ms  double precision,
    inter_token_mean_ms     double precision,
    duration_ms             double precision not null default 0,
    replica_id              text,
    recorded_at             timestamptz      not null default now(),
    primary key (id, created_at)
) partition by range (created_at);

comment on column comp_ai.requests.request_id is
    'X-Request-ID as the client saw it; a client may choose and repeat it';
comment on column comp_ai.requests.recorded_at is 'when the row reached PostgreSQL';

create index requests_by_principal on comp_ai.requests (principal_id, created_at desc);
create index requests_by_time on comp_ai.requests (created_at desc);

-- Prompts and answers, apart from the rest so that retention and erasure can treat them apart.
create table comp_ai.request_bodies (
    id             uuid        not null,
    created_at     timestamptz not null,
    request_body   text,
    response_text  text,
    primary key (id, created_at)
) partition by range (created_at);

-- A row of a month that has no partition yet lands here instead of failing.
create table comp_ai.requests_default partition of comp_ai.requests default;
create table comp_ai.request_bodies_default partition of comp_ai.request_bodies default;


-- Make the partition of `parent` that holds the UTC month of `month_start`, unless it is there.
-- Rows of that month that the default partition caught are moved into it.
create function comp_ai.ensure_month_partition(parent text, month_start date) returns void
language plpgsql as $$
declare
    name  text := format('%s_y%sm%s', parent, to_char(month_start, 'YYYY'), to_char(month_start, 'MM'));
    lower_bound timestamptz := month_start::timestamp at time zone 'UTC';
    upper_bound timestamptz := (month_start + interval '1 month') at time zone 'UTC';
begin
    if to_regclass(format('comp_ai.%I', name)) is not null then
        return;
    end if;
    -- Writers wait from here to the commit: a row that slipped into the default partition
    -- between the move and the attachment would make the attachment fail.
    execute format('lock table comp_ai.%I in share row exclusive mode', parent);
    if to_regclass(format('comp_ai.%I', name)) is not null then
        return;  -- another session made it while we waited
    end if;
    execute format('create table comp_ai.%I (like comp_ai.%I including all)', name, parent);
    execute format(
        'with moved as (delete from comp_ai.%I where created_at >= $1 and created_at < $2 returning *) '
        'insert into comp_ai.%I select * from moved', parent || '_default', name)
        using lower_bound, upper_bound;
    execute format(
        'alter table comp_ai.%I attach partition comp_ai.%I for values from (%L) to (%L)',
        parent, name, lower_bound, upper_bound);
end
$$;

-- Make the monthly partitions of requests and request_bodies for `months` months, the first of
-- them the month of `from_month`. Safe to repeat and to run twice at once.
create function comp_ai.ensure_request_partitions(from_month date, months integer) returns void
language plpgsql as $$
begin
    if months is null or months not between 1 and 120 then
        raise exception 'months is %, allowed: 1 to 120', months using errcode = '22023';
    end if;
    for step in 0 .. months - 1 loop
        perform comp_ai.ensure_month_partition(
            parent, (date_trunc('month', from_month::timestamp) + make_interval(months => step))::date)
        from unnest(array['requests', 'request_bodies']) as parent;
    end loop;
end
$$;


-- The plain shape: one line a request, its texts and its tokens.
create view comp_ai.requests_plain as
select r.id,
       r.principal_id                         as user_id,
       b.request_body                         as request_text,
       b.response_text,
       r.model                                as model_used,
       r.prompt_tokens + r.completion_tokens  as tokens_used,
       r.created_at,
       r.recorded_at                          as updated_at
from comp_ai.requests r
left join comp_ai.request_bodies b on b.id = r.id and b.created_at = r.created_at;


-- Keys for programs that have no OIDC. Only a hash of the secret is kept.
create table comp_ai.api_keys (
    id            uuid        primary key,
    prefix        text        not null unique,
    secret_hash   bytea       not null check (octet_length(secret_hash) = 32),
    name          text,
    owner         text        not null,
    permissions   text[]      not null,
    models        text[],
    created_at    timestamptz not null default now(),
    created_by    text,
    expires_at    timestamptz,
    revoked_at    timestamptz,
    last_used_at  timestamptz
);

comment on column comp_ai.api_keys.prefix is 'the part of the key that looks it up; not secret';
comment on column comp_ai.api_keys.secret_hash is 'SHA-256 of the whole key';
comment on column comp_ai.api_keys.models is 'models that the key may use; null allows every model';
create index api_keys_by_owner on comp_ai.api_keys (owner);
