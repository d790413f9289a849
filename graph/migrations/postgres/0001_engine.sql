-- Threads, their history, their mailboxes, and the journal.
--
-- Every write to what belongs to a thread holds a lock on the thread's row, so numbers are handed out without gaps, and the
-- rows need no foreign keys (a check of one in every step would cost more than the step). Rows of several threads are
-- locked in the order of their ids; threads before streams. Digests are the first 16 bytes of a SHA-256, so that a key of
-- any length costs an index entry of one size.

-- Fencing tokens grow over all threads, so that a thread that was deleted and made again never repeats one.
create sequence graph_token;
create sequence graph_cursor;

-- The place of a due thread in the queue: each lower rank counts like 30 seconds less of waiting. Immutable, because a
-- span of seconds is the same in every time zone.
create function graph_urgency(due_at timestamptz, priority smallint) returns timestamptz
language sql immutable as $$ select due_at + priority * interval '30 seconds' $$;

create table graph_thread (
    thread          bigint      generated always as identity primary key,
    created_at      timestamptz not null default now(),
    updated_at      timestamptz not null default now(),
    token           bigint      not null default 0,
    last_signal     bigint      not null default 0,
    -- Since when, or from when on, it may be claimed. While it is leased: when the lease expires. Null: not until
    -- something arrives.
    due_at          timestamptz,
    urgency         timestamptz generated always as (graph_urgency(due_at, priority)) stored,
    wake_at         timestamptz,
    checkpoint      integer     not null default 0,
    step            integer     not null default 0,
    last_checkpoint integer     not null default 0,
    branch          integer     not null default 0,
    branches        integer     not null default 1,
    unread          integer     not null default 0,
    revivals        integer     not null default 0,
    takeovers       integer     not null default 0,
    priority        smallint    not null,
    status          smallint    not null default 0,
    id              text        collate "C" not null unique,
    graph           text        not null,
    parent          text        collate "C",
    parent_name     text,
    owner           text,
    cancel          text,
    error           text,
    waits           jsonb,
    output          jsonb,
    input           jsonb       not null
    -- Half-empty pages: a step updates the row in its page, and touches no index.
) with (fillfactor = 50);

create index graph_thread_due on graph_thread (urgency) where due_at is not null;
create index graph_thread_parent on graph_thread (parent, id) where parent is not null;

create table graph_branch (
    thread      bigint  not null,
    branch      integer not null,
    from_branch integer not null,
    checkpoint  integer not null,
    primary key (thread, branch)
);

create table graph_checkpoint (
    thread   bigint      not null,
    at       timestamptz not null default now(),
    number   integer     not null,
    parent   integer     not null,
    branch   integer     not null,
    step     integer     not null,
    -- Null: a superstep. 'input', or 'update:' and the node.
    source   text,
    -- Nobody but the engine reads it; as text it is half the size.
    plan     json        not null,
    appends  jsonb,
    changes  jsonb,
    snapshot jsonb,
    primary key (thread, number)
);

create table graph_write (
    thread     bigint   not null,
    digest     uuid     not null,
    checkpoint integer  not null,
    kind       smallint not null,
    round      bigint   not null,
    task       text     not null,
    name       text     not null,
    value      jsonb    not null,
    primary key (thread, checkpoint, digest)
);

-- A consumed signal keeps its key for ever, and loses its payload.
create table graph_signal (
    thread  bigint  not null,
    digest  uuid    not null,
    number  bigint  not null,
    revives boolean not null,
    kind    text    not null,
    key     text    not null,
    payload jsonb,
    primary key (thread, digest)
);

create index graph_signal_unread on graph_signal (thread, number) where payload is not null;

create table graph_stream (
    stream bigint generated always as identity primary key,
    last   bigint not null,
    name   text   collate "C" not null unique
) with (fillfactor = 50);

create table graph_journal (
    cursor  bigint      primary key default nextval('graph_cursor'),
    stream  bigint      not null,
    number  bigint      not null,
    at      timestamptz not null default now(),
    digest  uuid,
    name    text        not null,
    thread  text        collate "C",
    payload jsonb       not null
);

create index graph_journal_stream on graph_journal (stream, cursor);
create index graph_journal_thread on graph_journal (thread, cursor) where thread is not null;
create unique index graph_journal_digest on graph_journal (digest) where digest is not null;

