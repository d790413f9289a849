//! A run of a thread as the engine makes it, one request to the database at a time, without nodes: what it knows between two
//! requests, and what it does with each answer.
//!
//! Two threads. The parent starts a child, waits for a signal *go* and for the child's end, and ends. The child waits for a
//! signal *tick*, which it asks for (until a time, if the world says so), and ends. Either can be cancelled.

use std::{collections::BTreeMap, fmt::Write as _, sync::OnceLock, time::Duration};

use graph::{
    Parent, Priority, Source, StorageError, ThreadFilter, ThreadInfo, ThreadStatus, WaitInfo,
    WaitKind,
    checkpoint::{
        CancelRequest, Claim, Commit, Lease, Loaded, NewCheckpoint, NewEvent, NewSignal, NewThread,
        Receipt, SignalRecord, Then, Write, WriteKind,
    },
};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use crate::flaws::{Database, Flaw};

pub const HOUR: Duration = Duration::from_hours(1);

/// When the time of the child's question is over. It is later than any exploration takes, so that it comes when a world says so.
pub fn deadline() -> Timestamp {
    static DEADLINE: OnceLock<Timestamp> = OnceLock::new();
    *DEADLINE.get_or_init(|| Timestamp::now() + SignedDuration::from_mins(20))
}

/// What a world's clock jumps by, and is past the deadline then.
pub const LATER: Duration = Duration::from_mins(25);

/// The kind of the signal that says that the time is over.
const EXPIRED: &str = "expired";

/// Which of the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Parent,
    Child,
}

/// Names of one world beside others in the same database.
#[derive(Clone, Debug, Default)]
pub struct Names(pub String);

impl Names {
    pub fn thread(&self, role: Role) -> String {
        match role {
            Role::Parent => format!("{}parent", self.0),
            Role::Child => format!("{}parent/kid", self.0),
        }
    }

    pub fn graph(&self, role: Role) -> String {
        format!("{}{role:?}", self.0)
    }

    pub fn new_thread(&self, role: Role) -> NewThread {
        NewThread {
            id: self.thread(role).into(),
            graph: self.graph(role),
            parent: (role == Role::Child).then(|| Parent {
                thread: self.thread(Role::Parent).into(),
                name: "kid".to_owned(),
            }),
            priority: Priority::Medium,
            input: json!({}).into(),
        }
    }
}

/// Kinds of signals that the thread waits for after a number of steps.
fn awaited(role: Role, step: u64) -> &'static [&'static str] {
    match (role, step) {
        (Role::Parent, 1) => &["go", "end"],
        (Role::Child, 0) => &["tick"],
        _ => &[],
    }
}

/// What a run does next.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// It has a lease, and knows nothing yet.
    Claimed,
    /// It makes its next commit.
    Ready,
    /// It has heard of signals that it has not read.
    News,
    /// Its commit was not answered: it finds out what became of it.
    Unsure(Box<Commit>),
}

/// What became of a run with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    GoesOn,
    /// It has given its lease back.
    Released,
    /// It was told that its lease is void.
    Fenced,
}

/// A run, between two requests.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is something that it knows or does not know, whatever it knows of the others"
)]
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub role: Role,
    pub lease: Lease,
    pub owner: String,
    pub phase: Phase,
    base: u64,
    step: u64,
    /// The newest signal that it has heard of.
    seen: u64,
    /// Signals that it has read and not used.
    mail: BTreeMap<u64, (String, String)>,
    /// What came, by kind: read now, or remembered with the task.
    answers: BTreeMap<String, String>,
    /// Signals that it has used since its last commit.
    used: Vec<u64>,
    /// Whether it has said that it asks; and whether that is in the database.
    said: bool,
    /// Whether the checkpoint has pending writes.
    dirty: bool,
    cancelled: bool,
    children_told: bool,
    /// Until when the child's question can be answered, and whether the run knows that this is over.
    until: Option<Timestamp>,
    late: bool,
}

impl Run {
    pub fn new(role: Role, owner: String, claim: Claim, asks_until: bool) -> Self {
        let mut run = Self {
            role,
            lease: claim.lease,
            owner,
            phase: Phase::Claimed,
            base: 0,
            step: 0,
            seen: 0,
            mail: BTreeMap::new(),
            answers: BTreeMap::new(),
            used: Vec::new(),
            said: false,
            dirty: false,
            cancelled: false,
            children_told: false,
            until: (asks_until && role == Role::Child).then(deadline),
            late: false,
        };
        if let Some(loaded) = claim.loaded {
            run.begin(*loaded);
        }
        run
    }

