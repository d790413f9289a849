//! Questions whose time is over. An answer may come at the same moment, so it is settled in the database which of them counts:
//! in one commit, the question leaves what the thread waits for (no answer is taken from then on), and a signal says that it has
//! expired (so that a late answer can be told). An answer that was taken before that is in the mailbox afterwards, and counts.

use serde_json::Value;

use crate::{
    checkpoint::{NewSignal, WaitKind, WaitRecord},
    memo::Waiting,
    state::State,
    waits::{EXPIRED, Expiry, arrival, expires, expiry_key},
};

use super::{
    Broken, Run,
    shared::Mailbox,
    tasks::{Status, Task},
};

/// That a question has expired.
pub(super) struct Expired {
    /// The signal that says so, if it is still in the mailbox.
    pub signal: Option<u64>,
}

impl<S: State> Run<S> {
    /// Ends the questions of suspended tasks whose deadline has passed.
    pub(super) async fn expire(&self, tasks: &[Task<S>]) -> Result<(), Broken> {
        let over = self.over(tasks);
        if over.is_empty() {
            return Ok(());
        }
        let shared = &*self.shared;
        let mut commit = self.commit();
        for wait in &over {
            let expiry = Expiry {
                id: wait.id.clone(),
            };
            commit.signals.push(NewSignal {
                thread: shared.thread.clone(),
                kind: EXPIRED.to_owned(),
                key: expiry_key(&wait.id),
                payload: serde_json::to_value(expiry).unwrap_or_default(),
                revives: false,
            });
        }
        commit.waits = shared.strike_waits(|open| over.iter().any(|wait| wait.id == open.id));
        self.land(commit, &[]).await?;
        shared.fetch_mail().await?;
        let mut settled = shared.expired.lock();
        settled.extend(over.into_iter().map(|wait| wait.id));
        Ok(())
    }

    /// The open questions whose deadline has passed, and of which nobody knows yet what counts.
    fn over(&self, tasks: &[Task<S>]) -> Vec<WaitRecord> {
        let now = self.shared.now();
        let mailbox = self.shared.mailbox.lock();
        let settled = self.shared.expired.lock();
        let mut over = Vec::new();
        for task in tasks {
            if !matches!(task.status, Status::Suspended) {
                continue;
            }
            for Waiting { record, .. } in &task.memo.lock().waits {
                let is_over = record.kind == WaitKind::Interrupt
                    && record.until.is_some_and(|until| until <= now)
                    && !settled.contains(&record.id)
                    && !mailbox
                        .any(|signal| arrival(record, signal).is_some() || expires(record, signal));
                if is_over {
                    over.push(record.clone());
                }
            }
        }
        over
    }

    /// Whether a question has expired. An answer in the mailbox came first.
    pub(super) fn expiry(&self, wait: &Waiting, mailbox: &mut Mailbox) -> Option<Expired> {
        let record = &wait.record;
        if record.kind != WaitKind::Interrupt || record.until.is_none() {
            return None;
        }
        if mailbox.any(|signal| arrival(record, signal).is_some()) {
            return None;
        }
        if let Some((_, number)) =
            mailbox.take(|signal| expires(record, signal).then_some(Value::Null))
        {
            return Some(Expired {
                signal: Some(number),
            });
        }
        // It was known already, and has left the mailbox.
        let settled = self.shared.expired.lock();
        settled
            .contains(&record.id)
            .then_some(Expired { signal: None })
    }
}
