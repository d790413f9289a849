//! Throw-away Redis servers, each in a folder of its own: one on a UNIX socket, a cluster, a master with a replica and a
//! sentinel. Only loopback.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const START: Duration = Duration::from_mins(1);

/// A process that ends with this value.
struct Process(Child);

impl Process {
    fn start(folder: &Path, arguments: &[String]) -> Self {
        let child = Command::new("redis-server")
            .args(arguments)
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server can be started (Debian's package redis-server)");
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Tries until it is true, with a bound.
async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let tries = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let came = tokio::time::timeout(START, tries).await;
    assert!(came.is_ok(), "{what} within {START:?}");
}

fn look(url: &str) -> redis::RedisResult<redis::Connection> {
    redis::Client::open(url)?.get_connection()
}

fn answers(url: &str) -> bool {
    look(url)
        .and_then(|mut connection| redis::cmd("PING").query::<String>(&mut connection))
        .is_ok()
}

/// Ports that were free a moment ago.
fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind(("127.0.0.1", 0)).expect("a free port"));
    held.map(|listener| listener.local_addr().expect("an address").port())
}

/// One server, which writes everything to disk before it answers. What it stored survives [`Server::kill`].
pub struct Server {
    process: Option<Process>,
    folder: tempfile::TempDir,
}

impl Server {
    pub async fn start() -> Self {
        let mut server = Self {
            folder: tempfile::tempdir().expect("a folder"),
            process: None,
        };
        server.up().await;
        server
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// For `REDIS_URL`.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Starts it again, with what it had stored.
    pub async fn up(&mut self) {
        let mut arguments = words("--port 0 --appendonly yes --appendfsync always --unixsocket");
        arguments.push(self.socket().display().to_string());
        self.process = Some(Process::start(self.folder.path(), &arguments));
        let url = self.url();
        until("redis-server answers", || answers(&url)).await;
    }

    /// As by `kill -9`.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// A connection beside the transport, to look at what is really there.
    pub fn look(&self) -> redis::Connection {
        look(&self.url()).expect("a connection")
    }
}

/// Two masters that share the slots.
pub struct Cluster {
    ports: [u16; 2],
    _processes: Vec<Process>,
    _folders: Vec<tempfile::TempDir>,
}

impl Cluster {
    pub async fn start() -> Self {
        let [one, two, bus_one, bus_two] = free_ports();
        let mut folders = Vec::new();
        let mut processes = Vec::new();
        for (port, bus) in [(one, bus_one), (two, bus_two)] {
            let folder = tempfile::tempdir().expect("a folder");
            let arguments = words(&format!(
                "--port {port} --bind 127.0.0.1 --cluster-enabled yes --cluster-port {bus} --save \"\""
            ));
            processes.push(Process::start(folder.path(), &arguments));
            folders.push(folder);
        }
        let url = |port: u16| format!("redis://127.0.0.1:{port}/");
        for port in [one, two] {
            until("a node answers", || answers(&url(port))).await;
        }
        for (port, slots) in [(one, (0, 8191)), (two, (8192, 16383))] {
            let mut node = look(&url(port)).expect("a connection");
            redis::cmd("CLUSTER")
                .arg("ADDSLOTSRANGE")
                .arg(slots.0)
                .arg(slots.1)
                .query::<()>(&mut node)
                .expect("slots");
        }
        redis::cmd("CLUSTER")
            .arg("MEET")
            .arg("127.0.0.1")
            .arg(two)
            .arg(bus_two)
            .query::<()>(&mut look(&url(one)).expect("a connection"))
            .expect("they meet");
        for port in [one, two] {
            until("the cluster is whole", || {
                look(&url(port))
                    .and_then(|mut node| {
                        redis::cmd("CLUSTER").arg("INFO").query::<String>(&mut node)
                    })
                    .is_ok_and(|info| info.contains("cluster_state:ok"))
            })
            .await;
        }
        Self {
            ports: [one, two],
            _processes: processes,
            _folders: folders,
        }
    }

    /// For `REDIS_URL`.
    pub fn url(&self) -> String {
        let [one, two] = self.ports;
        format!("redis+cluster://127.0.0.1:{one},127.0.0.1:{two}")
    }
}

/// A master, its replica, and a sentinel that watches them.
pub struct Watched {
    sentinel: u16,
    master: u16,
    replica: u16,
    processes: Vec<Process>,
    _folder: tempfile::TempDir,
}

impl Watched {
    pub async fn start() -> Self {
        let [master, replica, sentinel] = free_ports();
        let folder = tempfile::tempdir().expect("a folder");
        let mut processes = Vec::new();
        for (name, port, more) in [
            ("master", master, String::new()),
            (
                "replica",
                replica,
                format!("--replicaof 127.0.0.1 {master}"),
            ),
        ] {
            let own = folder.path().join(name);
            std::fs::create_dir(&own).expect("a folder");
            let arguments = words(&format!(
                "--port {port} --bind 127.0.0.1 --repl-diskless-sync-delay 0 --save \"\" {more}"
            ));
            processes.push(Process::start(&own, &arguments));
        }
        let mut configuration = String::new();
        let _ = write!(
            configuration,
            "port {sentinel}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {master} 1\n\
             sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 3000\n"
        );
        let file = folder.path().join("sentinel.conf");
        std::fs::write(&file, configuration).expect("it can be written");
        let arguments = [file.display().to_string(), "--sentinel".to_owned()];
        processes.push(Process::start(folder.path(), &arguments));
        let watched = Self {
            sentinel,
            master,
            replica,
            processes,
            _folder: folder,
        };
        for port in [master, replica, sentinel] {
            let url = format!("redis://127.0.0.1:{port}/");
            until("each of them answers", || answers(&url)).await;
        }
        // A replica that the sentinel does not know cannot be promoted.
        until("the sentinel knows the replica", || {
            look(&format!("redis://127.0.0.1:{sentinel}/"))
                .and_then(|mut node| {
                    redis::cmd("SENTINEL")
                        .arg("REPLICAS")
                        .arg("main")
                        .query::<Vec<redis::Value>>(&mut node)
                })
                .is_ok_and(|replicas| !replicas.is_empty())
        })
        .await;
        watched.wait_for_replica().await;
        watched
    }

    /// For `REDIS_URL`.
    pub fn url(&self) -> String {
        format!("redis+sentinel://127.0.0.1:{}/main", self.sentinel)
    }

    /// Until the replica has all that the master has.
    pub async fn wait_for_replica(&self) {
        let master = format!("redis://127.0.0.1:{}/", self.master);
        until("the replica keeps up", || {
            look(&master)
                .and_then(|mut node| {
                    // It waits for what this connection has written, and so for all that was written before.
                    redis::cmd("SET")
                        .arg("last")
                        .arg(1)
                        .query::<()>(&mut node)?;
                    redis::cmd("WAIT").arg(1).arg(100).query::<u64>(&mut node)
                })
                .is_ok_and(|replicas| replicas == 1)
        })
        .await;
    }

    /// Kills the master, and waits until the replica has taken its place.
    pub async fn fail_over(&mut self) {
        drop(self.processes.remove(0));
        let replica = format!("redis://127.0.0.1:{}/", self.replica);
        until("the replica is promoted", || {
            look(&replica)
                .and_then(|mut node| {
                    redis::cmd("INFO")
                        .arg("replication")
                        .query::<String>(&mut node)
                })
                .is_ok_and(|info| info.contains("role:master"))
        })
        .await;
    }
}
