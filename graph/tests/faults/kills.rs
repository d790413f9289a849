//! `kill -9` at any moment, of one of two processes that serve one database.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use graph::checkpoint::Checkpointer;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio_util::sync::CancellationToken;

use crate::{
    load::{self, Driver},
    long,
    storage::{self, Schema},
};

const DATABASE: &str = "GRAPH_TEST_SERVER_DATABASE";
const EFFECTS: &str = "GRAPH_TEST_SERVER_EFFECTS";

/// A database by its path, or by its URL.
async fn open(database: &str) -> Arc<dyn Checkpointer> {
    if database.contains("://") {
        Arc::new(storage::connect(database.to_owned()).await)
    } else {
        Arc::new(storage::sqlite(database.into()).await)
    }
}

/// Not a test by itself: the process that the tests below start and kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child process of the tests below"]
async fn server() {
    let database = std::env::var(DATABASE).expect("is given by the test that starts it");
    let effects = std::env::var(EFFECTS).expect("a path");
    // Nobody survives the one who started it.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    let engine = load::engine(open(&database).await, Path::new(&effects))
        .await
        .expect("builds");
    println!("\nserving");
    let owner = format!("process {}", std::process::id());
    engine
        .serve(load::options(&owner), CancellationToken::new())
        .await
        .expect("serves");
}

/// A process that serves. It goes with the value.
struct Served(Child);

impl Served {
    /// Starts it, and waits until it serves.
    fn start(database: &str, effects: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("has a path"))
            .args(["--ignored", "--exact", "kills::server", "--nocapture"])
            .env(DATABASE, database)
            .env(EFFECTS, effects)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("is piped")).lines();
        let serves = lines
            .by_ref()
            .any(|line| line.is_ok_and(|line| line == "serving"));
        let server = Self(child);
        assert!(serves, "the process ended before it served");
        server
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills one of two processes, again and again.
fn kill_often(database: &str, effects: &Path, seed: u64, times: u32) -> [Served; 2] {
    let mut random = StdRng::seed_from_u64(seed);
    let mut servers = [0, 1].map(|_| Served::start(database, effects));
    for _ in 0..times {
        crate::block(random.random_range(20..300));
        let victim = &mut servers[usize::from(random.random_bool(0.5))];
        victim.0.kill().expect("can be killed");
        let status = victim.0.wait().expect("ends");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "it died of something else: {status}"
        );
        *victim = Served::start(database, effects);
    }
    servers
}

async fn survives(database: String) {
    let seed = load::seed();
    let times = long(100, 10);
    let dir = tempfile::tempdir().expect("a directory");
    let effects = dir.path().join("effects");
    let driver = Driver::new(open(&database).await, &effects).await;
    let done = Arc::new(AtomicBool::new(false));
    let killer = tokio::task::spawn_blocking({
        let done = done.clone();
        move || {
            let servers = kill_often(&database, &effects, seed, times);
            done.store(true, Ordering::SeqCst);
            servers
        }
    });
    let count = driver.drive(seed, 60, &done).await;
    drop(killer.await.expect("kills"));
    println!("{times} processes were killed under {count} threads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_killed_at_random_lose_nothing_and_do_nothing_twice_on_sqlite() {
    let (path, _dir) = storage::sqlite_path();
    survives(path.to_str().expect("is text").to_owned()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_killed_at_random_lose_nothing_and_do_nothing_twice_on_postgres() {
    let schema = Schema::make().await;
    survives(schema.url.clone()).await;
}
