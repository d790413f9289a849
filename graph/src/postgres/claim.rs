//! Leases: taking them, prolonging them, and reading what a run needs.

use std::time::Duration;

use sqlx::{PgConnection, Row};

use super::{
    history,
    rows::{self, Thread, select_threads, status_of_thread},
    threads,
    values::{Time, text},
};
use crate::{
    checkpoint::{
        AGING_S, Claim, ClaimRequest, Claimed, Lease, Loaded, Renewed, StorageError, StoredPart,
        Write,
    },
    ids::ThreadId,
    private::chain,
    stored::{self, Fault, int, micros, number},
};

/// When to look again for what is due but locked.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

pub(super) async fn claim(
    db: &mut PgConnection,
    request: &ClaimRequest<'_>,
) -> Result<Claimed, Fault> {
    let graphs: Vec<_> = request.graphs.iter().map(|graph| text(graph)).collect();
    // The first of each priority make up the head of the queue, in the order of the time since when they are due, to which
    // each lower priority adds. One row is answered at least, for the clock and the next due time. A thread that somebody else
    // has locked at the moment is left for the next look, and the one behind it comes instead: hence some more candidates than
    // are wanted, which are locked one after the other until there are enough. The lease of a thread that has one has expired:
    // its run died.
    let found = sqlx::query(select_threads!(
        "with head as ( \
             select q.thread, q.seen, q.due_at + p.rank * $5 * interval '1 second' as place \
             from unnest('{0,1,2,3}'::smallint[]) as p (rank) cross join lateral ( \
                 select thread, due_at, xmin as seen from graph_thread \
                 where priority = p.rank and due_at <= now() and graph = any ($1) order by due_at limit $2 + 64 \
             ) q order by 3, 1 limit $2 + 64 \
         ), due as ( \
             select t.thread, h.place, t.xmin = h.seen as unchanged from head h cross join lateral ( \
                 select thread, xmin from graph_thread where thread = h.thread and due_at <= now() for no key update skip locked \
             ) t limit $2 \
         ), claimed as ( \
             update graph_thread t set token = nextval('graph_token'), takeovers = t.takeovers + (t.owner is not null)::int, \
                 owner = $3, status = 1, due_at = now() + $4 * interval '1 microsecond', updated_at = now() \
             from due where t.thread = any (array[due.thread]) returning t.*, due.place, due.unchanged \
         ) ",
        ", case when (select count(*) from head) > (select count(*) from due) then 0 else ( \
             select (extract(epoch from min(n.due_at) - now()) * 1000000)::bigint \
             from unnest('{0,1,2,3}'::smallint[]) as p (rank) cross join lateral ( \
                 select due_at from graph_thread where priority = p.rank and due_at > now() and graph = any ($1) \
                 order by due_at limit 1 \
             ) n \
         ) end, t.last_signal, t.unread, t.thread is not null and exists ( \
             select 1 from graph_write w where w.thread = t.thread and w.checkpoint = t.checkpoint offset 0 \
         ), t.unchanged from (select 1) one left join claimed t on true order by t.place, t.thread"
    ))
    .bind(graphs)
    .bind(stored::rows(request.limit))
    .bind(text(request.owner))
    .bind(micros(request.lease))
    .bind(AGING_S)
    .fetch_all(db)
    .await?;
    let first = found.first().ok_or_else(|| StorageError::Corrupt {
        what: "the queue gave no answer".to_owned(),
    })?;
    let next_due: Option<i64> = first.try_get(24)?;
    let mut claims = Vec::with_capacity(found.len());
    for row in &found {
        if row.try_get::<Option<i64>, _>(20)?.is_none() {
            continue;
        }
        let (thread, unreadable) = match rows::thread_as_far(row) {
            Ok(read) => read,
            // Not even who it is. The others are run; it comes again when its lease has expired.
            Err(fault) => {
                let error = fault.during("claiming threads");
                tracing::error!(error = %chain(&error), "a claimed thread cannot be read at all");
                continue;
            }
        };
        // What an earlier run has written while this statement was under way is not seen by it, but the thread's row tells.
        let is_fresh = unreadable.is_none()
            && row.try_get::<bool, _>(28)?
            && thread.record.checkpoint == 0
            && row.try_get::<i32, _>(26)? == 0
            && !row.try_get::<bool, _>(27)?;
        let mail = number(row.try_get(25)?);
        claims.push(Claim {
            lease: Lease {
                thread: thread.record.id.clone(),
                token: thread.token,
            },
            takeovers: thread.takeovers,
            loaded: is_fresh.then(|| Box::new(Loaded::fresh(&thread.record, mail, thread.now))),
            thread: thread.record,
            unreadable,
        });
    }
    let next_due = next_due.map(|next| match next {
        // Somebody else is busy with it at the moment.
        0 if claims.len() < request.limit => LOOK_AGAIN,
        next => Duration::from_micros(number(next)),
    });
    Ok(Claimed {
        claims,
        next_due,
        now: first.try_get::<Time, _>(23)?.0,
    })
}

