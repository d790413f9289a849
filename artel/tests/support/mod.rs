//! What end-to-end tests need: a data folder of its own, the real binary, and doubles that speak the real protocols.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod docker;
pub mod openai;
pub mod redis;
#[path = "../../../bot/tests/support/telegram.rs"]
pub mod telegram;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A data folder with an environment that holds nothing of the machine's but PATH. When it is dropped, everything that was
/// started on it is ended.
pub struct Home {
    folder: tempfile::TempDir,
    env: Vec<(String, String)>,
}

impl Home {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("artel-e2e-")
            .tempdir()
            .unwrap();
        // Ports that tests beside this one will hardly get: the process id spreads them.
        let low = 21_000 + (std::process::id() % 800) * 10;
        let mut home = Self {
            folder,
            env: Vec::new(),
        };
        home.set("ARTEL_PORTS", &format!("{low}-{}", low + 300));
        home.set("ARTEL_HTTP_ADDR", "127.0.0.1:0");
        home
    }

    pub fn with_tape() -> Self {
        let mut home = Self::new();
        home.set("ARTEL_TAPE", "demo");
        home
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// A setting that was made here.
    pub fn setting(&self, name: &str) -> Option<&str> {
        let (_, value) = self.env.iter().find(|(known, _)| known == name)?;
        Some(value)
    }

    /// A database of its own on the test server.
    pub async fn on_postgres(&mut self) {
        let server = std::env::var("ARTEL_TEST_DATABASE_URL").expect(
            "ARTEL_TEST_DATABASE_URL names no PostgreSQL server: run the tests with `make test`, which starts one",
        );
        let name = format!(
            "artel_{}_{}",
            std::process::id(),
            self.path()
                .file_name()
                .unwrap()
                .to_string_lossy()
                .replace(['-', '.'], "_")
                .to_lowercase()
        );
        let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(&server)
            .await
            .unwrap();
        sqlx::query(sqlx::AssertSqlSafe(format!("create database \"{name}\"")))
            .execute(&mut connection)
            .await
            .unwrap();
        let mut url = url::Url::parse(&server).unwrap();
        url.set_path(&name);
        self.set("DATABASE_URL", url.as_str());
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The program with these arguments.
    pub fn artel(&self, args: &[&str]) -> Command {
        self.program(env!("CARGO_BIN_EXE_artel"), args)
    }

    fn program(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path())
            .env("ARTEL_HOME", self.path())
            .env(
                "RUST_LOG",
                std::env::var("TEST_LOG").unwrap_or_else(|_| "warn".to_owned()),
            )
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(self.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Runs the program to its end, within a bound.
    pub async fn run(&self, args: &[&str]) -> Ran {
        let output = tokio::time::timeout(Duration::from_secs(150), self.artel(args).output())
            .await
            .unwrap_or_else(|_| panic!("artel {args:?} did not end within 150 s"))
            .unwrap();
        Ran::new(args, output)
    }

    /// Starts the program in the background; its lines of standard output can be waited for.
    pub fn start(&self, args: &[&str]) -> Running {
        self.started(self.artel(args))
    }

    /// Runs the program `spawner` to its end, within a bound.
    pub async fn spawner(&self, args: &[&str]) -> Ran {
        let mut command = self.program(env!("CARGO_BIN_EXE_spawner"), args);
        let output = tokio::time::timeout(Duration::from_mins(1), command.output())
            .await
            .unwrap_or_else(|_| panic!("spawner {args:?} did not end within 60 s"))
            .unwrap();
        Ran::new(args, output)
    }

    /// Starts the program `spawner` in the background, which is told of no database.
    pub fn start_spawner(&self) -> Running {
        let mut command = self.program(env!("CARGO_BIN_EXE_spawner"), &[]);
        command.env_remove("DATABASE_URL");
        self.started(command)
    }

    fn started(&self, mut command: Command) -> Running {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.file("test-stderr.log"))
            .unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Running {
            child,
            lines,
            seen: Vec::new(),
            log: self.file("test-stderr.log"),
        }
    }

    /// A number out of the SQLite database; `None` while it cannot be read.
    pub async fn count(&self, query: &'static str) -> Option<i64> {
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(self.file("artel.db"))
            .read_only(true);
        let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect_with(&options)
            .await
            .ok()?;
        sqlx::query_scalar(query)
            .fetch_one(&mut connection)
            .await
            .ok()
    }

    /// `artel status PROJECT --json`.
    pub async fn status(&self, project: &str) -> Value {
        let ran = self.run(&["status", project, "--json"]).await.success();
        serde_json::from_str(ran.stdout.lines().last().unwrap()).unwrap()
    }

    fn supervisors(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for project in std::fs::read_dir(self.file("deploy"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text =
                std::fs::read_to_string(project.path().join("supervisor.json")).unwrap_or_default();
            let state: Value = serde_json::from_str(&text).unwrap_or_default();
            pids.extend(
                state["pid"]
                    .as_i64()
                    .and_then(|pid| i32::try_from(pid).ok()),
            );
        }
        pids
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.file("test-stderr.log")).unwrap_or_default();
            eprintln!("what the program logged:\n{log}");
        }
        for pid in self.supervisors() {
            // Only what was started on this folder: its own supervisors, whose command line names it.
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&*self.path().to_string_lossy()) {
                let _ = std::process::Command::new("kill")
                    .arg("-TERM")
                    .arg(pid.to_string())
                    .status();
            }
        }
    }
}

