//! What homes have left on a shared engine whose spawners never come back. The engine is one of this file, because a real one has
//! no containers that ended a week ago.

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use spawner::docker::Engine;
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::net::UnixListener;

const OURS: &str = "local-ours";

/// A container as an engine tells of it.
struct Told {
    name: &'static str,
    labels: Value,
    /// In the list, and when it is looked at.
    status: (&'static str, &'static str),
    /// When it was made, when it ended, and when its time was over, in days from now.
    days: (i64, i64, i64),
}

fn days(count: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_hours(24 * count)
}

impl Told {
    fn new(
        name: &'static str,
        home: Option<&str>,
        status: &'static str,
        days: (i64, i64, i64),
    ) -> Self {
        let mut labels = json!({"artel.spawner": "another", "artel.part": "agent"});
        if let Some(home) = home {
            labels["artel.home"] = home.into();
        }
        Self {
            name,
            labels,
            status: (status, status),
            days,
        }
    }

    fn labels(&self) -> Value {
        let mut labels = self.labels.clone();
        labels["artel.deadline"] = days(self.days.2).as_second().to_string().into();
        labels
    }

    fn in_list(&self) -> Value {
        json!({
            "Id": self.name, "State": self.status.0, "Labels": self.labels(),
            "Created": days(self.days.0).as_second(),
        })
    }

    fn looked_at(&self) -> Value {
        json!({
            "Id": self.name, "Config": {"Labels": self.labels()},
            "State": {"Status": self.status.1, "FinishedAt": days(self.days.1).to_string()},
        })
    }
}

/// An engine that has these, and writes down what it was asked to remove, and how.
async fn engine(folder: &Path, all: Vec<Told>) -> (Engine, Arc<Mutex<Vec<String>>>) {
    let socket = folder.join("docker.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let removed = Arc::<Mutex<Vec<String>>>::default();
    let (all, written) = (Arc::new(all), Arc::clone(&removed));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (all, written) = (Arc::clone(&all), Arc::clone(&written));
            let service = service_fn(move |request| {
                let answer = answer(&all, &written, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let served = hyper::server::conn::http1::Builder::new();
            tokio::spawn(served.serve_connection(TokioIo::new(stream), service));
        }
    });
    let host = format!("unix://{}", socket.display());
    (Engine::connect(Some(&host), "runc").await.unwrap(), removed)
}

fn answer<B>(
    all: &[Told],
    removed: &Mutex<Vec<String>>,
    request: &Request<B>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    // Behind the version.
    let path = path.find("/containers/").map_or(path, |at| &path[at..]);
    let body = match (request.method(), path) {
        (&Method::DELETE, path) => {
            let query = request.uri().query().unwrap_or_default();
            let name = path.trim_start_matches("/containers/");
            removed.lock().unwrap().push(format!("{name}?{query}"));
            let runs = all
                .iter()
                .any(|told| told.name == name && told.status.1 == "running");
            let status = if runs {
                StatusCode::CONFLICT
            } else {
                StatusCode::NO_CONTENT
            };
            let answer = Response::builder().status(status);
            return answer.body(Full::default()).unwrap();
        }
        (_, "/containers/json") => all.iter().map(Told::in_list).collect(),
        (_, path) if path.starts_with("/containers/") => {
            let told = all
                .iter()
                .find(|told| path.contains(&format!("/{}/", told.name)));
            told.unwrap().looked_at()
        }
        (_, path) if path.ends_with("/info") => json!({"Runtimes": {"runc": {"path": "runc"}}}),
        _ => json!({"ApiVersion": "1.44", "Version": "0"}),
    };
    let answer = Response::builder().header("content-type", "application/json");
    answer.body(Full::from(body.to_string())).unwrap()
}

#[tokio::test]
async fn what_another_home_has_left_for_a_week_is_removed_and_nothing_that_runs_or_is_younger() {
    let other = Some("local-other");
    let long_ago = (-9, -8, -8);
    let mut begun_again = Told::new("begun-again", other, "exited", long_ago);
    begun_again.status.1 = "running";
    let mut nobodys = Told::new("nobodys", None, "exited", long_ago);
    nobodys.labels = json!({"com.example.artel": "yes"});
    let all = vec![
        Told::new("over", other, "exited", long_ago),
        Told::new("dead", other, "dead", long_ago),
        // It never ran, and ended when there was no calendar.
        Told::new("never-begun", other, "created", (-8, -700_000, -8)),
        Told::new("just-over", other, "exited", (-9, -6, -8)),
        Told::new("has-time", other, "exited", (-9, -8, -6)),
        Told::new("just-made", other, "created", (-6, -700_000, -8)),
        Told::new("runs", other, "running", (-30, -700_000, -20)),
        Told::new("paused", other, "paused", (-30, -700_000, -20)),
        Told::new("ours", Some(OURS), "exited", long_ago),
        // Of a former version, which did not say whose home it is.
        Told::new("older", None, "exited", long_ago),
        begun_again,
        nobodys,
    ];
    let folder = tempfile::tempdir().unwrap();
    let (engine, removed) = engine(folder.path(), all).await;
    assert_eq!(engine.remove_abandoned(OURS).await.unwrap(), 3);
    let removed = removed.lock().unwrap();
    let names: Vec<&str> = removed
        .iter()
        .map(|call| call.split('?').next().unwrap())
        .collect();
    assert_eq!(names, ["over", "dead", "never-begun"]);
    assert!(
        removed.iter().all(|call| !call.contains("force=true")),
        "{removed:?}"
    );
}
