//! A world of two threads, runs that come and go, and people who send signals: what can happen next, and what it looks like
//! from outside.

use std::{collections::BTreeMap, fmt::Write as _};

use graph::{
    CancelOutcome, Cursor, Entry, HistoryFilter, JournalFilter, StorageError, ThreadFilter,
    ThreadInfo, ThreadStatus,
    checkpoint::{
        CancelRequest, CheckpointRecord, Checkpointer, NewSignal, SignalOutcome, SignalRecord,
        Write, WriteKind,
    },
};
use serde_json::json;

use crate::{
    flaws::Database,
    run::{After, Names, Phase, Role, Run, is_live},
};

/// How much can happen.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Runs at the same time.
    pub runners: usize,
    /// Runs that die.
    pub crashes: usize,
    /// Leases that expire under runs that go on.
    pub lapses: usize,
    /// Commits that are not answered, landed or not.
    pub lost: usize,
    /// Whether runs use what a claim of a fresh thread brings along, where it does.
    pub fresh: bool,
    /// Whether the parent may be cancelled, at any moment.
    pub cancels: bool,
    /// Whether the child's question can be answered until a time only, which comes at any moment.
    pub deadline: bool,
    /// Signals from outside, sent at any moment: to whom, the kind, the key.
    pub letters: Vec<(Role, &'static str, &'static str)>,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Claim(Role),
    Load(usize),
    Fetch(usize),
    Commit(usize),
    /// It lands, and the run does not hear of it.
    LoseAnswer(usize),
    /// It does not even get there.
    LoseRequest(usize),
    Look(usize),
    Renew(usize),
    Crash(usize),
    /// Time passes: the lease of the thread expires.
    Lapse(Role),
    Send(usize),
    Cancel,
    /// Time passes: that of the child's question is over.
    Late,
}

/// What is not in the database.
#[derive(Clone, Debug)]
pub struct World {
    pub names: Names,
    pub limits: Limits,
    pub runs: Vec<Option<Run>>,
    pub sent: Vec<bool>,
    /// Which of them were answered with a refusal, because they came too late.
    pub refused: Vec<bool>,
    pub cancelled: bool,
    pub late: bool,
    claims: u64,
    /// The newest token of each thread that a claim gave, and whether it was given back.
    newest: BTreeMap<Role, (u64, bool)>,
    /// What a token has done that it may not.
    pub wrong: Option<String>,
}

/// A thread, as anybody can see it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub record: ThreadInfo,
    pub is_live: bool,
    pub mailbox: Vec<SignalRecord>,
    pub writes: Vec<Write>,
    pub history: Vec<CheckpointRecord>,
}

/// The database, as anybody can see it.
#[derive(Clone, Debug)]
pub struct View {
    pub threads: BTreeMap<Role, Seen>,
    /// Threads that should not be there.
    pub strangers: Vec<String>,
    pub journal: Vec<Entry>,
    /// All of it in words, without times and tokens.
    pub text: String,
}

impl View {
    pub async fn of(store: &dyn Checkpointer, names: &Names) -> Self {
        let parent = names.thread(Role::Parent);
        let filter = ThreadFilter {
            prefix: Some(parent.clone()),
            ..ThreadFilter::default()
        };
        let mut view = Self {
            threads: BTreeMap::new(),
            strangers: Vec::new(),
            journal: Vec::new(),
            text: String::new(),
        };
        for record in store.threads(&filter).await.expect("reads") {
            let id = record.id.as_str();
            let role = if id == parent {
                Role::Parent
            } else if id == names.thread(Role::Child) {
                Role::Child
            } else {
                view.strangers.push(id[parent.len()..].to_owned());
                continue;
            };
            let seen = Seen {
                is_live: is_live(&record),
                mailbox: store.mailbox(&record.id, 0).await.expect("reads").0,
                writes: store.pending_writes(&record.id).await.expect("reads"),
                history: store
                    .history(&record.id, &HistoryFilter::default())
                    .await
                    .expect("reads"),
                record,
            };
            view.threads.insert(role, seen);
        }
        for role in [Role::Parent, Role::Child] {
            let filter = JournalFilter::stream(names.thread(role));
            let entries = store.journal(&filter, Cursor::START, 100).await;
            view.journal.extend(entries.expect("reads"));
        }
        view.text = view.in_words();
        view
    }

