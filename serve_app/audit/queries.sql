-- Named queries of the audit log; loaded by serve_app/audit/log.py.

-- name: lock_head
select seq, hash from comp_ai.audit_head for update;

-- name: append
insert into comp_ai.audit_log ({columns}) values ({places});

-- name: move_head
update comp_ai.audit_head set seq = $1, hash = $2;

-- name: head
select seq, hash from comp_ai.audit_head;

-- name: all_rows
select {columns} from comp_ai.audit_log order by seq;

-- name: page
-- `seq` beyond which the page lies, and how many rows it has.
select {columns} from comp_ai.audit_log
where ($1::text is null or actor_id = $1)
  and ($2::text is null or action = $2)
  and ($3::timestamptz is null or at >= $3)
  and ($4::timestamptz is null or at < $4)
  and ($5::bigint is null or seq {beyond} $5)
order by seq {order}
limit $6;

-- name: last_after
select after from comp_ai.audit_log where action = $1 order by seq desc limit 1;
