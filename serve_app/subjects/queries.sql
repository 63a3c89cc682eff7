-- Named queries of the rights of subjects; loaded by serve_app/subjects/.

-- name: keep_out_holds
-- Nobody sets a hold before the end of this transaction.
lock table comp_ai.legal_holds in share mode;

-- name: holds
select id, subject, reason, set_by, set_at, released_by, released_at
from comp_ai.legal_holds
where ($1::text is null or subject = $1) and ($2 or released_at is null)
order by set_at, id;

-- name: set_hold
insert into comp_ai.legal_holds (id, subject, reason, set_by)
values ($1, $2, $3, $4)
on conflict (subject) where released_at is null do nothing
returning id, subject, reason, set_by, set_at, released_by, released_at;

-- name: release_hold
update comp_ai.legal_holds set released_at = now(), released_by = $2
where subject = $1 and released_at is null
returning id, subject, reason, set_by, set_at, released_by, released_at;

-- name: wait_for_writers
-- Until the end of the transaction no writer of records is at work.
select pg_advisory_xact_lock(hashtextextended('comp_ai_keys.erasures', 0));

-- name: be_a_writer
-- Until the end of the transaction no erasure begins. A statement of its own, so that the next one
-- sees those that began before.
select pg_advisory_xact_lock_shared(hashtextextended('comp_ai_keys.erasures', 0));

-- name: any_erasure
select exists (select from comp_ai_keys.erasures);

-- name: erasures_of
select id, tag, pseudonym, erased_at, finished_at
from comp_ai_keys.erasures
where tag = any($1::bytea[])
order by erased_at;

-- name: begin_erasure
insert into comp_ai_keys.erasures (id, tag, pseudonym, erased_at)
values ($1, $2, $3, clock_timestamp())
returning id, tag, pseudonym, erased_at, finished_at;

-- name: finish_erasure
update comp_ai_keys.erasures set finished_at = coalesce(finished_at, now()) where id = $1
returning finished_at;

-- name: distinct_subjects
-- Every subject that some row names, an account of the limits with its name as it is written there.
select principal_id as subject from comp_ai.requests where principal_id is not null
union select principal_id from comp_ai.usage_pending
union select principal_id from comp_ai.usage_minute
union select principal_id from comp_ai.usage_hour
union select principal_id from comp_ai.usage_day
union select principal_id from comp_ai.responses
union select principal_id from comp_ai.idempotency_keys
union select owner from comp_ai.files
union select owner from comp_ai.batches
union select owner from comp_ai.api_keys
union select created_by from comp_ai.api_keys where created_by is not null
union select subject from comp_ai.legal_holds
union select set_by from comp_ai.legal_holds
union select released_by from comp_ai.legal_holds where released_by is not null;

-- name: limit_accounts
select distinct account from comp_ai.limit_usage where account ~ '^(principal|group-member|role-member):';