-- When an arrival makes a thread due: not while it is leased (its run will see it), nor when it has ended (unless the
-- arrival revives it).
create function graph_due_on_arrival(due_at timestamptz, owner text, status smallint, revives boolean) returns timestamptz
language sql stable as $$
    select case when owner is not null or (status >= 3 and not revives) then due_at else least(due_at, now()) end
$$;

-- The journal's cursors are handed out before the transactions that use them commit, in another order. So a writer says,
-- before it takes cursors, that it will take some above the newest one: with an advisory lock, which its end releases.
-- A reader goes only up to where no such announcement stands; see graph_journal_horizon.
create function graph_announce_cursors() returns void language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(
        'graph_journal'::regclass::oid::bigint::bit(32)::int,
        (select (case when is_called then last_value else 0 end & x'3fffffff'::bigint)::int from graph_cursor));
end $$;

-- Up to where the journal is complete: whatever has a cursor up to here is visible to statements that start later, or was
-- rolled back. The order of the statements matters, and so does it that each sees what is committed when it starts.
create function graph_journal_horizon() returns bigint language plpgsql as $$
declare
    newest bigint;
    oldest bigint;
begin
    select case when is_called then last_value else 0 end into newest from graph_cursor;
    -- The lock holds the low 30 bits of a cursor near `newest`; one above it (its writer came later) does not matter.
    select min(newest - distance) into oldest from (
        select (newest - l.objid::bigint) & x'3fffffff'::bigint as distance
        from pg_locks l
        where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
            and l.database = (select oid from pg_database where datname = current_database())
            and l.classid = 'graph_journal'::regclass::oid
    ) announced where distance < x'20000000'::bigint;
    return least(newest, oldest);
end $$;

create function graph_read_journal(after_ bigint, limit_ bigint, streams_ text[], thread_ text)
returns table (cursor bigint, stream text, number bigint, name text, payload jsonb, thread text, at timestamptz)
language plpgsql as $$
#variable_conflict use_column
declare
    horizon bigint := graph_journal_horizon();
begin
    if streams_ is not null then
        return query
            select j.cursor, s.name, j.number, j.name, j.payload, j.thread, j.at
            from graph_stream s cross join lateral (
                select * from graph_journal i
                where i.stream = s.stream and i.cursor > after_ and i.cursor <= horizon
                    and (thread_ is null or i.thread = thread_)
                order by i.cursor limit limit_
            ) j
            where s.name = any (streams_)
            order by j.cursor limit limit_;
    elsif thread_ is not null then
        return query
            select j.cursor, s.name, j.number, j.name, j.payload, j.thread, j.at
            from graph_journal j join graph_stream s on s.stream = j.stream
            where j.thread = thread_ and j.cursor > after_ and j.cursor <= horizon
            order by j.cursor limit limit_;
    else
        return query
            select j.cursor, s.name, j.number, j.name, j.payload, j.thread, j.at
            from graph_journal j join graph_stream s on s.stream = j.stream
            where j.cursor > after_ and j.cursor <= horizon
            order by j.cursor limit limit_;
    end if;
end $$;

create function graph_journal_end() returns bigint language plpgsql as $$
declare
    horizon bigint := graph_journal_horizon();
begin
    return coalesce((select max(j.cursor) from graph_journal j where j.cursor <= horizon), 0);
end $$;

-- Appends one entry that is unique by its digest. Returns whether it is new.
create function graph_append(digest_ uuid, stream_ text, name_ text, payload_ jsonb, thread_ text) returns boolean
language plpgsql as $$
declare
    s graph_stream;
begin
    if exists (select 1 from graph_journal j where j.digest = digest_) then
        return false;
    end if;
    perform graph_announce_cursors();
    insert into graph_stream as st (name, last) values (stream_, 1)
        on conflict (name) do update set last = st.last + 1 returning * into s;
    insert into graph_journal (stream, number, digest, name, payload, thread)
        values (s.stream, s.last, digest_, name_, payload_, thread_)
        on conflict (digest) where digest is not null do nothing;
    if found then
        return true;
    end if;
    -- Somebody else appended it meanwhile, to another stream; this stream is locked, so its number can be given back.
    update graph_stream set last = last - 1 where stream = s.stream;
    return false;
end $$;

-- Puts a signal into a mailbox. Returns 'new', 'duplicate', 'no wait', 'full' or 'unknown'.
create function graph_send(
    id_ text, digest_ uuid, kind_ text, key_ text, payload_ jsonb, revives_ boolean, wait_ text, limit_ bigint
) returns text language plpgsql as $$
declare
    t graph_thread;