    /// All that matters of it for what it does next. Which of two void tokens it has does not, and so neither does who made it.
    pub fn describe(&self, is_valid: bool) -> String {
        let phase = match &self.phase {
            Phase::Unsure(_) => "unsure".to_owned(),
            phase => format!("{phase:?}"),
        };
        let mut text = format!("{:?} valid {is_valid} {phase}", self.role);
        let _ = write!(
            text,
            " base {} step {} seen {} mail {:?} answers {:?} used {:?} said {} dirty {} cancelled {} told {} late {}",
            self.base,
            self.step,
            self.seen,
            self.mail,
            self.answers,
            self.used,
            self.said,
            self.dirty,
            self.cancelled,
            self.children_told,
            self.late
        );
        text
    }

    fn read(&mut self, signals: Vec<SignalRecord>, newest: u64) {
        for signal in signals {
            if signal.number > self.seen {
                let payload = signal.payload.as_str().unwrap_or_default().to_owned();
                self.mail.insert(signal.number, (signal.kind, payload));
            }
        }
        self.seen = self.seen.max(newest);
    }

    fn begin(&mut self, loaded: Loaded) {
        self.base = loaded.state.checkpoint;
        self.step = loaded.state.step;
        self.dirty = !loaded.writes.is_empty();
        for write in loaded.writes {
            match write.kind {
                WriteKind::Wait => {
                    let came = write.value.as_str().unwrap_or_default().to_owned();
                    self.answers.insert(write.task, came);
                }
                WriteKind::Suspended => self.said = true,
                _ => {}
            }
        }
        self.cancelled = loaded.thread.cancel.is_some();
        self.look_at_the_clock(loaded.now);
        self.read(loaded.mailbox, loaded.mail);
        self.phase = Phase::Ready;
    }

    fn look_at_the_clock(&mut self, now: Timestamp) {
        self.late |= self.until.is_some_and(|until| until <= now);
    }

    /// A run that has looked at the database's clock once knows for itself how late it is.
    pub fn time_passes(&mut self) {
        self.late |= self.until.is_some() && self.phase != Phase::Claimed;
    }

    pub async fn load(&mut self, db: &Database<'_>) -> After {
        match db.store.load(&self.lease).await {
            Ok(loaded) => {
                self.begin(loaded);
                After::GoesOn
            }
            Err(StorageError::Fenced { .. }) => After::Fenced,
            Err(error) => panic!("loading: {error}"),
        }
    }

    pub async fn fetch(&mut self, db: &Database<'_>) -> After {
        let thread = &self.lease.thread;
        let (signals, newest) = db.store.mailbox(thread, self.seen).await.expect("reads");
        self.read(signals, newest);
        self.phase = Phase::Ready;
        After::GoesOn
    }

    /// Prolongs the lease, as a heartbeat does.
    pub async fn renew(&mut self, db: &Database<'_>) -> After {
        let leases = [self.lease.clone()];
        let renewed = db.store.renew(&leases, HOUR).await.expect("renews");
        if renewed[0].held {
            self.cancelled |= renewed[0].cancel.is_some();
            After::GoesOn
        } else {
            After::Fenced
        }
    }

    /// Takes what it waits for out of what it has read, oldest first. An answer goes before the word that the time is over.
    fn wake(&mut self) {
        self.take_awaited();
        let over = self.mail.iter().find(|(_, (of, _))| of == EXPIRED);
        if let Some(number) = over.map(|(number, _)| *number) {
            self.mail.remove(&number);
            self.used.push(number);
            let answer = self.answers.entry("tick".to_owned());
            answer.or_insert_with(|| EXPIRED.to_owned());
        }
    }

    fn take_awaited(&mut self) {
        for kind in awaited(self.role, self.step) {
            if self.answers.contains_key(*kind) {
                continue;
            }
            let found = self.mail.iter().find(|(_, (of, _))| of == kind);
            if let Some((number, (_, payload))) = found.map(|(n, it)| (*n, it.clone())) {
                self.mail.remove(&number);
                self.answers.insert((*kind).to_owned(), payload);
                self.used.push(number);
            }
        }
    }

    fn event(&self, name: impl Into<String>) -> NewEvent {
        NewEvent {
            stream: self.lease.thread.to_string(),
            name: name.into(),
            payload: Value::Null,
            thread: Some(self.lease.thread.clone()),
        }
    }

