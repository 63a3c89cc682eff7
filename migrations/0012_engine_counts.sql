-- What the engines say that they counted, to hold the accounts against. A row is one reading of
-- one replica; counts are since its start. Readings are added and dropped, never changed.
create table comp_ai.engine_counts (
    replica_id         text         not null,
    at                 timestamptz  not null,
    model              varchar(100) not null,
    started_at         timestamptz  not null,
    prompt_tokens      bigint       not null,
    completion_tokens  bigint       not null,
    requests_running   integer      not null,
    primary key (replica_id, at)
);

comment on column comp_ai.engine_counts.model is 'the name in its Serve deployment, not a policy''s';
comment on column comp_ai.engine_counts.requests_running is
    'running, waiting or about to be sent; where it is 0, every request that was counted had ended';

create index engine_counts_by_time on comp_ai.engine_counts (at);

-- The rows of one replica in a stretch of time.
-- Takes long: writers wait while it is built, a few seconds for a million rows. The records wait
-- in the spool meanwhile, so no request does.
create index requests_by_replica on comp_ai.requests (replica_id, created_at)
where replica_id is not null;
