-- Named queries of files and batches; loaded by serve_app/batches/queries.py.

-- name: lock_owner
-- Until the end of the transaction: what an owner may still have is counted by one at a time.
select pg_advisory_xact_lock(hashtextextended('comp_ai.files of ' || $1, 0));

-- name: add_file
-- Not one byte more than the owner may have.
insert into comp_ai.files
    (id, owner, purpose, filename, bytes, status, expires_at, key_id, sealed)
select $1, $2::text, $3, '', $4::bigint, 'uploading', now() + make_interval(secs => $5),
       $7::uuid, $8::bytea
where $4::bigint + coalesce(
    (select sum(bytes) from comp_ai.files where owner = $2::text and expires_at > now()), 0) <= $6
returning *;

-- name: add_result_file
insert into comp_ai.files (id, owner, purpose, filename, bytes, status, expires_at)
values ($1, $2, 'batch_output', $3, 0, 'processed', now() + make_interval(secs => $4));

-- name: measure_file
update comp_ai.files set bytes = $2 where id = $1;

-- name: add_chunk
insert into comp_ai.file_chunks (file_id, number, key_id, sealed) values ($1, $2, $3, $4);

-- name: publish_file
update comp_ai.files set status = 'processed' where id = $1 returning *;

-- name: discard_file
delete from comp_ai.files where id = $1 and status = 'uploading';

-- name: find_file
select * from comp_ai.files
where id = $1 and owner = $2 and status = 'processed' and expires_at > now();

-- name: delete_file
delete from comp_ai.files
where id = $1 and owner = $2 and status = 'processed' and expires_at > now() returning id;

-- name: list_files_asc
select * from comp_ai.files
where owner = $1 and status = 'processed' and expires_at > now()
  and ($2::text is null or purpose = $2) and ($3::text is null or id > $3)
order by id limit $4;

-- name: list_files_desc
select * from comp_ai.files
where owner = $1 and status = 'processed' and expires_at > now()
  and ($2::text is null or purpose = $2) and ($3::text is null or id < $3)
order by id desc limit $4;

-- name: read_chunk
select content, key_id, sealed from comp_ai.file_chunks where file_id = $1 and number = $2;

-- name: sweep_chunks
-- Before their file, so that no step takes long. An upload that did not end within an hour
-- never will.
delete from comp_ai.file_chunks where (file_id, number) in (
    select c.file_id, c.number
    from comp_ai.files f join comp_ai.file_chunks c on c.file_id = f.id
    where (f.expires_at <= now()
           or (f.status = 'uploading' and f.created_at < now() - interval '1 hour'))
      and not exists (
          select from comp_ai.legal_holds h where h.subject = f.owner and h.released_at is null)
    limit $1
    for update of c skip locked);

-- name: sweep_files
delete from comp_ai.files where id in (
    select id from comp_ai.files f
    where (f.expires_at <= now()
           or (f.status = 'uploading' and f.created_at < now() - interval '1 hour'))
      and not exists (select 1 from comp_ai.file_chunks c where c.file_id = f.id)
      and not exists (
          select from comp_ai.legal_holds h where h.subject = f.owner and h.released_at is null)
    limit $1
    for update skip locked);

-- name: sweep_batches
delete from comp_ai.batches where id in (
    select id from comp_ai.batches b
    where keep_until <= now()
      and not exists (
          select from comp_ai.legal_holds h where h.subject = b.owner and h.released_at is null)
      and status not in ('validating', 'in_progress', 'finalizing', 'cancelling')
    limit $1
    for update skip locked);

-- name: add_batch
insert into comp_ai.batches
    (id, owner, principal, api_key_id, endpoint, completion_window, input_file_id,
     output_expires_after_s, status, expires_at, keep_until, key_id, sealed)
select $1, $2::text, $3, $4, $5, $6, $7, $8, 'validating',
       now() + make_interval(secs => $9), now() + make_interval(secs => $10),
       $12::uuid, $13::bytea
where $11 > (
    select count(*) from comp_ai.batches
    where owner = $2::text
      and status in ('validating', 'in_progress', 'finalizing', 'cancelling'))
returning *;

-- name: find_batch
select * from comp_ai.batches where id = $1 and owner = $2;

-- name: list_batches
select * from comp_ai.batches
where owner = $1 and ($2::text is null or id < $2)
order by id desc limit $3;

-- name: cancel_batch
update comp_ai.batches set status = 'cancelling', cancelling_at = now()
where id = $1 and owner = $2 and status in ('validating', 'in_progress')
returning *;

-- name: count_lines
select batch_id,
       count(*) filter (where state = 'completed') as completed,
       count(*) filter (where state in ('failed', 'cancelled', 'expired')) as failed
from comp_ai.batch_lines where batch_id = any($1::text[]) group by batch_id;

-- name: open_batches
select id, owner, principal, endpoint, status, input_file_id, output_expires_after_s,
       expires_at <= now() as overdue,
       not exists (select 1 from comp_ai.batch_lines l
                   where l.batch_id = b.id and l.ready_at < 'infinity') as settled
