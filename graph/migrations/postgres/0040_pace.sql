-- Threads that are created with a lease; less to compute with each row; and what nobody calls any more goes.

drop function graph_commit(jsonb);

-- The place in the queue was a computed column, which the server looked up in every statement that writes to a thread, however
-- little it did with it. The queue is short for each of the four priorities, so it can be put in order when it is looked at.
drop index graph_thread_due;
alter table graph_thread drop column urgency;
drop function graph_urgency(timestamptz, smallint);
create index graph_thread_due on graph_thread (priority, due_at) where due_at is not null;

-- Gives a whole statement up: what it has changed is as if it had not been.
create function graph_refuse(code_ text, detail_ text) returns boolean language plpgsql as $$
begin
    raise exception 'refused' using errcode = code_, detail = coalesce(detail_, '{}');
end $$;

drop function graph_land(text[], text[], bigint[], integer[], integer[], integer[], text[], text[], jsonb[],
    jsonb[], jsonb[], integer[], integer[], smallint[], boolean[], integer[], jsonb[], bigint[], timestamptz[],
    smallint[], text[], jsonb[], integer[], integer[], uuid[], text[], smallint[], text[], bigint[], jsonb[], integer[],
    bigint[], text[], text[], text[], text[], smallint[], jsonb[], integer[], text[], uuid[], text[], text[], jsonb[],
    boolean[], text[], bigint, text[], text[], text[], integer[], integer[], integer[], text[], jsonb[], text[]);

-- Commits of any kind, new threads (with a lease, or without) and signals from outside, all in one transaction: whatever waits
-- at the same moment.
--
-- Everything comes in columns; a column group is null when there is nothing of its kind. `c_` are the commits, in the order
-- of their threads' ids, no thread twice. `x_` is what only some of them have (`x_op` is the commit's place in `c_`, from 1),
-- `w_` pending writes, `u_` used signals, `n_` new threads, `s_` signals, `k_` requests to cancel, `g_` the streams that are
-- spoken to, in the order of their names, and `e_` the events. In `n_` and `s_` an `op` of 0 is somebody outside.
--
-- Rows are locked in one order: threads by their ids, then streams by their names. So when a commit reaches other threads, or
-- somebody outside sends a signal, all of them are locked first (`lock_`, in order); else the commits' own update does it.
--
-- A lease that is not good, or a checkpoint that does not stand on the tip, refuses the whole call (GR001, with the places
-- of the commits that are good): the caller leaves the bad ones out and calls again.
--
-- Each statement is planned once and for all, maybe when a table is nearly empty, and must not go through all of it when it has
-- grown. So who is looked for always leads: `= any (array[x])` can be looked up in an index, but not merged or hashed; where a
-- partial index could be walked from end to end, a lateral subquery with `offset 0` is what the planner does not take apart.
create function graph_land(
    lock_ text[],
    c_id text[], c_token bigint[], c_parent integer[], c_branch integer[], c_step integer[], c_source text[],
    c_plan text[], c_appends jsonb[], c_changes jsonb[], c_snapshot jsonb[],
    -- What becomes of the lease: 0 it is kept, 1 yield, 2 wait, 3 end.
    x_op integer[], x_base integer[], x_then smallint[], x_clear boolean[], x_used integer[], x_waits jsonb[],
    x_mail_seen bigint[], x_wake_at timestamptz[], x_status smallint[], x_error text[], x_output jsonb[],
    w_op integer[], w_base integer[], w_digest uuid[], w_task text[], w_kind smallint[], w_name text[], w_round bigint[],
    w_value jsonb[],
    u_op integer[], u_number bigint[],
    n_id text[], n_graph text[], n_parent text[], n_parent_name text[], n_priority smallint[], n_input jsonb[],
    -- The lease with which it is created, if it is: whose, and for how many microseconds.
    n_owner text[], n_lease bigint[],
    s_op integer[], s_thread text[], s_digest uuid[], s_kind text[], s_key text[], s_payload jsonb[], s_revives boolean[],
    s_wait text[], s_limit bigint,
    k_thread text[], k_reason text[],
    g_name text[], g_count integer[],
    e_stream integer[], e_nth integer[], e_name text[], e_payload jsonb[], e_thread text[],
    out at timestamptz,
    -- Of each commit.
    out made integer[], out mail bigint[], out cancelled text[],
    -- Of each of `x_`, in no order: its `op`, and what is true of it in the end.
    out ended integer[], out released boolean[], out ended_mail bigint[], out ended_cancelled text[],
    -- The ids in `n_` that are new, and their tokens.
    out started text[], out tokens bigint[],
    -- Of each signal: 0 new, 1 duplicate, 2 no wait, 3 full, 4 unknown.
    out sent integer[]
) language plpgsql as $$
#variable_conflict use_column
declare
    -- Of each commit: the thread's number.
    threads bigint[];
    good integer[];
    used_op integer[];
    used_revives boolean[];
    streams bigint[];
    lasts bigint[];
