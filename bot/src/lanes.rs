//! Takes stored updates to their end: handled, put back, or put aside.
//!
//! Every chat has a lane: its updates are handled one after the other, in the order in which they came, and one that fails
//! holds up those behind it; other chats go on meanwhile. Orders that take long (a rollback) have a lane of their own, so that
//! the chat is answered while they work.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use ports::Failure;
use serde_json::Value;
use store::{InboxRow, MAX_INBOX_ATTEMPTS};
use tokio::task::JoinSet;

use crate::handlers::{self, Reply, Trouble};
use crate::say::{mention, say};
use crate::update::{self, Sender, Wants};
use crate::{Error, FRONT, GRACE, Shared, texts};

/// Updates that are looked at together, and at most, when all of the first ones have to wait.
const BATCH: u64 = 50;
const MOST: u64 = 3200;
/// Lanes at work at the same time.
const LANES: usize = 32;
/// How long the front desk may take for an order, and for one that takes long.
const DESK: Duration = Duration::from_mins(1);
const SLOW_DESK: Duration = Duration::from_mins(20);

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Lane {
    Chat(i64),
    Alone(i64),
}

/// A lane at work; it is free again when this goes, also in a panic.
struct Busy {
    lane: Lane,
    lanes: Arc<Mutex<HashSet<Lane>>>,
    shared: Shared,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.lanes.lock().remove(&self.lane);
        self.shared.arrived.notify_one();
    }
}

/// What to do with the rest of a lane.
enum Then {
    Next,
    Stop,
}

/// Handles updates until the end.
pub(crate) async fn run(shared: &Shared) -> Result<(), Error> {
    let busy: Arc<Mutex<HashSet<Lane>>> = Arc::default();
    let mut tasks = JoinSet::new();
    let mut failures = 0;
    while !shared.shutdown.is_cancelled() {
        match start(shared, &busy, &mut tasks).await {
            Ok(()) => {
                failures = 0;
                tokio::select! {
                    () = shared.shutdown.cancelled() => {}
                    () = shared.arrived.notified() => {}
                    () = tokio::time::sleep(shared.patience) => {}
                }
            }
            Err(error) => {
                tracing::error!(%error, "the inbox cannot be read");
                failures += 1;
                shared.pause(shared.backoff(failures)).await;
            }
        }
        while tasks.try_join_next().is_some() {}
    }
    // Whoever speaks may end the sentence; what is cut off is handled after the next start.
    let rest = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GRACE, rest).await;
    Ok(())
}

/// Starts the lanes that have something to do and are free.
async fn start(
    shared: &Shared,
    busy: &Arc<Mutex<HashSet<Lane>>>,
    tasks: &mut JoinSet<()>,
) -> Result<(), store::Error> {
    let mut limit = BATCH;
    loop {
        let rows = shared.store.unhandled_updates(FRONT, limit).await?;
        let full = rows.len() as u64 == limit;
        let mut lanes: BTreeMap<Lane, Vec<InboxRow>> = BTreeMap::new();
        for row in rows {
            let lane = lane_of(shared, &row);
            if !busy.lock().contains(&lane) {
                lanes.entry(lane).or_default().push(row);
            }
        }
        // All of them belong to chats that are at work: somebody behind them may not.
        if lanes.is_empty() && full && limit < MOST {
            limit *= 2;
            continue;
        }
        for (lane, rows) in lanes {
            if busy.lock().len() >= LANES {
                break;
            }
            busy.lock().insert(lane);
            let guard = Busy {
                lane,
                lanes: busy.clone(),
                shared: shared.clone(),
            };
            tasks.spawn(async move {
                let shared = &guard.shared;
                for row in rows {
                    if shared.shutdown.is_cancelled() {
                        break;
                    }
                    match handle(shared, row).await {
                        Ok(Then::Next) => {}
                        Ok(Then::Stop) => break,
                        Err(error) => {
                            tracing::error!(%error, "the inbox cannot be written");
                            shared.pause(shared.patience).await;
                            break;
                        }
                    }
                }
            });
        }
        return Ok(());
    }
}

fn parse(row: &InboxRow) -> Value {
    serde_json::from_str(&row.raw).unwrap_or_default()
}

fn is_slow(wants: &Wants) -> bool {
    matches!(wants, Wants::Command { name, .. } if name == "rollback")
}

