//! PostgreSQL is restarted again and again under threads that run: as an administrator would (connections are ended, the
//! state is written out), and as a crash does (all of its processes die, and it recovers from its log).

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use graph::Engine;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    load::{self, Driver},
    long, storage,
};

/// A server of its own, on a free port of loopback; stopped and removed with the value.
struct Server {
    dir: tempfile::TempDir,
    bin: PathBuf,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("graph-pg.")
            .tempdir_in("/tmp")
            .expect("a directory");
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| listener.local_addr())
            .expect("a port")
            .port();
        let server = Self {
            dir,
            bin: binaries(),
            port,
        };
        if is_root() {
            succeeds(Command::new("chown").arg("postgres").arg(server.dir.path()));
        }
        let data = server.data();
        succeeds(
            server
                .run("initdb")
                .args([
                    "-A",
                    "trust",
                    "-U",
                    "artel",
                    "-E",
                    "UTF8",
                    "--locale=C.UTF-8",
                    "-D",
                ])
                .arg(&data),
        );
        let settings = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\nmax_connections = 100\nshared_buffers = 32MB\n\
             # Nobody pulls the plug: what the system was given stays. Recovering takes seconds otherwise.\nfsync = off\n",
            server.dir.path().display()
        );
        let file = data.join("postgresql.conf");
        let defaults = std::fs::read_to_string(&file).expect("settings");
        std::fs::write(&file, defaults + &settings).expect("settings");
        succeeds(&mut server.control(&["start"]));
        server
    }

    fn url(&self) -> String {
        format!("postgres://artel@127.0.0.1:{}/postgres", self.port)
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// One of PostgreSQL's programs; it refuses to run as root.
    fn run(&self, program: &str) -> Command {
        let program = self.bin.join(program);
        let mut command = if is_root() {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir("/");
        command
    }

    fn control(&self, arguments: &[&str]) -> Command {
        let mut command = self.run("pg_ctl");
        command
            .args(["-w", "-t", "60", "-s", "-D"])
            .arg(self.data());
        command.arg("-l").arg(self.dir.path().join("log"));
        command.args(arguments);
        command
    }

    fn restart(&self, mode: &str) {
        succeeds(&mut self.control(&["restart", "-m", mode]));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.control(&["stop", "-m", "immediate"]).output();
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self")
        .is_ok_and(|about| std::os::unix::fs::MetadataExt::uid(&about) == 0)
}

/// Where PostgreSQL's programs are: Debian keeps those of each version apart, and out of the path.
fn binaries() -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|version| version.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists())
        .collect();
    found.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    found
        .pop()
        .or_else(|| std::env::split_paths(&path).find(|bin| bin.join("initdb").exists()))
        .expect("PostgreSQL is installed, with its program initdb")
}

fn succeeds(command: &mut Command) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("starts");
    assert!(
        status.success(),
        "{command:?}: {status}\n{}{}",
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    );
}

/// Serves with connections of its own.
async fn serve(
    server: &Server,
    effects: &Path,
    owner: &str,
    stop: &CancellationToken,
) -> JoinHandle<()> {
    let store = Arc::new(storage::connect(server.url()).await);
    let engine: Engine = load::engine(store, effects).await.expect("builds");
    let (options, stop) = (load::options(owner), stop.clone());
    tokio::spawn(async move { engine.serve(options, stop).await.expect("serves") })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_restarted_again_and_again_loses_nothing_and_nothing_is_stuck() {
    let seed = load::seed();
    let (runs, restarts) = long((1000, 60), (50, 5));
    let server = Arc::new(
        tokio::task::spawn_blocking(Server::start)
            .await
            .expect("starts"),
    );
    let dir = tempfile::tempdir().expect("a directory");
    let effects = dir.path().join("effects");
    let driver = Driver::new(Arc::new(storage::connect(server.url()).await), &effects).await;
    let stop = CancellationToken::new();
    let servers = [
        serve(&server, &effects, "first", &stop).await,
        serve(&server, &effects, "second", &stop).await,
    ];
    let done = Arc::new(AtomicBool::new(false));
    let restarter = tokio::task::spawn_blocking({
        let (server, done) = (server.clone(), done.clone());
        move || {
            let mut random = StdRng::seed_from_u64(seed);
            for _ in 0..restarts {
                let pause = long(500..4000, 200..900);
                crate::block(random.random_range(pause));
                server.restart(if random.random_bool(0.7) {
                    "immediate"
                } else {
                    "fast"
                });
            }
            done.store(true, Ordering::SeqCst);
        }
    });
    let count = driver.drive(seed, runs, &done).await;
    restarter.await.expect("restarts");
    stop.cancel();
    for server in servers {
        tokio::time::timeout(Duration::from_secs(30), server)
            .await
            .expect("drains in time")
            .expect("served to the end");
    }
    println!("the database was restarted {restarts} times under {count} threads");
}