    fn checkpoint(&self) -> NewCheckpoint {
        let mut appends = Map::new();
        if !self.answers.is_empty() {
            let came: Vec<&String> = self.answers.values().collect();
            appends.insert("log".to_owned(), json!(came));
        }
        NewCheckpoint {
            parent: self.base,
            branch: 0,
            step: self.step + 1,
            source: Source::Step,
            appends,
            changes: Map::new(),
            snapshot: None,
            plan: json!(self.step + 1),
            kept: None,
        }
    }

    fn end(&self, names: &Names, commit: &mut Commit, status: ThreadStatus) {
        commit.events.push(self.event(status.as_str()));
        commit.waits = Some(Vec::new());
        commit.then = Then::End {
            status,
            error: None,
            output: None,
        };
        if self.role == Role::Child {
            commit.signals.push(self.told_end(names));
        }
    }

    /// What the parent is told. A thread may end again after a retry, so each run says it under a key of its own.
    pub fn told_end(&self, names: &Names) -> NewSignal {
        NewSignal {
            thread: names.thread(Role::Parent).into(),
            kind: "end".to_owned(),
            key: format!("end:kid:{}", self.lease.token),
            payload: json!("end"),
            revives: false,
        }
    }

    /// The next commit, from what it knows.
    async fn next(&mut self, names: &Names, db: &Database<'_>) -> Commit {
        let mut commit = Commit::on(self.base);
        if self.cancelled {
            commit.consumed = std::mem::take(&mut self.used);
            self.used.clone_from(&commit.consumed);
            commit.writes = self.remembered();
            if self.role == Role::Parent && !self.children_told && !db.has(Flaw::ForgetsChildren) {
                let children = db.store.threads(&self.children()).await.expect("reads");
                commit.cancels = children
                    .into_iter()
                    .map(|child| CancelRequest {
                        thread: child.id,
                        reason: "the parent is cancelled".to_owned(),
                    })
                    .collect();
                if !commit.cancels.is_empty() {
                    return commit;
                }
            }
            self.end(names, &mut commit, ThreadStatus::Cancelled);
            return commit;
        }
        self.wake();
        commit.consumed.clone_from(&self.used);
        let is_open = self.step == 0 && !self.answers.contains_key("tick");
        if self.late && is_open {
            if db.has(Flaw::TrustsItsClock) {
                self.answers.insert("tick".to_owned(), EXPIRED.to_owned());
            } else {
                // In one commit, it takes no answer any more, and says why. An answer that came before is in the mailbox then.
                commit.waits = Some(Vec::new());
                commit.signals.push(self.expiry());
                return commit;
            }
        }
        let wanted = awaited(self.role, self.step);
        let is_first = self.role == Role::Child && self.step == 0;
        if is_first && !self.said {
            commit.events.push(self.event("asks"));
        }
        if wanted.iter().any(|kind| !self.answers.contains_key(*kind)) {
            commit.writes = self.remembered();
            if is_first {
                // How much it has said.
                commit
                    .writes
                    .push(write("ask", WriteKind::Suspended, json!(1)));
            }
            commit.waits = Some(self.waits());
            commit.then = Then::Wait {
                mail_seen: self.seen,
                wake_at: self.until.filter(|_| !db.has(Flaw::Oversleeps)),
            };
            return commit;
        }
        match (self.role, self.step) {
            (Role::Parent, 0) => {
                commit.children = vec![names.new_thread(Role::Child)];
                commit.events.push(self.event("spawned"));
            }
            (Role::Parent, 1) | (Role::Child, 0) => {
                for came in self.answers.values() {
                    commit.events.push(self.event(format!("got {came}")));
                }
                commit.clear_writes = self.dirty;
                commit.waits = Some(Vec::new());
            }
            _ => {
                self.end(names, &mut commit, ThreadStatus::Done);
                return commit;
            }
        }
        commit.checkpoint = Some(self.checkpoint());
        commit
    }

    /// That the time to answer is over, to the thread itself.
    fn expiry(&self) -> NewSignal {
        NewSignal {
            thread: self.lease.thread.clone(),
            kind: EXPIRED.to_owned(),
            key: EXPIRED.to_owned(),
            payload: json!(EXPIRED),
            revives: false,
        }
    }

    fn children(&self) -> ThreadFilter {
        ThreadFilter {
            parent: Some(self.lease.thread.clone()),
            statuses: vec![
                ThreadStatus::Ready,
                ThreadStatus::Running,
                ThreadStatus::Waiting,
            ],
            ..ThreadFilter::default()
        }
    }

