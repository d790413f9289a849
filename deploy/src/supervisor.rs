//! The process that keeps a project's service alive and owns its public port.
//!
//! It is started detached by the deployer, one per project (a locked file says so), and knows only
//! what it is told through its socket. Its arguments:
//! `--home DIR --project ID --port PORT --launcher PROGRAM [--launcher-arg WORD]… [--unconfined]`

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ports::ProjectId;
use rustix::fs::{FlockOperation, flock};
use sandbox::{Sandbox, Unconfined};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

use crate::control::{LINE_BYTES, Order, Reply, Status};
use crate::layout::{Layout, replace};
use crate::service::{Ground, Service};

/// Connections from outside at once; more wait in the listener's queue.
const CONNECTIONS: usize = 512;
/// How long a connection waits for a release that is being started again.
const PATIENCE: Duration = Duration::from_secs(3);
/// Somebody else has the port.
pub(crate) const EXIT_PORT_TAKEN: u8 = 3;
/// Another supervisor of the project is alive.
pub(crate) const EXIT_ALREADY: u8 = 4;

/// Why a supervisor ends.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0} is missing or not understood")]
    Argument(&'static str),
    #[error("the project's folder cannot be used: {0}")]
    Layout(#[source] ports::Failure),
    #[error("another supervisor of this project is alive")]
    Already,
    #[error("port {0} on 127.0.0.1 is used by another program")]
    PortTaken(u16),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Unavailable),
    #[error("{doing} failed")]
    System {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Who supervises: `supervisor.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub pid: u32,
    /// When the process started, in the kernel's ticks since boot: a process id is given anew.
    pub start_ticks: u64,
    pub port: u16,
}

/// The body of the hidden subcommand that supervises; `args` are those behind it. Returns when it
/// was told to end.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // A session of its own: a terminal that is closed does not reach it.
    let _ = rustix::process::setsid();
    let ended = Arguments::parse(args).and_then(|arguments| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed("starting"))?;
        runtime.block_on(supervise(arguments))
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("supervisor: {error}{}", cause.unwrap_or_default());
            ExitCode::from(match error {
                Error::PortTaken(_) => EXIT_PORT_TAKEN,
                Error::Already => EXIT_ALREADY,
                _ => 1,
            })
        }
    }
}

#[derive(Debug)]
struct Arguments {
    home: PathBuf,
    project: ProjectId,
    port: u16,
    launcher: PathBuf,
    launcher_args: Vec<String>,
    unconfined: bool,
}

impl Arguments {
    fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let (mut home, mut project, mut port, mut launcher) = (None, None, None, None);
        let (mut launcher_args, mut unconfined) = (Vec::new(), false);
        let mut args = args.into_iter();
        while let Some(flag) = args.next() {
            if flag == "--unconfined" {
                unconfined = true;
                continue;
            }
            let value = args.next().ok_or(Error::Argument("a value"))?;
            let text = value.to_string_lossy().into_owned();
            match flag.to_str() {
                Some("--home") => home = Some(PathBuf::from(value)),
                Some("--project") => project = Some(ProjectId::new(text)),
                Some("--port") => port = text.parse().ok(),
                Some("--launcher") => launcher = Some(PathBuf::from(value)),
                Some("--launcher-arg") => launcher_args.push(text),
                _ => return Err(Error::Argument("an argument")),
            }
        }
        Ok(Self {
            home: home.ok_or(Error::Argument("--home"))?,
            project: project.ok_or(Error::Argument("--project"))?,
            port: port.ok_or(Error::Argument("--port"))?,
            launcher: launcher.ok_or(Error::Argument("--launcher"))?,
            launcher_args,
            unconfined,
        })
    }
}

async fn supervise(arguments: Arguments) -> Result<(), Error> {
    let layout = Layout::new(&arguments.home, &arguments.project).map_err(Error::Layout)?;
    let _only = only_one(&layout)?;
    let sandbox = if arguments.unconfined {
        Sandbox::unconfined(Unconfined::ShippedTape)
    } else {
        Sandbox::detect()?
    };
    let (live, lives) = watch::channel(None);
    let (end, mut ends) = mpsc::channel(1);
    let supervisor = Arc::new(Supervisor {
        ground: Ground {
            layout: layout.clone(),
            sandbox,
            launcher: arguments.launcher,
            launcher_args: arguments.launcher_args,
        },
        inner: Mutex::new(Inner {
            services: BTreeMap::new(),
            listeners: BTreeMap::new(),
        }),
        live,
        lives,
        end,
    });
    supervisor.listen(arguments.port).await?;
    let identity = Identity {
        pid: std::process::id(),
        start_ticks: start_ticks(std::process::id()).unwrap_or(0),
        port: arguments.port,
    };
    let text = serde_json::to_vec(&identity).unwrap_or_default();
    replace(&layout.supervisor(), &text).map_err(failed("writing supervisor.json"))?;
    // Last, because whoever can speak to it may rely on all of the above.
    let control =
        sandbox::relay::listen(&layout.control()).map_err(failed("opening the control socket"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("waiting for signals"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed("waiting for signals"))?;
    let speakers = Arc::new(Semaphore::new(16));
    loop {
        tokio::select! {
            accepted = control.accept() => {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let (supervisor, speakers) = (Arc::clone(&supervisor), Arc::clone(&speakers));
                tokio::spawn(async move {
                    let _place = speakers.acquire_owned().await;
                    let talk = supervisor.converse(stream);
                    let _ = tokio::time::timeout(Duration::from_secs(30), talk).await;
                });
            }
            _ = ends.recv() => break,
            _ = terminate.recv() => break,
            _ = hangup.recv() => {}
        }
    }
    supervisor.end_everything().await;
    let _ = std::fs::remove_file(layout.control());
    let _ = std::fs::remove_file(layout.supervisor());
    Ok(())
}

struct Supervisor {
    ground: Ground,
    inner: Mutex<Inner>,
    live: watch::Sender<Option<Live>>,
    lives: watch::Receiver<Option<Live>>,
    end: mpsc::Sender<()>,
}

/// The release that answers.
#[derive(Clone)]
struct Live {
    number: u64,
    /// Every connection to it holds a copy.
    connections: Arc<()>,
}

struct Inner {
    services: BTreeMap<u64, Service>,
    listeners: BTreeMap<u16, JoinHandle<()>>,
}

impl Supervisor {
    async fn converse(&self, mut stream: UnixStream) {
        let (reading, mut writing) = stream.split();
        let mut line = Zeroizing::new(Vec::new());
        let read = BufReader::new(reading)
            .take(LINE_BYTES)
            .read_until(b'\n', &mut line)
            .await;
        if read.is_err() || line.is_empty() {
            return;
        }
        let (reply, last) = match serde_json::from_slice::<Order>(&line) {
            Ok(order) => {
                let last = matches!(order, Order::Shutdown);
                (self.carry_out(order).await, last)
            }
            Err(error) => {
                let message = format!("the order is not understood: {error}");
                (Err(("supervisor", message)), false)
            }
        };
        let reply = match reply {
            Ok(()) => Reply::Done(self.status().await),
            Err((kind, message)) => Reply::Refused {
                kind: kind.to_owned(),
                message,
            },
        };
        let mut text = serde_json::to_vec(&reply).unwrap_or_default();
        text.push(b'\n');
        let _ = writing.write_all(&text).await;
        let _ = writing.shutdown().await;
        if last {
            let _ = self.end.try_send(());
        }
    }

    async fn carry_out(&self, order: Order) -> Result<(), (&'static str, String)> {
        match order {
            Order::Status => Ok(()),
            Order::Listen { port } => self.listen(port).await.map_err(|error| refusal(&error)),
            Order::Run(start) => {
                let mut inner = self.inner.lock().await;
                let number = start.release;
                let failed = inner
                    .services
                    .get(&number)
                    .is_some_and(|service| service.status().phase == crate::control::Phase::Failed);
                if failed && let Some(old) = inner.services.remove(&number) {
                    old.end().await;
                }
                inner
                    .services
                    .entry(number)
                    .or_insert_with(|| Service::start(self.ground.clone(), start));
                Ok(())
            }
            Order::Switch { release, port } => {
                self.listen(port).await.map_err(|error| refusal(&error))?;
                let mut inner = self.inner.lock().await;
                let Some(service) = inner.services.get(&release) else {
                    let message = format!("release {release} is not running");
                    return Err(("not_running", message));
                };
                service.keep_alive();
                self.live.send_if_modified(|live| {
                    let changes = live.as_ref().is_none_or(|live| live.number != release);
                    if changes {
                        *live = Some(Live {
                            number: release,
                            connections: service.connections(),
                        });
                    }
                    changes
                });
                inner.listeners.retain(|open, task| {
                    let keep = *open == port;
                    if !keep {
                        task.abort();
                    }
                    keep
                });
                Ok(())
            }
            Order::Retire { release } => {
                let service = self.inner.lock().await.services.remove(&release);
                self.live.send_if_modified(|live| {
                    let was = live.as_ref().is_some_and(|live| live.number == release);
                    if was {
                        *live = None;
                    }
                    was
                });
                if let Some(service) = service {
                    service.let_go().await;
                    service.end().await;
                }
                Ok(())
            }
            Order::Shutdown => {
                self.end_everything().await;
                Ok(())
            }
        }
    }

    async fn status(&self) -> Status {
        let inner = self.inner.lock().await;
        Status {
            pid: std::process::id(),
            live: self.lives.borrow().as_ref().map(|live| live.number),
            ports: inner.listeners.keys().copied().collect(),
            releases: inner.services.values().map(Service::status).collect(),
        }
    }

    async fn listen(&self, port: u16) -> Result<(), Error> {
        let mut inner = self.inner.lock().await;
        if inner.listeners.contains_key(&port) {
            return Ok(());
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::AddrInUse => Error::PortTaken(port),
                _ => failed("opening the public port")(error),
            })?;
        let carrying = carry_all(listener, self.lives.clone(), self.ground.layout.clone());
        inner.listeners.insert(port, tokio::spawn(carrying));
        Ok(())
    }

    async fn end_everything(&self) {
        let mut inner = self.inner.lock().await;
        for (_, task) in std::mem::take(&mut inner.listeners) {
            task.abort();
        }
        self.live.send_replace(None);
        let ending = std::mem::take(&mut inner.services)
            .into_values()
            .map(|service| tokio::spawn(service.end()));
        for ended in ending.collect::<Vec<_>>() {
            let _ = ended.await;
        }
    }
}

/// Carries each connection to the door of the release that is live at that moment.
async fn carry_all(listener: TcpListener, lives: watch::Receiver<Option<Live>>, layout: Layout) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (lives, layout) = (lives.clone(), layout.clone());
        tokio::spawn(async move {
            match door(lives, &layout).await {
                Some((door, held)) => {
                    sandbox::relay::carry(stream, door).await;
                    drop(held.connections);
                }
                None => sorry(stream).await,
            }
            drop(place);
        });
    }
}

/// The live release's door; a short time is given to one that is being started.
async fn door(lives: watch::Receiver<Option<Live>>, layout: &Layout) -> Option<(UnixStream, Live)> {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        let live = lives.borrow().clone()?;
        if let Ok(stream) = sandbox::relay::connect(&layout.door(live.number)).await {
            return Some((stream, live));
        }
        if tokio::time::Instant::now() > until {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn sorry(mut stream: TcpStream) {
    const TEXT: &str = "This service is not running at the moment.\n";
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{TEXT}",
        TEXT.len()
    );
    let (mut reading, mut writing) = stream.split();
    let _ = writing.write_all(answer.as_bytes()).await;
    let _ = writing.shutdown().await;
    // What was asked is read, within bounds: a connection closed on unread bytes loses the answer.
    let mut scrap = vec![0; 16 * 1024];
    let reading = async { while matches!(reading.read(&mut scrap).await, Ok(1..)) {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), reading).await;
}

/// Locks the file that says that the project has a supervisor; the kernel unlocks it when the
/// process ends, however it ends.
fn only_one(layout: &Layout) -> Result<File, Error> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(layout.supervisor_lock())
        .map_err(failed("opening supervisor.lock"))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::Already)?;
    Ok(file)
}

/// When a process started, in the kernel's ticks since boot.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &stat[stat.rfind(')')? + 1..];
    rest.split_whitespace().nth(19)?.parse().ok()
}

fn refusal(error: &Error) -> (&'static str, String) {
    match error {
        Error::PortTaken(_) => ("port_taken", error.to_string()),
        _ => ("supervisor", error.to_string()),
    }
}

fn failed(doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::System { doing, source }
}