begin
    at := now();
    if lock_ is not null then
        perform 1 from graph_thread where id = any (lock_) order by id for no key update;
    end if;

    if c_id is not null then
        with u as (
            update graph_thread t set
                checkpoint = case when b.branch is null then t.checkpoint else t.last_checkpoint + 1 end,
                last_checkpoint = t.last_checkpoint + (b.branch is not null)::integer,
                step = coalesce(b.step, t.step),
                takeovers = case when b.branch is null then t.takeovers else 0 end,
                updated_at = now()
            from unnest(c_id, c_token, c_parent, c_branch, c_step, c_source, c_plan, c_appends, c_changes, c_snapshot)
                with ordinality as b (id, token, parent, branch, step, source, plan, appends, changes, snapshot, op)
            where t.id = any (array[b.id]) and t.token = b.token and t.owner is not null
                and (b.branch is null or (t.branch = b.branch and t.checkpoint = b.parent))
            returning b.*, t.thread, t.checkpoint, t.last_signal, t.cancel
        ), i as (
            insert into graph_checkpoint (thread, number, parent, branch, step, source, plan, appends, changes, snapshot)
                select thread, checkpoint, parent, branch, step, source, plan::json, appends, changes, snapshot
                from u where branch is not null
        )
        select array_agg(op order by op), array_agg(thread order by op),
            array_agg(case when branch is null then 0 else checkpoint end order by op),
            array_agg(last_signal order by op), array_agg(cancel order by op)
            into good, threads, made, mail, cancelled
            from u;
        if good is null or cardinality(good) < cardinality(c_id) then
            raise exception 'refused' using errcode = 'GR001', detail = coalesce(good, '{}')::text;
        end if;
    end if;

    if true = any (x_clear) then
        delete from graph_write w using unnest(x_op, x_base, x_clear) as x (op, base, clear)
            where x.clear and w.thread = any (array[threads[x.op]]) and w.checkpoint = any (array[x.base]);
    end if;
    if w_op is not null then
        insert into graph_write (thread, checkpoint, digest, task, kind, name, round, value)
            select threads[w.op], case when made[w.op] > 0 then made[w.op] else w.base end,
                w.digest, w.task, w.kind, w.name, w.round, w.value
            from unnest(w_op, w_base, w_digest, w_task, w_kind, w_name, w_round, w_value)
                as w (op, base, digest, task, kind, name, round, value)
            on conflict (thread, checkpoint, digest) do update set value = excluded.value;
    end if;

    if u_op is not null then
        with gone as (
            update graph_signal s set payload = null from (
                select u.op, k.place from unnest(u_op, u_number) as u (op, number) cross join lateral (
                    select g.ctid as place from graph_signal g
                    where g.thread = threads[u.op] and g.number = u.number and g.payload is not null offset 0
                ) k
            ) u where s.ctid = u.place returning u.op, s.revives
        )
        select array_agg(op), array_agg(revives) into used_op, used_revives from gone;
        -- What follows counts on all of them having been there, and on none that revives; both are rarely wrong.
        if coalesce(cardinality(used_op), 0) < cardinality(u_op) or true = any (used_revives) then
            update graph_thread t set unread = t.unread + r.missed, revivals = t.revivals - r.revivals
                from (
                    select op, sum(missed)::integer as missed, sum(revivals)::integer as revivals from (
                        select op, used as missed, 0 as revivals from unnest(x_op, x_used) as x (op, used) where used > 0
                        union all
                        select op, -1, revives::integer from unnest(used_op, used_revives) as x (op, revives)
                    ) counts group by op
                ) r where t.thread = any (array[threads[r.op]]);
        end if;
    end if;

    if n_id is not null then
        with fresh as (
            insert into graph_thread (id, graph, parent, parent_name, priority, input, owner, status, token, due_at)
                select n.id, n.graph, n.parent, n.parent_name, n.priority, n.input, n.owner,
                    case when n.owner is null then 0 else 1 end,
                    case when n.owner is null then 0 else nextval('graph_token') end,
                    now() + coalesce(n.lease, 0) * interval '1 microsecond'
                from unnest(n_id, n_graph, n_parent, n_parent_name, n_priority, n_input, n_owner, n_lease) with ordinality
                    as n (id, graph, parent, parent_name, priority, input, owner, lease, ord)
                order by n.id, n.ord
                on conflict (id) do nothing
                returning id, token
        )
        select array_agg(id), array_agg(token) into started, tokens from fresh;
    end if;

    if s_thread is not null then
        with given as (
            select s.*, t.thread, t.last_signal, t.unread,
                case
                    when t.thread is null then 4
                    when exists (
                        select 1 from graph_signal g where g.thread = t.thread and g.digest = s.digest offset 0) then 1
                    when s.wait is not null
                        and not coalesce(t.waits @> jsonb_build_array(jsonb_build_object('id', s.wait)), false) then 2
                    else 0 end as outcome
                from unnest(s_op, s_thread, s_digest, s_kind, s_key, s_payload, s_revives, s_wait) with ordinality
                    as s (op, id, digest, kind, key, payload, revives, wait, ord)
                left join graph_thread t on t.id = any (array[s.id])
        ), firsts as (
            select *, row_number() over (partition by thread, digest, outcome order by ord) as nth from given
        ), placed as (
            select *, row_number() over (partition by thread, outcome, nth = 1 order by ord) as place from firsts
        ), told as (
            select *, case
                when outcome <> 0 then outcome
                when nth > 1 then 1
                when op = 0 and unread + place > s_limit then 3
                else 0 end as verdict
                from placed
        ), arrived as (
            insert into graph_signal (thread, digest, number, revives, kind, key, payload)
                select thread, digest, last_signal + place, revives, kind, key, payload from told where verdict = 0
                returning thread, revives
        ), noted as (
            update graph_thread t set
                last_signal = t.last_signal + a.all_, unread = t.unread + a.all_, revivals = t.revivals + a.revivals,
                due_at = graph_due_on_arrival(t.due_at, t.owner, t.status, a.revivals > 0), updated_at = now()
                from (
                    select thread, count(*)::integer as all_, (count(*) filter (where revives))::integer as revivals
                    from arrived group by thread
                ) a where t.thread = any (array[a.thread])
        )
        select array_agg(verdict order by ord) into sent from told;
    end if;

    if k_thread is not null then
        update graph_thread t set
            cancel = r.reason, due_at = graph_due_on_arrival(t.due_at, t.owner, t.status, false), updated_at = now()
            from (
                select distinct on (k.thread) k.thread, k.reason
                from unnest(k_thread, k_reason) with ordinality as k (thread, reason, ord) order by k.thread, k.ord
            ) r
            where t.id = any (array[r.thread]) and t.status < 3 and t.cancel is null;
    end if;

    if g_name is not null then
        perform graph_announce_cursors();
        with spoken as (
            insert into graph_stream as s (name, last) select g.name, g.count from unnest(g_name, g_count) as g (name, count)
                on conflict (name) do update set last = s.last + excluded.last
                returning s.stream, s.name, s.last
        )
        select array_agg(stream order by name), array_agg(last order by name) into streams, lasts from spoken;
        insert into graph_journal (stream, number, name, payload, thread)
            select streams[e.stream], lasts[e.stream] - g_count[e.stream] + e.nth, e.name, e.payload, e.thread
            from unnest(e_stream, e_nth, e_name, e_payload, e_thread) as e (stream, nth, name, payload, thread);
    end if;

    if x_op is not null then
        with u as (
            update graph_thread t set
                takeovers = case when j.released then 0 else t.takeovers end,
                unread = t.unread - x.used,
                waits = case
                    when x.then_ = 3 then null
                    when x.waits is not null then nullif(x.waits, '[]')
                    else t.waits end,
                owner = case when not j.released then t.owner end,
                status = case when not j.released then t.status else (array[0, 2, x.status])[x.then_]::smallint end,
                wake_at = case when not j.released then t.wake_at when x.then_ = 2 then x.wake_at end,
                due_at = case
                    when not j.released then t.due_at
                    when x.then_ = 1 or (x.then_ = 3 and t.revivals > 0) then now()
                    when x.then_ = 2 then x.wake_at end,
                error = case when x.then_ = 3 then x.error else t.error end,
                output = case when x.then_ = 3 then x.output else t.output end,
                cancel = case when x.then_ = 3 then null else t.cancel end
            from unnest(x_op, x_then, x_used, x_waits, x_mail_seen, x_wake_at, x_status, x_error, x_output)
                as x (op, then_, used, waits, mail_seen, wake_at, status, error, output)
            join graph_thread r on r.thread = any (array[threads[x.op]])
            cross join lateral (
                select case x.then_
                    when 0 then false
                    when 2 then r.cancel is null and not (r.last_signal > x.mail_seen and exists (
                        select 1 from graph_signal g
                        where g.thread = r.thread and g.payload is not null and g.number > x.mail_seen offset 0))
                    else true end as released
            ) j
            where t.thread = any (array[r.thread])
            returning x.op, j.released, t.last_signal, t.cancel
        )
        select array_agg(op), array_agg(released), array_agg(last_signal), array_agg(cancel)
            into ended, released, ended_mail, ended_cancelled
            from u;
    end if;
end $$;
