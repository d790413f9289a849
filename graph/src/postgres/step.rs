//! The statements of a superstep that is written alone, and that of any number of those that are nothing but their checkpoints.

use sqlx::{PgConnection, Row, postgres::PgRow};

use super::{
    job::{Answer, CommitJob, Head, narrow},
    land::{Answers, group},
    pace::is_beyond,
    rows::{optional, wide},
    values::{Jsonb, Time, text},
};
use crate::{
    checkpoint::{Receipt, StorageError},
    stored::{Fault, number},
};

pub(super) fn receipt(checkpoint: u64, mail: i64, cancel: Option<String>, now: Time) -> Receipt {
    Receipt {
        checkpoint: Some(checkpoint),
        released: false,
        mail: number(mail),
        cancel,
        undelivered: Vec::new(),
        now: now.0,
    }
}

/// A row of what the two statements below answer.
fn step_receipt(row: &PgRow) -> Result<Receipt, Fault> {
    Ok(receipt(
        wide(row, 0)?,
        row.try_get(1)?,
        optional(row, 2)?,
        row.try_get(3)?,
    ))
}

/// The fence, the head and the checkpoint in one statement.
pub(super) async fn step(db: &mut PgConnection, commit: &CommitJob) -> Result<Answers, Fault> {
    let Some(head) = &commit.head else {
        return Ok(vec![Err(commit.fenced())]);
    };
    let found = sqlx::query(
        "with u as ( \
             update graph_thread t set checkpoint = t.last_checkpoint + 1, last_checkpoint = t.last_checkpoint + 1, \
                 step = $5, takeovers = 0, updated_at = now() \
             where t.id = $1 and t.token = $2 and t.owner is not null and t.branch = $4 and t.checkpoint = $3 \
             returning t.thread, t.checkpoint, t.last_signal, t.cancel \
         ), i as ( \
             insert into graph_checkpoint (thread, number, parent, branch, step, source, plan, appends, changes, snapshot) \
             select thread, checkpoint, $3, $4, $5, $6, $7::text::json, $8, $9, $10 from u \
         ) \
         select checkpoint, last_signal, cancel, now() from u",
    )
    .bind(&commit.id)
    .bind(commit.token)
    .bind(narrow(head.parent))
    .bind(narrow(head.branch.into()))
    .bind(narrow(head.step))
    .bind(&head.source)
    .bind(head.plan.as_text())
    .bind(&head.appends)
    .bind(&head.changes)
    .bind(&head.snapshot)
    .fetch_optional(&mut *db)
    .await?;
    let answer = match &found {
        Some(row) => Ok(Answer::Committed(step_receipt(row)?)),
        None => Err(Box::pin(refusal(db, commit)).await?),
    };
    Ok(vec![answer])
}

/// One commit that has signals that it consumes, events in one stream, or its thread's end beside its checkpoint. Much less to
/// prepare for the server than what takes any number of them; see [`pace`](super::pace) for why it reads as it does.
const LONE: &str = "with u as ( \
         update graph_thread t set checkpoint = t.last_checkpoint + 1, last_checkpoint = t.last_checkpoint + 1, \
             step = $5, takeovers = 0, updated_at = now(), unread = t.unread - coalesce(cardinality($14), 0), \
             waits = case when $10 then t.waits end, \
             owner = case when $11 is null then t.owner end, \
             status = coalesce($11, t.status), \
             wake_at = case when $11 is null then t.wake_at end, \
             due_at = case when $11 is null then t.due_at when t.revivals > 0 then now() end, \
             error = case when $11 is null then t.error else $12 end, \
             output = case when $11 is null then t.output else $13 end, \
             cancel = case when $11 is null then t.cancel end \
         where t.id = $1 and t.token = $2 and t.owner is not null and t.branch = $4 and t.checkpoint = $3 \
         returning t.thread, t.checkpoint, t.last_signal, t.cancel \
     ), i as ( \
         insert into graph_checkpoint (thread, number, parent, branch, step, plan, appends, changes, snapshot) \
         select thread, checkpoint, $3, $4, $5, $6::text::json, $7, $8, $9 from u \
     ), gone as ( \
         update graph_signal s set payload = null from ( \
             select k.place from u, unnest($14::bigint[]) as x (number) cross join lateral ( \
                 select g.ctid as place from graph_signal g \
                 where g.thread = u.thread and g.number = x.number and g.payload is not null offset 0 \
             ) k \
         ) x where s.ctid = x.place returning s.revives \
     ), spoken as ( \
         insert into graph_stream as s (name, last) select $15, cardinality($16) from u \
         where case when $15 is null then false else (select graph_announce_cursors()) is null is not null end \
         on conflict (name) do update set last = s.last + excluded.last returning s.stream, s.last \
     ), said as ( \
         insert into graph_journal (stream, number, name, payload, thread) \
         select l.stream, l.last - cardinality($16) + e.nth, e.name, e.payload, e.thread \
         from spoken l, unnest($16::text[], $17::jsonb[], $18::text[]) with ordinality as e (name, payload, thread, nth) \
     ) \
     select checkpoint, last_signal, cancel, now(), \
         case when (select count(*) filter (where not revives) from gone) < coalesce(cardinality($14), 0) \
             then graph_refuse('GR002', null) end \
     from u";

/// Whether [`lone`] can do it.
pub(super) fn is_lone(commit: &CommitJob) -> bool {
    let Some(more) = &commit.more else {
        return false;
    };
    let stream = more.events.first().map(|event| &event.stream);
    // What comes from elsewhere than a superstep may consume what revives.
    commit
        .head
        .as_ref()
        .is_some_and(|head| head.source.is_none())
        && more.is_light()
        && more
            .events
            .iter()
            .all(|event| Some(&event.stream) == stream)
}

