//! The queue of what waits to be written.
//!
//! What limits a database is how often it can make sure that its log is on the disk. So nothing commits by itself: it gets
//! into a queue, and one of at most [`WRITERS`] writers takes whatever waits at the moment (nobody waits for a batch to
//! fill) and writes it in one transaction: commits of any kind, new threads, signals from outside. Each one's fate is its own.
//! A commit whose lease is stale, or that does not stand on the tip, is refused without a trace, and the others do not
//! notice. When the database refuses the whole transaction, each is tried alone.

use std::{
    collections::{HashSet, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
};

use parking_lot::Mutex;
use sqlx::postgres::PgDatabaseError;
use tokio::{runtime::Handle, sync::oneshot};

use super::{
    hands::{Hands, is_refusal},
    job::{Answer, Job},
    land::{Answers, REFUSED, land},
    limits::is_given_up,
    step::refusal,
};
use crate::{checkpoint::StorageError, stored::Fault};

/// How many shared transactions are under way at the same time: while one waits for the disk, the next ones are prepared.
pub(super) const WRITERS: usize = 2;

/// The most jobs in one transaction.
const MOST: usize = 256;

/// The most bytes in one transaction; something larger goes alone.
const MOST_BYTES: usize = 4 << 20;

struct Waiting {
    job: Job,
    answer: oneshot::Sender<Result<Answer, StorageError>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    writers: usize,
}

/// The queue. It holds at most one job for each caller that waits.
pub(super) struct Sharing {
    queue: Mutex<Queue>,
    hands: Arc<Hands>,
}

impl std::fmt::Debug for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue.lock();
        f.debug_struct("Sharing")
            .field("waiting", &queue.waiting.len())
            .field("writers", &queue.writers)
            .finish_non_exhaustive()
    }
}

impl Sharing {
    pub fn new(hands: Arc<Hands>) -> Self {
        Self {
            queue: Mutex::default(),
            hands,
        }
    }

    /// Writes a job, beside whatever else waits.
    pub async fn write(self: &Arc<Self>, job: Job) -> Result<Answer, StorageError> {
        let queued = {
            let mut queue = self.queue.lock();
            let free = queue.writers < WRITERS;
            queue.writers += usize::from(free);
            if free && queue.waiting.is_empty() {
                Err(job)
            } else {
                let operation = job.operation();
                let (answer, answered) = oneshot::channel();
                queue.waiting.push_back(Waiting { job, answer });
                Ok((free, answered, operation))
            }
        };
        match queued {
            Ok((start, answered, operation)) => {
                if start {
                    self.writer(false).start();
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
            Err(job) => {
                let writer = self.writer(false);
                let result = alone(&self.hands, &job).await;
                writer.pass_on();
                result
            }
        }
    }

    fn writer(self: &Arc<Self>, last_resort: bool) -> Writer {
        Writer {
            sharing: self.clone(),
            given_back: false,
            last_resort,
        }
    }
}

/// The right to write shared transactions. Whoever has it writes until nothing waits, or passes it on; when it is dropped
/// (its task was ended, or its caller went away) another task goes on.
struct Writer {
    sharing: Arc<Sharing>,
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
                let next = self.sharing.writer(true);
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
                write(&self.sharing.hands, batch).await;
            }
        }
    }
}

/// What goes into the next transaction: commits in the order of their threads' ids, for rows are locked in one order.
fn take(waiting: &mut VecDeque<Waiting>) -> Vec<Waiting> {
    let mut bytes = 0;
    let mut batch: Vec<Waiting> = Vec::new();
    let (hasher, mut present) = (RandomState::new(), HashSet::new());
    while let Some(next) = waiting.front() {
        bytes += next.job.bytes();
        let full = batch.len() == MOST || bytes > MOST_BYTES;
        // The next transaction judges it.
        let is_new = present.insert(hasher.hash_one(next.job.identity()));
        if !batch.is_empty() && (full || !is_new) {
            break;
        }
        batch.extend(waiting.pop_front());
    }
    batch.sort_by(|a, b| a.job.place().cmp(b.job.place()));
    batch
}

