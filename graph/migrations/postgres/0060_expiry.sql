-- Questions that can be answered until a time: an answer that comes later is refused, by the database's clock.

-- Whether these waits of these threads are open, but their time has passed.
create function graph_expired(threads_ text[], waits_ text[]) returns boolean[] language sql strict as $$
    select array_agg(
        case when a.wait is null then false else exists (
            select 1 from graph_thread t cross join jsonb_array_elements(t.waits) w
                where t.id = a.thread and w ->> 'id' = a.wait and (w ->> 'until')::timestamptz <= clock_timestamp()
        ) end order by a.ord)
    from unnest(threads_, waits_) with ordinality as a (thread, wait, ord)
$$;

-- The same waits, but with a name that no wait has in the place of those.
create function graph_open_waits(threads_ text[], waits_ text[]) returns text[] language sql strict as $$
    select array_agg(case when a.expired then '' else a.wait end order by a.ord)
    from unnest(waits_, graph_expired(threads_, waits_)) with ordinality as a (wait, expired, ord)
$$;

-- Puts a signal into a mailbox. Returns 'new', 'duplicate', 'no wait', 'expired', 'full' or 'unknown'.
create or replace function graph_send(
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
    if wait_ is not null and (graph_expired(array[id_], array[wait_]))[1] then
        return 'expired';
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
