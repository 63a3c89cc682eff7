-- Responses that are kept for their callers, and background responses on their way.

-- No CHECK on status: a newer release may know more of them, and a rollback must go on reading.
-- previous_id has no foreign key: a response may be removed before those that continue it.
create table comp_ai.responses (
    id            varchar(64)  primary key,
    principal_id  varchar(255) not null,
    model         varchar(100) not null,
    status        text         not null,
    background    boolean      not null default false,
    previous_id   varchar(64),
    response      text         not null,
    input_items   text         not null,
    created_at    timestamptz  not null default now(),
    updated_at    timestamptz  not null default now(),
    expires_at    timestamptz  not null,
    heartbeat_at  timestamptz
);

comment on column comp_ai.responses.response is 'the response object as its caller gets it, JSON';
comment on column comp_ai.responses.input_items is
    'the items of this request alone, with their ids, JSON; the rest follows from previous_id';
comment on column comp_ai.responses.heartbeat_at is
    'when the gateway that runs this background response last said so';

create index responses_by_expiry on comp_ai.responses (expires_at);
create index responses_by_principal on comp_ai.responses (principal_id, created_at desc);