    fn in_words(&self) -> String {
        let mut text = String::new();
        for (role, seen) in &self.threads {
            let record = &seen.record;
            let waits: Vec<&str> = record.waits.iter().map(|it| it.id.as_str()).collect();
            let _ = writeln!(
                text,
                "{role:?} {} at {} step {} lease {} live {} waits {waits:?} timer {} cancel {:?} error {:?} output {:?}",
                record.status.as_str(),
                record.checkpoint,
                record.step,
                record.lease.is_some(),
                seen.is_live,
                record.wake_at.is_some(),
                record.cancel,
                record.error,
                record.output
            );
            for mail in &seen.mailbox {
                let _ = writeln!(
                    text,
                    "  mail {} {} {}",
                    mail.number, mail.kind, mail.payload
                );
            }
            for it in &seen.writes {
                let _ = writeln!(text, "  write {} {:?} {}", it.task, it.kind, it.value);
            }
            for it in &seen.history {
                let _ = writeln!(
                    text,
                    "  checkpoint {} on {} step {} plan {}",
                    it.checkpoint, it.parent, it.step, it.plan
                );
            }
        }
        for entry in &self.journal {
            let who = if entry.stream.ends_with("/kid") {
                "child"
            } else {
                "parent"
            };
            let _ = writeln!(text, "said {who} {} {}", entry.number, entry.name);
        }
        let _ = write!(text, "strangers {}", self.strangers.len());
        text
    }

    /// How often a signal is in the thread's mailbox, is remembered by it, or was used in a step that has landed.
    pub fn count(&self, names: &Names, to: Role, payload: &str) -> usize {
        let used = format!("got {payload}");
        let stream = names.thread(to);
        let journal = self.journal.iter();
        let used = journal.filter(|it| it.stream == stream && it.name == used);
        let kept = self.threads.get(&to).map_or(0, |seen| {
            let mail = seen.mailbox.iter().filter(|it| it.payload == payload);
            let writes = seen.writes.iter();
            mail.count()
                + writes
                    .filter(|it| it.kind == WriteKind::Wait && it.value == payload)
                    .count()
        });
        used.count() + kept
    }

    pub fn has_ended(&self, role: Role) -> bool {
        self.threads
            .get(&role)
            .is_some_and(|seen| seen.record.status.is_ended())
    }
}

impl World {
    pub fn new(names: Names, limits: Limits) -> Self {
        Self {
            names,
            runs: vec![None; limits.runners],
            sent: vec![false; limits.letters.len()],
            refused: vec![false; limits.letters.len()],
            limits,
            cancelled: false,
            late: false,
            claims: 0,
            newest: BTreeMap::new(),
            wrong: None,
        }
    }

    pub async fn begin(&self, store: &dyn Checkpointer) {
        let parent = self.names.new_thread(Role::Parent);
        store.create_thread(parent).await.expect("creates");
    }

    /// Whether a run has the newest lease of its thread.
    pub fn is_valid(run: &Run, view: &View) -> bool {
        let seen = view.threads.get(&run.role);
        seen.and_then(|it| it.record.lease.as_ref())
            .is_some_and(|lease| lease.token == run.lease.token)
    }

    /// All of it in words, beside the database. Which of the runs is which does not matter.
    pub fn in_words(&self, view: &View) -> String {
        let mut runs: Vec<String> = self
            .runs
            .iter()
            .flatten()
            .map(|run| run.describe(Self::is_valid(run, view)))
            .collect();
        runs.sort();
        format!(
            "{} crashes {} lapses {} lost {} sent {:?} refused {:?} cancelled {} late {} wrong {:?}",
            runs.join("\n"),
            self.limits.crashes,
            self.limits.lapses,
            self.limits.lost,
            self.sent,
            self.refused,
            self.cancelled,
            self.late,
            self.wrong
        )
    }

