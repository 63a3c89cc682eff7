-- Rights of data subjects: legal holds, and the erasures that were made. A subject is the id of a
-- principal. Beside the previous release: it knows neither table.

create table comp_ai.legal_holds (
    id           uuid          primary key,
    subject      varchar(255)  not null,
    reason       text          not null,
    set_by       text          not null,
    set_at       timestamptz   not null default now(),
    released_by  text,
    released_at  timestamptz,
    check ((released_at is null) = (released_by is null))
);

comment on table comp_ai.legal_holds is
    'whose rows neither retention removes nor an erasure touches, while released_at is null';
create unique index legal_holds_in_force on comp_ai.legal_holds (subject)
    where released_at is null;

-- Apart from comp_ai, so that a backup of that schema does not bring an older state of it back.
create schema if not exists comp_ai_keys;

create table comp_ai_keys.erasures (
    id           uuid         primary key,
    tag          bytea        not null check (octet_length(tag) = 32),
    pseudonym    text         not null unique,
    erased_at    timestamptz  not null,
    finished_at  timestamptz
);

comment on column comp_ai_keys.erasures.tag is
    'HMAC-SHA-256 of the subject, under a key of the service that the master key wraps: the row '
    'names nobody';
comment on column comp_ai_keys.erasures.pseudonym is 'random; stands in the place of the subject';
comment on column comp_ai_keys.erasures.erased_at is
    'what was made until then is erased; what the subject does afterwards is its own again';
comment on column comp_ai_keys.erasures.finished_at is
    'null: it was broken off, and goes on when it is asked for again';
create index erasures_by_tag on comp_ai_keys.erasures (tag, erased_at);
