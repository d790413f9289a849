//! A home, a repository and a deployer for tests; what they started is gone when they go.

#![allow(dead_code)] // each test file uses a part

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use deploy::{LocalDeployer, Options};
use ports::{
    AcceptanceCheck, Check, DeployRequest, Deployer, HttpExpectation, Plaintext, ProjectId,
    Repository, SecretHandle, SecretResolver, Sha,
};
use sandbox::{Sandbox, Unconfined};

/// A service that says its version, counts in its data folder, and misbehaves when asked to.
pub const SERVICE: &str = r#"
import http.server, os, sys, time
VERSION = open("version").read().strip()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, text = 200, VERSION
        if self.path == "/crash":
            print("crashing as asked", flush=True)
            os._exit(3)
        if self.path == "/count":
            path = os.path.join(os.environ["DATA_DIR"], "count")
            count = int(open(path).read()) + 1 if os.path.exists(path) else 1
            open(path, "w").write(str(count))
            text = str(count)
        if self.path == "/slow":
            time.sleep(1)
        if self.path == "/env":
            text = "\n".join(sorted(f"{k}={v}" for k, v in os.environ.items()))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *args):
        pass
print("starting", VERSION, os.environ.get("TOKEN", "without a token"))
http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"#;

pub struct World {
    pub home: tempfile::TempDir,
    pub deployer: LocalDeployer,
    repository: PathBuf,
    projects: Vec<ProjectId>,
}

struct Secrets;

#[async_trait]
impl SecretResolver for Secrets {
    async fn resolve(&self, handle: &SecretHandle, _: &str) -> ports::Result<Plaintext> {
        Ok(Plaintext::new(format!("value-of-{}", handle.name)))
    }
}

impl World {
    pub fn new() -> Self {
        Self::with(Sandbox::detect().expect("bubblewrap works here"))
    }

    pub fn unconfined() -> Self {
        Self::with(Sandbox::unconfined(Unconfined::ShippedTape))
    }

    fn with(sandbox: Sandbox) -> Self {
        let home = tempfile::tempdir().expect("directory");
        let deployer = LocalDeployer::new(Options {
            home: home.path().to_owned(),
            sandbox,
            program: env!("CARGO_BIN_EXE_deploy-process").into(),
            supervise_args: vec!["supervise".into()],
            launch_args: vec!["launch".into()],
            secrets: Arc::new(Secrets),
            ready_s: 10,
        });
        let repository = home.path().join("repository.git");
        git(home.path(), &["init", "-q", "--bare", "repository.git"]);
        Self {
            home,
            deployer,
            repository,
            projects: vec![project("p1"), project("p2")],
        }
    }

    /// The same home, another process's view of it.
    pub fn with_ready_s(&self, ready_s: u64) -> LocalDeployer {
        let deployer = self.deployer.clone();
        let mut options = deployer.options();
        options.ready_s = ready_s;
        LocalDeployer::new(options)
    }

    /// A commit of the service, with changes on top.
    pub fn commit(&self, version: &str, changes: &[(&str, &str)]) -> Sha {
        let tree = self.home.path().join(format!("tree-{version}"));
        std::fs::create_dir_all(&tree).expect("directory");
        let manifest = "version: 1\nchecks: 'true'\nservice:\n  command: [python3, service.py]\n";
        let mut files = BTreeMap::from([
            ("service.py", SERVICE),
            ("version", version),
            ("artel.yaml", manifest),
        ]);
        files.extend(changes.iter().copied());
        for (name, content) in files {
            std::fs::write(tree.join(name), content).expect("written");
        }
        let bare = format!("--git-dir={}", self.repository.display());
        let index = self.home.path().join(format!("index-{version}"));
        let run = |args: &[&str]| {
            let output = Command::new("git")
                .arg(&bare)
                .args(args)
                .env("GIT_INDEX_FILE", &index)
                .env("GIT_WORK_TREE", &tree)
                .env("GIT_AUTHOR_NAME", "a")
                .env("GIT_AUTHOR_EMAIL", "a@b")
                .env("GIT_COMMITTER_NAME", "a")
                .env("GIT_COMMITTER_EMAIL", "a@b")
                .current_dir(&tree)
                .output()
                .expect("git runs");
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout)
                .expect("text")
                .trim()
                .to_owned()
        };
        run(&["add", "--all"]);
        let written = run(&["write-tree"]);
        Sha::new(run(&["commit-tree", &written, "-m", version]))
    }

    pub fn order(&self, key: &str, sha: &Sha, port: u16) -> DeployRequest {
        DeployRequest {
            key: key.to_owned(),
            project: project("p1"),
            repository: Repository {
                project: project("p1"),
                location: self.repository.display().to_string(),
                path: Some(self.repository.clone()),
                clone_url: None,
                default_branch: "main".into(),
            },
            sha: sha.clone(),
            port,
            secrets: Vec::new(),
            acceptance: Vec::new(),
        }
    }

    pub fn folder(&self) -> PathBuf {
        self.home.path().join("deploy/p1")
    }

    pub fn supervisor_pid(&self) -> u32 {
        let text = std::fs::read(self.folder().join("supervisor.json")).expect("a supervisor");
        let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        value["pid"]
            .as_u64()
            .expect("pid")
            .try_into()
            .expect("small")
    }

    /// Processes that have this world's home among their arguments.
    pub fn processes(&self) -> Vec<String> {
        let home = self.home.path().display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&home) {
                found.push(line);
            }
        }
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let (deployer, projects) = (self.deployer.clone(), self.projects.clone());
        // A test's runtime may be ending: a thread with its own.
        let ending = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("runtime");
            runtime.block_on(async {
                for project in projects {
                    let _ = deployer.remove(&project).await;
                }
            });
        });
        let _ = ending.join();
    }
}

pub fn project(id: &str) -> ProjectId {
    ProjectId::from(id)
}

pub fn http(name: &str, path: &str, contains: &str) -> AcceptanceCheck {
    AcceptanceCheck {
        name: name.to_owned(),
        check: Check::Http {
            method: "GET".into(),
            path: path.into(),
            headers: BTreeMap::new(),
            body: None,
            expect: HttpExpectation {
                status: 200,
                body_contains: vec![contains.into()],
                json: None,
            },
        },
    }
}

pub fn command(name: &str, argv: &[&str]) -> AcceptanceCheck {
    AcceptanceCheck {
        name: name.to_owned(),
        check: Check::Command {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            exit_code: 0,
        },
    }
}

pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("address").port()
}

/// The body of a plain GET, or what went wrong.
pub fn get(port: u16, path: &str) -> Result<String, String> {
    let ask = || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: x\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|error| error.to_string())?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| format!("no answer: {answer:?}"))?;
    if head.contains(" 200 ") {
        Ok(body.to_owned())
    } else {
        Err(format!("{head}: {body}"))
    }
}

/// Waits until it holds; the last thing that was seen otherwise.
pub async fn until<T: std::fmt::Debug>(
    seconds: u64,
    mut look: impl FnMut() -> T,
    holds: impl Fn(&T) -> bool,
) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        let seen = look();
        if holds(&seen) {
            return seen;
        }
        assert!(Instant::now() < end, "still {seen:?} after {seconds} s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn git(directory: &Path, args: &[&str]) {
    let status = Command::new("git")
        .args(args)
        .current_dir(directory)
        .status();
    assert!(status.expect("git runs").success());
}
