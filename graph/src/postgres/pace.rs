//! One statement for what most supersteps have beside their checkpoint (signals that they consume, events), for the ends of
//! threads, and for new threads. `graph_land` can do that as well; this touches each thread's row once, and is no procedure.

use sqlx::{PgConnection, Row, postgres::PgDatabaseError};

use super::{
    job::{Answer, CommitJob, Head, Job, More, StartRow, narrow},
    land::{Answers, Events, count, group, list, start_answer, started},
    step::receipt,
    values::{Time, plain},
};
use crate::{
    checkpoint::StorageError,
    stored::{Fault, number},
};

/// The code of the error with which the statement gives up because of what `graph_land` can do only.
const BEYOND: &str = "GR002";

/// Everything comes in columns, as in `graph_land`. What is written depends on `own`, so that all threads are locked (in the
/// order of their ids) before anything else is; then come new threads, then streams, in the order of their names. In the end the
/// statement is given up if a commit was refused (then the caller leaves it out), or if a consumed signal was not there or is
/// one that revives.
const PACE: &str = "with u as ( \
         update graph_thread t set \
             checkpoint = t.last_checkpoint + 1, last_checkpoint = t.last_checkpoint + 1, step = b.step, takeovers = 0, \
             updated_at = now(), unread = t.unread - b.used, \
             waits = case when b.waits then t.waits end, \
             owner = case when b.status is null then t.owner end, \
             status = coalesce(b.status, t.status), \
             wake_at = case when b.status is null then t.wake_at end, \
             due_at = case when b.status is null then t.due_at when t.revivals > 0 then now() end, \
             error = case when b.status is null then t.error else b.error end, \
             output = case when b.status is null then t.output else b.output end, \
             cancel = case when b.status is null then t.cancel end \
         from unnest($1::text[], $2::bigint[], $3::int[], $4::int[], $5::int[], $6::text[], $7::jsonb[], $8::jsonb[], \
             $9::jsonb[], $10::int[], $11::bool[], $12::smallint[], $13::text[], $14::jsonb[]) with ordinality \
             as b (id, token, parent, branch, step, plan, appends, changes, snapshot, used, waits, status, error, output, ord) \
         where t.id = any (array[b.id]) and t.token = b.token and t.owner is not null \
             and t.branch = b.branch and t.checkpoint = b.parent \
         returning b.ord, b.parent, b.branch, b.step, b.plan, b.appends, b.changes, b.snapshot, \
             t.thread, t.checkpoint, t.last_signal, t.cancel \
     ), own as ( \
         select count(*) as n, array_agg(ord order by ord) as good, array_agg(thread order by ord) as threads, \
             array_agg(checkpoint order by ord) as made, array_agg(last_signal order by ord) as mail, \
             array_agg(cancel order by ord) as cancelled from u \
     ), i as ( \
         insert into graph_checkpoint (thread, number, parent, branch, step, plan, appends, changes, snapshot) \
         select thread, checkpoint, parent, branch, step, plan::json, appends, changes, snapshot from u \
     ), gone as ( \
         update graph_signal s set payload = null from ( \
             select k.place from own, unnest($15::int[], $16::bigint[]) as x (op, number) cross join lateral ( \
                 select g.ctid as place from graph_signal g \
                 where g.thread = own.threads[x.op] and g.number = x.number and g.payload is not null offset 0 \
             ) k \
         ) x where s.ctid = x.place returning s.revives \
     ), born as ( \
         insert into graph_thread (id, graph, parent, parent_name, priority, input, owner, status, token, due_at) \
         select n.id, n.graph, n.parent, n.parent_name, n.priority, n.input, n.owner, \
             case when n.owner is null then 0 else 1 end, \
             case when n.owner is null then 0 else nextval('graph_token') end, \
             now() + coalesce(n.lease, 0) * interval '1 microsecond' \
         from unnest($24::text[], $25::text[], $26::text[], $27::text[], $28::smallint[], $29::jsonb[], $30::text[], \
             $31::bigint[]) as n (id, graph, parent, parent_name, priority, input, owner, lease) \
         where (select n from own) >= 0 \
         order by n.id on conflict (id) do nothing returning id, token \
     ), spoken as ( \
         insert into graph_stream as s (name, last) select g.name, g.count from unnest($17::text[], $18::int[]) as g (name, count) \
         where case when $17 is null then false \
             else (select count(*) from born) >= 0 and (select graph_announce_cursors()) is null is not null end \
         on conflict (name) do update set last = s.last + excluded.last returning s.stream, s.name, s.last \
     ), lasts as ( \
         select array_agg(stream order by name) as streams, array_agg(last order by name) as lasts from spoken \
     ), said as ( \
         insert into graph_journal (stream, number, name, payload, thread) \
         select l.streams[e.stream], l.lasts[e.stream] - ($18::int[])[e.stream] + e.nth, e.name, e.payload, e.thread \
         from lasts l, unnest($19::int[], $20::int[], $21::text[], $22::jsonb[], $23::text[]) \
             as e (stream, nth, name, payload, thread) \
     ) \
     select now(), own.made, own.mail, own.cancelled, \
         (select array_agg(id order by id) from born), (select array_agg(token order by id) from born), \
         case when own.n < coalesce(cardinality($1), 0) then graph_refuse('GR001', own.good::text) \
             when (select count(*) filter (where not revives) from gone) < coalesce(cardinality($15), 0) \
                 then graph_refuse('GR002', null) end \
     from own";

