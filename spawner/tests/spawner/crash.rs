//! `kill -9` of the whole program while a worker runs.

use crate::stage::{
    Another, Models, assert_succeeded, git, options, repository, runtime, script, transport, until,
    wait_result,
};
use protocol::suite;
use spawner::Spawner;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const HOME: &str = "ARTEL_TEST_CRASH_HOME";

/// The program that dies: not a test of its own, but the other process of the one below.
#[tokio::test]
#[ignore = "runs as the child process of the test below"]
async fn the_program_that_dies() {
    let home = PathBuf::from(std::env::var_os(HOME).expect("started by the test below"));
    let bus = transport(&home).await;
    let (runtime, _cleanup) = runtime(&home).await;
    let spawner = Spawner::new(options(&home, runtime, bus, Arc::new(Models::default()))).unwrap();
    spawner.run(CancellationToken::new()).await.unwrap();
}

/// Whether a process lives that has this among its arguments.
fn runs(marker: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
        .any(|line| String::from_utf8_lossy(&line).contains(marker))
}

#[tokio::test]
async fn a_job_whose_program_was_killed_runs_again_in_the_same_workspace_once() {
    let folder = tempfile::tempdir().unwrap();
    let base = repository(folder.path());
    let home = folder.path().join("home");
    let bare = folder.path().join("repository.git");
    // The first run works until it is killed, with Git's lock held; the second one finishes.
    let work = format!(
        ": {}
echo run >> runs.txt
if [ $(wc -l < runs.txt) = 1 ]; then touch .git/index.lock beat; while true; do sleep 0.02; done; fi
rm -f beat; git add runs.txt; git commit -qm Finish",
        folder.path().display()
    );
    let request = script(folder.path(), &base, "r1", 1, &work);
    let bus = transport(&home).await;
    bus.publish_job(&request).await.unwrap();
    drop(bus);

    let mut program = Another::start("crash::the_program_that_dies", [(HOME, home.as_os_str())]);
    let beat = home.join("workspaces/p/job-1/one/beat");
    until(async || beat.exists().then_some(())).await;
    program.kill();

    // The worker dies with its program.
    let marker = folder.path().to_str().unwrap();
    until(async || (!runs(marker)).then_some(())).await;

    let bus = transport(&home).await;
    let (runtime, _cleanup) = runtime(&home).await;
    let spawner = Spawner::new(options(
        &home,
        runtime,
        Arc::clone(&bus),
        Arc::new(Models::default()),
    ));
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(spawner.unwrap().run(shutdown.clone()));
    let result = wait_result(&bus, "r1").await;
    assert_succeeded(&result);
    assert_eq!(git(&bare, &["show", "task/one:runs.txt"]), "run\nrun\n");
    let delivered = bus.next_result(Duration::ZERO).await.unwrap().unwrap();
    assert_eq!(delivered.result.request_id, "r1");
    assert!(
        bus.next_result(Duration::ZERO).await.unwrap().is_none(),
        "one result"
    );
    until(async || {
        bus.next_job(Duration::ZERO)
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;
    shutdown.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_job_that_spawners_keep_dying_of_becomes_a_dead_letter_and_a_result() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let bus = transport(&home).await;
    bus.publish_job(&suite::request("r1")).await.unwrap();
    // Each of them takes it and is not heard of again.
    for n in 1..=20 {
        let taken = bus.next_job(Duration::ZERO).await.unwrap().unwrap();
        assert_eq!(taken.deliveries, n);
        bus.release_job(&taken.receipt).await.unwrap();
    }
    let models = Arc::new(Models::default());
    let (runtime, _cleanup) = runtime(&home).await;
    let spawner = Spawner::new(options(&home, runtime, Arc::clone(&bus), models)).unwrap();
    let running = tokio::spawn(spawner.run(CancellationToken::new()));
    let result = wait_result(&bus, "r1").await;
    assert_eq!(result.status, protocol::ResultStatus::Lost);
    assert_eq!(result.failure.unwrap().kind, spawner::kind::LOST);
    let letter = until(async || bus.dead_letters(1).await.unwrap().pop()).await;
    assert!(
        letter.0.contains("20 times") && letter.1.contains("\"r1\""),
        "{letter:?}"
    );
    running.abort();
}