    /// What can happen next. `fair`: only what will happen some time, if nothing else does: nobody dies, no letter gets lost,
    /// and whoever is cancelled may not get any more.
    pub fn actions(&self, view: &View, fair: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        let has_room = self.runs.iter().any(Option::is_none);
        for (role, seen) in &view.threads {
            let record = &seen.record;
            if has_room
                && !seen.is_live
                && (record.status != ThreadStatus::Waiting || self.late && record.wake_at.is_some())
                && !record.status.is_ended()
            {
                actions.push(Action::Claim(*role));
            }
            if seen.is_live {
                let lives = self
                    .runs
                    .iter()
                    .flatten()
                    .any(|run| Self::is_valid(run, view) && run.role == *role);
                if !lives || (!fair && self.limits.lapses > 0) {
                    actions.push(Action::Lapse(*role));
                }
            }
        }
        for (index, run) in self.runs.iter().enumerate() {
            let Some(run) = run else { continue };
            match run.phase {
                Phase::Claimed => actions.push(Action::Load(index)),
                Phase::News => actions.push(Action::Fetch(index)),
                Phase::Unsure(_) => actions.push(Action::Look(index)),
                Phase::Ready => {
                    actions.push(Action::Commit(index));
                    if !fair && self.limits.lost > 0 {
                        actions.extend([Action::LoseAnswer(index), Action::LoseRequest(index)]);
                    }
                }
            }
            if fair {
                continue;
            }
            let is_live = view.threads.get(&run.role).is_some_and(|it| it.is_live);
            if !is_live {
                actions.push(Action::Renew(index));
            }
            if self.limits.crashes > 0 {
                actions.push(Action::Crash(index));
            }
        }
        for (index, (to, kind, _)) in self.limits.letters.iter().enumerate() {
            let is_due = !self.sent[index]
                && view.threads.get(to).is_some_and(|seen| {
                    // Nobody answers what is not asked.
                    !self.is_answer(*to, kind) || seen.record.waits.iter().any(|it| it.id == "tick")
                });
            if is_due && !(fair && self.cancelled) {
                actions.push(Action::Send(index));
            }
        }
        if self.limits.deadline && !self.late {
            actions.push(Action::Late);
        }
        if self.limits.cancels && !fair && !self.cancelled {
            actions.push(Action::Cancel);
        }
        actions
    }

    /// Whether a letter answers a question, and does not only bring what somebody waits for.
    fn is_answer(&self, to: Role, kind: &str) -> bool {
        self.limits.deadline && to == Role::Child && kind == "tick"
    }

    /// The letters that were taken.
    pub fn taken(&self) -> impl Iterator<Item = (Role, &'static str)> {
        let letters = self
            .limits
            .letters
            .iter()
            .zip(&self.sent)
            .zip(&self.refused);
        letters
            .filter(|((_, sent), refused)| **sent && !**refused)
            .map(|(((to, _, key), _), _)| (*to, *key))
    }

    /// Does it, and notes what may not be. `before`: the view before it. Returns whether it could be done.
    pub async fn act(&mut self, db: &Database<'_>, before: &View, action: Action) -> bool {
        let names = self.names.clone();
        let index = match action {
            Action::Claim(role) => return self.claim(db, role).await,
            Action::Lapse(role) => {
                self.lapse(db, before, role).await;
                return true;
            }
            Action::Send(index) => {
                self.send(db, index).await;
                return true;
            }
            Action::Cancel => {
                let request = CancelRequest {
                    thread: names.thread(Role::Parent).into(),
                    reason: "enough".to_owned(),
                };
                let outcome = db.store.cancel(request).await.expect("cancels");
                let is_fine = (outcome == CancelOutcome::Ended) == before.has_ended(Role::Parent);
                self.note(!is_fine, || format!("cancelling answers {outcome:?}"));
                self.cancelled = true;
                return true;
            }
            // The clock is that of the database.
            Action::Late => {
                self.late = true;
                self.runs.iter_mut().flatten().for_each(Run::time_passes);
                return true;
            }
            Action::Load(index)
            | Action::Fetch(index)
            | Action::Commit(index)
            | Action::LoseAnswer(index)
            | Action::LoseRequest(index)
            | Action::Look(index)
            | Action::Renew(index)
            | Action::Crash(index) => index,
        };
        let Some(mut run) = self.runs[index].take() else {
            return false;
        };
        let after = match action {
            Action::Load(_) => run.load(db).await,
            Action::Fetch(_) => run.fetch(db).await,
            Action::Look(_) => run.look(db).await,
            Action::Renew(_) => run.renew(db).await,
            Action::LoseRequest(_) => {
                self.limits.lost -= 1;
                run.lose_request(&names, db).await;
                After::GoesOn
            }
            Action::Crash(_) => {
                self.limits.crashes -= 1;
                After::Fenced
            }
            _ => {
                let heard = action == Action::Commit(index);
                if !heard {
                    self.limits.lost -= 1;
                }
                let (_, answer, after) = run.commit(&names, db, heard).await;
                self.judge(db, before, &run, &answer).await;
                after
            }
        };
        if after == After::GoesOn {
            self.runs[index] = Some(run);
        }
        true
    }

