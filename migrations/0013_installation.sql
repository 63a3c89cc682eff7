-- Which installation this is. Made once and in every backup, so that the key ring beside the
-- backups of one installation is never overwritten with that of another, as of a fresh database
-- that was started in the place of a lost one.
create table comp_ai.installation (
    only_row    boolean      primary key default true check (only_row),
    id          uuid         not null default gen_random_uuid(),
    created_at  timestamptz  not null default now()
);
insert into comp_ai.installation default values;
