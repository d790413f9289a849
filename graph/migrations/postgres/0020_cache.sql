-- Results of nodes, by a digest of the graph and the node, and one of the key. May be emptied at any time, so it is not logged:
-- a crash of the server empties it, and writing to it waits for no disk.

create unlogged table graph_cache (
    space      uuid        not null,
    key        uuid        not null,
    put_at     timestamptz not null default clock_timestamp(),
    -- Null: never.
    expires_at timestamptz,
    size       integer     not null,
    -- Nobody but the engine reads it.
    value      json        not null,
    primary key (space, key)
);

create index graph_cache_age on graph_cache (space, put_at);
create index graph_cache_expiry on graph_cache (expires_at) where expires_at is not null;
