-- The audit log: administrative acts and refusals of permission, in a chain of hashes.
-- serve_app/audit/chain.py says what is hashed; `comp-ai audit verify` checks it.

create table comp_ai.audit_log (
    seq             bigint       primary key,
    at              timestamptz  not null,
    recorded_at     timestamptz  not null,
    actor_id        text         not null,
    actor_kind      text         not null,
    api_key_id      uuid,
    action          text         not null,
    target          text,
    before          text,
    after           text,
    client_address  text,
    request_id      text,
    previous_hash   bytea        not null check (octet_length(previous_hash) = 32),
    hash            bytea        not null check (octet_length(hash) = 32)
);

comment on column comp_ai.audit_log.at is 'when it was done';
comment on column comp_ai.audit_log.recorded_at is 'when the row was chained';
comment on column comp_ai.audit_log.before is
    'JSON, kept as text: the hash is of these very bytes, which jsonb would write anew';
create index audit_log_by_time on comp_ai.audit_log (at, seq);
create index audit_log_by_actor on comp_ai.audit_log (actor_id, seq);
create index audit_log_by_action on comp_ai.audit_log (action, seq);

-- The end of the chain: its one row is locked by whoever appends, so the rows have one order,
-- and says how many there must be, so that a tail that was cut off is missed.
create table comp_ai.audit_head (
    only_row  boolean  primary key default true check (only_row),
    seq       bigint   not null,
    hash      bytea    not null check (octet_length(hash) = 32)
);
insert into comp_ai.audit_head (seq, hash) values (0, decode(repeat('00', 32), 'hex'));

create function comp_ai.refuse_audit_change() returns trigger
language plpgsql as $$
begin
    raise exception '% is append-only: % is refused', tg_table_name, lower(tg_op)
        using errcode = '42501';
end
$$;

create function comp_ai.check_audit_head() returns trigger
language plpgsql as $$
begin
    if new.seq <= old.seq then
        raise exception 'audit_head only goes forward' using errcode = '42501';
    end if;
    return new;
end
$$;

create trigger audit_log_is_append_only before update or delete or truncate on comp_ai.audit_log
    for each statement execute function comp_ai.refuse_audit_change();
create trigger audit_head_is_one_row before insert or delete or truncate on comp_ai.audit_head
    for each statement execute function comp_ai.refuse_audit_change();
create trigger audit_head_goes_forward before update on comp_ai.audit_head
    for each row execute function comp_ai.check_audit_head();

-- In every session_replication_role, so that setting it is no way around.
alter table comp_ai.audit_log enable always trigger audit_log_is_append_only;
alter table comp_ai.audit_head enable always trigger audit_head_is_one_row;
alter table comp_ai.audit_head enable always trigger audit_head_goes_forward;

-- The owner too gives these up. It could take them back, and drop the triggers: what it changes
-- then is found by the chain.
revoke all on comp_ai.audit_log, comp_ai.audit_head from public;
revoke update, delete, truncate on comp_ai.audit_log from current_user;
revoke insert, delete, truncate on comp_ai.audit_head from current_user;
