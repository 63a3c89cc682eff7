-- Named queries of the keys of subjects; loaded by serve_app/accounts/sealing/subject_keys.py.

-- name: hold_keys
-- Until the end of the transaction nobody destroys them: an erasure waits for what is being
-- written, and what is written after it finds no key. Wrapping them anew does not wait.
select id, kind, subject, wrapped, master_key_id
from comp_ai_keys.subject_keys
where kind = $1 and subject = any($2::text[])
order by subject
for key share;

-- name: add_keys
-- In the order of the subjects, so that several writers do not wait for each other in a ring.
insert into comp_ai_keys.subject_keys (id, kind, subject, wrapped, master_key_id)
select id, $1, subject, wrapped, $2
from unnest($3::uuid[], $4::text[], $5::bytea[]) as new (id, subject, wrapped)
order by subject
on conflict (kind, subject) do nothing;

-- name: find_keys
select id, kind, subject, wrapped, master_key_id
from comp_ai_keys.subject_keys
where id = any($1::uuid[]);

-- name: destroy_keys
with destroyed as (
    delete from comp_ai_keys.subject_keys where kind = 'subject' and subject = $1 returning id
)
select count(*) from destroyed;

-- name: lock_outdated
-- Two rotations at once take different rows.
select id, kind, subject, wrapped, master_key_id
from comp_ai_keys.subject_keys
where master_key_id = any($1::text[])
order by id
limit $2
for no key update skip locked;

-- name: rewrap
update comp_ai_keys.subject_keys as keys
set wrapped = new.wrapped, master_key_id = $1, rewrapped_at = now()
from unnest($2::uuid[], $3::bytea[]) as new (id, wrapped)
where keys.id = new.id;

-- name: count_by_master
select master_key_id, count(*) as keys
from comp_ai_keys.subject_keys
group by master_key_id
order by master_key_id;
