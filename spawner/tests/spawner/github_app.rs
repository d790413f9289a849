//! A GitHub App instead of a token: what it asks GitHub for, what it keeps, and what becomes of refusals.

use crate::githost::{GitHost, Mood};
use crate::github::{API, APP, Api, key_file};
use crate::stage::{Stage, assert_succeeded, kind, runtime};
use jiff::SignedDuration;
use protocol::Source;
use spawner::{AppError, GitHubApp, GitTokens};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

const INSTALLATION: &str = "GET /repos/acme/repository/installation";
const TOKEN: &str = "POST /app/installations/815/access_tokens";

/// A host with nothing but its API, the app, and the address of a repository.
async fn host() -> (tempfile::TempDir, GitHost, GitHubApp, Url) {
    let folder = tempfile::tempdir().unwrap();
    let host = GitHost::start(folder.path(), "none yet").await;
    let app = app(&host, "app.pem");
    let repository = format!("{}/acme/repository.git", host.url).parse().unwrap();
    (folder, host, app, repository)
}

fn app(host: &GitHost, key: &str) -> GitHubApp {
    GitHubApp::new(&format!("{}{API}", host.url), APP, &key_file(key)).unwrap()
}

async fn minted(app: &GitHubApp, repository: &Url) -> String {
    let token = app.mint(repository).await.unwrap().expect("a token");
    assert_eq!(token.user, "x-access-token");
    token.secret.expose().to_owned()
}

#[tokio::test]
async fn an_app_proves_who_it_is_and_asks_for_the_contents_of_one_repository_only() {
    let (_folder, host, app, repository) = host().await;
    assert_eq!(minted(&app, &repository).await, "ghs_canary1");
    assert_eq!(host.github.asked(), [INSTALLATION, TOKEN]);
    // GitHub's own form of a key, and the other usual one.
    let same = self::app(&host, "app.pkcs8.pem");
    assert_eq!(minted(&same, &repository).await, "ghs_canary2");
    assert_eq!(host.github.wrong(), [""; 0]);
}

#[tokio::test]
async fn a_token_is_kept_until_shortly_before_it_expires_or_until_it_is_refused() {
    let (_folder, host, app, repository) = host().await;
    // However the repository is written, and by however many at once.
    let same: Url = repository
        .as_str()
        .replace("acme/repository.git", "Acme/Repository")
        .parse()
        .unwrap();
    let (first, second, third) = tokio::join!(
        minted(&app, &repository),
        minted(&app, &repository),
        minted(&app, &repository)
    );
    assert_eq!([first, second, third], ["ghs_canary1"; 3]);
    assert_eq!(minted(&app, &same).await, "ghs_canary1");
    assert_eq!(host.github.asked().len(), 2);
    app.refused(&same);
    assert_eq!(minted(&app, &repository).await, "ghs_canary2");
    assert_eq!(minted(&app, &repository).await, "ghs_canary2");
    // One that ends before the longest command may have ended is used at once and not kept.
    app.refused(&repository);
    host.github.set_holds(SignedDuration::from_mins(9));
    assert_eq!(minted(&app, &repository).await, "ghs_canary3");
    host.github.set_holds(SignedDuration::from_mins(30));
    assert_eq!(minted(&app, &repository).await, "ghs_canary4");
    assert_eq!(minted(&app, &repository).await, "ghs_canary4");
}

#[tokio::test]
async fn another_host_is_asked_nothing_and_given_nothing() {
    let (_folder, host, app, _) = host().await;
    let other: Url = "https://other.example/acme/repository.git".parse().unwrap();
    assert!(app.mint(&other).await.unwrap().is_none());
    let strange: Url = format!("{}/acme/repository.git/x", host.url)
        .parse()
        .unwrap();
    let error = app.mint(&strange).await.err().unwrap();
    assert!(error.reason.contains("owner/name"), "{error}");
    assert_eq!(host.github.asked(), [""; 0]);
}

#[tokio::test]
async fn what_github_refuses_is_said_with_who_can_mend_it() {
    let (_folder, host, app, repository) = host().await;
    let elsewhere = GitHost::start(std::path::Path::new("/nonexistent"), "").await;
    for (mood, retryable, says) in [
        (Api::Answers(401), false, "GITHUB_APP_PRIVATE_KEY_FILE"),
        (Api::Answers(403), false, "suspended"),
        (Api::Answers(404), false, "install the app"),
        (Api::Answers(503), true, "tried again"),
        (Api::Limits, true, "too often"),
        (Api::NoToken, false, "contents: write"),
        (Api::Nonsense, false, "GITHUB_API_URL"),
        (Api::Lines, false, "a token that is none"),
        (Api::Redirects(elsewhere.url.clone()), false, "elsewhere"),
    ] {
        host.github.set_mood(mood.clone());
        let error = app.mint(&repository).await.err().unwrap();
        assert_eq!(error.retryable, retryable, "{mood:?}: {error}");
        assert!(error.reason.contains(says), "{mood:?}: {error}");
        assert_eq!(error.host, "127.0.0.1");
    }
    assert_eq!(
        elsewhere.github.asked(),
        [""; 0],
        "no credential went there"
    );
    host.github.set_mood(Api::Fine);
    // Another app's key, and a repository where the app is not.
    let stranger = self::app(&host, "other.pem");
    let error = stranger.mint(&repository).await.err().unwrap();
    assert!(error.reason.contains("GITHUB_APP_ID"), "{error}");
    assert_eq!(host.github.wrong(), ["the signature is somebody else's"]);
    let private: Url = format!("{}/acme/private.git", host.url).parse().unwrap();
    let error = app.mint(&private).await.err().unwrap();
    assert!(error.reason.contains("acme/private"), "{error}");
    // And after all of that it is a token.
    assert!(minted(&app, &repository).await.starts_with("ghs_canary"));
}

