//! Following a project's journal on the terminal: live lines for people, JSON for programs, until there is nothing more to
//! wait for.

use std::time::Duration;

use graph::{Cursor, Entry, JournalFilter, ThreadFilter, ThreadStatus};
use ports::{Audience, Event, FrontDesk, JobStatus, ProjectId, Recorded, SaidKind, threads};

use crate::app::App;
use crate::config::Mode;
use crate::home::Held;
use crate::home::neighbours::Part;
use crate::lines::{End, EndError, EndStatus, EventLine, for_people, wait_record};
use crate::words::{self, print_json};
use crate::work::Work;

/// Entries that are read together.
const PAGE: usize = 500;
/// How long the journal is waited for before this process looks whether somebody still does the work.
const PATIENCE: Duration = Duration::from_millis(500);

/// Prints what happens.
pub struct Printer {
    /// JSON, one object a line.
    pub json: bool,
}

impl Printer {
    /// Prints an entry; gives what it says, if it is the crew's.
    pub fn entry(&self, entry: &Entry) -> Option<Recorded> {
        let recorded = Recorded::from_journal(&entry.payload)?;
        if self.json {
            print_json(&EventLine::new(&recorded, entry.number, entry.at));
        } else if let Some(line) = for_people(&recorded) {
            words::say(&line);
        }
        Some(recorded)
    }

    /// Prints the end.
    pub fn end(&self, end: &End) {
        if self.json {
            print_json(end);
            return;
        }
        match end.status {
            EndStatus::Deployed | EndStatus::Answered => {}
            EndStatus::Waiting => {
                if let Some(wait) = &end.wait {
                    words::say(&format!(
                        "answer with: artel approve {0} | artel reject {0} | artel answer {0} TEXT",
                        wait.id
                    ));
                }
            }
            EndStatus::Cancelled => words::complain("cancelled"),
            EndStatus::Failed => {
                if let Some(error) = &end.error {
                    words::complain(&format!("artel: {}", error.message));
                    if !error.action.is_empty() {
                        words::complain(&format!("  {}", error.action));
                    }
                }
            }
        }
    }
}

/// How the kinds of the engine's own signals begin, such as the end of a child.
const ENGINES_OWN: &str = "graph.";

/// What is being waited for.
#[derive(Clone, Debug)]
pub enum Until {
    /// What comes of a message, whose key this is: an answer, or the end of the job that it led to.
    Message(String),
    /// The conversation and its job have nothing left to do but wait for people.
    Idle,
}

/// Does the work itself as long as nobody else does it.
pub struct Doing<'a> {
    app: &'a App,
    work: Option<Work>,
    /// Whether it was said that nobody works.
    said: bool,
}

impl<'a> Doing<'a> {
    /// Takes the work on if it is free.
    pub async fn begin(app: &'a App) -> anyhow::Result<Self> {
        let mut doing = Self {
            app,
            work: None,
            said: false,
        };
        doing.take_over().await?;
        Ok(doing)
    }

    /// Takes the work on when whoever did it is gone.
    async fn take_over(&mut self) -> anyhow::Result<()> {
        if self.work.is_some() {
            return Ok(());
        }
        if let Some(held) = self.free_work()? {
            self.work = Some(Work::start(self.app, held, Part::Command).await?);
        }
        Ok(())
    }

    /// The right to do the work, when nobody does it.
    fn free_work(&mut self) -> anyhow::Result<Option<Held>> {
        let home = &self.app.home;
        if !self.app.is_shared() {
            return Ok(home.take_work()?);
        }
        let runs = [Part::Runner, Part::Up, Part::Command];
        if !home.present(&runs)?.is_empty() {
            return Ok(None);
        }
        if self.app.config.mode == Mode::Full {
            // Servers have processes of their own for the work; a command is no substitute for one that is down.
            if !std::mem::replace(&mut self.said, true) {
                words::complain(&format!(
                    "artel: no runner lives on {}: this waits until `artel runner` or `artel up` is started",
                    home.path().display()
                ));
            }
            return Ok(None);
        }
        Ok(home.join_work()?)
    }