fn lane_of(shared: &Shared, row: &InboxRow) -> Lane {
    match update::read(&parse(row), &shared.me()) {
        Some((sender, wants)) if !is_slow(&wants) => Lane::Chat(sender.chat),
        _ => Lane::Alone(row.update_id),
    }
}

/// Handles one update.
async fn handle(shared: &Shared, row: InboxRow) -> Result<Then, store::Error> {
    let mut value = parse(&row);
    let read = update::read(&value, &shared.me());
    if row.attempts >= MAX_INBOX_ATTEMPTS {
        // It ended the program every time.
        let sender = read.as_ref().map(|(sender, _)| sender);
        put_aside(
            shared,
            row.update_id,
            sender,
            "the program ended whenever it was tried",
        )
        .await;
        shared.store.begin_update(FRONT, row.update_id).await?;
        return Ok(Then::Next);
    }
    if !shared.store.begin_update(FRONT, row.update_id).await? {
        return Ok(Then::Next);
    }
    let Some((sender, wants)) = read else {
        shared.store.update_handled(FRONT, row.update_id).await?;
        return Ok(Then::Next);
    };
    let bound = if is_slow(&wants) { SLOW_DESK } else { DESK };
    let work = handlers::attend(shared, &row, &mut value, &sender, &wants);
    let outcome = match tokio::time::timeout(bound, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Trouble::Desk(slow(bound))),
    };
    let reply = match outcome {
        Ok(reply) => reply,
        Err(Trouble::Desk(failure)) if !goes_away(&failure, &wants) => {
            Reply::Say(texts::failure(&failure))
        }
        Err(trouble) => return failed(shared, &row, &sender, &trouble).await,
    };
    match reply {
        Reply::Nothing => {}
        Reply::Remark(text) => mention(shared, sender.chat, &text).await,
        Reply::Say(text) => {
            if say(shared, sender.chat, &text).await.is_err() {
                shared.store.release_update(FRONT, row.update_id).await?;
                return Ok(Then::Stop);
            }
        }
    }
    shared.store.update_handled(FRONT, row.update_id).await?;
    Ok(Then::Next)
}

fn slow(bound: Duration) -> Failure {
    let message = format!(
        "it took longer than {} s and was broken off; /status shows how things stand",
        bound.as_secs()
    );
    Failure::new("desk_slow", message).retryable()
}

/// Whether a failure is the machine's and may go away: then what was said is kept and tried again, instead of being answered.
fn goes_away(failure: &Failure, wants: &Wants) -> bool {
    matches!(failure.kind.as_str(), "database" | "journal" | "engine")
        || (failure.retryable && matches!(wants, Wants::Words { .. } | Wants::Press { .. }))
}

/// Puts an update back, or aside when it was tried often enough.
async fn failed(
    shared: &Shared,
    row: &InboxRow,
    sender: &Sender,
    trouble: &Trouble,
) -> Result<Then, store::Error> {
    let words = trouble.to_string();
    let tries = row.attempts + 1;
    tracing::error!(update = row.update_id, tries, error = %words, "an update could not be handled");
    let last = tries >= MAX_INBOX_ATTEMPTS;
    if last {
        put_aside(shared, row.update_id, Some(sender), &words).await;
    }
    shared
        .store
        .update_failed(FRONT, row.update_id, &words)
        .await?;
    if last {
        return Ok(Then::Next);
    }
    let pause = shared.backoff(u32::try_from(tries).unwrap_or(u32::MAX));
    shared.pause(pause).await;
    Ok(Then::Stop)
}

/// Tells the admins and the person, before the update is put aside, so that a crash in between tells them twice, not never.
async fn put_aside(shared: &Shared, update: i64, sender: Option<&Sender>, why: &str) {
    let from = sender.map_or_else(String::new, |sender| {
        format!(" from {} ({})", sender.name, sender.user)
    });
    let text = format!(
        "A Telegram update{from} could not be handled and was put aside after {MAX_INBOX_ATTEMPTS} tries: {why}\nIt is kept in the table `inbox` as {update}."
    );
    shared.notice("telegram.put_aside", &text).await;
    if let Some(sender) = sender {
        let text = format!(
            "I could not work on your last message: {why}. It is kept, and the admins know; send it again when it is mended."
        );
        mention(shared, sender.chat, &text).await;
    }
}
