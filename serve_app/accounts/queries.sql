-- Named queries of the accounts; loaded by serve_app/accounts/queries.py.
-- A batch comes as one array for each column: there is no table on its way that would have to be
-- written first and emptied after.

-- name: insert_requests
-- Says how many were not there before, and which of those are refusals of a permission.
with inserted as (
    insert into comp_ai.requests ({columns})
    select * from unnest({arrays})
    on conflict do nothing
    returning id, denied
)
select count(*) as written, array_agg(id) filter (where denied is not null) as refused
from inserted;

-- name: insert_bodies
insert into comp_ai.request_bodies ({columns})
select * from unnest({arrays})
on conflict do nothing;

-- name: last_recorded_at
-- Of the latest requests alone: no index has recorded_at.
select max(recorded_at)
from (select recorded_at from comp_ai.requests order by created_at desc limit 1000) as latest;
