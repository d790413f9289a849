//! The in-process transport: the common suite, and what only it has (its folder, its bounds).

use async_trait::async_trait;
use protocol::local::Options;
use protocol::suite::{self, Harness};
use protocol::{LocalTransport, Transport, TransportError};
use std::sync::Arc;
use std::time::Duration;

struct Local(tempfile::TempDir);

impl Local {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn options(&self) -> Options {
        Options {
            lease: self.lease(),
            ..Options::new(self.0.path())
        }
    }
}

#[async_trait]
impl Harness for Local {
    async fn open_for(&self, lease: Duration) -> Arc<dyn Transport> {
        let options = Options {
            lease,
            ..self.options()
        };
        Arc::new(LocalTransport::with(options).await.unwrap())
    }

    async fn open_remembering(&self, lives: Duration, lately: Duration) -> Arc<dyn Transport> {
        let options = Options {
            lives,
            lately,
            ..self.options()
        };
        Arc::new(LocalTransport::with(options).await.unwrap())
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(700)
    }
}

protocol::transport_suite!(Local::new());

#[tokio::test]
async fn a_full_queue_refuses_and_keeps_what_it_has() {
    let local = Local::new();
    let bus = LocalTransport::with(Options {
        capacity: 2,
        ..local.options()
    })
    .await
    .unwrap();
    bus.publish_job(&suite::request("a")).await.unwrap();
    bus.publish_job(&suite::request("b")).await.unwrap();
    let refused = bus.publish_job(&suite::request("c")).await.unwrap_err();
    assert!(
        matches!(refused, TransportError::Full { limit: 2, .. }),
        "{refused}"
    );
    let held = bus.next_job(Duration::ZERO).await.unwrap().unwrap();
    bus.ack_job(&held.receipt).await.unwrap();
    bus.publish_job(&suite::request("c")).await.unwrap();
}

#[tokio::test]
async fn a_folder_has_one_user_at_a_time() {
    let local = Local::new();
    let first = LocalTransport::open(local.0.path()).await.unwrap();
    let second = LocalTransport::open(local.0.path()).await.err().unwrap();
    assert!(
        matches!(&second, TransportError::InUse { place } if place.contains(local.0.path().to_str().unwrap())),
        "{second}"
    );
    drop(first);
    LocalTransport::open(local.0.path()).await.unwrap();
}

#[tokio::test]
async fn a_folder_that_is_about_to_be_given_up_is_waited_for() {
    let local = Local::new();
    let first = LocalTransport::open(local.0.path()).await.unwrap();
    let second = LocalTransport::open(local.0.path());
    tokio::pin!(second);
    // It looks, and the folder is taken.
    tokio::select! {
        // First: on a machine that stands still, the other one may have given up meanwhile.
        biased;
        () = tokio::time::sleep(Duration::from_millis(100)) => {}
        opened = &mut second => panic!("the folder is taken: {:?}", opened.err()),
    }
    drop(first);
    second.await.unwrap();
}

#[tokio::test]
async fn files_that_are_not_messages_become_dead_letters() {
    let local = Local::new();
    drop(local.open().await);
    let jobs = local.0.path().join("jobs");
    std::fs::write(jobs.join("half.json"), "{\"order\": 1, \"mess").unwrap();
    std::fs::write(
        jobs.join("future.json"),
        "{\"order\": 2, \"message\": {\"version\": 9}}",
    )
    .unwrap();
    std::fs::write(jobs.join("left.tmp"), "written aside, never renamed").unwrap();
    let bus = local.open().await;
    bus.publish_job(&suite::request("good")).await.unwrap();
    let held = bus.next_job(Duration::ZERO).await.unwrap().unwrap();
    assert_eq!(held.request.request_id, "good");
    assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
    let letters = bus.dead_letters(10).await.unwrap();
    assert_eq!(letters.len(), 2);
    assert!(
        letters
            .iter()
            .any(|(reason, _)| reason.contains("version 9"))
    );
    assert!(letters.iter().any(|(_, body)| body.contains("mess")));
    assert!(!jobs.join("left.tmp").exists());
}

#[tokio::test]
async fn a_job_is_on_disk_before_anybody_hears_of_it() {
    let local = Local::new();
    let bus = local.open().await;
    bus.publish_job(&suite::request("a")).await.unwrap();
    let text = std::fs::read_to_string(local.0.path().join("jobs/a.json")).unwrap();
    assert!(text.contains("\"request_id\":\"a\""), "{text}");
}

#[tokio::test]
async fn a_store_that_cannot_be_written_says_where() {
    let local = Local::new();
    let bus = local.open().await;
    std::fs::remove_dir(local.0.path().join("jobs")).unwrap();
    let error = bus.publish_job(&suite::request("a")).await.unwrap_err();
    assert!(error.to_string().contains("jobs/a.json"), "{error}");
    std::fs::create_dir(local.0.path().join("jobs")).unwrap();
    bus.publish_job(&suite::request("a")).await.unwrap();
}

#[tokio::test]
async fn a_cancel_is_remembered_for_as_long_as_its_job_may_wait() {
    let local = Local::new();
    let bus = local.open().await;
    let day = Duration::from_hours(24);
    for (id, days) in [("a", 29), ("gone", 31)] {
        bus.cancel(id).await.unwrap();
        let file = local.0.path().join(format!("cancelled/{id}.json"));
        let file = std::fs::File::options().write(true).open(file).unwrap();
        file.set_modified(std::time::SystemTime::now() - day * days)
            .unwrap();
    }
    // What is old is looked for now and then, when something is published.
    bus.publish_job(&suite::request("a")).await.unwrap();
    assert!(bus.cancelled("a").await.unwrap(), "it would begin");
    assert!(!bus.cancelled("gone").await.unwrap());
}

#[tokio::test]
async fn whoever_waits_for_a_file_that_nobody_can_read_is_answered() {
    let local = Local::new();
    drop(local.open().await);
    let mut request = serde_json::to_value(suite::request("job")).unwrap();
    let mut result = serde_json::to_value(suite::result("result", "x")).unwrap();
    for (folder, id, message) in [
        ("jobs", "job", &mut request),
        ("results", "result", &mut result),
    ] {
        message["version"] = 9.into();
        let file = local.0.path().join(folder).join(format!("{id}.json"));
        let text = format!("{{\"order\": 1, \"message\": {message}}}");
        std::fs::write(file, text).unwrap();
    }
    // Twice: what was answered is answered once.
    for _ in 0..2 {
        let bus = local.open().await;
        assert_eq!(bus.dead_letters(10).await.unwrap().len(), 2);
        assert!(bus.next_job(Duration::ZERO).await.unwrap().is_none());
        let mut kinds = Vec::new();
        while let Some(told) = bus.next_result(Duration::ZERO).await.unwrap() {
            assert_eq!((told.result.attempt, told.result.fencing_token), (1, 7));
            kinds.push((told.result.request_id, told.result.failure.unwrap().kind));
        }
        kinds.sort();
        let expected = [("job", "bad_request"), ("result", "bad_result")];
        assert_eq!(
            kinds,
            expected.map(|(id, kind)| (id.to_owned(), kind.to_owned()))
        );
    }
}