from comp_ai.batches b
where status in ('validating', 'in_progress', 'finalizing', 'cancelling')
order by id limit 1000;

-- name: lock_batch
-- Until the end of the transaction: one gateway at a time works on a batch as a whole. Not the
-- row's own lock, behind which a client that cancels would have to wait.
select pg_try_advisory_xact_lock(hashtextextended('comp_ai.batches ' || $1, 0));

-- name: batch_status
select status from comp_ai.batches where id = $1;

-- name: add_lines
insert into comp_ai.batch_lines (batch_id, number, custom_id, key_id, sealed)
select $1, number, '', key_id, sealed
from unnest($2::integer[], $3::uuid[], $4::bytea[]) as line (number, key_id, sealed);

-- name: drop_lines
delete from comp_ai.batch_lines where batch_id = $1;

-- name: batch_words
select id, metadata, errors, key_id, sealed from comp_ai.batches where id = $1;

-- name: begin_batch
update comp_ai.batches
set status = 'in_progress', in_progress_at = now(), total = $2, model = $3
where id = $1 and status = 'validating' returning id;

-- name: fail_batch
update comp_ai.batches set status = 'failed', failed_at = now(), key_id = $2, sealed = $3,
    metadata = null
where id = $1 and status = 'validating' returning id;

-- name: claim_line
-- The claim of a gateway that died has ended, so its lines are taken like new ones.
with next as (
    select l.batch_id, l.number
    from comp_ai.batch_lines l
    where l.batch_id = $1 and l.ready_at <= now()
      and exists (select 1 from comp_ai.batches b
                  where b.id = $1 and b.status = 'in_progress' and b.expires_at > now())
    order by l.ready_at, l.number
    limit 1
    for update of l skip locked
)
update comp_ai.batch_lines l
set state = 'running', claim = gen_random_uuid(), ready_at = now() + make_interval(secs => $2)
from next
where l.batch_id = next.batch_id and l.number = next.number
returning l.batch_id, l.number, l.custom_id, l.body, l.key_id, l.sealed, l.claim, l.attempts,
    l.waits,
    exists (
        select 1 from comp_ai.batches b
        where b.id = l.batch_id and b.api_key_id is not null and not exists (
            select 1 from comp_ai.api_keys k
            where k.id = b.api_key_id and k.revoked_at is null
              and (k.expires_at is null or k.expires_at > now()))
    ) as revoked;

-- name: renew_claims
-- Those that come back are still held; the others are to be given up.
update comp_ai.batch_lines l
set ready_at = now() + make_interval(secs => $4)
from unnest($1::text[], $2::integer[], $3::uuid[]) as held (batch_id, number, claim)
join comp_ai.batches b on b.id = held.batch_id
where l.batch_id = held.batch_id and l.number = held.number and l.claim = held.claim
  and b.status = 'in_progress' and b.expires_at > now()
returning l.claim;

-- name: finish_line
update comp_ai.batch_lines
set state = $4, status_code = $5, request_id = $6, error_code = $7, error_message = $8,
    key_id = $9, sealed = $10, ready_at = 'infinity', claim = null, custom_id = '', body = null
where batch_id = $1 and number = $2 and claim = $3
returning number;

-- name: postpone_line
update comp_ai.batch_lines
set state = 'pending', claim = null, attempts = $4, waits = $5,
    ready_at = now() + make_interval(secs => $6)
where batch_id = $1 and number = $2 and claim = $3
returning number;

-- name: expire_batch
update comp_ai.batches set status = 'finalizing', finalizing_at = now(), expired_at = now()
where id = $1 and status in ('validating', 'in_progress') and expires_at <= now();

-- name: begin_finalizing
update comp_ai.batches set status = 'finalizing', finalizing_at = now()
where id = $1 and status = 'in_progress';

-- name: close_lines
-- Those that run at a living gateway are left to it: it gives them up at its next renewal.
with open as (
    select batch_id, number from comp_ai.batch_lines
    where batch_id = $1 and ready_at < 'infinity' and (state = 'pending' or ready_at <= now())
    for update skip locked
)
update comp_ai.batch_lines l
set state = $2, error_code = $3, error_message = $4, claim = null, body = null,
    ready_at = case when l.sealed is not null then 'infinity'::timestamptz end
from open where l.batch_id = open.batch_id and l.number = open.number;

-- name: lines_are_open
select exists (
    select 1 from comp_ai.batch_lines where batch_id = $1 and ready_at < 'infinity');

-- name: results
select batch_id, number, custom_id, state, status_code, request_id, response, error_code,
       error_message, key_id, sealed
from comp_ai.batch_lines where batch_id = $1 order by number;

-- name: end_batch
update comp_ai.batches
set output_file_id = $3, error_file_id = $4, completed = $5, failed = $6,
    status = case when status = 'cancelling' then 'cancelled'
                  when expired_at is not null then 'expired'
                  else 'completed' end,
    cancelled_at = case when status = 'cancelling' then now() end,
    completed_at = case when status = 'finalizing' and expired_at is null then now() end
where id = $1 and status = $2
returning id;
