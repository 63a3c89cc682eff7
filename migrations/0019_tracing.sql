-- The trace of a request, for who looks it up from its row or finds the row from the trace.
alter table comp_ai.requests add column trace_id text;

comment on column comp_ai.requests.trace_id is
    'its OpenTelemetry trace, 32 hex digits; null where the request was not traced';
