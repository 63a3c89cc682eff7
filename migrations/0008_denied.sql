-- Which permission or model a request was refused for; each such row has one in the audit log.
alter table comp_ai.requests add column denied text;

comment on column comp_ai.requests.denied is
    'the permission, or model:<name>, that the principal lacks; null where none was refused';