#[tokio::test]
async fn a_github_that_is_away_or_silent_is_given_up_and_asked_again_later() {
    let (_folder, host, _, repository) = host().await;
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = gone.local_addr().unwrap();
    drop(gone);
    let away = GitHubApp::new(&format!("http://{nobody}"), APP, &key_file("app.pem")).unwrap();
    let there: Url = format!("http://{nobody}/acme/repository.git")
        .parse()
        .unwrap();
    let error = away.mint(&there).await.err().unwrap();
    assert!(
        error.retryable && error.reason.contains("does not answer"),
        "{error}"
    );

    let app = app(&host, "app.pem").patient(Duration::from_millis(200));
    host.github.set_mood(Api::Silent);
    let error = app.mint(&repository).await.err().unwrap();
    assert!(
        error.retryable && error.reason.contains("does not answer"),
        "{error}"
    );
    assert!(
        !error.to_string().contains("eyJ"),
        "the proof is not said: {error}"
    );
    // The bound is for tests; with the real one it answers again.
    host.github.set_mood(Api::Fine);
    assert_eq!(
        minted(&self::app(&host, "app.pem"), &repository).await,
        "ghs_canary1"
    );
}

#[test]
fn an_app_that_cannot_be_used_is_refused_by_the_name_of_its_setting() {
    let api = "https://api.github.com";
    let new = |api: &str, id: &str, key: &str| {
        let error = GitHubApp::new(api, id, &key_file(key)).err();
        error.unwrap_or_else(|| panic!("{api} {id} {key} is fine?"))
    };
    for (error, says) in [
        (
            new("http://github.example", APP, "app.pem"),
            "GITHUB_API_URL",
        ),
        (
            new("https://me@github.example", APP, "app.pem"),
            "GITHUB_API_URL",
        ),
        (new("github", APP, "app.pem"), "GITHUB_API_URL"),
        (new(api, "my-app", "app.pem"), "GITHUB_APP_ID"),
        (new(api, "", "app.pem"), "GITHUB_APP_ID"),
        (new(api, APP, "missing.pem"), "GITHUB_APP_PRIVATE_KEY_FILE"),
        (new(api, APP, "words.txt"), "no private key"),
        (new(api, APP, "app.public.pem"), "no private key"),
        (new(api, APP, "elliptic.pem"), "another kind"),
    ] {
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(matches!(
        new(api, APP, "missing.pem"),
        AppError::Unreadable { .. }
    ));
    for id in [APP, "Iv1.8a61f9b3a7aba766", "Iv23liExample"] {
        assert!(
            GitHubApp::new(api, id, &key_file("app.pem")).is_ok(),
            "{id}"
        );
    }
}

#[tokio::test]
async fn a_task_is_cloned_and_pushed_with_tokens_that_the_app_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let host = GitHost::start(folder.path(), "none yet").await;
    host.believes_github();
    let app = Arc::new(app(&host, "app.pem"));
    let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
    let stage = Stage::tuned(folder, runtime, cleanup, [], |options| {
        options.tokens = app;
    })
    .await;
    // Whoever owns it.
    std::os::unix::fs::symlink(".", stage.folder.path().join("acme")).unwrap();
    let request = |id: &str, attempt: u32, file: &str| {
        let script = format!("echo hello > {file} && git add -A && git commit -qm 'Add {file}'");
        let mut request = stage.script(id, attempt, &script);
        let url = format!("{}/acme/repository.git", host.url);
        request.repository.source = Source::CloneUrl(url);
        request
    };
    let result = stage.run(&request("r1", 1, "one.txt")).await;
    assert_succeeded(&result);
    assert_eq!(result.head_sha, stage.pushed(), "it is on the host");
    let visits = host.visits();
    let came = |with: &str| {
        visits
            .iter()
            .any(|visit| visit.password.as_deref() == Some(with))
    };
    assert!(came("ghs_canary1"));
    assert_eq!(host.github.minted().len(), 1, "one for the whole task");

    // GitHub has taken the token back: that command fails, and the next attempt has another one.
    host.set_password("ghs_canary2");
    let refused = stage.run(&request("r2", 2, "two.txt")).await;
    assert_eq!(kind(&refused), spawner::kind::ACCESS_DENIED);
    assert_succeeded(&stage.run(&request("r3", 3, "two.txt")).await);
    assert_eq!(host.github.minted().len(), 2);

    // No answer is no refusal: it is tried again.
    host.set_password("ghs_canary3");
    host.github.set_mood(Api::Answers(503));
    assert_eq!(
        kind(&stage.run(&request("r4", 4, "four.txt")).await),
        spawner::kind::ACCESS_DENIED
    );
    let away = stage.run(&request("r5", 5, "four.txt")).await;
    assert_eq!(kind(&away), spawner::kind::REMOTE_DOWN);
    let failure = away.failure.unwrap();
    assert!(!failure.evidence.contains("ghs_canary3"), "{failure:?}");
    host.github.set_mood(Api::Answers(404));
    let missing = stage.run(&request("r6", 6, "four.txt")).await;
    assert_eq!(kind(&missing), spawner::kind::ACCESS_DENIED);
    let failure = missing.failure.unwrap();
    assert!(failure.message.contains("GITHUB_APP_ID"), "{failure:?}");
    assert!(
        failure.evidence.contains("install the app there"),
        "{failure:?}"
    );
    host.set_mood(Mood::Fine);
}
