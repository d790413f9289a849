-- Results of nodes, by a digest of the graph and the node, and one of the key. May be emptied at any time.

create table graph_cache (
    rowid      integer primary key autoincrement,
    space      blob    not null,
    key        blob    not null,
    -- Null: never.
    expires_at integer,
    size       integer not null,
    value      text    not null
) strict;

create unique index graph_cache_key on graph_cache (space, key);
create index graph_cache_age on graph_cache (space, rowid, size);
create index graph_cache_expiry on graph_cache (expires_at) where expires_at is not null;
