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