/// Nothing: it turned out that only `graph_land` can do it, and nothing has changed.
pub(super) async fn lone(
    db: &mut PgConnection,
    commit: &CommitJob,
) -> Result<Option<Answers>, Fault> {
    let (Some(head), Some(more)) = (&commit.head, &commit.more) else {
        return Ok(None);
    };
    let ends = more.then == 3;
    let stream = more.events.first().map(|event| &event.stream);
    let names: Vec<&str> = more.events.iter().map(|event| &*event.name).collect();
    let payloads: Vec<&Jsonb> = more.events.iter().map(|event| &event.payload).collect();
    let threads: Vec<_> = more.events.iter().map(|e| e.thread.as_deref()).collect();
    let result = sqlx::query(LONE)
        .bind(&commit.id)
        .bind(commit.token)
        .bind(narrow(head.parent))
        .bind(narrow(head.branch.into()))
        .bind(narrow(head.step))
        .bind(head.plan.as_text())
        .bind(&head.appends)
        .bind(&head.changes)
        .bind(&head.snapshot)
        .bind(!ends && more.waits.is_none())
        .bind(ends.then_some(more.status))
        .bind(&more.error)
        .bind(&more.output)
        .bind(group(more.consumed.clone()))
        .bind(stream)
        .bind(group(names))
        .bind(group(payloads))
        .bind(group(threads))
        .fetch_optional(&mut *db)
        .await;
    let answer = match result {
        Ok(Some(row)) => Ok(Answer::Committed(Receipt {
            released: ends,
            ..step_receipt(&row)?
        })),
        Ok(None) => Err(Box::pin(refusal(db, commit)).await?),
        Err(error) if is_beyond(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(vec![answer]))
}

/// Checkpoints alone, many of them: who is refused finds no row, writes nothing, and the others do not notice.
pub(super) async fn step_all(
    db: &mut PgConnection,
    steps: &[(&CommitJob, &Head)],
) -> Result<Answers, Fault> {
    fn column<'a, T>(
        steps: &[(&'a CommitJob, &'a Head)],
        of: impl Fn(&'a CommitJob, &'a Head) -> T,
    ) -> Vec<T> {
        steps
            .iter()
            .map(|(commit, head)| of(commit, head))
            .collect()
    }
    let found = sqlx::query(
        "with u as ( \
             update graph_thread t set checkpoint = t.last_checkpoint + 1, last_checkpoint = t.last_checkpoint + 1, \
                 step = b.step, takeovers = 0, updated_at = now() \
             from unnest($1::text[], $2::bigint[], $3::int[], $4::int[], $5::int[], $6::text[], $7::text[], $8::jsonb[], \
                 $9::jsonb[], $10::jsonb[]) with ordinality \
                 as b (id, token, parent, branch, step, source, plan, appends, changes, snapshot, ord) \
             where t.id = any (array[b.id]) and t.token = b.token and t.owner is not null \
                 and t.branch = b.branch and t.checkpoint = b.parent \
             returning b.*, t.thread, t.checkpoint, t.last_signal, t.cancel \
         ), i as ( \
             insert into graph_checkpoint (thread, number, parent, branch, step, source, plan, appends, changes, snapshot) \
             select thread, checkpoint, parent, branch, step, source, plan::json, appends, changes, snapshot from u \
         ) \
         select checkpoint, last_signal, cancel, now(), ord from u",
    )
    .bind(column(steps, |commit, _| commit.id.as_str()))
    .bind(column(steps, |commit, _| commit.token))
    .bind(column(steps, |_, head| narrow(head.parent)))
    .bind(column(steps, |_, head| narrow(head.branch.into())))
    .bind(column(steps, |_, head| narrow(head.step)))
    .bind(column(steps, |_, head| head.source.as_deref()))
    .bind(column(steps, |_, head| head.plan.as_text()))
    .bind(column(steps, |_, head| head.appends.as_ref()))
    .bind(column(steps, |_, head| head.changes.as_ref()))
    .bind(column(steps, |_, head| head.snapshot.as_ref()))
    .fetch_all(&mut *db)
    .await?;
    let mut receipts: Vec<Option<Receipt>> = steps.iter().map(|_| None).collect();
    for row in &found {
        let at = usize::try_from(row.try_get::<i64, _>(4)? - 1).unwrap_or(usize::MAX);
        if let Some(receipt) = receipts.get_mut(at) {
            *receipt = Some(step_receipt(row)?);
        }
    }
    let mut answers = Vec::with_capacity(steps.len());
    for ((commit, _), receipt) in steps.iter().zip(receipts) {
        answers.push(match receipt {
            Some(receipt) => Ok(Answer::Committed(receipt)),
            None => Err(Box::pin(refusal(db, commit)).await?),
        });
    }
    Ok(answers)
}

/// Why a commit was refused: its lease is not good, or it does not stand on the tip.
pub(super) async fn refusal(
    db: &mut PgConnection,
    commit: &CommitJob,
) -> Result<StorageError, sqlx::Error> {
    if commit.head.is_none() {
        return Ok(commit.fenced());
    }
    let holds = sqlx::query_scalar(
        "select exists (select 1 from graph_thread where id = $1 and token = $2 and owner is not null)",
    )
    .bind(text(commit.lease.thread.as_str()))
    .bind(commit.token)
    .fetch_one(db)
    .await?;
    Ok(commit.refusal(holds))
}
