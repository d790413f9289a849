//! Waiting: for answers, signals, children and times.

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    checkpoint::{WaitKind, WaitRecord, WriteKind},
    error::NodeError,
    memo::{RETRY, Waiting, expired},
    plan::{child_name, given_name},
    stored::{micros_after, time},
    waits::{Arrived, RESERVED, Reply, WaitFor, arrival, timer},
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
        let value = self.ask(name, serde_json::to_value(question)?, None)?;
        self.read_answer(name, value.unwrap_or_default())
    }

    /// Like [`Context::interrupt`], but only until a time, by the database's clock: what comes first counts, the answer or the
    /// deadline. From the deadline on, an answer is refused ([`EngineError::Expired`](crate::EngineError::Expired)).
    ///
    /// The deadline with which the question is asked first stays, whatever a re-run gives: `now + 2 hours` is two hours from
    /// the first time. Its id is that of an interrupt of this name; both count the same questions.
    ///
    /// ```
    /// # use graph::{Context, NodeError, Reply};
    /// # use jiff::{SignedDuration, Timestamp};
    /// # async fn node(ctx: Context) -> Result<(), NodeError> {
    /// let deadline = Timestamp::now() + SignedDuration::from_hours(2);
    /// match ctx.interrupt_until::<bool>("deploy", "Deploy today?", deadline).await? {
    ///     Reply::Answered(yes) => { /* … */ }
    ///     Reply::Expired => { /* nobody was there */ }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn interrupt_until<A: DeserializeOwned>(
        &self,
        name: &str,
        question: &(impl Serialize + ?Sized + Sync),
        deadline: Timestamp,
    ) -> Result<Reply<A>, NodeError> {
        // As databases keep it, and never too early.
        let deadline = time(micros_after(deadline).max(0));
        let value = self.ask(name, serde_json::to_value(question)?, Some(deadline))?;
        Ok(match value {
            Some(value) => Reply::Answered(self.read_answer(name, value)?),
            None => Reply::Expired,
        })
    }

    /// The answer to a question; nothing if its time is over.
    fn ask(
        &self,
        name: &str,
        question: Value,
        until: Option<Timestamp>,
    ) -> Result<Option<Value>, NodeError> {
        self.check_name(name)?;
        let task = &self.inner.task;
        let space = question_space(name);
        let (round, until) = {
            let mut memo = self.inner.memo.lock();
            let round = memo.round("interrupt", name);
            if until.is_some() && memo.get(WriteKind::Wait, &expired(&space), round).is_some() {
                drop(memo);
                self.inner.check_run()?;
                return Ok(None);
            }
            let first = until.and_then(|_| memo.deadline(task, &space, round));
            (round, first.or(until))
        };
        let wait = WaitRecord {
            id: self.wait_id("interrupt", name, round),
            name: name.to_owned(),
            kind: WaitKind::Interrupt,
            task: task.clone(),
            value: question,
            signals: Vec::new(),
            children: Vec::new(),
            until,
        };
        self.wait(wait, round).map(Some)
    }

    fn read_answer<A: DeserializeOwned>(&self, name: &str, answer: Value) -> Result<A, NodeError> {
        serde_json::from_value(answer).map_err(|error| {
            let run = &self.inner.run;
            NodeError::from(error)
                .context(format!(
                    "the answer to `{name}` is not of the right type, and the first answer counts; to ask again, fork thread `{}` from checkpoint {} and make the fork its head",
                    run.thread,
                    run.base()
                ))
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
        Ok(as_given(serde_json::from_value(value)?))
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
            let arrived: Option<Arrived> = serde_json::from_value(value.clone())?;
            return Ok(arrived.map(as_given));
        }
        if inner.cleaning {
            return Err(NodeError::cancelled());
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
        let arrived: Option<Arrived> = serde_json::from_value(value)?;
        Ok(arrived.map(as_given))
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
            children: {
                let renamed = self.inner.run.renamed.lock();
                let children = what.children.iter();
                children.map(|name| child_name(&renamed, name)).collect()
            },
            until: what.until,
        })
    }

    /// Takes the oldest matching signal, or finds that the time has come.
    fn look(&self, wait: &WaitRecord) -> Option<(Value, Option<u64>)> {
        let run = &self.inner.run;
        if let Some((value, number)) = run.mailbox.lock().take(|signal| arrival(wait, signal)) {
            return Some((value, Some(number)));
        }
        // Whether a question has expired is settled in the database, where an answer may have come first.
        wait.until
            .filter(|_| wait.kind != WaitKind::Interrupt)
            .is_some_and(|until| until <= run.now())
            .then(|| (timer(), None))
    }

    fn wait(&self, wait: WaitRecord, round: u32) -> Result<Value, NodeError> {
        let inner = &*self.inner;
        inner.check_run()?;
        self.check_memory(&wait.name)?;
        let space = if wait.kind == WaitKind::Interrupt {
            question_space(&wait.name)
        } else {
            wait_space(&wait.name)
        };
        let mut memo = inner.memo.lock();
        if let Some(value) = memo.get(WriteKind::Wait, &space, round) {
            return Ok(value.clone());
        }
        if inner.cleaning {
            return Err(NodeError::cancelled());
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

/// With the name under which the node has spawned a child.
fn as_given(arrived: Arrived) -> Arrived {
    match arrived {
        Arrived::Child(mut end) => {
            end.name = given_name(&end.name).to_owned();
            Arrived::Child(end)
        }
        other => other,
    }
}

/// The space of the questions of this name. Interrupts and waits of one name do not meet.
fn question_space(name: &str) -> String {
    format!("?{name}")
}

/// The space of the waits of this name: the name itself, if that is not the space of a question or the engine's own.
fn wait_space(name: &str) -> String {
    if name.starts_with('?') || name == RETRY {
        // No name has a line break.
        return format!("{name}\nwait");
    }
    name.to_owned()
}