/// What the program said.
#[derive(Debug)]
pub struct Ran {
    pub args: Vec<String>,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn new(args: &[&str], output: Output) -> Self {
        Self {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub fn success(self) -> Self {
        self.code(0)
    }

    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// The lines as JSON.
    pub fn json(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
            })
            .collect()
    }

    /// The last line as JSON: the end of a command that does work.
    pub fn end(&self) -> Value {
        self.json()
            .pop()
            .unwrap_or_else(|| panic!("nothing was printed: {self:#?}"))
    }
}

/// The program in the background.
pub struct Running {
    pub child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
    pub seen: Vec<String>,
    log: PathBuf,
}

impl Running {
    /// The next line that fits, within a bound.
    pub async fn line(
        &mut self,
        what: &str,
        within: Duration,
        fits: impl Fn(&str) -> bool,
    ) -> String {
        let found = tokio::time::timeout(within, async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                self.seen.push(line.clone());
                if fits(&line) {
                    return Some(line);
                }
            }
            None
        })
        .await;
        match found {
            Ok(Some(line)) => line,
            other => panic!(
                "{}: {what}; it said {:#?}\n{}",
                if other.is_err() {
                    format!("not within {within:?}")
                } else {
                    "it ended before".to_owned()
                },
                self.seen,
                std::fs::read_to_string(&self.log).unwrap_or_default()
            ),
        }
    }

    /// The next event of a name, in `--json`.
    pub async fn event(&mut self, name: &str, within: Duration) -> Value {
        let line = self
            .line(name, within, |line| {
                serde_json::from_str::<Value>(line).is_ok_and(|value| value["event"] == name)
            })
            .await;
        serde_json::from_str(&line).unwrap()
    }

    /// `kill -9`.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGTERM, and its exit code within a bound.
    pub async fn terminate(&mut self, within: Duration) -> i32 {
        let pid = self.child.id().expect("it still runs");
        std::process::Command::new("kill")
            .arg("-TERM")
            .arg(pid.to_string())
            .status()
            .unwrap();
        tokio::time::timeout(within, self.child.wait())
            .await
            .unwrap_or_else(|_| panic!("it did not end within {within:?} of SIGTERM"))
            .unwrap()
            .code()
            .unwrap_or(-1)
    }

    /// Its exit code, within a bound; its output goes on being read.
    pub async fn ended(&mut self, within: Duration) -> i32 {
        tokio::time::timeout(within, async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                self.seen.push(line);
            }
            self.child.wait().await.unwrap().code().unwrap_or(-1)
        })
        .await
        .unwrap_or_else(|_| panic!("it did not end within {within:?}; it said {:#?}", self.seen))
    }
}

/// The address of a deployed service that stands in a text, without a slash at its end.
pub fn address_in(text: &str) -> Option<String> {
    let at = text.find("http://127.0.0.1:")?;
    let url: String = text[at..]
        .chars()
        .take_while(|c| !c.is_whitespace() && !"<\"')".contains(*c))
        .collect();
    Some(url.trim_end_matches('/').to_owned())
}

/// The answer of a service, if it gives one.
pub async fn ask(url: &str) -> Result<(u16, String), reqwest::Error> {
    // Whichever test of a process is first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_mins(1))
        .build()?;
    let answer = client.get(url).send().await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

/// The answer of a service: status and body.
pub async fn get(url: &str) -> (u16, String) {
    ask(url)
        .await
        .unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Tries until it holds, within a bound.
pub async fn eventually<F, Fut, T>(what: &str, within: Duration, mut attempt: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let until = tokio::time::Instant::now() + within;
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(
            tokio::time::Instant::now() < until,
            "not within {within:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
