//! Waiting: for answers, signals, children and times.

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    checkpoint::{WaitKind, WaitRecord, WriteKind},
    error::NodeError,
    memo::Waiting,
    waits::{Arrived, RESERVED, WaitFor, arrival, timer},
};

use super::{Context, wait_id};

impl Context {
    /// Asks something and suspends the thread until the answer has come ([`Engine::answer`](crate::Engine::answer)).
    ///
    /// The same name again in one task is the next question.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn interrupt<A: DeserializeOwned>(
        &self,
        name: &str,
        question: &(impl Serialize + ?Sized + Sync),
    ) -> Result<A, NodeError> {
        self.check_name(name)?;
        let round = self.inner.memo.lock().round("interrupt", name);
        let wait = WaitRecord {
            id: self.wait_id("interrupt", name, round),
            name: name.to_owned(),
            kind: WaitKind::Interrupt,
            task: self.inner.task.clone(),
            value: serde_json::to_value(question)?,
            signals: Vec::new(),
            children: Vec::new(),
            until: None,
        };
        let value = self.wait(wait, round)?;
        serde_json::from_value(value).map_err(|error| {
            NodeError::from(error)
                .context(format!("the answer to `{name}` is not of the right type"))
                .fatal()
        })
    }

    /// The id that the coming interrupt of this name will have, so that it can stand in an event said before it.
    pub fn interrupt_id(&self, name: &str) -> String {
        let round = self.inner.memo.lock().next_round("interrupt", name);
        self.wait_id("interrupt", name, round)
    }

    /// Suspends the thread until the first of several things comes: the oldest matching signal in the mailbox, or the time.
    ///
    /// The same name again in one task is the next wait. Signals that nobody waits for stay in the mailbox.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn wait_any(&self, name: &str, what: &WaitFor) -> Result<Arrived, NodeError> {
        self.check_name(name)?;
        if what.signals.is_empty() && what.children.is_empty() && what.until.is_none() {
            return Err(NodeError::msg(format!(
                "`{name}` waits for nothing, and would wait for ever; name a signal, a child or a time"
            ))
            .fatal());
        }
        let round = self.inner.memo.lock().round("wait", name);
        let value = self.wait(self.record(name, round, WaitKind::Wait, what)?, round)?;
        Ok(serde_json::from_value(value)?)
    }

    /// Suspends the thread until that time, by the database's clock.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn sleep_until(&self, name: &str, at: Timestamp) -> Result<(), NodeError> {
        self.check_name(name)?;
        let round = self.inner.memo.lock().round("wait", name);
        let what = WaitFor::new().until(at);
        self.wait(self.record(name, round, WaitKind::Timer, &what)?, round)?;
        Ok(())
    }

    /// Like [`Context::wait_any`], but returns at once, with nothing if nothing has come. Remembered too.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn try_take(&self, name: &str, what: &WaitFor) -> Result<Option<Arrived>, NodeError> {
        self.check_name(name)?;
        self.inner.check_run()?;
        self.check_memory(name)?;
        let inner = &*self.inner;
        let mut memo = inner.memo.lock();
        let round = memo.round("take", name);
        if let Some(value) = memo.get(WriteKind::Take, name, round) {
            return Ok(serde_json::from_value(value.clone())?);
        }
        let wait = self.record(name, round, WaitKind::Wait, what)?;
        let (value, consumed) = match self.look(&wait) {
            Some((value, consumed)) => (value, consumed),
            None => (Value::Null, None),
        };
        memo.note(
            &inner.task,
            WriteKind::Take,
            name,
            round,
            value.clone(),
            consumed,
        );
        Ok(serde_json::from_value(value)?)
    }

    fn record(
        &self,
        name: &str,
        round: u32,
        kind: WaitKind,
        what: &WaitFor,
    ) -> Result<WaitRecord, NodeError> {
        if let Some(kind) = what.signals.iter().find(|kind| kind.starts_with(RESERVED)) {
            return Err(
                NodeError::msg(format!("the signal kind `{kind}` is the engine's own")).fatal(),
            );
        }
        Ok(WaitRecord {
            id: self.wait_id("wait", name, round),
            name: name.to_owned(),
            kind,
            task: self.inner.task.clone(),
            value: Value::Null,
            signals: what.signals.clone(),
            children: what.children.clone(),
            until: what.until,
        })
    }

    /// Takes the oldest matching signal, or finds that the time has come.
    fn look(&self, wait: &WaitRecord) -> Option<(Value, Option<u64>)> {
        let run = &self.inner.run;
        if let Some((value, number)) = run.mailbox.lock().take(|signal| arrival(wait, signal)) {
            return Some((value, Some(number)));
        }
        wait.until
            .is_some_and(|until| until <= run.now())
            .then(|| (timer(), None))
    }

    fn wait(&self, wait: WaitRecord, round: u32) -> Result<Value, NodeError> {
        let inner = &*self.inner;
        inner.check_run()?;
        self.check_memory(&wait.name)?;
        let space = if wait.kind == WaitKind::Interrupt {
            // Interrupts and waits of one name do not meet.
            format!("?{}", wait.name)
        } else {
            wait.name.clone()
        };
        let mut memo = inner.memo.lock();
        if let Some(value) = memo.get(WriteKind::Wait, &space, round) {
            return Ok(value.clone());
        }
        if !inner.may_wait {
            return Err(NodeError::msg(format!(
                "node `{}` cleans up after a cancellation and cannot wait (for `{}`)",
                inner.node, wait.name
            ))
            .fatal());
        }
        if inner.is_alone()
            && memo.waits.is_empty()
            && let Some((value, consumed)) = self.look(&wait)
        {
            memo.note(
                &inner.task,
                WriteKind::Wait,
                &space,
                round,
                value.clone(),
                consumed,
            );
            return Ok(value);
        }
        memo.waits.push(Waiting {
            record: wait,
            space,
            round,
        });
        Err(NodeError::suspended())
    }

    fn wait_id(&self, space: &str, name: &str, round: u32) -> String {
        let inner = &*self.inner;
        wait_id(
            &inner.run,
            inner.root_step(),
            &inner.task,
            space,
            name,
            round,
        )
    }
}
