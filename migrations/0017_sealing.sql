-- What callers store and upload, sealed with the key of its subject like the bodies of requests.

-- The columns of plain text stay: rows of the release before have them, and it may still write
-- them. What it cannot read it must not take for something else: a text is null or empty where it
-- is sealed, an idempotency key has a state that it takes for a request under way, and a line of a
-- batch with a sealed result is `ready_at` infinity, so that it does not end the batch without it.

alter table comp_ai.responses
    alter column response drop not null,
    alter column input_items drop not null,
    add column key_id uuid,
    add column sealed bytea,
    add column items_key_id uuid,
    add column sealed_items bytea,
    alter column sealed set storage external,
    alter column sealed_items set storage external;

comment on column comp_ai.responses.sealed is
    'AES-256-GCM of what `response` was before, bound to this row and to the key `key_id`';
comment on column comp_ai.responses.sealed_items is
    'the same of `input_items`: the response is written anew while it is made, and they are not';

alter table comp_ai.idempotency_keys
    add column key_id uuid,
    add column sealed bytea,
    alter column sealed set storage external;

comment on column comp_ai.idempotency_keys.sealed is
    'AES-256-GCM of the answer, bound to this row and to the key `key_id`; it counts only where '
    'the state is sealed';
comment on column comp_ai.idempotency_keys.state is
    'claimed: a request is under way; answered: answer holds its answer; sealed: sealed holds it; '
    'not_kept: it was answered, and the answer was too long to keep';

alter table comp_ai.files
    add column key_id uuid,
    add column sealed bytea;

comment on column comp_ai.files.sealed is
    'AES-256-GCM of the name that its owner gave it, bound to this row and to the key `key_id`';

alter table comp_ai.file_chunks
    alter column content drop not null,
    add column key_id uuid,
    add column sealed bytea,
    alter column sealed set storage external;

comment on column comp_ai.file_chunks.sealed is
    'AES-256-GCM of the content, bound to this row and to the key `key_id`';

alter table comp_ai.batches
    add column key_id uuid,
    add column sealed bytea;

comment on column comp_ai.batches.sealed is
    'AES-256-GCM of the JSON {metadata, errors}, bound to this row and to the key `key_id`';

alter table comp_ai.batch_lines
    add column key_id uuid,
    add column sealed bytea,
    alter column sealed set storage external;

comment on column comp_ai.batch_lines.sealed is
    'AES-256-GCM of the custom_id and of the body or, once there is one, of the response, bound to '
    'this row and to the key `key_id`';
comment on column comp_ai.batch_lines.ready_at is
    'when it may be taken: while it runs, when its claim ends; null, or infinity where it is '
    'sealed, once it has its result';
