//! Writes jobs with the statement that does the least for them: those of [`step`] for one superstep, or for many that are nothing
//! but checkpoints; that of [`pace`] for what most supersteps, starts and ends have; and the one here for everything.

use std::collections::{BTreeMap, HashMap};

use sqlx::{PgConnection, Row, postgres::PgRow};

use super::{
    DEADLOCK_ATTEMPTS, is_transient,
    job::{Answer, CommitJob, Head, Job, More, SignalRow, StartRow, narrow},
    pace,
    step::{self, receipt},
    threads,
    values::{Jsonb, Time, plain},
};
use crate::{
    checkpoint::{Created, MAILBOX_LIMIT, SignalOutcome, StorageError},
    stored::{Fault, int, number},
};

/// The code of the error with which `graph_land` refuses.
pub(super) const REFUSED: &str = "GR001";

/// The answers, in the order of the jobs.
pub(super) type Answers = Vec<Result<Answer, StorageError>>;

/// Writes jobs in one transaction. No two of them clash, and commits come in the order of their threads.
pub(super) async fn land(db: &mut PgConnection, jobs: &[&Job]) -> Result<Answers, Fault> {
    let mut attempt = 1;
    loop {
        match once(db, jobs).await {
            Err(Fault::Database(error)) if attempt < DEADLOCK_ATTEMPTS && is_transient(&error) => {
                attempt += 1;
            }
            result => return result,
        }
    }
}

async fn once(db: &mut PgConnection, jobs: &[&Job]) -> Result<Answers, Fault> {
    match jobs {
        [Job::Start(row)] => Ok(vec![Ok(threads::create(db, row).await?)]),
        [Job::Signal(signal)] => {
            let outcome = threads::signal(db, signal).await?;
            Ok(vec![Ok(Answer::Signalled(outcome))])
        }
        [Job::Commit(commit)] if commit.more.is_none() => step::step(db, commit).await,
        [Job::Commit(commit)] if step::is_lone(commit) => match step::lone(db, commit).await? {
            Some(answers) => Ok(answers),
            None => Box::pin(everything(db, jobs)).await,
        },
        // In boxes, because these are large, and what comes before them is moved about with each commit.
        _ => match bare(jobs) {
            Some(steps) => Box::pin(step::step_all(db, &steps)).await,
            None => Box::pin(mixed(db, jobs)).await,
        },
    }
}

async fn mixed(db: &mut PgConnection, jobs: &[&Job]) -> Result<Answers, Fault> {
    if let Some(light) = pace::light(jobs)
        && let Some(answers) = light.land(db).await?
    {
        return Ok(answers);
    }
    everything(db, jobs).await
}

/// The commits, if all jobs are commits of no more than a checkpoint.
fn bare<'a>(jobs: &[&'a Job]) -> Option<Vec<(&'a CommitJob, &'a Head)>> {
    jobs.iter()
        .map(|job| match job {
            Job::Commit(commit) if commit.more.is_none() => {
                Some((&**commit, commit.head.as_ref()?))
            }
            _ => None,
        })
        .collect()
}

/// A group of columns, as the database takes it: nothing when there is no row.
pub(super) fn group<T>(column: Vec<T>) -> Option<Vec<T>> {
    (!column.is_empty()).then_some(column)
}

/// The commits among the jobs, each with its place from 1.
struct Columns<'a> {
    commits: Vec<&'a CommitJob>,
    more: Vec<(i32, &'a More)>,
    /// New threads, those from outside first.
    starts: Vec<&'a StartRow>,
    /// Signals, those of commits first: an outsider's may find the mailbox full.
    signals: Vec<(i32, &'a SignalRow, Option<&'a str>)>,
    events: Events<'a>,
    lock: Option<Vec<&'a str>>,
}

/// Events, numbered within their streams.
#[derive(Default)]
pub(super) struct Events<'a> {
    pub streams: Vec<&'a str>,
    pub counts: Vec<i32>,
    /// The stream's place from 1.
    pub stream: Vec<i32>,
    pub nth: Vec<i32>,
    pub name: Vec<&'a str>,
    pub payload: Vec<&'a Jsonb>,
    pub thread: Vec<Option<&'a str>>,
}