/// Writes a batch and tells everybody. Those that `graph_land` refuses are left out, and the rest is tried again.
async fn write(hands: &Hands, mut batch: Vec<Waiting>) {
    while !batch.is_empty() {
        let jobs: Vec<&Job> = batch.iter().map(|waiting| &waiting.job).collect();
        match together(hands, &jobs).await {
            Ok(answers) => {
                for (waiting, answer) in batch.drain(..).zip(answers) {
                    // Nobody listens any more: it landed all the same.
                    let _ = waiting.answer.send(answer);
                }
            }
            Err(Fault::Database(error))
                if batch.len() > 1 && is_refusal(&error) && !is_given_up(&error) =>
            {
                let Some(good) = good_ones(&error, &batch) else {
                    // One of them is at fault.
                    for waiting in batch {
                        let answer = alone(hands, &waiting.job).await;
                        let _ = waiting.answer.send(answer);
                    }
                    return;
                };
                let (rest, bad): (Vec<_>, Vec<_>) = batch
                    .into_iter()
                    .zip(good)
                    .partition(|(_, is_good)| *is_good);
                for (waiting, _) in bad {
                    let answer = alone(hands, &waiting.job).await;
                    let _ = waiting.answer.send(answer);
                }
                batch = rest.into_iter().map(|(waiting, _)| waiting).collect();
            }
            Err(fault) => {
                let mut fault = Some(fault);
                let text = format!("{fault:?}");
                for waiting in batch.drain(..) {
                    let fault = fault
                        .take()
                        .unwrap_or_else(|| Fault::Database(sqlx::Error::Protocol(text.clone())));
                    let operation = waiting.job.operation();
                    let _ = waiting.answer.send(Err(fault.during(&operation)));
                }
            }
        }
    }
}

/// Which jobs of a batch were not refused, if that is what the error says. Some were.
fn good_ones(error: &sqlx::Error, batch: &[Waiting]) -> Option<Vec<bool>> {
    let places = good_places(error)?;
    let mut commits = 0;
    let good: Vec<bool> = batch
        .iter()
        .map(|waiting| match waiting.job {
            Job::Commit(_) => {
                commits += 1;
                places.contains(&commits)
            }
            Job::Start(_) | Job::Signal(_) => true,
        })
        .collect();
    (!good.iter().all(|good| *good)).then_some(good)
}

/// The places of the good commits, from 1: written as `{1,3}`.
fn good_places(error: &sqlx::Error) -> Option<Vec<usize>> {
    let refused = error
        .as_database_error()?
        .try_downcast_ref::<PgDatabaseError>()
        .filter(|error| error.code() == REFUSED)?;
    refused
        .detail()?
        .trim_matches(['{', '}'])
        .split(',')
        .filter(|place| !place.is_empty())
        .map(|place| place.parse().ok())
        .collect()
}

async fn together(hands: &Hands, jobs: &[&Job]) -> Result<Answers, Fault> {
    hands.limits.short(land_all(hands, jobs)).await
}

async fn land_all(hands: &Hands, jobs: &[&Job]) -> Result<Answers, Fault> {
    let mut db = hands.take().await?;
    match land(&mut db, jobs).await {
        Err(Fault::Database(error)) => {
            if let ([Job::Commit(commit)], Some(_)) = (jobs, good_places(&error)) {
                let answer = Box::pin(refusal(&mut db, commit)).await?;
                hands.give(db);
                return Ok(vec![Err(answer)]);
            }
            hands.give_after(db, &error);
            Err(error.into())
        }
        result => {
            hands.give(db);
            result
        }
    }
}

async fn alone(hands: &Hands, job: &Job) -> Result<Answer, StorageError> {
    let answers = together(hands, &[job]).await;
    let answer = answers
        .map_err(|fault| fault.during(&job.operation()))?
        .pop();
    answer.unwrap_or_else(|| {
        Err(StorageError::Corrupt {
            what: format!("the database gave no answer while {}", job.operation()),
        })
    })
}