    fn note(&mut self, is_wrong: bool, what: impl FnOnce() -> String) {
        if is_wrong && self.wrong.is_none() {
            self.wrong = Some(what());
        }
    }

    async fn claim(&mut self, db: &Database<'_>, role: Role) -> bool {
        let Some(room) = self.runs.iter().position(Option::is_none) else {
            return false;
        };
        self.claims += 1;
        let owner = format!("{}run {}", self.names.0, self.claims);
        let claimed = db.claim(&self.names, role, &owner).await;
        let Some(mut claim) = claimed.claims.into_iter().next() else {
            return false;
        };
        if !self.limits.fresh {
            claim.loaded = None;
        }
        let token = claim.lease.token;
        let last = self.newest.insert(role, (token, false));
        self.note(last.is_some_and(|(last, _)| last >= token), || {
            "tokens do not grow".to_owned()
        });
        self.runs[room] = Some(Run::new(role, owner, claim, self.limits.deadline));
        let again = db.claim(&self.names, role, "somebody else").await;
        self.note(!again.claims.is_empty(), || {
            "a live lease was handed out".to_owned()
        });
        true
    }

    /// Only the newest token of a thread writes, until it is given back; any other leaves no trace.
    async fn judge(
        &mut self,
        db: &Database<'_>,
        before: &View,
        run: &Run,
        answer: &Result<graph::checkpoint::Receipt, StorageError>,
    ) {
        let is_newest = self.newest.get(&run.role) == Some(&(run.lease.token, false));
        match answer {
            Ok(receipt) => {
                self.note(!is_newest, || "a void token has written".to_owned());
                if receipt.released {
                    self.newest.insert(run.role, (run.lease.token, true));
                }
            }
            Err(error) => {
                self.note(is_newest, || format!("a valid token was refused: {error}"));
                let after = View::of(db.store, &self.names).await;
                self.note(after.text != before.text, || {
                    "a refused commit has left a trace".to_owned()
                });
            }
        }
    }

    async fn lapse(&mut self, db: &Database<'_>, before: &View, role: Role) {
        let lease = before.threads[&role].record.lease.clone();
        let lease = lease.expect("it is live");
        let lives = self.runs.iter().flatten();
        if lives.clone().any(|run| run.lease.token == lease.token) {
            self.limits.lapses -= 1;
        }
        db.store.break_leases(&lease.owner).await.expect("breaks");
    }

    async fn send(&mut self, db: &Database<'_>, index: usize) {
        let (to, kind, key) = self.limits.letters[index];
        let is_known = self.taken().any(|taken| taken == (to, key));
        let is_answer = self.is_answer(to, kind);
        let signal = NewSignal {
            thread: self.names.thread(to).into(),
            kind: kind.to_owned(),
            key: key.to_owned(),
            payload: json!(key),
            revives: false,
        };
        let outcome = db.signal(signal, is_answer.then_some(kind)).await;
        let expected = if is_known {
            SignalOutcome::Duplicate
        } else if is_answer && self.late {
            self.refused[index] = true;
            SignalOutcome::Expired
        } else {
            SignalOutcome::New
        };
        self.note(outcome != expected, || {
            format!("the signal {key} was answered with {outcome:?}")
        });
        self.sent[index] = true;
    }
}
