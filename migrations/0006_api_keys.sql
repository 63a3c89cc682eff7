-- API keys: notes, limits of their own, rotation, and a notice of every change.
-- Beside the previous release: it leaves the new columns empty, and to it an earlier secret of a
-- key is a key with an expiry.

alter table comp_ai.api_keys
    add column note         text  check (char_length(note) <= 1000),
    add column limits       jsonb check (jsonb_typeof(limits) = 'object'),
    add column rotated_at   timestamptz,
    add column replaced_by  uuid references comp_ai.api_keys on delete cascade,
    add constraint api_keys_earlier_secret_ends check (replaced_by is null or expires_at is not null),
    add constraint api_keys_replaced_by_another check (replaced_by <> id);

comment on column comp_ai.api_keys.limits is 'a LimitPolicy of serve_app/config.py; null is none';
comment on column comp_ai.api_keys.replaced_by is
    'the key of which this row is an earlier secret, valid until it expires; null: a key itself';
create index api_keys_by_successor on comp_ai.api_keys (replaced_by) where replaced_by is not null;

-- Gateways that believe what they know of a key listen on this channel
-- (serve_app/identity/key_changes.py). The payload is a prefix; an empty one means every key.
create function comp_ai.notify_api_key() returns trigger
language plpgsql as $$
begin
    if tg_op = 'TRUNCATE' then
        perform pg_notify('comp_ai_api_keys', '');
        return null;
    end if;
    if tg_op <> 'INSERT' then
        perform pg_notify('comp_ai_api_keys', old.prefix);
    end if;
    if tg_op <> 'DELETE' then
        perform pg_notify('comp_ai_api_keys', new.prefix);
    end if;
    return null;
end
$$;

-- Not for last_used_at, which is written all the time.
create trigger api_keys_notify
    after insert or delete
    or update of prefix, secret_hash, owner, permissions, models, limits, expires_at, revoked_at,
        replaced_by
    on comp_ai.api_keys
    for each row execute function comp_ai.notify_api_key();
create trigger api_keys_notify_truncate after truncate on comp_ai.api_keys
    for each statement execute function comp_ai.notify_api_key();

-- In every session_replication_role: rows that are restored or replicated change too.
alter table comp_ai.api_keys enable always trigger api_keys_notify;
alter table comp_ai.api_keys enable always trigger api_keys_notify_truncate;