impl<'a> Events<'a> {
    pub fn of(more: &[(i32, &'a More)]) -> Self {
        let events = || more.iter().flat_map(|(_, more)| &more.events);
        let mut places: BTreeMap<&str, i32> =
            events().map(|event| (event.stream.as_str(), 0)).collect();
        for (place, index) in places.values_mut().zip(1..) {
            *place = index;
        }
        let mut all = Self {
            streams: places.keys().copied().collect(),
            counts: vec![0; places.len()],
            ..Self::default()
        };
        for event in events() {
            let place = places.get(event.stream.as_str()).copied().unwrap_or(0);
            let mut nth = 0;
            if let Some(count) = usize::try_from(place - 1)
                .ok()
                .and_then(|index| all.counts.get_mut(index))
            {
                *count += 1;
                nth = *count;
            }
            all.stream.push(place);
            all.nth.push(nth);
            all.name.push(&event.name);
            all.payload.push(&event.payload);
            all.thread.push(event.thread.as_deref());
        }
        all
    }
}

impl<'a> Columns<'a> {
    fn of(jobs: &[&'a Job]) -> Self {
        let commits: Vec<&CommitJob> = jobs
            .iter()
            .filter_map(|job| match job {
                Job::Commit(commit) => Some(&**commit),
                _ => None,
            })
            .collect();
        let more: Vec<(i32, &More)> = commits
            .iter()
            .zip(1..)
            .filter_map(|(commit, op)| Some((op, commit.more.as_ref()?)))
            .collect();
        let mut starts: Vec<&StartRow> = Vec::new();
        let mut outside = Vec::new();
        for job in jobs {
            match job {
                Job::Start(row) => starts.push(row),
                Job::Signal(signal) => outside.push((0, &signal.row, signal.wait.as_deref())),
                Job::Commit(_) => {}
            }
        }
        starts.extend(more.iter().flat_map(|(_, more)| &more.children));
        let mut signals: Vec<_> = more
            .iter()
            .flat_map(|(op, more)| more.signals.iter().map(|row| (*op, row, None)))
            .collect();
        signals.extend(outside);
        let reached = signals
            .iter()
            .map(|(_, row, _)| row.thread.as_str())
            .chain(cancels(&more).map(|(thread, _)| thread.as_str()));
        let mut lock: Vec<&str> = reached.collect();
        if !lock.is_empty() {
            lock.extend(commits.iter().map(|commit| commit.id.as_str()));
            lock.sort_unstable();
            lock.dedup();
        }
        Self {
            events: Events::of(&more),
            lock: group(lock),
            commits,
            more,
            starts,
            signals,
        }
    }

    fn commits<T>(&self, of: impl Fn(&'a CommitJob) -> T) -> Option<Vec<T>> {
        group(self.commits.iter().map(|commit| of(commit)).collect())
    }

    fn heads<T>(&self, of: impl Fn(&'a Head) -> T) -> Option<Vec<Option<T>>> {
        self.commits(|commit| commit.head.as_ref().map(&of))
    }

    fn more<T>(&self, of: impl Fn(&'a More) -> T) -> Option<Vec<T>> {
        group(self.more.iter().map(|(_, more)| of(more)).collect())
    }

    fn rows<R, T>(
        &self,
        rows: impl Fn(&'a More) -> &'a [R],
        of: impl Fn(i32, &'a More, &'a R) -> T,
    ) -> Option<Vec<T>>
    where
        R: 'a,
    {
        let mut column = Vec::new();
        for (op, more) in &self.more {
            column.extend(rows(more).iter().map(|row| of(*op, more, row)));
        }
        group(column)
    }

    fn starts<T>(&self, of: impl Fn(&'a StartRow) -> T) -> Option<Vec<T>> {
        group(self.starts.iter().map(|row| of(row)).collect())
    }

    fn signals<T>(&self, of: impl Fn(&'a SignalRow) -> T) -> Option<Vec<T>> {
        group(self.signals.iter().map(|(_, row, _)| of(row)).collect())
    }
}

/// Pending writes that are to be forgotten, in columns.
#[derive(Default)]
struct Forgotten<'a> {
    ids: Vec<&'a str>,
    tokens: Vec<i64>,
    bases: Vec<i32>,
    digests: Vec<uuid::Uuid>,
}

impl<'a> Forgotten<'a> {
    fn of(jobs: &[&'a Job]) -> Self {
        let mut all = Self::default();
        for job in jobs {
            let Job::Commit(commit) = job else { continue };
            let Some(more) = &commit.more else { continue };
            for digest in &more.forget {
                all.ids.push(commit.id.as_str());
                all.tokens.push(commit.token);
                all.bases.push(more.base);
                all.digests.push(*digest);
            }
        }
        all
    }
}

fn cancels<'a>(more: &[(i32, &'a More)]) -> impl Iterator<Item = &'a (String, String)> {
    more.iter().flat_map(|(_, more)| &more.cancels)
}

pub(super) fn count(list: &[i64]) -> i32 {
    i32::try_from(list.len()).unwrap_or(i32::MAX)
}

// Of a wait whose time has passed, `graph_land` hears nothing, so that it is not open. That cannot change in between.
macro_rules! land_after {
    ($first:literal) => {
        concat!(
            $first,
            "select at, made, mail, cancelled, ended, released, ended_mail, ended_cancelled, started, tokens, sent, \
     graph_expired($42, $48) \
     from graph_land($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, \
     $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42, $43, $44, $45, \
     $46, $47, graph_open_waits($42, $48), $49, $50, $51, $52, $53, $54, $55, $56, $57, $58)"
        )
    };
}

const EVERYTHING: &str = land_after!("");
/// The same, and forgets pending writes. Only loops inside a task do.
const EVERYTHING_AND_FORGET: &str = land_after!(
    "with f as ( \
         delete from graph_write w \
         using unnest($59::text[], $60::bigint[], $61::integer[], $62::uuid[]) as f (id, token, base, digest), graph_thread t \
         where t.id = f.id and t.token = f.token and t.owner is not null \
             and w.thread = t.thread and w.checkpoint = f.base and w.digest = f.digest \
     ) "
);

async fn everything(db: &mut PgConnection, jobs: &[&Job]) -> Result<Answers, Fault> {
    let columns = Columns::of(jobs);
    let Columns {
        events, signals, ..
    } = &columns;
    let forgotten = Forgotten::of(jobs);
    let statement = if forgotten.digests.is_empty() {
        EVERYTHING
    } else {
        EVERYTHING_AND_FORGET
    };
    let mut query = sqlx::query(statement)
        .bind(columns.lock.as_ref())
        // c_
        .bind(columns.commits(|commit| commit.id.as_str()))
        .bind(columns.commits(|commit| commit.token))
        .bind(columns.heads(|head| narrow(head.parent)))
        .bind(columns.heads(|head| narrow(head.branch.into())))
        .bind(columns.heads(|head| narrow(head.step)))
        .bind(columns.commits(|commit| commit.head.as_ref()?.source.as_deref()))
        .bind(columns.heads(|head| head.plan.as_text()))
        .bind(columns.commits(|commit| commit.head.as_ref()?.appends.as_ref()))
        .bind(columns.commits(|commit| commit.head.as_ref()?.changes.as_ref()))
        .bind(columns.commits(|commit| commit.head.as_ref()?.snapshot.as_ref()))
        // x_
        .bind(group(columns.more.iter().map(|(op, _)| *op).collect()))
        .bind(columns.more(|more| more.base))
        .bind(columns.more(|more| more.then))
        .bind(columns.more(|more| more.clear))
        .bind(columns.more(|more| count(&more.consumed)))
        .bind(columns.more(|more| more.waits.as_ref()))
        .bind(columns.more(|more| more.mail_seen))
        .bind(columns.more(|more| more.wake_at))
        .bind(columns.more(|more| more.status))
        .bind(columns.more(|more| more.error.as_deref()))
        .bind(columns.more(|more| more.output.as_ref()))
        // w_
        .bind(columns.rows(|more| &more.writes, |op, _, _| op))
        .bind(columns.rows(|more| &more.writes, |_, more, _| more.base))
        .bind(columns.rows(|more| &more.writes, |_, _, row| row.digest))
        .bind(columns.rows(|more| &more.writes, |_, _, row| row.task.as_str()))
        .bind(columns.rows(|more| &more.writes, |_, _, row| row.kind))
        .bind(columns.rows(|more| &more.writes, |_, _, row| row.name.as_str()))
        .bind(columns.rows(|more| &more.writes, |_, _, row| row.round))
        .bind(columns.rows(|more| &more.writes, |_, _, row| &row.value))
        // u_
        .bind(columns.rows(|more| &more.consumed, |op, _, _| op))
        .bind(columns.rows(|more| &more.consumed, |_, _, number| *number))
        // n_
        .bind(columns.starts(|row| row.id.as_str()))
        .bind(columns.starts(|row| row.graph.as_str()))
        .bind(columns.starts(|row| row.parent.as_deref()))
        .bind(columns.starts(|row| row.parent_name.as_deref()))
        .bind(columns.starts(|row| row.priority))
        .bind(columns.starts(|row| &row.input))
        .bind(columns.starts(StartRow::owner))
        .bind(columns.starts(StartRow::lease))
        // s_
        .bind(group(signals.iter().map(|(op, _, _)| *op).collect()))
        .bind(columns.signals(|row| row.thread.as_str()))
        .bind(columns.signals(|row| row.digest))
        .bind(columns.signals(|row| row.kind.as_str()))
        .bind(columns.signals(|row| row.key.as_str()))
        .bind(columns.signals(|row| &row.payload))
        .bind(columns.signals(|row| row.revives))
        .bind(group(signals.iter().map(|(_, _, wait)| *wait).collect()))
        .bind(int(MAILBOX_LIMIT))
        // k_
        .bind(group(
            cancels(&columns.more)
                .map(|(thread, _)| thread.as_str())
                .collect(),
        ))
        .bind(group(
            cancels(&columns.more)
                .map(|(_, reason)| reason.as_str())
                .collect(),
        ))
        // g_, e_
        .bind((!events.streams.is_empty()).then_some(&events.streams))
        .bind((!events.streams.is_empty()).then_some(&events.counts))
        .bind((!events.streams.is_empty()).then_some(&events.stream))
        .bind((!events.streams.is_empty()).then_some(&events.nth))
        .bind((!events.streams.is_empty()).then_some(&events.name))
        .bind((!events.streams.is_empty()).then_some(&events.payload))
        .bind((!events.streams.is_empty()).then_some(&events.thread));
    if !forgotten.digests.is_empty() {
        query = query
            .bind(&forgotten.ids)
            .bind(&forgotten.tokens)
            .bind(&forgotten.bases)
            .bind(&forgotten.digests);
    }
    let row = query.fetch_one(db).await?;
    answers(jobs, &columns, &row)
}

pub(super) fn list<T>(row: &PgRow, index: usize) -> Result<Vec<T>, sqlx::Error>
where
    for<'r> Option<Vec<T>>: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    Ok(row.try_get::<Option<Vec<T>>, _>(index)?.unwrap_or_default())
}

/// What the commits, the new threads and the signals became, told to whoever asked.
fn answers(jobs: &[&Job], columns: &Columns<'_>, row: &PgRow) -> Result<Answers, Fault> {
    let now: Time = row.try_get(0)?;
    let made: Vec<i32> = list(row, 1)?;
    let mail: Vec<i64> = list(row, 2)?;
    let cancelled: Vec<Option<String>> = list(row, 3)?;
    let short = || StorageError::Corrupt {
        what: "graph_land gave too few answers".to_owned(),
    };
    let mut receipts = Vec::with_capacity(made.len());
    for ((made, mail), cancel) in made.into_iter().zip(mail).zip(cancelled) {
        let mut receipt = receipt(number(made.into()), mail, cancel.map(plain), now);
        receipt.checkpoint = receipt.checkpoint.filter(|made| *made > 0);
        receipts.push(receipt);
    }
    let ended: Vec<i32> = list(row, 4)?;
    let released: Vec<bool> = list(row, 5)?;
    let mail: Vec<i64> = list(row, 6)?;
    let cancelled: Vec<Option<String>> = list(row, 7)?;
    for (((op, released), mail), cancel) in ended.into_iter().zip(released).zip(mail).zip(cancelled)
    {
        let receipt = at(&mut receipts, op).ok_or_else(short)?;
        receipt.released = released;
        receipt.mail = number(mail);
        receipt.cancel = cancel.map(plain);
    }
    let mut outcomes: Vec<i32> = list(row, 10)?;
    let late: Vec<bool> = list(row, 11)?;
    for (outcome, _) in outcomes.iter_mut().zip(late).filter(|(_, late)| *late) {
        if *outcome == NO_WAIT {
            *outcome = EXPIRED;
        }
    }
    if outcomes.len() != columns.signals.len() || receipts.len() != columns.commits.len() {
        return Err(short().into());
    }
    let inside = columns.signals.iter().filter(|(op, _, _)| *op > 0).count();
    let outside = outcomes.split_off(inside);
    for ((op, signal, _), outcome) in columns.signals.iter().zip(outcomes) {
        let receipt = at(&mut receipts, *op).ok_or_else(short)?;
        if outcome == UNKNOWN && !receipt.undelivered.contains(&signal.receiver) {
            receipt.undelivered.push(signal.receiver.clone());
        }
    }
    let started = started(row, 8)?;
    let (mut receipts, mut outside) = (receipts.into_iter(), outside.into_iter());
    jobs.iter()
        .map(|job| {
            Ok(Ok(match job {
                Job::Commit(_) => Answer::Committed(receipts.next().ok_or_else(short)?),
                Job::Start(row) => start_answer(row, &started, now),
                Job::Signal(_) => Answer::Signalled(outcome_of(outside.next().ok_or_else(short)?)?),
            }))
        })
        .collect()
}

/// The new threads among those that were to be created, with their tokens: two columns.
pub(super) fn started(row: &PgRow, index: usize) -> Result<HashMap<String, i64>, sqlx::Error> {
    let (ids, tokens): (Vec<String>, Vec<i64>) = (list(row, index)?, list(row, index + 1)?);
    Ok(ids.into_iter().zip(tokens).collect())
}

pub(super) fn start_answer(row: &StartRow, started: &HashMap<String, i64>, now: Time) -> Answer {
    match started.get(&row.id) {
        Some(token) => threads::created(row, *token, now),
        None => Answer::Created(Created::Existing, None),
    }
}

/// By its place from 1.
fn at<T>(list: &mut [T], place: i32) -> Option<&mut T> {
    list.get_mut(usize::try_from(place - 1).ok()?)
}

/// What `graph_land` says of a signal to nobody.
const UNKNOWN: i32 = 4;
/// What it says of an answer to what is not waited for.
const NO_WAIT: i32 = 2;
/// What that is when the wait is there, but its time has passed.
const EXPIRED: i32 = 5;

fn outcome_of(code: i32) -> Result<SignalOutcome, StorageError> {
    Ok(match code {
        0 => SignalOutcome::New,
        1 => SignalOutcome::Duplicate,
        NO_WAIT => SignalOutcome::NoSuchWait,
        EXPIRED => SignalOutcome::Expired,
        3 => SignalOutcome::MailboxFull,
        UNKNOWN => SignalOutcome::UnknownThread,
        other => {
            return Err(StorageError::Corrupt {
                what: format!("graph_land answered {other} for a signal"),
            });
        }
    })
}
