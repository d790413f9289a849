-- Threads, their history, their mailboxes, and the journal.
--
-- Times are microseconds since 1970, UTC. JSON is text. Digests are the first 16 bytes of a SHA-256, so that a key of any
-- length costs an index entry of one size. Every write happens in a transaction that began with BEGIN IMMEDIATE: there is
-- one writer at a time, so numbers are handed out without gaps and in the order of the commits.

create table graph_counter (
    name  text primary key,
    value integer not null
) strict, without rowid;

-- Fencing tokens grow over all threads, so that a thread that was deleted and made again never repeats one.
insert into graph_counter (name, value) values ('token', 0);

create table graph_thread (
    thread          integer primary key autoincrement,
    id              text    not null unique,
    graph           text    not null,
    parent          text,
    parent_name     text,
    priority        integer not null,
    status          integer not null default 0,
    branch          integer not null default 0,
    checkpoint      integer not null default 0,
    step            integer not null default 0,
    last_checkpoint integer not null default 0,
    branches        integer not null default 1,
    last_signal     integer not null default 0,
    unread          integer not null default 0,
    revivals        integer not null default 0,
    token           integer not null default 0,
    takeovers       integer not null default 0,
    owner           text,
    -- Since when, or from when on, it may be claimed. While it is leased: when the lease expires. Null: not until something
    -- arrives.
    due_at          integer,
    urgency         integer generated always as (due_at + priority * 30000000) virtual,
    wake_at         integer,
    created_at      integer not null,
    updated_at      integer not null,
    cancel          text,
    error           text,
    waits           text,
    output          text
) strict;

create index graph_thread_due on graph_thread (urgency) where due_at is not null;
create index graph_thread_parent on graph_thread (parent, id) where parent is not null;

-- Apart from the thread, whose row is written with every step.
create table graph_input (
    thread integer primary key,
    input  text not null
) strict;

create table graph_branch (
    thread      integer not null,
    branch      integer not null,
    from_branch integer not null,
    checkpoint  integer not null,
    primary key (thread, branch)
) strict, without rowid;

create table graph_checkpoint (
    rowid    integer primary key,
    thread   integer not null,
    number   integer not null,
    branch   integer not null,
    parent   integer not null,
    step     integer not null,
    at       integer not null,
    -- Null: a superstep. 'input', or 'update:' and the node.
    source   text,
    plan     text    not null,
    appends  text,
    changes  text,
    snapshot text
) strict;

create unique index graph_checkpoint_number on graph_checkpoint (thread, number);

create table graph_write (
    rowid      integer primary key,
    thread     integer not null,
    checkpoint integer not null,
    digest     blob    not null,
    task       text    not null,
    kind       integer not null,
    name       text    not null,
    round      integer not null,
    value      text    not null
) strict;

create unique index graph_write_key on graph_write (thread, checkpoint, digest);

-- A consumed signal keeps its key for ever, and loses its payload.
create table graph_signal (
    rowid   integer primary key,
    thread  integer not null,
    number  integer not null,
    digest  blob    not null,
    revives integer not null,
    kind    text    not null,
    key     text    not null,
    payload text
) strict;

create unique index graph_signal_key on graph_signal (thread, digest);
create index graph_signal_unread on graph_signal (thread, number) where payload is not null;

create table graph_stream (
    stream integer primary key,
    name   text    not null unique,
    last   integer not null
) strict;

create table graph_journal (
    cursor  integer primary key autoincrement,
    stream  integer not null,
    number  integer not null,
    at      integer not null,
    name    text    not null,
    thread  text,
    digest  blob,
    payload text    not null
) strict;

-- With the cursor, as every index here: it is the row id.
create index graph_journal_stream on graph_journal (stream);
create index graph_journal_thread on graph_journal (thread) where thread is not null;
create unique index graph_journal_digest on graph_journal (digest) where digest is not null;
