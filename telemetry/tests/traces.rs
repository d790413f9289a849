//! Spans on their way to a collector, over HTTP.
#![allow(missing_docs)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use telemetry::{Options, Output};
use tracing::{info, info_span};

type Received = Arc<Mutex<Vec<ExportTraceServiceRequest>>>;

/// A collector that keeps what it is sent.
async fn collector() -> (String, Received) {
    async fn take(State(received): State<Received>, headers: HeaderMap, body: Bytes) -> StatusCode {
        assert_eq!(headers["content-type"], "application/x-protobuf");
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        received.lock().unwrap().push(request);
        StatusCode::OK
    }
    let received = Received::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let app = axum::Router::new()
        .route("/v1/traces", axum::routing::post(take))
        .with_state(received.clone());
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (endpoint, received)
}

fn options(endpoint: &str) -> Options {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Options {
        output: Output::Writer(Arc::new(Mutex::new(Vec::new()))),
        otlp_endpoint: Some(endpoint.to_owned()),
        redact: Arc::new(|text| text.replace("canary", "(redacted)")),
        ..Options::new("artel-test")
    }
}

fn spans(received: &Received) -> Vec<Span> {
    let received = received.lock().unwrap();
    received
        .iter()
        .flat_map(|request| &request.resource_spans)
        .flat_map(|of_resource| &of_resource.scope_spans)
        .flat_map(|of_scope| of_scope.spans.clone())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_on_where_its_context_is_carried() {
    let (endpoint, received) = collector().await;
    let (dispatch, guard) = telemetry::build(&options(&endpoint)).unwrap();
    assert!(guard.exports());
    let mut carried = String::new();
    tracing::dispatcher::with_default(&dispatch, || {
        {
            let asked = info_span!("ask", project = "p1", note = "a canary");
            let _entered = asked.enter();
            carried = telemetry::current_traceparent().unwrap();
            info!(what = "the canary again", "an event");
        }
        // As another process would: only the text is left.
        let worked = info_span!("work");
        assert!(telemetry::set_parent(&worked, &carried));
        worked.in_scope(|| info_span!("inner").in_scope(|| ()));
        drop(worked);

        let alone = info_span!("alone");
        assert!(!telemetry::set_parent(&alone, "00-nonsense"));
        alone.in_scope(|| ());
        tracing::debug_span!("detail").in_scope(|| ());
    });
    // The guard blocks while it flushes, as it would at the end of a program.
    let before = Instant::now();
    tokio::task::spawn_blocking(move || drop(guard))
        .await
        .unwrap();
    assert!(before.elapsed() < Duration::from_secs(30));

    let spans = spans(&received);
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let (ask, work, inner) = (named("ask"), named("work"), named("inner"));
    assert_eq!(spans.len(), 4, "{spans:?}");
    assert_eq!(
        carried,
        format!("00-{}-{}-01", hex(&ask.trace_id), hex(&ask.span_id))
    );
    assert_eq!(work.parent_span_id, ask.span_id);
    assert_eq!(
        (&work.trace_id, &inner.trace_id),
        (&ask.trace_id, &ask.trace_id)
    );
    assert_eq!(inner.parent_span_id, work.span_id);
    assert_ne!(named("alone").trace_id, ask.trace_id);

    let note = ask
        .attributes
        .iter()
        .find(|attribute| attribute.key == "note");
    let note = note.unwrap().value.clone().unwrap().value.unwrap();
    assert_eq!(note, Value::StringValue("a (redacted)".to_owned()));
    assert!(!format!("{spans:?}").contains("canary"));
    let resource = format!(
        "{:?}",
        received.lock().unwrap()[0].resource_spans[0].resource
    );
    assert!(resource.contains("artel-test"), "{resource}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_name_is_the_same_trace() {
    let (endpoint, received) = collector().await;
    for name in ["first", "second"] {
        // Each by itself, as two processes would.
        let (dispatch, guard) = telemetry::build(&options(&endpoint)).unwrap();
        tracing::dispatcher::with_default(&dispatch, || {
            let run = info_span!("run", name);
            assert!(telemetry::join_trace(&run, "p/job-1"));
            run.in_scope(|| ());
            let other = info_span!("other");
            assert!(telemetry::join_trace(&other, "p/job-2"));
            other.in_scope(|| ());
        });
        tokio::task::spawn_blocking(move || drop(guard))
            .await
            .unwrap();
    }
    let spans = spans(&received);
    let of = |name: &str| -> Vec<&Span> { spans.iter().filter(|span| span.name == name).collect() };
    let (runs, others) = (of("run"), of("other"));
    assert_eq!((runs.len(), others.len()), (2, 2));
    assert_eq!(runs[0].trace_id, runs[1].trace_id);
    assert_eq!(runs[0].parent_span_id, runs[1].parent_span_id);
    assert_ne!(runs[0].span_id, runs[1].span_id);
    assert_ne!(runs[0].trace_id, others[0].trace_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn details_are_exported_as_parts_of_something_whatever_is_logged() {
    let (endpoint, received) = collector().await;
    let (dispatch, guard) = telemetry::build(&Options {
        filter: Some("error".to_owned()),
        ..options(&endpoint)
    })
    .unwrap();
    tracing::dispatcher::with_default(&dispatch, || {
        // Looking for work, every second.
        tracing::debug_span!(target: "store::db", "idle").in_scope(|| ());
        info_span!("run").in_scope(|| {
            tracing::debug_span!(target: "store::db", "db").in_scope(|| {
                tracing::debug!(target: "store::db", "a detail of a detail");
            });
            tracing::debug_span!(target: "sqlx::query", "theirs").in_scope(|| ());
            tracing::debug_span!(target: "storefront", "not ours").in_scope(|| ());
            info_span!(target: "hyper_util::client", "the exporter's").in_scope(|| ());
        });
    });
    tokio::task::spawn_blocking(move || drop(guard))
        .await
        .unwrap();
    let spans = spans(&received);
    let mut names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["db", "run"]);
    assert!(spans.iter().all(|span| span.events.is_empty()), "{spans:?}");
}

#[test]
fn a_collector_that_is_away_holds_nobody_up_for_long() {
    // A port that accepts and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (dispatch, guard) = telemetry::build(&options(&endpoint)).unwrap();
    tracing::dispatcher::with_default(&dispatch, || info_span!("step").in_scope(|| ()));
    let before = Instant::now();
    drop(guard);
    assert!(before.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn the_guard_flushes_from_a_runtime_with_one_thread() {
    let runtime = tokio::task::spawn_blocking(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    })
    .await
    .unwrap();
    let (endpoint, received) = runtime.spawn(collector()).await.unwrap();
    let (dispatch, guard) = telemetry::build(&options(&endpoint)).unwrap();
    tracing::dispatcher::with_default(&dispatch, || info_span!("last").in_scope(|| ()));
    drop(guard);
    assert_eq!(spans(&received).len(), 1);
    runtime.shutdown_background();
}

#[test]
fn an_address_that_is_none_is_said() {
    let error = telemetry::build(&options("collector:4317")).err().unwrap();
    assert!(
        error.to_string().contains("http://127.0.0.1:4318"),
        "{error}"
    );
}
