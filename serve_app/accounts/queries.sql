-- Named queries of the accounts; loaded by serve_app/accounts/queries.py.

-- name: stage_requests
-- Once a session, as the next. The columns alone, without constraints: the INSERT checks
-- them, and one bad row is then found by halving.
create temporary table if not exists staged_requests on commit delete rows
as select {columns} from comp_ai.requests with no data;

-- name: stage_bodies
create temporary table if not exists staged_bodies on commit delete rows
as select {columns} from comp_ai.request_bodies with no data;

-- name: insert_requests
-- Says how many were not there before, and which of those are refusals of a permission.
with inserted as (
    insert into comp_ai.requests ({columns})
    select {columns} from staged_requests
    on conflict do nothing
    returning id, denied
)
select count(*) as written, array_agg(id) filter (where denied is not null) as refused
from inserted;

-- name: insert_bodies
insert into comp_ai.request_bodies ({columns})
select {columns} from staged_bodies
on conflict do nothing;

-- name: last_recorded_at
-- Of the latest requests alone: no index has recorded_at.
select max(recorded_at)
from (select recorded_at from comp_ai.requests order by created_at desc limit 1000) as latest;
