"""Rows of a person in every place that may hold some, for the tests of the rights of subjects."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import asyncpg

from serve_app.accounts import writer
from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog
from serve_app.records import Outcome, PrincipalKind, RequestRecord, new_id, utc_now
from serve_app.subjects.names import in_accounts
from tests.sealing import subject_keys


def marker(subject: str) -> str:
    """Return what every text of `subject` holds."""
    return f"SECRET-OF-{subject}"


def names_of(subject: str) -> tuple[str, ...]:
    """Return what a row of `subject` may be known by."""
    return subject, in_accounts(subject), marker(subject)


def record(
    subject: str | None, created_at: datetime | None = None, **changes: Any
) -> RequestRecord:
    return RequestRecord(
        id=new_id(),
        created_at=created_at or utc_now(),
        route="chat.completions",
        status=200,
        outcome=Outcome.COMPLETED,
        principal_kind=PrincipalKind.USER,
        model="a-model",
        prompt_tokens=3,
        completion_tokens=4,
        cost_micros=5,
        **{
            "principal_id": subject,
            "client_address": f"address-of-{subject}",
            "request_id": f"{subject}-1",
            "request_body": f"{marker(str(subject))} ask",
            "response_text": f"{marker(str(subject))} answer",
            **changes,
        },
    )


async def write(connection: asyncpg.Connection, *records: RequestRecord) -> None:
    await writer.prepare_session(connection)
    report = await writer.write(connection, records, subject_keys())
    assert not report.poison


_PLANTED = """
with old as (
    insert into comp_ai.requests (id, created_at, request_id, route, status, outcome, principal_id,
                                  client_address, prompt_tokens, duration_ms)
    values (gen_random_uuid(), $4, $1, 'chat.completions', 200, 'completed', $1, $1, 7, 1)
    returning id, created_at),
old_body as (
    insert into comp_ai.request_bodies (id, created_at, request_body, response_text)
    select id, created_at, $2, $2 from old),
response as (
    insert into comp_ai.responses
        (id, principal_id, model, status, response, input_items, expires_at)
    values ('resp_' || $1, $1, 'm', 'completed', json_build_object('t', $2)::text, '[]',
            now() + interval '1 day')),
answer as (
    insert into comp_ai.idempotency_keys (principal_id, key, route, fingerprint, state, owner,
                                          claim_expires_at, answer, expires_at)
    values ($1, 'key-of-' || $1, 'r', sha256('x'), 'answered', gen_random_uuid(), now(),
            convert_to($2, 'UTF8'), now() + interval '1 day')),
file as (
    insert into comp_ai.files (id, owner, purpose, filename, bytes, status, expires_at)
    values ('file-' || $1, $1, 'batch', $2, 1, 'processed', now() + interval '1 day')
    returning id),
chunk as (
    insert into comp_ai.file_chunks (file_id, number, content)
    select id, 0, convert_to($2, 'UTF8') from file),
batch as (
    insert into comp_ai.batches (id, owner, principal, endpoint, completion_window, input_file_id,
                                 status, metadata, expires_at, keep_until)
    values ('batch_' || $1, $1, jsonb_build_object('id', $1), 'e', '24h', 'f', 'in_progress',
            jsonb_build_object('note', $2), now(), now())
    returning id),
line as (
    insert into comp_ai.batch_lines (batch_id, number, custom_id, body, response)
    select id, 1, $2, convert_to($2, 'UTF8'), convert_to($2, 'UTF8') from batch),
key as (
    insert into comp_ai.api_keys
        (id, prefix, secret_hash, name, note, owner, permissions, created_by)
    values (gen_random_uuid(), 'p-' || md5($1), sha256('x'), $2, $2, $1, '{}', $1),
           (gen_random_uuid(), 'q-' || md5($1), sha256('x'), 'n', null, 'another', '{}', $1)),
minutes as (
    insert into comp_ai.usage_minute
    values (date_trunc('minute', $4), $1, 'm', gen_random_uuid(), true, 1, 2, 3, 4, 5, 6, 7)),
hours as (
    insert into comp_ai.usage_hour
    values (date_trunc('hour', $4), $1, 'm', gen_random_uuid(), true, 1, 2, 3, 4, 5, 6, 7)),
days as (
    insert into comp_ai.usage_day
    values (date_trunc('day', $4), $1, 'm', gen_random_uuid(), true, 1, 2, 3, 4, 5, 6, 7)),
limits as (
    insert into comp_ai.limit_usage (account, period, tokens, cost_micros)
    values ('principal:' || $3, '2026-11', 10, 20), ('group-member:g:' || $3, '2026-11', 10, 20),
           ('role-member:r:' || $3, '2026-11-01', 10, 20))
insert into comp_ai.legal_holds (id, subject, reason, set_by, set_at, released_by, released_at)
values (gen_random_uuid(), $1, $2, $1, $4, $1, $4)
"""


async def plant(connection: asyncpg.Connection, subject: str) -> None:
    """Put rows of `subject` into every place: a month ago, and now."""
    before = utc_now() - timedelta(days=40)
    await connection.execute(
        _retyped(_PLANTED), subject, marker(subject), in_accounts(subject), before
    )
    await write(connection, record(subject), record(subject, before))
    async with connection.transaction():
        by = Actor(id=subject, kind="user", client_address="::1")
        await AuditLog().append(connection, AuditAct(actor=by, action="key.create", target="k"))


def _retyped(sql: str) -> str:
    """Return `sql` with the types of its values named: PostgreSQL sees each in many places."""
    for number in (1, 2, 3):
        sql = sql.replace(f"${number}", f"${number}::text")
    return sql.replace("$4", "$4::timestamptz")


async def places_of(connection: asyncpg.Connection, *texts: str) -> dict[str, int]:
    """Return how many rows of which tables hold one of `texts`, in whichever column."""
    tables = await connection.fetch(
        "select format('%I.%I', n.nspname, c.relname) as name from pg_class c "
        "join pg_namespace n on n.oid = c.relnamespace "
        "where n.nspname like 'comp\\_ai%' and c.relkind in ('r', 'p') and not c.relispartition"
    )
    # Bytes are shown as hexadecimal digits.
    patterns = [f"%{form}%" for text in texts for form in (text, text.encode().hex())]
    found = {}
    for table in tables:
        sql = f"select count(*) from {table['name']} t where t::text like any($1::text[])"
        if rows := await connection.fetchval(sql, patterns):
            found[table["name"].partition(".")[2]] = rows
    return found
