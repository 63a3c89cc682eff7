"""Rows for every table, made of the catalog: a table that is new needs nothing here."""

from __future__ import annotations

import asyncpg

from serve_app.audit.act import Actor, AuditAct
from serve_app.audit.log import AuditLog

_TABLES = """
select c.oid, format('%I.%I', n.nspname, c.relname) as name
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname in ('comp_ai', 'comp_ai_keys') and c.relkind in ('r', 'p')
  and not c.relispartition order by c.oid
"""

# Columns that an INSERT must name, and the column that each of them references.
_COLUMNS = """
select a.attname as name, format_type(a.atttypid, null) as type,
       f.confrelid::regclass::text as other_table, o.attname as other_column
from pg_attribute a
left join pg_constraint f on f.conrelid = a.attrelid and f.contype = 'f'
     and f.conkey = array[a.attnum]
left join pg_attribute o on o.attrelid = f.confrelid and o.attnum = f.confkey[1]
where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
  and a.attnotnull and not a.atthasdef and a.attidentity = '' and a.attgenerated = ''
order by a.attnum
"""

# 32 bytes: what the schema asks of a hash.
_VALUES = {
    "uuid": "gen_random_uuid()",
    "text": "'{}'",
    "character varying": "'{}'",
    "smallint": "1",
    "integer": "1",
    "bigint": "1",
    "double precision": "1.5",
    "boolean": "true",
    "bytea": "sha256('x')",
    "jsonb": "'{}'",
    "text[]": "'{}'",
    "date": "current_date",
    "timestamp with time zone": "now()",
}


async def fill(connection: asyncpg.Connection) -> list[str]:
    """Put a row into each table that has none; return the names of all tables."""
    names = []
    for table in await connection.fetch(_TABLES):
        names.append(table["name"])
        if not await connection.fetchval(f"select exists (select from {table['name']})"):
            await _insert(connection, table["oid"], table["name"])
    return names


async def _insert(connection: asyncpg.Connection, oid: int, table: str) -> None:
    if table == "comp_ai.audit_log":
        await append_to_audit_log(connection)
        return
    columns = await connection.fetch(_COLUMNS, oid)
    names = ", ".join(f'"{column["name"]}"' for column in columns)
    values = ", ".join(_value(column) for column in columns)
    what = f"({names}) values ({values})" if columns else "default values"
    await connection.execute(f"insert into {table} {what}")


def _value(column: asyncpg.Record) -> str:
    if column["other_table"] is not None:
        return f"(select {column['other_column']} from {column['other_table']} limit 1)"
    return _VALUES[column["type"]]


async def append_to_audit_log(connection: asyncpg.Connection, rows: int = 1) -> None:
    """Add rows to the audit log, as the service does."""
    actor = Actor(id="tests", kind="operator")
    acts = [AuditAct(actor=actor, action="test.act", target=str(n)) for n in range(rows)]
    async with connection.transaction():
        await AuditLog().append_all(connection, acts)
