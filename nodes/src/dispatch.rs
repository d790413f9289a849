//! What a conversation does with its jobs: starts them one at a time, queues what comes meanwhile, passes wishes and orders on,
//! and tells how they ended.

use graph::{ChildEnd, NodeError, ThreadId};
use ports::{Event, JobId, JobKind, JobStatus, SaidKind, TaskId, threads};

use crate::{
    conversation::{Finished, Queued, Running},
    developers::broken_down,
    job::{self, JobOutcome, JobUpdate},
    signal::{self, Message, Order, OrderKind},
    talk::Talk,
    texts,
};

/// What follows a turn of a conversation.
pub(crate) enum Then {
    /// The next thing in the mailbox.
    Listen,
    /// The conversation is over.
    End,
}

impl Talk<'_> {
    /// Starts a job, or keeps the work until the running one has ended.
    pub(crate) fn begin(&mut self, work: JobKind, yes: bool) -> Result<(), NodeError> {
        if let Some(running) = &self.now.running {
            let text = if self.now.queue.len() >= self.crew.policy.max_queued_changes {
                format!(
                    "There are {} changes waiting already; send **{}** again when some of them are done.",
                    self.now.queue.len(),
                    work.title()
                )
            } else {
                let text = format!(
                    "**{}** is next: it starts when {} has ended.",
                    work.title(),
                    running.job
                );
                self.now.queue.push(Queued { work, yes });
                text
            };
            return self.reply(text);
        }
        self.start(work, yes)
    }

    pub(crate) fn start(&mut self, work: JobKind, yes: bool) -> Result<(), NodeError> {
        self.now.jobs += 1;
        let id = JobId::new(format!("job-{}", self.now.jobs));
        let scope = self.scope().job(id.clone());
        let update = JobUpdate::default()
            .scope(scope.clone())
            .work(Some(work.clone()))
            .spec(self.now.spec.clone())
            .slug(self.now.slug.clone())
            .yes(yes)
            .policy(self.crew.policy.clone());
        let thread = self.ctx.spawn(id.as_str(), job::GRAPH, &update)?;
        tracing::info!(project = %scope.project, job = %id, key = self.key, "a job is started");
        scope.tell(
            self.ctx,
            Event::JobStarted {
                work: work.clone(),
                thread: thread.to_string(),
            },
        )?;
        let note = self
            .crew
            .tape_note()
            .map_or_else(String::new, |note| format!(" It is played {note}."));
        let text = format!(
            "Started: **{}** ({id}).{note} I will tell you when it is done; ask me at any time.",
            work.title()
        );
        self.now.running = Some(Running { job: id, work, yes });
        self.say(SaidKind::News, text)
    }

    pub(crate) fn job_ended(&mut self, end: &ChildEnd) -> Result<(), NodeError> {
        let Some(running) = self.now.running.take() else {
            return Ok(());
        };
        let outcome = match serde_json::from_value::<Option<JobOutcome>>(end.output.clone()) {
            Ok(Some(outcome)) => outcome,
            _ => self.unsaid_end(&running, end)?,
        };
        if outcome.status == JobStatus::Deployed
            && let (JobKind::Change { change }, Some(spec)) = (&running.work, &mut self.now.spec)
        {
            spec.features.push(change.title.clone());
            spec.acceptance.extend(change.acceptance.iter().cloned());
            for need in &change.needs {
                if !spec.needs.contains(need) {
                    spec.needs.push(need.clone());
                }
            }
        }
        let text = texts::result(&running.work, &outcome, self.crew.tape_note().as_deref());
        self.say(SaidKind::Result, text)?;
        let status = outcome.status;
        self.now.last = Some(Finished {
            job: running.job,
            work: running.work,
            outcome,
        });
        self.go_on(status)
    }

    /// The job's thread broke down before it could say how it ended.
    pub(crate) fn unsaid_end(
        &self,
        running: &Running,
        end: &ChildEnd,
    ) -> Result<JobOutcome, NodeError> {
        let cancelled = end.status == graph::checkpoint::ThreadStatus::Cancelled;
        let outcome = JobOutcome {
            status: if cancelled {
                JobStatus::Cancelled
            } else {
                JobStatus::Failed
            },
            url: None,
            sha: None,
            failure: (!cancelled).then(|| broken_down(&end.thread, end.error.as_deref())),
        };
        self.scope().job(running.job.clone()).tell(
            self.ctx,
            Event::JobEnded {
                status: outcome.status,
                url: None,
                failure: outcome.failure.clone(),
            },
        )?;
        Ok(outcome)
    }

    /// What was queued follows a success, waits for a retry after a failure, and is dropped with a cancelled job.
    pub(crate) fn go_on(&mut self, status: JobStatus) -> Result<(), NodeError> {
        if self.now.queue.is_empty() {
            return Ok(());
        }
        match status {
            JobStatus::Deployed => {
                let next = self.now.queue.remove(0);
                self.start(next.work, next.yes)
            }
            JobStatus::Failed => {
                let waiting = self.queued_titles();
                self.reply(format!("Still waiting: {waiting}. Say \"retry\" to try the failed job again, or \"cancel\" to drop them."))
            }
            JobStatus::Cancelled => self.drop_queue(),
        }
    }

    pub(crate) fn queued_titles(&self) -> String {
        let titles: Vec<String> = self
            .now
            .queue
            .iter()
            .map(|queued| format!("**{}**", queued.work.title()))
            .collect();
        titles.join(", ")
    }

    pub(crate) fn drop_queue(&mut self) -> Result<(), NodeError> {
        if self.now.queue.is_empty() {
            return Ok(());
        }
        let dropped = self.queued_titles();
        self.now.queue.clear();
        self.reply(format!("Dropped, because it was waiting for that job: {dropped}. Send it again if you still want it."))
    }

    pub(crate) fn steer(&mut self, text: &str, message: &Message) -> Result<(), NodeError> {
        let Some(running) = self.now.running.clone() else {
            return self.reply("No job is running, so there is nothing to steer.");
        };
        let text = self.crew.vault.redact(text);
        let wish = signal::Steer {
            text: text.clone(),
            by: message.from.clone(),
        };
        self.scope().job(running.job.clone()).tell(
            self.ctx,
            Event::JobSteered {
                text: text.clone(),
                by: message.from.clone(),
            },
        )?;
        let thread = self.job_thread(&running);
        self.ctx.signal(&thread, signal::STEER, &self.key, &wish)?;
        self.reply(format!("Passed on to {}: {text}", running.job))
    }

    pub(crate) fn job_thread(&self, running: &Running) -> ThreadId {
        ThreadId::from(threads::job(&self.scope().project, &running.job))
    }

    pub(crate) async fn order(&mut self, order: Order) -> Result<Then, NodeError> {
        match order.what {
            OrderKind::Deploy if self.now.spec.is_none() => {
                self.reply("There is nothing to deploy yet. Tell me what you want built.")?;
            }
            OrderKind::Deploy => self.begin(JobKind::Redeploy, order.yes)?,
            OrderKind::Retry { ref task } => self.retry(&order, task.as_ref())?,
            OrderKind::Cancel => self.cancel()?,
            OrderKind::Status => {
                let record = self.record().await?;
                self.reply(texts::status(record.as_ref(), &self.now))?;
            }
            OrderKind::Archive => {
                self.withdraw()?;
                if let Some(running) = &self.now.running {
                    self.ctx.cancel_child(running.job.as_str())?;
                }
                self.now.queue.clear();
                self.reply("This project is put away.")?;
                return Ok(Then::End);
            }
        }
        Ok(Then::Listen)
    }

    pub(crate) fn retry(&mut self, order: &Order, task: Option<&TaskId>) -> Result<(), NodeError> {
        if let Some(running) = self.now.running.clone() {
            let retry = signal::Retry {
                task: task.cloned(),
                by: Some(order.by.clone()),
            };
            let thread = self.job_thread(&running);
            self.ctx.signal(&thread, signal::RETRY, &self.key, &retry)?;
            return self.reply(format!("Told {} to try again what failed.", running.job));
        }
        match &self.now.last {
            Some(last) if last.outcome.status != JobStatus::Deployed => {
                let work = last.work.clone();
                self.start(work, order.yes)
            }
            _ => self.reply("Nothing failed, so there is nothing to try again."),
        }
    }

    pub(crate) fn cancel(&mut self) -> Result<(), NodeError> {
        if let Some(running) = self.now.running.clone() {
            self.ctx.cancel_child(running.job.as_str())?;
            self.now.queue.clear();
            return self.reply(format!("Stopping {}.", running.job));
        }
        if self.now.open.is_some() || !self.now.queue.is_empty() {
            self.withdraw()?;
            self.now.queue.clear();
            return self.reply("Dropped. Nothing was built or changed.");
        }
        self.reply("No job is running.")
    }
}
