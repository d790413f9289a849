//! The way to the database, and what could be wrong with it or with the run that goes it. Each flaw must be found.

use graph::{
    StorageError, ThreadFilter,
    checkpoint::{
        Checkpointer, ClaimRequest, Claimed, Commit, Lease, NewSignal, Receipt, SignalOutcome, Then,
    },
};

use crate::run::{HOUR, Names, Role, Run};

/// Something that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The database does not compare the token of a commit with the thread's.
    FenceNotChecked,
    /// The database hands out threads under live leases.
    ClaimsLiveLeases,
    /// A refused commit leaves its events behind.
    RefusedHalfway,
    /// A suspension does not look into the mailbox once more.
    SleepsOverNews,
    /// The keys of signals are not compared.
    KeysNotCompared,
    /// What was used stays in the mailbox.
    UsedStays,
    /// What is used leaves the mailbox before the step has landed.
    UsedTooEarly,
    /// A child is started before the step that starts it, under a name of the run's.
    SpawnsAtOnce,
    /// The end of a child is told before it has ended.
    TellsEndTooEarly,
    /// Events are said before the step that says them has landed.
    SaysTooEarly,
    /// A commit that was not answered is made again, whether it has landed or not.
    CommitsAgainBlindly,
    /// A parent that is cancelled leaves its children alone.
    ForgetsChildren,
    /// A run that finds that the time of a question is over does not ask the database whether an answer came first.
    TrustsItsClock,
    /// A question is answered when its time is over.
    AnswersLate,
    /// Who waits until a time is not woken by it.
    Oversleeps,
}

/// A database with at most one flaw.
pub struct Database<'a> {
    pub store: &'a dyn Checkpointer,
    pub flaw: Option<Flaw>,
}

impl Database<'_> {
    pub fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    pub async fn claim(&self, names: &Names, role: Role, owner: &str) -> Claimed {
        if self.has(Flaw::ClaimsLiveLeases) {
            let all = self.store.threads(&ThreadFilter::default()).await;
            for lease in all.expect("reads").into_iter().filter_map(|it| it.lease) {
                self.store.break_leases(&lease.owner).await.expect("breaks");
            }
        }
        self.store
            .claim(ClaimRequest {
                owner,
                graphs: &[names.graph(role)],
                limit: 1,
                lease: HOUR,
            })
            .await
            .expect("claims")
    }

    pub async fn signal(&self, mut signal: NewSignal, answers: Option<&str>) -> SignalOutcome {
        if self.has(Flaw::KeysNotCompared) {
            let (_, newest) = self.store.mailbox(&signal.thread, 0).await.expect("reads");
            signal.key = format!("{} {newest}", signal.key);
        }
        let answers = answers.filter(|_| !self.has(Flaw::AnswersLate));
        self.store.signal(signal, answers).await.expect("signals")
    }

    /// What a flawed run does before its commit.
    pub async fn before_commit(&self, names: &Names, run: &Run, commit: &Commit) {
        match self.flaw {
            // In a commit of its own.
            Some(Flaw::UsedTooEarly) if !commit.consumed.is_empty() => {
                let early = Commit {
                    consumed: commit.consumed.clone(),
                    ..Commit::on(commit.base)
                };
                let _ = self.store.commit(&run.lease, early).await;
            }
            Some(Flaw::SpawnsAtOnce) => {
                for child in &commit.children {
                    let mut child = child.clone();
                    child.id = format!("{}-{}", child.id, run.lease.token).into();
                    self.store.create_thread(child).await.expect("creates");
                }
            }
            Some(Flaw::TellsEndTooEarly)
                if run.role == Role::Child && matches!(commit.then, Then::End { .. }) =>
            {
                self.store
                    .signal(run.told_end(names), None)
                    .await
                    .expect("signals");
            }
            Some(Flaw::SaysTooEarly) => {
                for (index, event) in commit.events.iter().enumerate() {
                    let id = format!("{} {} {index}", run.lease.token, commit.base);
                    self.store.append(&id, event.clone()).await.expect("says");
                }
            }
            _ => {}
        }
    }

    pub async fn commit(&self, lease: &Lease, mut commit: Commit) -> Result<Receipt, StorageError> {
        let mut lease = lease.clone();
        match self.flaw {
            Some(Flaw::FenceNotChecked) => {
                let thread = self.store.thread(&lease.thread).await?;
                if let Some(held) = thread.and_then(|it| it.lease) {
                    lease.token = held.token;
                }
            }
            Some(Flaw::SleepsOverNews) => {
                if let Then::Wait { mail_seen, .. } = &mut commit.then {
                    *mail_seen = i64::MAX as u64 - 1;
                }
            }
            Some(Flaw::UsedStays) => commit.consumed.clear(),
            Some(Flaw::SpawnsAtOnce) => commit.children.clear(),
            Some(Flaw::TellsEndTooEarly) => commit.signals.clear(),
            Some(Flaw::SaysTooEarly) => commit.events.clear(),
            _ => {}
        }
        let events = commit.events.clone();
        let answer = self.store.commit(&lease, commit).await;
        if self.has(Flaw::RefusedHalfway) && answer.is_err() {
            for (index, event) in events.into_iter().enumerate() {
                let id = format!("{} refused {index}", lease.token);
                self.store.append(&id, event).await?;
            }
        }
        answer
    }
}
