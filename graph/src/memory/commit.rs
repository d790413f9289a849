//! Commits: what they may be refused for, and what they change.

use jiff::Timestamp;

use super::tables::Tables;
use crate::checkpoint::{Commit, Lease, Receipt, StorageError, Then, ThreadStatus, WriteKey};

impl Tables {
    /// All of a commit, or nothing.
    pub(super) fn commit(
        &mut self,
        lease: &Lease,
        commit: Commit,
        now: Timestamp,
    ) -> Result<Receipt, StorageError> {
        // Everything that can be refused is refused before anything is written.
        let thread = self.held(lease)?;
        let mut made = None;
        if let Some(new) = commit.checkpoint {
            if new.branch != thread.record.branch || new.parent != thread.record.checkpoint {
                return Err(StorageError::NotTheTip {
                    thread: lease.thread.clone(),
                    branch: new.branch,
                    parent: new.parent,
                });
            }
            made = Some(thread.grow(new, now));
        }
        if commit.clear_writes {
            thread.writes.remove(&commit.base);
        }
        if !commit.forget.is_empty()
            && let Some(writes) = thread.writes.get_mut(&commit.base)
        {
            for key in &commit.forget {
                writes.remove(key);
            }
        }
        if !commit.writes.is_empty() {
            let writes = thread
                .writes
                .entry(made.unwrap_or(commit.base))
                .or_default();
            for write in commit.writes {
                let key = WriteKey {
                    task: write.task,
                    kind: write.kind,
                    name: write.name,
                    round: write.round,
                };
                writes.insert(key, (write.value, write.kept));
            }
        }
        for number in &commit.consumed {
            thread.mailbox.remove(number);
        }
        if let Some(waits) = commit.waits {
            thread.record.waits = waits;
        }
        if made.is_some() {
            thread.takeovers = 0;
        }
        thread.record.updated_at = now;

        for event in commit.events {
            self.append(event, now);
        }
        for child in commit.children {
            self.create(child, now);
        }
        let mut undelivered = Vec::new();
        for signal in commit.signals {
            if !self.threads.contains_key(&signal.thread) {
                if !undelivered.contains(&signal.thread) {
                    undelivered.push(signal.thread);
                }
                continue;
            }
            self.deliver(signal, now);
        }
        for request in commit.cancels {
            self.cancel(request, now);
        }

        let thread = self.held(lease)?;
        let mut released = true;
        match commit.then {
            Then::Keep => released = false,
            Then::Yield => {
                thread.release(ThreadStatus::Ready, Some(now));
                thread.record.wake_at = None;
            }
            Then::Wait { mail_seen, wake_at } => {
                let news = thread.mailbox.range(mail_seen + 1..).next().is_some();
                if news || thread.record.cancel.is_some() {
                    released = false;
                } else {
                    thread.release(ThreadStatus::Waiting, wake_at);
                    thread.record.wake_at = wake_at;
                }
            }
            Then::End {
                status,
                error,
                output,
            } => {
                let revived = thread.mailbox.values().any(|mail| mail.revives);
                thread.release(status, revived.then_some(now));
                thread.record.error = error;
                thread.record.output = output;
                thread.returns_state = thread.record.output.is_none();
                thread.record.waits = Vec::new();
                thread.record.wake_at = None;
                thread.record.cancel = None;
            }
        }
        thread.state = commit
            .state
            .filter(|_| released)
            .map(|state| (thread.record.checkpoint, state));
        Ok(Receipt {
            checkpoint: made,
            released,
            mail: thread.mail,
            cancel: thread.record.cancel.clone(),
            undelivered,
            now,
        })
    }
}
