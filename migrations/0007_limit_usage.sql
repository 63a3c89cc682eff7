-- What was used by account and period, as the Limits deployment counts it against the budgets.
-- Its journal on disk is what it works with; this is what is left if that is lost.
create table comp_ai.limit_usage (
    account      text        not null,
    period       text        not null,
    tokens       bigint      not null,
    cost_micros  bigint      not null,
    journal      uuid,
    updated_at   timestamptz not null default now(),
    primary key (account, period)
);

comment on column comp_ai.limit_usage.account is
    'everyone, principal:…, api_key:…, group:…, role:…; each name percent-encoded';
comment on column comp_ai.limit_usage.period is 'a month or a day of UTC: 2026-11, 2026-11-23';
comment on column comp_ai.limit_usage.cost_micros is 'in millionths of the currency';
comment on column comp_ai.limit_usage.journal is
    'the journal that wrote it last; null where it was made of comp_ai.requests';

create index limit_usage_by_period on comp_ai.limit_usage (period);

-- What was used before this table was there, so that budgets which are set now know of it. A name
-- that needs encoding is left out: it begins with nothing used.
with used as (
    select created_at at time zone 'UTC' as at, principal_id, api_key_id,
           prompt_tokens + completion_tokens as tokens
    from comp_ai.requests
    where created_at >= date_trunc('month', now() at time zone 'UTC') at time zone 'UTC'
      and prompt_tokens + completion_tokens > 0
),
charged as (
    select account, at, tokens
    from used
    cross join lateral (
        values ('everyone'),
               (case when principal_id ~ '^[A-Za-z0-9_.~/-]+$' then 'principal:' || principal_id end),
               ('api_key:' || api_key_id)
    ) as bearer (account)
    where account is not null
)
insert into comp_ai.limit_usage (account, period, tokens, cost_micros)
select account, to_char(at, 'YYYY-MM'), sum(tokens), 0 from charged group by 1, 2
union all
select account, to_char(at, 'YYYY-MM-DD'), sum(tokens), 0 from charged
where at >= date_trunc('day', now() at time zone 'UTC')
group by 1, 2;