/// Jobs of which this statement can do each.
pub(super) struct Light<'a> {
    jobs: &'a [&'a Job],
    commits: Vec<(&'a CommitJob, &'a Head)>,
    more: Vec<(i32, &'a More)>,
    starts: Vec<&'a StartRow>,
}

pub(super) fn light<'a>(jobs: &'a [&'a Job]) -> Option<Light<'a>> {
    let mut light = Light {
        jobs,
        commits: Vec::with_capacity(jobs.len()),
        more: Vec::new(),
        starts: Vec::new(),
    };
    for job in jobs {
        match job {
            Job::Start(row) => light.starts.push(row),
            Job::Commit(commit) => {
                // What comes from elsewhere than a superstep may consume what revives.
                let head = commit.head.as_ref().filter(|head| head.source.is_none())?;
                light.commits.push((commit, head));
                if let Some(more) = &commit.more {
                    let op = i32::try_from(light.commits.len()).ok()?;
                    more.is_light().then(|| light.more.push((op, more)))?;
                }
            }
            Job::Signal(_) => return None,
        }
    }
    Some(light)
}

impl<'a> Light<'a> {
    fn heads<T>(&self, of: impl Fn(&'a CommitJob, &'a Head) -> T) -> Option<Vec<T>> {
        group(
            self.commits
                .iter()
                .map(|(commit, head)| of(commit, head))
                .collect(),
        )
    }

    fn each<T>(&self, of: impl Fn(Option<&'a More>) -> T) -> Option<Vec<T>> {
        self.heads(|commit, _| of(commit.more.as_ref()))
    }

    fn starts<T>(&self, of: impl Fn(&'a StartRow) -> T) -> Option<Vec<T>> {
        group(self.starts.iter().map(|row| of(row)).collect())
    }

    fn used<T>(&self, of: impl Fn(i32, i64) -> T) -> Option<Vec<T>> {
        let mut used = Vec::new();
        for (op, more) in &self.more {
            used.extend(more.consumed.iter().map(|number| of(*op, *number)));
        }
        group(used)
    }

    /// Nothing: it turned out that only `graph_land` can do it, and nothing has changed.
    pub async fn land(&self, db: &mut PgConnection) -> Result<Option<Answers>, Fault> {
        let ending = |more: Option<&'a More>| more.filter(|more| more.then == 3);
        let events = Events::of(&self.more);
        let speaks = !events.streams.is_empty();
        let result = sqlx::query(PACE)
            .bind(self.heads(|commit, _| commit.id.as_str()))
            .bind(self.heads(|commit, _| commit.token))
            .bind(self.heads(|_, head| narrow(head.parent)))
            .bind(self.heads(|_, head| narrow(head.branch.into())))
            .bind(self.heads(|_, head| narrow(head.step)))
            .bind(self.heads(|_, head| head.plan.as_text()))
            .bind(self.heads(|_, head| head.appends.as_ref()))
            .bind(self.heads(|_, head| head.changes.as_ref()))
            .bind(self.heads(|_, head| head.snapshot.as_ref()))
            .bind(self.each(|more| more.map_or(0, |more| count(&more.consumed))))
            .bind(self.each(|more| more.is_none_or(|more| more.then == 0 && more.waits.is_none())))
            .bind(self.each(|more| ending(more).map(|more| more.status)))
            .bind(self.each(|more| ending(more)?.error.as_deref()))
            .bind(self.each(|more| ending(more)?.output.as_ref()))
            .bind(self.used(|op, _| op))
            .bind(self.used(|_, number| number))
            .bind(speaks.then_some(&events.streams))
            .bind(speaks.then_some(&events.counts))
            .bind(speaks.then_some(&events.stream))
            .bind(speaks.then_some(&events.nth))
            .bind(speaks.then_some(&events.name))
            .bind(speaks.then_some(&events.payload))
            .bind(speaks.then_some(&events.thread))
            .bind(self.starts(|row| row.id.as_str()))
            .bind(self.starts(|row| row.graph.as_str()))
            .bind(self.starts(|row| row.parent.as_deref()))
            .bind(self.starts(|row| row.parent_name.as_deref()))
            .bind(self.starts(|row| row.priority))
            .bind(self.starts(|row| &row.input))
            .bind(self.starts(StartRow::owner))
            .bind(self.starts(StartRow::lease))
            .fetch_one(db)
            .await;
        let row = match result {
            Ok(row) => row,
            Err(error) if is_beyond(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let now: Time = row.try_get(0)?;
        let made: Vec<i32> = list(&row, 1)?;
        let mail: Vec<i64> = list(&row, 2)?;
        let cancelled: Vec<Option<String>> = list(&row, 3)?;
        let started = started(&row, 4)?;
        let mut receipts = made.into_iter().zip(mail).zip(cancelled);
        let short = || StorageError::Corrupt {
            what: "a shared commit gave too few answers".to_owned(),
        };
        let answers = self.jobs.iter().map(|job| match job {
            Job::Commit(commit) => {
                let ((made, mail), cancel) = receipts.next().ok_or_else(short)?;
                let mut receipt = receipt(number(made.into()), mail, cancel.map(plain), now);
                receipt.released = ending(commit.more.as_ref()).is_some();
                Ok(Ok(Answer::Committed(receipt)))
            }
            Job::Start(row) => Ok(Ok(start_answer(row, &started, now))),
            Job::Signal(_) => Err(short()),
        });
        Ok(Some(answers.collect::<Result<_, StorageError>>()?))
    }
}

/// Whether a statement was given up because of what `graph_land` can do only.
pub(super) fn is_beyond(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        .is_some_and(|error| error.code() == BEYOND)
}
