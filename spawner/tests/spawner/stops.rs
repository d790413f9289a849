//! Stops, whatever an attempt is doing when they come, and in whatever order: by the crew, for want of money, for a later attempt,
//! and while the spawner is drained.

use crate::githost::GitHost;
use crate::stage::{SOON, Stage, assert_succeeded, kind, runtime, until};
use async_trait::async_trait;
use futures::StreamExt as _;
use futures::future::join_all;
use protocol::{Source, SpawnRequest};
use serde_json::json;
use spawner::runtime::{self, Identity, Limits, Runtime, Work, Worker};
use spawner::{GitToken, GitTokens, HostToken, TokenError};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use url::Url;

const COMMIT: &str =
    "echo hello > hello.txt; git add hello.txt; git commit -qm Hello --allow-empty";

/// What an attempt may be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It waits for a workspace in which another process works.
    Waiting,
    /// The runtime is asked for Docker inside.
    Asking,
    /// It looks for a worker of a former process.
    Adopting,
    /// What worked for the task before is ended.
    Clearing,
    Cloning,
    Starting,
    Pushing,
}

use Doing::{Adopting, Asking, Clearing, Cloning, Pushing, Starting, Waiting};

const ALL: [Doing; 7] = [
    Waiting, Asking, Adopting, Clearing, Cloning, Starting, Pushing,
];

/// A runtime and tokens which do not come back, once, from what is to be stopped, until they may.
struct Stuck {
    at: Doing,
    is: AtomicBool,
    go: Notify,
    worked: AtomicBool,
    runtime: Arc<dyn Runtime>,
    tokens: HostToken,
}

impl Stuck {
    async fn pass(&self, at: Doing) {
        if at == self.at && !self.is.swap(true, Ordering::SeqCst) {
            self.go.notified().await;
        }
    }
}

/// The same, as options have it.
struct Shared(Arc<Stuck>);

#[async_trait]
impl GitTokens for Shared {
    async fn mint(&self, repository: &Url) -> Result<Option<GitToken>, TokenError> {
        let worked = self.0.worked.load(Ordering::SeqCst);
        self.0.pass(if worked { Pushing } else { Cloning }).await;
        self.0.tokens.mint(repository).await
    }
}

#[async_trait]
impl Runtime for Shared {
    fn describe(&self) -> String {
        self.0.runtime.describe()
    }

    fn check(&self) -> Result<(), spawner::Error> {
        self.0.runtime.check()
    }

    fn owner(&self) -> Option<(u32, u32)> {
        self.0.runtime.owner()
    }

    async fn docker_inside(&self) -> Result<(), runtime::Error> {
        self.0.pass(Asking).await;
        Ok(())
    }

    async fn start(&self, work: &Work) -> Result<Box<dyn Worker>, runtime::Error> {
        self.0.pass(Starting).await;
        self.0.worked.store(true, Ordering::SeqCst);
        self.0.runtime.start(work).await
    }

    async fn adopt(
        &self,
        who: &Identity,
        limits: &Limits,
        workspace: &Path,
    ) -> Result<Option<Box<dyn Worker>>, runtime::Error> {
        self.0.pass(Adopting).await;
        self.0.runtime.adopt(who, limits, workspace).await
    }

    async fn clear(&self, who: &Identity) -> Result<(), runtime::Error> {
        self.0.pass(Clearing).await;
        self.0.runtime.clear(who).await
    }
}

/// An attempt that never comes further by itself.
struct Halted {
    at: Doing,
    stuck: Arc<Stuck>,
    stage: Stage,
    host: GitHost,
    _lock: Option<std::fs::File>,
}

impl Halted {
    async fn new(at: Doing) -> Self {
        Self::after(at, |_| {}).await
    }

    /// With something in the folder of the workspace's notes.
    async fn after(at: Doing, before: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("home/workspaces/p/job-1/one~");
        std::fs::create_dir_all(&state).unwrap();
        before(&state);
        let host = GitHost::start(folder.path(), "password").await;
        let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
        let stuck = Arc::new(Stuck {
            at,
            is: AtomicBool::new(false),
            go: Notify::new(),
            worked: AtomicBool::new(false),
            runtime,
            tokens: HostToken::github(&host.url, "password".to_owned()).unwrap(),
        });
        let lock = (at == Waiting).then(|| {
            let lock = std::fs::File::create(state.join("lock")).unwrap();
            lock.lock().unwrap();
            lock
        });
        let outer = Arc::new(Shared(Arc::clone(&stuck)));
        let tokens = Arc::clone(&outer);
        let tune = |options: &mut spawner::Options| {
            options.tokens = tokens;
            options.unpaid_patience = Duration::from_millis(200);
        };
        let stage = Stage::tuned(folder, outer, cleanup, [], tune).await;
        let halted = Self {
            at,
            stuck,
            stage,
            host,
            _lock: lock,
        };
        let mut request = halted.request("r1", 1);
        request.docker = at == Asking;
        halted.stage.submit(&request).await;
        if at == Waiting {
            // The first that is said of it, just before.
            let mut events = halted.stage.transport.events("r1").await.unwrap();
            let said = tokio::time::timeout(SOON, events.next()).await.unwrap();
            assert!(said.is_some());
        } else {
            let is_there = async || halted.stuck.is.load(Ordering::SeqCst).then_some(());
            until(is_there).await;
        }
        halted
    }