begin
    select * into t from graph_thread where id = id_ for no key update;
    if not found then
        return 'unknown';
    end if;
    if exists (select 1 from graph_signal s where s.thread = t.thread and s.digest = digest_) then
        return 'duplicate';
    end if;
    if wait_ is not null and not coalesce(t.waits @> jsonb_build_array(jsonb_build_object('id', wait_)), false) then
        return 'no wait';
    end if;
    if t.unread >= limit_ then
        return 'full';
    end if;
    insert into graph_signal (thread, digest, number, revives, kind, key, payload)
        values (t.thread, digest_, t.last_signal + 1, revives_, kind_, key_, payload_);
    update graph_thread set
        last_signal = last_signal + 1, unread = unread + 1, revivals = revivals + revives_::int, updated_at = now(),
        due_at = graph_due_on_arrival(due_at, owner, status, revives_)
        where thread = t.thread;
    return 'new';
end $$;

-- All that a superstep, a suspension or an end writes, if the lease is good. Everything is refused before anything is
-- written. The document's fields are those of the commit; what is empty is left out. JSON's null becomes SQL's in records,
-- hence the many coalesce: a value may well be null.
create function graph_commit(
    d jsonb,
    out refused text, out made integer, out released boolean, out mail bigint, out cancelled text,
    out undelivered text[], out at timestamptz
) language plpgsql as $$
#variable_conflict use_column
declare
    own graph_thread;
    c jsonb := d -> 'checkpoint';
    -- What becomes of the lease: 0 it is kept, 1 yield, 2 wait, 3 end.
    then_ integer := (d ->> 'then')::integer;
    used integer := 0;
    used_revivals integer := 0;
