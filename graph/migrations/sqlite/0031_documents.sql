-- Long-term memory beside threads. A path is the labels of the namespace, each followed by the character 31.
create table graph_document (
    path       text    not null,
    key        text    not null,
    value      text    not null,
    created_at integer not null,
    updated_at integer not null,
    -- Microseconds.
    ttl        integer,
    expires_at integer,
    primary key (path, key)
) strict;

create index graph_document_expiry on graph_document (expires_at) where expires_at is not null;
