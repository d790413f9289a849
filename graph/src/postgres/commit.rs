//! Commits. Steps that only write a checkpoint share a transaction; everything else is one call of the database's
//! `graph_commit`.
//!
//! # Sharing
//! What limits a database is how often it can make sure that its log is on the disk. So a step does not commit by itself: it
//! gets into a queue, and one of at most [`WRITERS`] writers takes whatever waits at the moment (nobody waits for a batch to
//! fill) and writes it in one statement. The statement joins the steps with the threads' rows, which it updates and so locks:
//! a step whose lease is stale, or that does not stand on the tip, finds no row and writes nothing, and the others do not
//! notice. A step's fate is its own also when the database refuses the whole statement: then each is tried alone.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use sqlx::{PgConnection, PgPool, Row, postgres::PgRow};
use tokio::{runtime::Handle, sync::oneshot};

use super::{
    DEADLOCK_ATTEMPTS, document, is_transient,
    rows::{optional, wide},
    values::{Jsonb, Time, plain, text},
};
use crate::{
    checkpoint::{Commit, Lease, NewCheckpoint, Receipt, StorageError, Then},
    ids::ThreadId,
    stored::{Fault, int, number, source_text},
};

/// How many shared transactions are under way at the same time: while one waits for the disk, the next ones are prepared.
const WRITERS: usize = 2;

/// The most steps in one transaction.
const MOST_STEPS: usize = 256;

/// The most bytes in one transaction; a larger step goes alone.
const MOST_BYTES: usize = 4 << 20;

/// A commit, however it is best made.
pub(super) async fn commit(
    pool: &PgPool,
    sharing: &Arc<Sharing>,
    lease: &Lease,
    commit: &Commit,
) -> Result<Receipt, Fault> {
    if let Some(step) = Step::of(lease, commit)? {
        return Ok(sharing.commit(pool, step).await?);
    }
    let document = document::of(lease, commit)?;
    let mut attempt = 1;
    loop {
        let result = alone(pool, lease, commit, document.clone()).await;
        match result {
            Err(Fault::Database(error)) if attempt < DEADLOCK_ATTEMPTS && is_transient(&error) => {
                attempt += 1;
            }
            result => return result,
        }
    }
}

async fn alone(
    pool: &PgPool,
    lease: &Lease,
    commit: &Commit,
    document: Jsonb,
) -> Result<Receipt, Fault> {
    let row = sqlx::query(
        "select refused, made, released, mail, cancelled, undelivered, at from graph_commit($1)",
    )
    .bind(document)
    .fetch_one(pool)
    .await?;
    let refused: Option<&str> = row.try_get(0)?;
    match (refused, &commit.checkpoint) {
        (None, _) => {}
        (Some("tip"), Some(new)) => return Err(not_the_tip(lease, new).into()),
        (Some(_), _) => return Err(fenced(lease).into()),
    }
    Ok(Receipt {
        checkpoint: row
            .try_get::<Option<i32>, _>(1)?
            .map(|made| number(made.into())),
        released: row.try_get(2)?,
        mail: number(row.try_get(3)?),
        cancel: optional(&row, 4)?,
        undelivered: row
            .try_get::<Option<Vec<String>>, _>(5)?
            .unwrap_or_default()
            .into_iter()
            .map(|id| ThreadId::from(plain(id)))
            .collect(),
        now: row.try_get::<Time, _>(6)?.0,
    })
}

fn fenced(lease: &Lease) -> StorageError {
    StorageError::Fenced {
        thread: lease.thread.clone(),
        token: lease.token,
    }
}

fn not_the_tip(lease: &Lease, new: &NewCheckpoint) -> StorageError {
    StorageError::NotTheTip {
        thread: lease.thread.clone(),
        branch: new.branch,
        parent: new.parent,
    }
}

/// A commit that is nothing but a checkpoint.
struct Step {
    lease: Lease,
    parent: u64,
    branch: u32,
    number: u64,
    source: Option<String>,
    plan: Jsonb,
    appends: Option<Jsonb>,
    changes: Option<Jsonb>,
    snapshot: Option<Jsonb>,
}

impl Step {
    fn of(lease: &Lease, commit: &Commit) -> Result<Option<Self>, StorageError> {
        let Commit {
            base: _,
            checkpoint: Some(new),
            writes,
            clear_writes: false,
            consumed,
            events,
            children,
            signals,
            cancels,
            waits: None,
            then: Then::Keep,
            // Not given to those who write values down.
            state: _,
        } = commit
        else {
            return Ok(None);
        };
        let nothing_else = writes.is_empty()
            && consumed.is_empty()
            && events.is_empty()
            && children.is_empty()
            && signals.is_empty()
            && cancels.is_empty();
        if !nothing_else {
            return Ok(None);
        }
        let step = Self {
            lease: lease.clone(),
            parent: new.parent,
            branch: new.branch,
            number: new.step,
            source: source_text(&new.source).map(|source| text(&source).into_owned()),
            plan: Jsonb::of(&new.plan)?,
            appends: Jsonb::channels(&new.appends)?,
            changes: Jsonb::channels(&new.changes)?,
            snapshot: new.snapshot.as_ref().map(Jsonb::of).transpose()?,
        };
        Ok(Some(step))
    }