    /// Goes on: takes the work over when whoever did it is gone, and says when a part of ours has ended.
    pub async fn keep(&mut self) -> anyhow::Result<()> {
        self.take_over().await?;
        match &mut self.work {
            Some(work) => match work.ended().await {
                Some(error) => Err(error),
                None => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// Stops what this process did.
    pub async fn finish(self) {
        if let Some(work) = self.work {
            work.stop().await;
        }
    }
}

/// Follows a project from `after` on until there is nothing more to wait for.
pub async fn follow(
    app: &App,
    doing: &mut Doing<'_>,
    project: &ProjectId,
    after: Cursor,
    until: Until,
    printer: &Printer,
) -> anyhow::Result<End> {
    let journal = app.engine.journal();
    let filter = JournalFilter::stream(project.as_str());
    let mut watch = Watch::new(project, until);
    let mut cursor = after;
    loop {
        doing.take_over().await?;
        // Read before the entries: when all was quiet then, what follows in the journal is all there is.
        let quiet = is_quiet(app, project).await?;
        loop {
            let entries = journal.read(&filter, cursor, PAGE).await?;
            let Some(last) = entries.last() else { break };
            cursor = last.cursor;
            for entry in &entries {
                if let Some(recorded) = printer.entry(entry) {
                    watch.see(&recorded);
                }
            }
        }
        if let Some(mut end) = watch.end(quiet) {
            if end.status == EndStatus::Answered && matches!(watch.until, Until::Idle) {
                // What was asked before this began still waits.
                let report = app.desk.status(project).await.ok();
                if let Some(wait) = report.and_then(|report| report.waits.into_iter().next()) {
                    end.status = EndStatus::Waiting;
                    end.wait = Some(wait);
                }
            }
            return Ok(end);
        }
        if let Some(failure) = broken(app, project).await? {
            return Ok(failure);
        }
        match &mut doing.work {
            Some(work) => tokio::select! {
                changed = journal.changed(cursor, PATIENCE) => changed?,
                error = work.broken() => return Err(error),
            },
            None => journal.changed(cursor, PATIENCE).await?,
        }
    }
}

/// The end, when the conversation's own thread failed.
async fn broken(app: &App, project: &ProjectId) -> anyhow::Result<Option<End>> {
    let thread = app.engine.thread(threads::conversation(project)).await?;
    Ok(thread
        .filter(|thread| thread.status == ThreadStatus::Failed)
        .map(|thread| {
            let mut end = End::new(Some(project.as_str()), EndStatus::Failed);
            end.error = Some(EndError {
                code: "conversation_failed".to_owned(),
                message: thread
                    .error
                    .unwrap_or_else(|| "the conversation failed".to_owned()),
                action: "see `artel doctor` and the log, then say it again".to_owned(),
            });
            end
        }))
}

/// Whether the crew has nothing to do for a project but wait for people.
pub async fn is_quiet(app: &App, project: &ProjectId) -> anyhow::Result<bool> {
    let prefix = threads::conversation(project);
    let filter = ThreadFilter {
        prefix: Some(prefix),
        ..ThreadFilter::default()
    };
    let all = app.engine.threads(&filter).await?;
    let ended = |thread: &graph::ThreadInfo| {
        matches!(
            thread.status,
            ThreadStatus::Done | ThreadStatus::Failed | ThreadStatus::Cancelled
        )
    };
    let parents: Vec<_> = all
        .iter()
        .filter(|thread| !ended(thread))
        .filter_map(|thread| thread.parent.as_ref().map(|parent| parent.thread.clone()))
        .collect();
    for thread in all.iter().filter(|thread| !ended(thread)) {
        if matches!(thread.status, ThreadStatus::Ready | ThreadStatus::Running)
            || thread.cancel.is_some()
        {
            return Ok(false);
        }
        // A job or a task that waits neither for a child nor for a person waits for a worker, an errand or a clock:
        // something will come by itself.
        let kinds: Vec<_> = thread.waits.iter().flat_map(|wait| &wait.signals).collect();
        let for_people = kinds
            .iter()
            .any(|kind| kind.starts_with(nodes::signal::ANSWER_PREFIX));
        if thread.parent.is_some() && !parents.contains(&thread.id) && !for_people {
            return Ok(false);
        }
        // What it waits for may have come already, and nobody have looked yet.
        let (mail, _) = app.engine.checkpointer().mailbox(&thread.id, 0).await?;
        if mail
            .iter()
            .any(|signal| signal.kind.starts_with(ENGINES_OWN) || kinds.contains(&&signal.kind))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What was seen so far.
struct Watch {
    project: ProjectId,
    until: Until,
    /// The message was taken up.
    heard: bool,
    replied: bool,
    jobs: usize,
    open: Vec<ports::OpenWait>,
    ended: Option<End>,
}

impl Watch {
    fn new(project: &ProjectId, until: Until) -> Self {
        Self {
            project: project.clone(),
            heard: matches!(until, Until::Idle),
            until,
            replied: false,
            jobs: 0,
            open: Vec::new(),
            ended: None,
        }
    }

    fn see(&mut self, recorded: &Recorded) {
        match &recorded.event {
            Event::MessageReceived { key, .. } => {
                if matches!(&self.until, Until::Message(wanted) if wanted == key) {
                    self.heard = true;
                    self.replied = false;
                }
            }
            Event::Said {
                kind: SaidKind::Reply,
                to: Audience::Owner,
                ..
            } => self.replied = true,
            Event::Said {
                kind: SaidKind::Trouble,
                to: Audience::Owner,
                text,
                ..
            } => {
                let mut end = End::new(Some(self.project.as_str()), EndStatus::Failed);
                end.error = Some(EndError {
                    code: "not_worked_on".to_owned(),
                    message: text.clone(),
                    action: "`artel doctor` looks at what is needed; then say it again".to_owned(),
                });
                self.ended = Some(end);
            }
            Event::WaitOpened { wait, .. } => self.open.push(wait.clone()),
            Event::WaitClosed { wait, .. } => self.open.retain(|open| open.id != *wait),
            Event::JobStarted { .. } => {
                self.jobs += 1;
                self.ended = None;
            }
            Event::JobEnded {
                status,
                url,
                failure,
            } => {
                self.jobs = self.jobs.saturating_sub(1);
                let mut end = End::new(
                    Some(self.project.as_str()),
                    match status {
                        JobStatus::Deployed => EndStatus::Deployed,
                        JobStatus::Failed => EndStatus::Failed,
                        JobStatus::Cancelled => EndStatus::Cancelled,
                    },
                );
                end.url.clone_from(url);
                end.error = failure.as_ref().map(|failure| EndError {
                    code: failure.kind.clone(),
                    message: failure.message.clone(),
                    action: format!("see `artel logs {0}`, then `artel retry {0}`", self.project),
                });
                self.ended = Some(end);
            }
            _ => {}
        }
    }

    fn end(&self, quiet: bool) -> Option<End> {
        if !self.heard {
            return None;
        }
        if quiet && self.jobs == 0 && self.ended.is_some() {
            return self.ended.clone();
        }
        let for_owner = |wait: &&ports::OpenWait| wait.audience == Audience::Owner;
        if let Some(wait) = self.open.iter().find(for_owner).or(self.open.first())
            && quiet
        {
            let mut end = End::new(Some(self.project.as_str()), EndStatus::Waiting);
            end.wait = Some(wait_record(wait));
            return Some(end);
        }
        let answered = match self.until {
            // While a job that was there before runs, an answer is all that comes of a message.
            Until::Message(_) => self.replied && self.jobs == 0,
            Until::Idle => quiet && self.jobs == 0,
        };
        answered.then(|| End::new(Some(self.project.as_str()), EndStatus::Answered))
    }
}