    fn request(&self, id: &str, attempt: u32) -> SpawnRequest {
        let mut request = self.stage.script(id, attempt, COMMIT);
        request.repository.source = Source::CloneUrl(format!("{}/repository.git", self.host.url));
        request
    }

    async fn cancel(&self) {
        self.stage.transport.cancel("r1").await.unwrap();
    }

    async fn unpaid(&self) {
        self.stage.transport.unpaid("r1").await.unwrap();
    }

    async fn ends_as(&self, expected: &str) {
        let result = self.stage.result("r1").await;
        assert_eq!(kind(&result), expected, "{:?}", self.at);
    }
}

/// Everything that an attempt may be doing, beside each other.
async fn in_each(all: &[Doing], what: impl AsyncFn(Halted)) {
    let each = all
        .iter()
        .map(async |at| what(Halted::new(*at).await).await);
    join_all(each).await;
}

#[tokio::test]
async fn a_cancel_is_heard_whatever_the_attempt_is_doing() {
    in_each(&ALL, async |halted| {
        halted.cancel().await;
        halted.ends_as(spawner::kind::CANCELLED).await;
        halted.stage.shut_down().await;
    })
    .await;
}

#[tokio::test]
async fn what_would_spend_is_stopped_for_want_of_money_whatever_it_is_doing() {
    in_each(&[Asking, Clearing, Cloning, Starting], async |halted| {
        halted.unpaid().await;
        halted.ends_as(spawner::kind::BUDGET).await;
        halted.stage.shut_down().await;
    })
    .await;
}

#[tokio::test]
async fn a_cancel_is_heard_after_a_want_of_money_that_changes_nothing() {
    // Nothing spends any more, or there may be a report.
    in_each(&[Waiting, Adopting, Pushing], async |halted| {
        halted.unpaid().await;
        halted.cancel().await;
        halted.ends_as(spawner::kind::CANCELLED).await;
        halted.stage.shut_down().await;
    })
    .await;
}

#[tokio::test]
async fn a_later_attempt_takes_the_place_of_one_that_looks_about_clones_or_pushes() {
    in_each(&[Adopting, Cloning, Pushing], async |halted| {
        halted.stage.submit(&halted.request("r2", 2)).await;
        halted.ends_as(spawner::kind::SUPERSEDED).await;
        assert_succeeded(&halted.stage.result("r2").await);
        halted.stage.shut_down().await;
    })
    .await;
}

#[tokio::test]
async fn who_is_drained_hears_a_cancel_and_then_ends() {
    in_each(&[Waiting, Starting], async |halted| {
        halted.stage.transport.drain(None).await.unwrap();
        halted.cancel().await;
        halted.ends_as(spawner::kind::CANCELLED).await;
        halted.stage.ended().await;
    })
    .await;
}

#[tokio::test]
async fn a_report_of_a_process_that_died_is_taken_although_its_worker_is_not_paid_any_more() {
    // As a worker has left it whose spawner was killed before the result was known.
    let said = json!({"status": "failed", "summary": "", "reason": "the tests are red"});
    let kept = json!({"request_id": "r1", "input_tokens": 0, "output_tokens": 0, "said": said});
    let halted = Halted::after(Cloning, |state| {
        std::fs::write(state.join("broker.json"), kept.to_string()).unwrap();
    })
    .await;
    halted.unpaid().await;
    // Orders are heard one after the other.
    let bus = &halted.stage.transport;
    bus.drain(None).await.unwrap();
    let drains = async || {
        bus.spawners()
            .await
            .unwrap()
            .iter()
            .any(|beat| beat.draining)
    };
    until(async || drains().await.then_some(())).await;
    halted.stuck.go.notify_one();
    let result = halted.stage.result("r1").await;
    assert_eq!(kind(&result), spawner::kind::AGENT_FAILED);
    let message = result.failure.unwrap().message;
    assert!(message.contains("the tests are red"), "{message}");
    halted.stage.ended().await;
}