    fn bytes(&self) -> usize {
        [&self.appends, &self.changes, &self.snapshot]
            .into_iter()
            .flatten()
            .map(Jsonb::len)
            .sum::<usize>()
            + self.plan.len()
    }

    fn refusal(&self, holds: bool) -> StorageError {
        if holds {
            StorageError::NotTheTip {
                thread: self.lease.thread.clone(),
                branch: self.branch,
                parent: self.parent,
            }
        } else {
            fenced(&self.lease)
        }
    }

    fn operation(&self) -> String {
        format!("committing a step of thread {}", self.lease.thread)
    }
}

struct Waiting {
    step: Step,
    answer: oneshot::Sender<Result<Receipt, StorageError>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    writers: usize,
}

/// The queue of steps that are about to share transactions. It holds at most one step for each caller that waits.
#[derive(Default)]
pub(super) struct Sharing {
    queue: Mutex<Queue>,
}

impl std::fmt::Debug for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue.lock();
        f.debug_struct("Sharing")
            .field("waiting", &queue.waiting.len())
            .field("writers", &queue.writers)
            .finish()
    }
}

impl Sharing {
    async fn commit(self: &Arc<Self>, pool: &PgPool, step: Step) -> Result<Receipt, StorageError> {
        let operation = step.operation();
        let answered = {
            let mut queue = self.queue.lock();
            let free = queue.writers < WRITERS;
            queue.writers += usize::from(free);
            if free && queue.waiting.is_empty() {
                Err(step)
            } else {
                let (answer, answered) = oneshot::channel();
                queue.waiting.push_back(Waiting { step, answer });
                Ok((free, answered))
            }
        };
        match answered {
            Ok((start, answered)) => {
                if start {
                    self.writer(pool, false).start();
                }
                answered.await.unwrap_or_else(|gone| {
                    Err(StorageError::Backend {
                        operation,
                        source: Box::new(gone),
                    })
                })
            }
            // Nobody else is there: no need to bother another task. What comes meanwhile is written after it, also when the
            // caller is dropped.
            Err(step) => {
                let writer = self.writer(pool, false);
                let result = write_one(pool, &step).await;
                writer.pass_on();
                result
            }
        }
    }

    fn writer(self: &Arc<Self>, pool: &PgPool, last_resort: bool) -> Writer {
        Writer {
            sharing: self.clone(),
            pool: pool.clone(),
            given_back: false,
            last_resort,
        }
    }
}

/// The right to write shared transactions. Whoever has it writes until nothing waits, or passes it on; when it is dropped
/// (its task was ended, or its caller went away) another task goes on.
struct Writer {
    sharing: Arc<Sharing>,
    pool: PgPool,
    given_back: bool,
    /// Was started by such a drop. When it is dropped as well, there is no runtime any more.
    last_resort: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.given_back || self.give_back() {
            return;
        }
        match Handle::try_current() {
            Ok(runtime) if !self.last_resort => {
                let next = self.sharing.writer(&self.pool, true);
                runtime.spawn(next.run());
            }
            _ => {
                let mut queue = self.sharing.queue.lock();
                queue.writers -= 1;
                if queue.writers == 0 {
                    // Whoever still waits is told so, by the end of its channel.
                    queue.waiting.clear();
                }
            }
        }
    }
}

impl Writer {
    /// Gives the right back if nothing waits. The look and the giving back are one: whoever comes later starts a writer.
    fn give_back(&mut self) -> bool {
        let mut queue = self.sharing.queue.lock();
        if queue.waiting.is_empty() {
            queue.writers -= 1;
            self.given_back = true;
        }
        self.given_back
    }

    fn start(self) {
        tokio::spawn(self.run());
    }

    fn pass_on(mut self) {
        if !self.give_back() {
            self.start();
        }
    }

    async fn run(mut self) {
        while !self.give_back() {
            let batch = take(&mut self.sharing.queue.lock().waiting);
            // Empty when the other writer was quicker.
            if !batch.is_empty() {
                write(&self.pool, batch).await;
            }
        }
    }
}

/// What goes into the next transaction, in the order of the threads' ids: rows are locked in one order.
fn take(waiting: &mut VecDeque<Waiting>) -> Vec<Waiting> {
    let mut bytes = 0;
    let mut batch: Vec<Waiting> = Vec::new();
    while let Some(next) = waiting.front() {
        bytes += next.step.bytes();
        let full = batch.len() == MOST_STEPS || bytes > MOST_BYTES;
        // A second step of one thread: its lease is used twice at once. The next transaction judges it.
        let twice = batch
            .iter()
            .any(|other| other.step.lease.thread == next.step.lease.thread);
        if !batch.is_empty() && (full || twice) {
            break;
        }
        batch.extend(waiting.pop_front());
    }
    batch.sort_by(|a, b| a.step.lease.thread.cmp(&b.step.lease.thread));
    batch
}

