//! What can be watched: spans of everything that happens for a project reach a collector, joined by trace and by ids, and log
//! lines are JSON that carries the same ids. Neither holds a secret, a prompt or what a person wrote.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1 as otlp;
use prost::Message;
use serde_json::Value;
use support::Home;

const TAPE: &str = include_str!("support/tiny.yaml");
/// The key of a model endpoint, which the configuration knows and a worker prints.
const KEY: &str = "sk-canary-0123456789abcdef";
/// A word of a person.
const SAID: &str = "canary-of-a-person";
/// A word of a model, which goes into prompts as well.
const ANSWERED: &str = "canary-of-a-model";

/// A collector that keeps what it is sent, as it was sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Bytes>>>);

impl Collector {
    async fn start() -> (Self, String) {
        async fn take(State(collector): State<Collector>, body: Bytes) -> StatusCode {
            collector.0.lock().unwrap().push(body);
            StatusCode::OK
        }
        let collector = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new()
            .route("/v1/traces", axum::routing::post(take))
            .with_state(collector.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (collector, address)
    }

    fn spans(&self) -> Spans {
        let bodies = self.0.lock().unwrap();
        let spans = bodies
            .iter()
            .map(|body| ExportTraceServiceRequest::decode(body.clone()).unwrap())
            .flat_map(|request| request.resource_spans)
            .flat_map(|of_resource| of_resource.scope_spans)
            .flat_map(|of_scope| of_scope.spans)
            .map(|span| Span {
                fields: fields(&span.attributes),
                span,
            })
            .collect();
        Spans(spans)
    }

    /// Whether a text stands anywhere in what was sent.
    fn holds(&self, text: &str) -> bool {
        let bodies = self.0.lock().unwrap();
        bodies
            .iter()
            .any(|body| body.windows(text.len()).any(|part| part == text.as_bytes()))
    }
}

fn fields(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    attributes
        .iter()
        .map(|attribute| {
            let value = attribute.value.clone().and_then(|value| value.value);
            let text = match value {
                Some(any_value::Value::StringValue(text)) => text,
                Some(any_value::Value::IntValue(number)) => number.to_string(),
                other => format!("{other:?}"),
            };
            (attribute.key.clone(), text)
        })
        .collect()
}

#[derive(Clone, Debug)]
struct Span {
    span: otlp::Span,
    fields: BTreeMap<String, String>,
}

impl Span {
    fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

struct Spans(Vec<Span>);

impl Spans {
    fn all<'a, 'b>(&'a self, name: &'b str) -> impl Iterator<Item = &'a Span> + use<'a, 'b> {
        self.0.iter().filter(move |span| span.span.name == name)
    }

    #[track_caller]
    fn find(&self, name: &str, fields: &[(&str, &str)]) -> &Span {
        let found = self.all(name).find(|span| {
            fields
                .iter()
                .all(|(field, value)| span.field(field) == *value)
        });
        found.unwrap_or_else(|| {
            let all: Vec<_> = self.all(name).map(|span| &span.fields).collect();
            let names: BTreeSet<_> = self.0.iter().map(|span| &span.span.name).collect();
            panic!("no span {name} with {fields:?} among {all:#?}; there are {names:?}")
        })
    }

    /// Whether something was said in a span of this name.
    #[track_caller]
    fn event(&self, name: &str, said: &str, with: &[(&str, &str)]) {
        let found = self
            .all(name)
            .flat_map(|span| &span.span.events)
            .any(|event| {
                let fields = fields(&event.attributes);
                event.name == said
                    && with
                        .iter()
                        .all(|(field, value)| fields.get(*field).is_some_and(|text| text == value))
            });
        assert!(found, "{said:?} with {with:?} was said in no span {name}");
    }

    /// The span and those around it, innermost first, as far as they were sent.
    fn around<'a>(&'a self, span: &'a Span) -> Vec<&'a Span> {
        let mut around = vec![span];
        while let Some(parent) = around.last().and_then(|last| {
            self.0
                .iter()
                .find(|span| span.span.span_id == last.span.parent_span_id)
        }) {
            around.push(parent);
        }
        around
    }

