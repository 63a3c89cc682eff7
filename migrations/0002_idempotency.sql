-- Idempotency keys: what was asked under a key, who works on it now, and the answer.

-- No CHECK on state: a row of a newer release must not stop this one.
create table comp_ai.idempotency_keys (
    principal_id      text         not null,
    key               varchar(255) not null,
    route             text         not null,
    fingerprint       bytea        not null check (octet_length(fingerprint) = 32),
    state             text         not null,
    owner             uuid         not null,
    claim_expires_at  timestamptz  not null,
    status            integer,
    media_type        text,
    answer            bytea,
    created_at        timestamptz  not null default now(),
    expires_at        timestamptz  not null,
    primary key (principal_id, key)
);

comment on column comp_ai.idempotency_keys.fingerprint is 'SHA-256 of the request body';
comment on column comp_ai.idempotency_keys.state is
    'claimed: a request is under way; answered: answer holds its answer; '
    'not_kept: it was answered, and the answer was too long to keep';
comment on column comp_ai.idempotency_keys.owner is 'token of the request that made the claim';
comment on column comp_ai.idempotency_keys.claim_expires_at is
    'renewed while the request is under way; a claim past it is as if it had never been';

create index idempotency_keys_by_expiry on comp_ai.idempotency_keys (expires_at);