async fn write(pool: &PgPool, batch: Vec<Waiting>) {
    let steps: Vec<&Step> = batch.iter().map(|waiting| &waiting.step).collect();
    match write_steps(pool, &steps).await {
        Ok(receipts) => {
            for (waiting, receipt) in batch.into_iter().zip(receipts) {
                // Nobody listens any more: the commit landed all the same.
                let _ = waiting.answer.send(receipt);
            }
        }
        Err(Fault::Database(error)) if batch.len() > 1 && error.as_database_error().is_some() => {
            // The database said no, so nothing was written: one of them is at fault.
            for waiting in batch {
                let receipt = write_one(pool, &waiting.step).await;
                let _ = waiting.answer.send(receipt);
            }
        }
        Err(fault) => {
            let mut fault = Some(fault);
            let text = format!("{fault:?}");
            for waiting in batch {
                let fault = fault
                    .take()
                    .unwrap_or_else(|| Fault::Database(sqlx::Error::Protocol(text.clone())));
                let operation = waiting.step.operation();
                let _ = waiting.answer.send(Err(fault.during(&operation)));
            }
        }
    }
}

async fn write_one(pool: &PgPool, step: &Step) -> Result<Receipt, StorageError> {
    match write_steps(pool, &[step]).await {
        Ok(mut receipts) => receipts.pop().unwrap_or_else(|| Err(step.refusal(false))),
        Err(fault) => Err(fault.during(&step.operation())),
    }
}

/// One answer for each step, in their order.
async fn write_steps(
    pool: &PgPool,
    steps: &[&Step],
) -> Result<Vec<Result<Receipt, StorageError>>, Fault> {
    let mut attempt = 1;
    let mut db = pool.acquire().await?;
    let found = loop {
        match insert(&mut db, steps).await {
            Err(error) if attempt < DEADLOCK_ATTEMPTS && is_transient(&error) => attempt += 1,
            result => break result?,
        }
    };
    let mut answers: Vec<Option<Receipt>> = steps.iter().map(|_| None).collect();
    for row in &found {
        let at = usize::try_from(row.try_get::<i64, _>(0)? - 1).unwrap_or(usize::MAX);
        if let Some(answer) = answers.get_mut(at) {
            *answer = Some(Receipt {
                checkpoint: Some(wide(row, 1)?),
                released: false,
                mail: number(row.try_get(2)?),
                cancel: optional(row, 3)?,
                undelivered: Vec::new(),
                now: row.try_get::<Time, _>(4)?.0,
            });
        }
    }
    let mut receipts = Vec::with_capacity(steps.len());
    for (step, answer) in steps.iter().zip(answers) {
        receipts.push(match answer {
            Some(receipt) => Ok(receipt),
            None => Err(step.refusal(holds(&mut db, &step.lease).await?)),
        });
    }
    Ok(receipts)
}

/// Whether a refused step had a good lease, and so is not on the tip.
async fn holds(db: &mut PgConnection, lease: &Lease) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select 1 from graph_thread where id = $1 and token = $2 and owner is not null)",
    )
    .bind(text(lease.thread.as_str()))
    .bind(int(lease.token))
    .fetch_one(db)
    .await
}

/// The fence, the head and the checkpoints in one statement.
async fn insert(db: &mut PgConnection, steps: &[&Step]) -> Result<Vec<PgRow>, sqlx::Error> {
    fn column<T>(steps: &[&Step], of: impl Fn(&Step) -> T) -> Vec<T> {
        steps.iter().map(|step| of(step)).collect()
    }
    sqlx::query(
        "with b as ( \
             select * from unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], \
                 $7::jsonb[], $8::jsonb[], $9::jsonb[], $10::jsonb[]) with ordinality \
                 as b (id, token, parent, branch, step, source, plan, appends, changes, snapshot, ord) \
         ), u as ( \
             update graph_thread t set checkpoint = t.last_checkpoint + 1, last_checkpoint = t.last_checkpoint + 1, \
                 step = b.step, takeovers = 0, updated_at = now() \
             from b where t.id = b.id and t.token = b.token and t.owner is not null \
                 and t.branch = b.branch and t.checkpoint = b.parent \
             returning b.ord, t.thread, t.checkpoint, t.last_signal, t.cancel \
         ), i as ( \
             insert into graph_checkpoint (thread, number, parent, branch, step, source, plan, appends, changes, snapshot) \
             select u.thread, u.checkpoint, b.parent, b.branch, b.step, b.source, b.plan, b.appends, b.changes, b.snapshot \
             from u join b on b.ord = u.ord \
         ) \
         select ord, checkpoint, last_signal, cancel, now() from u",
    )
    .bind(column(steps, |s| text(s.lease.thread.as_str()).into_owned()))
    .bind(column(steps, |s| int(s.lease.token)))
    .bind(column(steps, |s| int(s.parent)))
    .bind(column(steps, |s| i64::from(s.branch)))
    .bind(column(steps, |s| int(s.number)))
    .bind(column(steps, |s| s.source.clone()))
    .bind(column(steps, |s| s.plan.clone()))
    .bind(column(steps, |s| s.appends.clone()))
    .bind(column(steps, |s| s.changes.clone()))
    .bind(column(steps, |s| s.snapshot.clone()))
    .fetch_all(db)
    .await
}
