//! A code host on loopback: `git http-backend` behind HTTP with a password, which writes down who came with what; with GitHub's API
//! beside it.

use crate::github::{self, GitHub};
use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::process::Command;

/// What the host is like today.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It serves whoever has the password.
    Fine,
    /// It accepts and never answers.
    Silent,
    /// It always answers this.
    Answers(u16),
    /// It sends everybody elsewhere.
    Redirects(String),
    /// It serves, but takes no push.
    ReadOnly,
}

/// One request, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Visit {
    pub path: String,
    /// The password of basic authentication, if there was one.
    pub password: Option<String>,
}

pub struct GitHost {
    pub url: String,
    pub github: Arc<GitHub>,
    state: Arc<State>,
}

struct State {
    root: PathBuf,
    github: Arc<GitHub>,
    password: Mutex<String>,
    /// Whether the newest token of the API is the password.
    believes_github: AtomicBool,
    mood: Mutex<Mood>,
    visits: Mutex<Vec<Visit>>,
    /// Command lines of processes that held the password while a request was served.
    seen_in_arguments: Mutex<Vec<String>>,
}

impl GitHost {
    /// Serves the repositories in a folder.
    pub async fn start(root: &Path, password: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            root: root.to_owned(),
            github: Arc::default(),
            believes_github: AtomicBool::new(false),
            password: Mutex::new(password.to_owned()),
            mood: Mutex::new(Mood::Fine),
            visits: Mutex::default(),
            seen_in_arguments: Mutex::default(),
        });
        let served = Arc::clone(&state);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&served);
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&state), request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        let github = Arc::clone(&state.github);
        Self { url, github, state }
    }

    /// From now on the newest token that the API gave is the password, until another one is set.
    pub fn believes_github(&self) {
        self.state.believes_github.store(true, Ordering::SeqCst);
    }

    pub fn set_mood(&self, mood: Mood) {
        *self.state.mood.lock().unwrap() = mood;
    }

    pub fn set_password(&self, password: &str) {
        self.state.believes_github.store(false, Ordering::SeqCst);
        password.clone_into(&mut self.state.password.lock().unwrap());
    }

    pub fn visits(&self) -> Vec<Visit> {
        self.state.visits.lock().unwrap().clone()
    }

    pub fn seen_in_arguments(&self) -> Vec<String> {
        self.state.seen_in_arguments.lock().unwrap().clone()
    }
}

fn plain(status: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

async fn answer(
    state: Arc<State>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
    if request.uri().path().starts_with(github::API) {
        return Ok(state.github.answer(request).await);
    }
    let login = request.headers().get(AUTHORIZATION).map(|value| {
        let text = value.to_str().unwrap().strip_prefix("Basic ").unwrap();
        let bytes = base64::engine::general_purpose::STANDARD.decode(text);
        String::from_utf8(bytes.unwrap()).unwrap()
    });
    let password = login
        .as_deref()
        .and_then(|login| Some(login.split_once(':')?.1.to_owned()));
    let path = request.uri().path().to_owned();
    state.visits.lock().unwrap().push(Visit {
        path: path.clone(),
        password: password.clone(),
    });
    let wanted = match state.github.minted().pop() {
        Some(token) if state.believes_github.load(Ordering::SeqCst) => token,
        _ => state.password.lock().unwrap().clone(),
    };
    look_at_arguments(&state, &wanted);
    let mood = state.mood.lock().unwrap().clone();
    match &mood {
        Mood::Silent => std::future::pending().await,
        Mood::Answers(status) => return Ok(plain(*status)),
        Mood::Redirects(to) => {
            let mut response = plain(302);
            let target = request.uri().path_and_query().unwrap();
            let to = format!("{to}{target}").parse().unwrap();
            response.headers_mut().insert(LOCATION, to);
            return Ok(response);
        }
        Mood::Fine | Mood::ReadOnly => {}
    }
    let pushes = request.uri().to_string().contains("git-receive-pack");
    if mood == Mood::ReadOnly && pushes {
        return Ok(plain(403));
    }
    if password.as_deref() != Some(wanted.as_str()) {
        let mut response = plain(401);
        let realm = "Basic realm=\"git\"".parse().unwrap();
        response.headers_mut().insert(WWW_AUTHENTICATE, realm);
        return Ok(response);
    }
    Ok(serve(&state, request).await)
}

/// The program that asks still runs while it is served: its arguments can be read.
fn look_at_arguments(state: &State, password: &str) {
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(password) {
            state.seen_in_arguments.lock().unwrap().push(line);
        }
    }
}

async fn serve(state: &State, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let header = |name: &str| {
        let value = request.headers().get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", &state.root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_COUNT", "2")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        // Code hosts give any commit that they still have.
        .env("GIT_CONFIG_KEY_1", "uploadpack.allowAnySHA1InWant")
        .env("GIT_CONFIG_VALUE_1", "true")
        .env("REMOTE_USER", "artel")
        .env("REMOTE_ADDR", "127.0.0.1")
        .env("REQUEST_METHOD", request.method().as_str())
        .env("PATH_INFO", request.uri().path())
        .env("QUERY_STRING", request.uri().query().unwrap_or_default())
        .env(
            "CONTENT_TYPE",
            header(CONTENT_TYPE.as_str()).unwrap_or_default(),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if let Some(encoding) = header(CONTENT_ENCODING.as_str()) {
        command.env("HTTP_CONTENT_ENCODING", encoding);
    }
    if let Some(protocol) = header("git-protocol") {
        command.env("HTTP_GIT_PROTOCOL", protocol);
    }
    let body = request.into_body().collect().await.unwrap().to_bytes();
    command.env("CONTENT_LENGTH", body.len().to_string());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feed = async move {
        let _ = stdin.write_all(&body).await;
    };
    let ((), output) = tokio::join!(feed, child.wait_with_output());
    let output = output.unwrap().stdout;
    let end = output
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap();
    let head = String::from_utf8_lossy(&output[..end]).into_owned();
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(&output[end + 4..])));
    for line in head.lines() {
        let (name, value) = line.split_once(": ").unwrap();
        if name == "Status" {
            let status = value.split(' ').next().unwrap().parse().unwrap();
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
        } else {
            let name: hyper::header::HeaderName = name.parse().unwrap();
            response.headers_mut().insert(name, value.parse().unwrap());
        }
    }
    response
}
