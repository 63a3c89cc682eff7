-- Files, and the batches that are made of them. A batch runs from what stands here alone, so it
-- survives every process. No CHECK on status, state or purpose: a newer release may know more.

create table comp_ai.files (
    id          text         collate "C" primary key,
    owner       varchar(255) not null,
    purpose     text         not null,
    filename    text         not null,
    bytes       bigint       not null check (bytes >= 0),
    status      text         not null,
    created_at  timestamptz  not null default now(),
    expires_at  timestamptz  not null
);

comment on column comp_ai.files.id is 'file-<UUID version 7>: in the order of time';
comment on column comp_ai.files.owner is 'id of the principal';
comment on column comp_ai.files.status is 'uploading: not all is here, and nobody sees it; processed';
create index files_by_owner on comp_ai.files (owner, id);
create index files_by_expiry on comp_ai.files (expires_at);
create index files_unfinished on comp_ai.files (created_at) where status = 'uploading';

-- A file in pieces, so that neither its upload nor its download stands in memory whole.
create table comp_ai.file_chunks (
    file_id  text     collate "C" not null references comp_ai.files on delete cascade,
    number   integer  not null,
    content  bytea    not null,
    primary key (file_id, number)
);

create table comp_ai.batches (
    id                      text         collate "C" primary key,
    owner                   varchar(255) not null,
    principal               jsonb        not null,
    api_key_id              uuid,
    endpoint                text         not null,
    completion_window       text         not null,
    input_file_id           text         not null,
    output_file_id          text,
    error_file_id           text,
    output_expires_after_s  integer,
    status                  text         not null,
    model                   text,
    errors                  jsonb,
    metadata                jsonb,
    total                   integer      not null default 0,
    completed               integer      not null default 0,
    failed                  integer      not null default 0,
    created_at              timestamptz  not null default now(),
    expires_at              timestamptz  not null,
    keep_until              timestamptz  not null,
    in_progress_at          timestamptz,
    finalizing_at           timestamptz,
    completed_at            timestamptz,
    failed_at               timestamptz,
    expired_at              timestamptz,
    cancelling_at           timestamptz,
    cancelled_at            timestamptz
);

comment on column comp_ai.batches.principal is
    'who made it, with what it was allowed then; its lines are asked on behalf of that';
comment on column comp_ai.batches.completed is
    'counted from the lines while there are any, kept here once they are in the result files';
create index batches_by_owner on comp_ai.batches (owner, id);
create index batches_open on comp_ai.batches (id)
    where status in ('validating', 'in_progress', 'finalizing', 'cancelling');
create index batches_by_expiry on comp_ai.batches (keep_until);

-- One row for each request of a batch, until the result files are written.
create table comp_ai.batch_lines (
    batch_id       text     collate "C" not null references comp_ai.batches on delete cascade,
    number         integer  not null,
    custom_id      text     not null,
    body           bytea,
    state          text     not null default 'pending',
    ready_at       timestamptz default now(),
    claim          uuid,
    attempts       integer  not null default 0,
    waits          integer  not null default 0,
    status_code    integer,
    request_id     text,
    response       bytea,
    error_code     text,
    error_message  text,
    primary key (batch_id, number)
);

comment on column comp_ai.batch_lines.number is 'line of the input file, from 1';
comment on column comp_ai.batch_lines.state is
    'pending, running, completed, failed, cancelled or expired';
comment on column comp_ai.batch_lines.ready_at is
    'when it may be taken: while it runs, when its claim ends; null once it has its result';
comment on column comp_ai.batch_lines.claim is
    'made new each time that a gateway takes the line; only who knows it may write the result';
comment on column comp_ai.batch_lines.attempts is 'times that the engine failed on it';
comment on column comp_ai.batch_lines.waits is 'times that it was refused for now';
create index batch_lines_ready on comp_ai.batch_lines (batch_id, ready_at, number)
    where ready_at is not null;
create index batch_lines_by_state on comp_ai.batch_lines (batch_id, state);