    /// What has come is remembered with the tasks that waited for it.
    fn remembered(&self) -> Vec<Write> {
        self.answers
            .iter()
            .map(|(kind, came)| write(kind, WriteKind::Wait, json!(came)))
            .collect()
    }

    fn waits(&self) -> Vec<WaitInfo> {
        awaited(self.role, self.step)
            .iter()
            .filter(|kind| !self.answers.contains_key(**kind))
            .map(|kind| WaitInfo {
                id: (*kind).to_owned(),
                name: (*kind).to_owned(),
                kind: if self.until.is_some() {
                    WaitKind::Interrupt
                } else {
                    WaitKind::Wait
                },
                task: (*kind).to_owned(),
                value: Value::Null,
                signals: vec![(*kind).to_owned()],
                children: Vec::new(),
                until: self.until,
            })
            .collect()
    }

    /// Makes its next commit. `heard`: whether the answer comes back.
    pub async fn commit(
        &mut self,
        names: &Names,
        db: &Database<'_>,
        heard: bool,
    ) -> (Commit, Result<Receipt, StorageError>, After) {
        let commit = self.next(names, db).await;
        db.before_commit(names, self, &commit).await;
        let answer = db.commit(&self.lease, commit.clone()).await;
        if !heard {
            self.phase = Phase::Unsure(Box::new(commit.clone()));
            return (commit, answer, After::GoesOn);
        }
        let after = match &answer {
            Ok(receipt) => self.landed(&commit, receipt),
            // Somebody else has the thread; or it has landed before.
            Err(StorageError::Fenced { .. } | StorageError::NotTheTip { .. }) => After::Fenced,
            Err(error) => panic!("committing: {error}"),
        };
        (commit, answer, after)
    }

    /// The commit never got to the database, and the run does not know that.
    pub async fn lose_request(&mut self, names: &Names, db: &Database<'_>) {
        let commit = self.next(names, db).await;
        db.before_commit(names, self, &commit).await;
        self.phase = Phase::Unsure(Box::new(commit));
    }

    fn landed(&mut self, commit: &Commit, receipt: &Receipt) -> After {
        if receipt.released {
            return After::Released;
        }
        self.used.clear();
        self.dirty |= !commit.writes.is_empty();
        self.said |= !commit.events.is_empty();
        if let Some(number) = receipt.checkpoint {
            self.base = number;
            self.step += 1;
            self.answers.clear();
            self.dirty = false;
            self.said = false;
        }
        self.children_told |= !commit.cancels.is_empty();
        self.look_at_the_clock(receipt.now);
        self.cancelled |= receipt.cancel.is_some();
        self.phase = if receipt.mail > self.seen {
            Phase::News
        } else {
            Phase::Ready
        };
        After::GoesOn
    }

    /// Whether the unanswered commit has landed: if so, goes on as if it had been answered, else it will be made again.
    pub async fn look(&mut self, db: &Database<'_>) -> After {
        let Phase::Unsure(commit) = self.phase.clone() else {
            return After::GoesOn;
        };
        if self.renew(db).await == After::Fenced {
            return After::Fenced;
        }
        let loaded = match db.store.load(&self.lease).await {
            Ok(loaded) => loaded,
            Err(StorageError::Fenced { .. }) => return After::Fenced,
            Err(error) => panic!("looking: {error}"),
        };
        let advanced = loaded.state.checkpoint != self.base;
        // An end that had landed would have taken the lease along.
        let is_written = !matches!(commit.then, Then::End { .. })
            && !commit.events.is_empty()
            && !commit.writes.is_empty()
            && commit.writes.iter().all(|it| loaded.writes.contains(it));
        if (advanced || is_written) && !db.has(Flaw::CommitsAgainBlindly) {
            let receipt = Receipt {
                checkpoint: advanced.then_some(loaded.state.checkpoint),
                released: false,
                mail: loaded.mail,
                cancel: loaded.thread.cancel,
                undelivered: Vec::new(),
                now: loaded.now,
            };
            return self.landed(&commit, &receipt);
        }
        self.phase = Phase::Ready;
        After::GoesOn
    }
}

fn write(task: &str, kind: WriteKind, value: Value) -> Write {
    Write {
        task: task.to_owned(),
        kind,
        name: String::new(),
        round: 0,
        value,
        kept: None,
    }
}

/// Whether the lease of a thread is live: those that are not have been made to expire.
pub fn is_live(thread: &ThreadInfo) -> bool {
    thread
        .lease
        .as_ref()
        .is_some_and(|lease| lease.expires_at > Timestamp::now() + SignedDuration::from_mins(30))
}
