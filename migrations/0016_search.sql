-- Indexes for what auditors ask of the requests: by key, by the X-Request-ID, by model, and what
-- was refused or failed. By principal there is one already; by time a page is in the order of the
-- id too.

create index requests_by_time_and_id on comp_ai.requests (created_at desc, id desc);
create index requests_by_key on comp_ai.requests (api_key_id, created_at desc)
    where api_key_id is not null;
create index requests_by_request_id on comp_ai.requests (request_id, created_at desc);
create index requests_by_model on comp_ai.requests (model, created_at desc);
-- Small: of what was not simply answered.
create index requests_by_outcome on comp_ai.requests (outcome, created_at desc)
    where outcome <> 'completed';
create index requests_by_status on comp_ai.requests (status, created_at desc)
    where status <> 200;

-- Last: from here to the commit nobody reads the table either.
drop index comp_ai.requests_by_time;
