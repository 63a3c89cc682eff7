-- Named queries of the search; loaded by serve_app/search/reading.py. In braces: columns, and
-- conditions with the numbers of their values.

-- name: place
-- Where the row with the id $1 stands among the others.
select created_at from comp_ai.requests where id = $1 order by created_at desc limit 1;

-- name: page
-- Only what is asked for is in the conditions: then the indexes and partitions can be chosen.
select {columns} from comp_ai.requests
where {wanted}
order by created_at desc, id desc
limit {limit};

-- name: one
select {columns} from comp_ai.requests where id = $1 order by created_at desc limit 1;

-- name: body
select * from comp_ai.request_bodies where id = $1 and created_at = $2;