pub(super) async fn renew(
    db: &mut PgConnection,
    leases: &[Lease],
    lease: Duration,
) -> Result<Vec<Renewed>, Fault> {
    let ids: Vec<_> = leases.iter().map(|l| text(l.thread.as_str())).collect();
    let tokens: Vec<i64> = leases.iter().map(|l| int(l.token)).collect();
    // The rows are locked in the order of their ids, as everywhere.
    let found = sqlx::query(
        "with held as ( \
             select t.thread, b.ord from unnest($1::text[], $2::bigint[]) with ordinality b (id, token, ord) \
             join graph_thread t on t.id = b.id where t.token = b.token and t.owner is not null \
             order by t.id for no key update of t \
         ) \
         update graph_thread t set due_at = now() + $3 * interval '1 microsecond' \
         from held where t.thread = held.thread returning held.ord, t.cancel, t.revivals > 0",
    )
    .bind(ids)
    .bind(tokens)
    .bind(micros(lease))
    .fetch_all(db)
    .await?;
    let mut renewed: Vec<Renewed> = leases
        .iter()
        .map(|lease| Renewed {
            thread: lease.thread.clone(),
            held: false,
            cancel: None,
            input: false,
        })
        .collect();
    for row in &found {
        let at = usize::try_from(row.try_get::<i64, _>(0)? - 1).unwrap_or(usize::MAX);
        if let Some(renewed) = renewed.get_mut(at) {
            renewed.held = true;
            renewed.cancel = rows::optional(row, 1)?;
            renewed.input = row.try_get(2)?;
        }
    }
    Ok(renewed)
}

pub(super) async fn break_leases(db: &mut PgConnection, owner: &str) -> Result<u64, Fault> {
    // The rows are locked in the order of their ids, as everywhere.
    let broken = sqlx::query(
        "with held as ( \
             select thread from graph_thread where owner = $1 and due_at > now() order by id for no key update \
         ) \
         update graph_thread t set due_at = now() from held where t.thread = held.thread",
    )
    .bind(text(owner))
    .execute(db)
    .await?;
    Ok(broken.rows_affected())
}

/// One round trip for a thread that has just begun, and one more for each of what there is: checkpoints, pending writes,
/// signals. Not in one transaction: whatever changes meanwhile needs a newer token (and then nothing can be committed on what
/// was read), or is a signal, which is read with its number in one statement.
pub(super) async fn load(db: &mut PgConnection, lease: &Lease) -> Result<Loaded, Fault> {
    let fenced = || StorageError::Fenced {
        thread: lease.thread.clone(),
        token: lease.token,
    };
    let row = sqlx::query(select_threads!(
        ", t.last_signal, t.unread, \
             exists (select 1 from graph_write w where w.thread = t.thread and w.checkpoint = t.checkpoint offset 0) \
         from graph_thread t where t.id = $1 and t.token = $2"
    ))
    .bind(text(lease.thread.as_str()))
    .bind(int(lease.token))
    .fetch_optional(&mut *db)
    .await?
    .ok_or_else(fenced)?;
    let thread = rows::thread(&row)?;
    if thread.record.lease.is_none() {
        return Err(fenced().into());
    }
    let (branch, checkpoint) = (thread.record.branch, thread.record.checkpoint);
    let state = history::state_on(db, &thread, branch, checkpoint).await?;
    let writes = if row.try_get(26)? {
        writes(db, &thread).await?
    } else {
        Vec::new()
    };
    let (mailbox, mail) = if row.try_get::<i32, _>(25)? == 0 {
        (Vec::new(), number(row.try_get(24)?))
    } else {
        threads::mailbox(db, &lease.thread, 0).await?
    };
    Ok(Loaded {
        state,
        writes,
        mailbox,
        mail,
        now: thread.now,
        thread: thread.record,
    })
}

pub(super) async fn pending_writes(
    db: &mut PgConnection,
    thread: &ThreadId,
) -> Result<Vec<Write>, Fault> {
    let found = history::known(db, thread).await?;
    writes(db, &found).await
}

async fn writes(db: &mut PgConnection, thread: &Thread) -> Result<Vec<Write>, Fault> {
    let checkpoint = thread.record.checkpoint;
    let unreadable =
        |fault: Fault| fault.in_part(&thread.record.id, StoredPart::Writes(checkpoint));
    sqlx::query(
        "select task, kind, name, round, value from graph_write where thread = $1 and checkpoint = $2 \
         order by task collate \"C\", kind, name collate \"C\", round",
    )
    .bind(thread.key)
    .bind(int(checkpoint))
    .fetch_all(db)
    .await?
    .iter()
    .map(|row| rows::write(row).map_err(unreadable))
    .collect()
}
