-- Bodies sealed with a key of their subject, and what the policy said of each request.
-- The keys stand in a schema of their own, so that a backup of comp_ai holds none of them.

create schema if not exists comp_ai_keys;

-- One key a subject. Without its row what was sealed with it cannot be read by anybody.
create table comp_ai_keys.subject_keys (
    id             uuid         primary key,
    kind           text         not null default 'subject',
    subject        varchar(255) not null,
    wrapped        bytea        not null,
    master_key_id  text         not null,
    created_at     timestamptz  not null default now(),
    rewrapped_at   timestamptz,
    unique (kind, subject)
);

comment on column comp_ai_keys.subject_keys.kind is
    'subject: seals what belongs to the principal `subject`; service: a key of the service itself, '
    'by name';
comment on column comp_ai_keys.subject_keys.wrapped is
    'the key, sealed with the master key; bound to id, kind and subject';
comment on column comp_ai_keys.subject_keys.master_key_id is
    'which master key opens it: the start of a digest, never the key';

create index subject_keys_by_master on comp_ai_keys.subject_keys (master_key_id);

-- The columns of plain text stay: rows of the release before have them, and it may still write.
alter table comp_ai.request_bodies
    add column key_id uuid,
    add column sealed bytea;

comment on column comp_ai.request_bodies.sealed is
    'AES-256-GCM of the JSON {request, response}, bound to this row and to the key `key_id`; the '
    'columns of plain text are null where it is set';
alter table comp_ai.requests add column bodies text;

comment on column comp_ai.requests.bodies is
    'what the policy kept of prompt and answer: none, metadata, redacted or full';

alter table comp_ai.api_keys add column bodies text;

comment on column comp_ai.api_keys.bodies is
    'the most that is kept of what is asked with this key; null adds nothing to the policy';
