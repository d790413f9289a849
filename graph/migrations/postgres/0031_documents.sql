-- Long-term memory beside threads. A path is the labels of the namespace, each followed by the character 31.
create table graph_document (
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    expires_at timestamptz,
    -- Microseconds.
    ttl        bigint,
    path       text        collate "C" not null,
    key        text        collate "C" not null,
    value      jsonb       not null,
    primary key (path, key)
);

create index graph_document_expiry on graph_document (expires_at) where expires_at is not null;