begin
    at := now();
    released := false;
    if d ? 'others' then
        perform 1 from graph_thread
            where id = d ->> 'id' or id = any (array(select jsonb_array_elements_text(d -> 'others')))
            order by id for no key update;
    end if;
    select * into own from graph_thread where id = d ->> 'id' for no key update;
    if not found or own.token <> (d ->> 'token')::bigint or own.owner is null then
        refused := 'fenced';
        return;
    end if;
    mail := own.last_signal;
    cancelled := own.cancel;

    if c is not null then
        if (c ->> 'branch')::bigint <> own.branch or (c ->> 'parent')::bigint <> own.checkpoint then
            refused := 'tip';
            return;
        end if;
        made := own.last_checkpoint + 1;
        insert into graph_checkpoint (thread, number, parent, branch, step, source, plan, appends, changes, snapshot)
            values (own.thread, made, own.checkpoint, own.branch, (c ->> 'step')::integer, c ->> 'source', c -> 'plan',
                c -> 'appends', c -> 'changes', c -> 'snapshot');
    end if;

    if d ? 'clear' then
        delete from graph_write where thread = own.thread and checkpoint = (d ->> 'base')::integer;
    end if;
    if d ? 'writes' then
        insert into graph_write (thread, checkpoint, digest, task, kind, name, round, value)
            select own.thread, coalesce(made, (d ->> 'base')::integer), w.digest, w.task, w.kind, w.name, w.round,
                coalesce(w.value, 'null')
            from jsonb_to_recordset(d -> 'writes')
                as w (digest uuid, task text, kind smallint, name text, round bigint, value jsonb)
            on conflict (thread, checkpoint, digest) do update set value = excluded.value;
    end if;

    if d ? 'consumed' then
        with gone as (
            update graph_signal set payload = null
                where thread = own.thread and payload is not null
                    and number = any (array(select jsonb_array_elements_text(d -> 'consumed')::bigint))
                returning revives
        )
        select count(*), count(*) filter (where revives) into used, used_revivals from gone;
    end if;

    if d ? 'children' then
        insert into graph_thread (id, graph, parent, parent_name, priority, due_at, input)
            select n.id, n.graph, n.parent, n.parent_name, n.priority, now(), coalesce(n.input, 'null')
            from jsonb_to_recordset(d -> 'children')
                as n (id text, graph text, parent text, parent_name text, priority smallint, input jsonb)
            order by n.id
            on conflict (id) do nothing;
    end if;

    if d ? 'signals' then
        select array_agg(s.thread order by s.ord) into undelivered from (
            select e.value ->> 'thread' as thread, min(e.ord) as ord
            from jsonb_array_elements(d -> 'signals') with ordinality e (value, ord) group by 1
        ) s where not exists (select 1 from graph_thread t where t.id = s.thread);
        with fresh as (
            select distinct on (t.thread, s.digest)
                t.thread, t.last_signal, s.digest, s.kind, s.key, s.payload, s.revives, s.ord
            from rows from (
                jsonb_to_recordset(d -> 'signals')
                    as (thread text, digest uuid, kind text, key text, payload jsonb, revives boolean)
            ) with ordinality as s (thread, digest, kind, key, payload, revives, ord)
            join graph_thread t on t.id = s.thread
            where not exists (select 1 from graph_signal g where g.thread = t.thread and g.digest = s.digest)
            order by t.thread, s.digest, s.ord
        ), arrived as (
            insert into graph_signal (thread, digest, number, revives, kind, key, payload)
                select f.thread, f.digest, f.last_signal + row_number() over (partition by f.thread order by f.ord),
                    f.revives, f.kind, f.key, coalesce(f.payload, 'null')
                from fresh f
                returning thread, revives
        )
        update graph_thread t set
            last_signal = t.last_signal + a.all_, unread = t.unread + a.all_, revivals = t.revivals + a.revivals,
            due_at = graph_due_on_arrival(t.due_at, t.owner, t.status, a.revivals > 0), updated_at = now()
            from (
                select thread, count(*)::integer as all_, (count(*) filter (where revives))::integer as revivals
                from arrived group by thread
            ) a where t.thread = a.thread;
    end if;

    if d ? 'cancels' then
        update graph_thread t set
            cancel = r.reason, due_at = graph_due_on_arrival(t.due_at, t.owner, t.status, false), updated_at = now()
            from (
                select distinct on (x.thread) x.thread, x.reason from rows from (
                    jsonb_to_recordset(d -> 'cancels') as (thread text, reason text)
                ) with ordinality as x (thread, reason, ord) order by x.thread, x.ord
            ) r
            where t.id = r.thread and t.status < 3 and t.cancel is null;
    end if;

    if d ? 'events' then
        perform graph_announce_cursors();
        with said as (
            select e.value ->> 'stream' as stream, e.value as v, e.ord,
                row_number() over (partition by e.value ->> 'stream' order by e.ord) as nth
            from jsonb_array_elements(d -> 'events') with ordinality e (value, ord)
        ), streams as (
            insert into graph_stream as s (name, last)
                select stream, count(*) from said group by stream order by stream
                on conflict (name) do update set last = s.last + excluded.last
                returning s.stream, s.name, s.last
        )
        insert into graph_journal (stream, number, name, payload, thread)
            select s.stream, s.last - max(nth) over (partition by s.stream) + nth, v ->> 'name', v -> 'payload',
                v ->> 'thread'
            from said join streams s on s.name = said.stream
            order by ord;
    end if;

    if d ? 'signals' or d ? 'cancels' then
        select t.last_signal, t.cancel into mail, cancelled from graph_thread t where t.thread = own.thread;
    end if;
    if then_ = 2 then
        released := cancelled is null and not (mail > (d ->> 'mail_seen')::bigint and exists (
            select 1 from graph_signal
            where thread = own.thread and payload is not null and number > (d ->> 'mail_seen')::bigint));
    else
        released := then_ <> 0;
    end if;

    update graph_thread t set
        checkpoint = coalesce(made, t.checkpoint), last_checkpoint = coalesce(made, t.last_checkpoint),
        step = coalesce((c ->> 'step')::integer, t.step),
        takeovers = case when made is not null or released then 0 else t.takeovers end,
        unread = t.unread - used, revivals = t.revivals - used_revivals,
        waits = case
            when then_ = 3 then null
            when d ? 'waits' then nullif(d -> 'waits', '[]')
            else t.waits end,
        updated_at = now()
        where t.thread = own.thread;
    if released then
        update graph_thread t set
            owner = null,
            status = case then_ when 1 then 0 when 2 then 2 else (d ->> 'status')::smallint end,
            wake_at = case when then_ = 2 then (d ->> 'wake_at')::timestamptz end,
            due_at = case
                when then_ = 1 or (then_ = 3 and t.revivals > 0) then now()
                when then_ = 2 then (d ->> 'wake_at')::timestamptz end,
            error = case when then_ = 3 then d ->> 'error' else t.error end,
            output = case when then_ = 3 then d -> 'output' else t.output end,
            cancel = case when then_ = 3 then null else t.cancel end
            where t.thread = own.thread;
        if then_ = 3 then
            cancelled := null;
        end if;
    end if;
end $$;