    fn names_around<'a>(&'a self, span: &'a Span) -> Vec<&'a str> {
        let around = self.around(span);
        around.iter().map(|span| span.span.name.as_str()).collect()
    }
}

fn playing(tape: &str) -> Home {
    let mut home = Home::new();
    std::fs::write(home.file("tape.yaml"), tape).unwrap();
    let file = home.file("tape.yaml").display().to_string();
    home.set("ARTEL_TAPE", &file);
    home
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_that_happens_for_a_project_is_a_span_and_a_job_is_one_trace() {
    let (collector, address) = Collector::start().await;
    // The worker prints the key, and the model's words are in prompts, commits and reviews.
    let tape = TAPE
        .replace("git log --oneline", &format!("echo {KEY} {ANSWERED}"))
        .replace("It says the wrong thing", ANSWERED)
        .replace("Write hello.txt.", &format!("Write hello.txt. {ANSWERED}"));
    assert!(
        tape.matches(ANSWERED).count() > 3,
        "the tape is not what this test knows"
    );
    let mut home = playing(&tape);
    home.set("OTEL_EXPORTER_OTLP_ENDPOINT", &address);
    home.set("OPENAI_API_KEY", KEY);
    // What is exported does not depend on what is logged; both are as they come.
    home.set("RUST_LOG", "");
    home.set("ARTEL_LOG", "json");
    let mut up = home.start(&["up"]);
    up.line("it is up", Duration::from_secs(20), |line| {
        line.contains("is up on")
    })
    .await;
    let wish = format!("Say hello, {SAID} {KEY}");
    let ran = home.run(&["new", &wish, "--yes", "--json"]).await.success();
    assert_eq!(up.terminate(Duration::from_mins(2)).await, 0);
    let log = std::fs::read_to_string(home.file("test-stderr.log")).unwrap();
    let project = ran.end()["project"].as_str().unwrap().to_owned();
    let job = format!("{project}/job-1");
    let task = format!("{job}/world");
    let spans = collector.spans();

    // The engine: runs of all three kinds of threads, with what is in them.
    for thread in [&project, &job, &task] {
        spans.find("run", &[("thread", thread)]);
        spans.find("superstep", &[("thread", thread)]);
        spans.find("db", &[("thread", thread), ("operation", "commit")]);
    }
    let asked = spans.find(
        "step",
        &[("thread", &task), ("node", "reviewer"), ("name", "review")],
    );
    assert_eq!(
        spans.names_around(asked),
        ["step", "node", "superstep", "run"]
    );

    // A model call of the crew's own is part of its node, and names the thread as the engine does.
    let call = spans.find("model_call", &[("role", "architect"), ("thread", &job)]);
    assert_eq!(call.field("project"), project);
    assert_eq!(call.field("job"), "job-1");
    assert!(!call.field("input_tokens").is_empty(), "{:?}", call.fields);
    assert_eq!(
        spans.names_around(call),
        ["model_call", "step", "node", "superstep", "run"]
    );

    // The queue carries the developer's trace to the worker.
    let worker = spans.find(
        "worker",
        &[("project", &project), ("task", "world"), ("attempt", "1")],
    );
    assert_eq!(worker.field("job"), "job-1");
    let around = spans.names_around(worker);
    assert_eq!(around, ["worker", "node", "superstep", "run"]);
    let developer = spans.around(worker)[1];
    assert_eq!(
        (developer.field("node"), developer.field("thread")),
        ("developer", task.as_str())
    );
    assert_eq!(worker.span.trace_id, developer.span.trace_id);
    let request = worker.field("request");
    for step in ["clone", "run", "push"] {
        let step = spans.find("worker_step", &[("request", request), ("step", step)]);
        assert_eq!(step.span.parent_span_id, worker.span.span_id);
    }
    // What the worker asks a model for is part of the worker; what Git does for it too.
    let call = spans.find("model_call", &[("request", request)]);
    assert_eq!(call.span.parent_span_id, worker.span.span_id);
    assert_eq!(call.field("thread"), task);
    assert!(
        spans
            .all("git")
            .any(|git| spans.names_around(git).contains(&"worker"))
    );

    // Checks and deploys are errands; code hosting is part of the nodes that ask for it.
    let checks = spans.find("run_checks", &[("project", &project)]);
    assert_eq!(spans.names_around(checks), ["run_checks", "errand"]);
    let deploy = spans.find("deploy", &[("project", &project)]);
    assert_eq!(spans.names_around(deploy), ["deploy", "errand"]);
    for step in ["unpack", "start", "check", "switch", "check live"] {
        let step = spans.find("deploy_step", &[("project", &project), ("step", step)]);
        assert!(spans.names_around(step).contains(&"deploy"));
    }
    let merge = spans.find("merge", &[("project", &project)]);
    assert!(spans.names_around(merge).contains(&"node"));
    let git = spans
        .all("git")
        .find(|git| spans.names_around(git).contains(&"merge"));
    assert!(!git.expect("merging runs Git").field("command").is_empty());

    // All of it is one trace, over every sleep and every queue; the conversation's runs are traces of their own.
    let trace = |name: &str, thread: &str| {
        let all = spans
            .all(name)
            .filter(|span| span.field("thread") == thread);
        all.map(|span| span.span.trace_id.clone())
            .collect::<BTreeSet<_>>()
    };
    let of_job = trace("run", &job);
    assert_eq!(of_job.len(), 1);
    assert!(
        spans
            .all("run")
            .filter(|run| run.field("thread") == job)
            .count()
            > 2
    );
    assert_eq!(trace("run", &task), of_job);
    assert_eq!(trace("errand", &task), of_job);
    assert_eq!(trace("errand", &job), of_job);
    assert!(of_job.contains(&worker.span.trace_id));
    assert!(trace("run", &project).is_disjoint(&of_job));
    // The message, the turn that took it up and the job that came of it are joined by its key.
    let message = spans.find("message", &[("thread", &project)]);
    let key = message.field("key");
    assert!(!key.is_empty());
    spans.event("node", "taken up", &[("key", key), ("kind", "message")]);
    spans.event(
        "node",
        "a job is started",
        &[("project", &project), ("job", "job-1")],
    );
    // What is looked for every second is no trace.
    for db in spans.all("db") {
        assert!(!db.span.parent_span_id.is_empty(), "{:?}", db.fields);
    }

    // Nothing that is not to leave has left.
    assert!(
        collector.holds(&task),
        "the canaries are sought where the ids are found"
    );
    for canary in [KEY, SAID, ANSWERED] {
        assert!(!collector.holds(canary), "{canary} was exported");
        assert!(!log.contains(canary), "{canary} was logged");
    }

    // The log is JSON, line by line, and carries the ids.
    let mut logged = BTreeSet::new();
    for line in log.lines() {
        let line: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(
            line["level"].is_string() && line["timestamp"].is_string(),
            "{line}"
        );
        for span in line["spans"].as_array().into_iter().flatten() {
            if span["name"] == "worker" {
                logged.insert(span["request"].as_str().unwrap().to_owned());
                assert_eq!(span["project"], project.as_str());
            }
        }
    }
    assert!(logged.contains(request), "{logged:?}\n{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_is_said_once_and_holds_up_nothing() {
    // A port that nobody listens on.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let mut home = playing(TAPE);
    home.set("OTEL_EXPORTER_OTLP_ENDPOINT", &address);
    home.set("RUST_LOG", "info");
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .success();
    let complaints: Vec<&str> = ran
        .stderr
        .lines()
        .filter(|line| line.contains("collector") || line.contains("opentelemetry"))
        .collect();
    assert_eq!(complaints.len(), 1, "{complaints:#?}");
    assert!(
        complaints[0].contains("OTEL_EXPORTER_OTLP_ENDPOINT"),
        "{complaints:?}"
    );
}
