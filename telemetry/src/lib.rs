//! Logs and traces: one call at the start of a process sets everything up.
//!
//! A log line goes to standard error, as JSON or as text; a span goes to an OpenTelemetry collector when an endpoint is given.
//! Both pass a redactor on their way out, in case a secret slips into a message. What logs and spans call the things of the
//! crew is in [`fields`]; how a trace goes on in another process is in [`current_traceparent`], [`set_parent`] and [`join_trace`].
//!
//! Logs follow `RUST_LOG`; what is exported does not depend on it (see [`Options::otlp_endpoint`]).
//!
//! What is never logged: prompts and answers of models, values of secrets, bodies of requests, and what a person wrote.
//!
//! Not here: the record that people read (`store`), and metrics.

pub mod fields;

mod context;
mod export;
mod panics;
mod writer;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Dispatch, Level};
use tracing_subscriber::filter::{DynFilterFn, LevelFilter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer};

pub use context::{current_traceparent, join_trace, set_parent};
use writer::Redacting;

/// Takes secrets out of a text. It is called for every log line and every exported span, on whatever thread writes it,
/// and must not log.
pub type Redact = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    Json,
    /// For people.
    #[default]
    Text,
}

impl Format {
    /// Reads `ARTEL_LOG`: `json` or `text`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "json" => Some(Self::Json),
            "text" => Some(Self::Text),
            _ => None,
        }
    }
}

/// Where log lines go.
#[derive(Clone, Default)]
pub enum Output {
    /// Standard error.
    #[default]
    Stderr,
    /// Anything else: a file, a pane, a test.
    Writer(Arc<Mutex<dyn Write + Send>>),
}

/// What to set up.
#[derive(Clone)]
pub struct Options {
    /// The name of the process in traces, such as `artel`.
    pub service: String,
    /// How log lines look.
    pub format: Format,
    /// What is logged, as in `RUST_LOG`; `None`: warnings of everybody, and our own information.
    pub filter: Option<String>,
    /// Where log lines go.
    pub output: Output,
    /// The collector's address, as in `OTEL_EXPORTER_OTLP_ENDPOINT`, without `/v1/traces`; `None`: no traces.
    ///
    /// Exported is, whatever `filter` says: what is of level info or above; and of our own crates the spans of level debug
    /// (database calls, Git commands) that are part of another span, so that looking for work every second leaves no trace.
    pub otlp_endpoint: Option<String>,
    /// Takes secrets out of what is logged and exported.
    pub redact: Redact,
}

impl Options {
    /// Text on standard error, no traces, nothing redacted.
    pub fn new(service: impl Into<String>) -> Self {
        Self {
            service: service.into(),
            format: Format::Text,
            filter: None,
            output: Output::Stderr,
            otlp_endpoint: None,
            redact: Arc::new(str::to_owned),
        }
    }
}

/// Why telemetry cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter is none.
    #[error(
        "RUST_LOG is {filter:?}, which is not a filter: write one like `info` or `warn,artel=debug`"
    )]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The exporter cannot be made.
    #[error("traces cannot be sent to OTEL_EXPORTER_OTLP_ENDPOINT={endpoint}: {message}")]
    Exporter {
        /// The endpoint.
        endpoint: String,
        /// Why.
        message: String,
    },
    /// Something has set up logging before.
    #[error("logging is already set up in this process")]
    AlreadySet,
}

/// Keeps telemetry going; dropping it sends the last spans, for at most three seconds.
#[must_use = "spans are lost when this is dropped early"]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Guard {
    /// The longest that a process waits at its end for a collector.
    const FLUSH: Duration = Duration::from_secs(3);

    /// Whether spans are exported.
    pub fn exports(&self) -> bool {
        self.provider.is_some()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown_with_timeout(Self::FLUSH)
        {
            tracing::warn!(%error, "the last spans did not reach the collector");
        }
    }
}

/// Sets up logging and tracing of this process, its panics included. Once a process; with `otlp_endpoint`, after rustls'
/// crypto provider is installed.
pub fn init(options: &Options) -> Result<Guard, Error> {
    let (dispatch, guard) = build(options)?;
    tracing::dispatcher::set_global_default(dispatch).map_err(|_| Error::AlreadySet)?;
    panics::log();
    Ok(guard)
}

/// Makes what [`init`] sets up, for a part of a process only.
pub fn build(options: &Options) -> Result<(Dispatch, Guard), Error> {
    let filter = filter(options.filter.as_deref())?;
    let provider = match options.otlp_endpoint.as_deref().map(str::trim) {
        None | Some("") => None,
        Some(endpoint) => Some(export::provider(
            &options.service,
            endpoint,
            options.redact.clone(),
        )?),
    };
    let traces = provider.as_ref().map(|provider| {
        let exported = DynFilterFn::new(|metadata, context| {
            let (level, target) = (*metadata.level(), metadata.target());
            let detail = level == Level::DEBUG
                && metadata.is_span()
                && is_one_of(target, &OURS)
                && context.lookup_current().is_some();
            (level <= Level::INFO || detail) && !is_one_of(target, &EXPORTERS)
        });
        export::layer(provider).with_filter(exported.with_max_level_hint(LevelFilter::DEBUG))
    });
    let writer = Redacting::new(
        options.output.clone(),
        options.redact.clone(),
        options.format,
    );
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(false);
    let lines = match options.format {
        Format::Json => lines
            .json()
            .with_current_span(false)
            .with_span_list(true)
            .boxed(),
        Format::Text => lines.boxed(),
    };
    let subscriber = tracing_subscriber::registry()
        .with(traces)
        .with(lines.with_filter(filter));
    Ok((Dispatch::new(subscriber), Guard { provider }))
}

/// Our own crates.
const OURS: [&str; 14] = [
    "artel",
    "bot",
    "deploy",
    "forge",
    "graph",
    "models",
    "nodes",
    "protocol",
    "sandbox",
    "secrets",
    "spawner",
    "store",
    "telemetry",
    "worker",
];

/// The exporter's own HTTP calls would be traced, exported, and traced again.
const EXPORTERS: [&str; 7] = [
    "h2",
    "hyper",
    "hyper_util",
    "opentelemetry",
    "reqwest",
    "rustls",
    "tower",
];

/// The filter of log lines. By default: warnings of everybody, and what our own crates say.
fn filter(given: Option<&str>) -> Result<EnvFilter, Error> {
    let filter = given.map_or_else(
        || format!("warn,{}=info", OURS.join("=info,")),
        str::to_owned,
    );
    // It complains about every batch that does not arrive; [`export`] says it once.
    let full = if filter.contains("opentelemetry") {
        filter.clone()
    } else {
        format!("{filter},opentelemetry-otlp=off")
    };
    EnvFilter::try_new(full).map_err(|source| Error::Filter { filter, source })
}

/// Whether a target is one of these crates, or a module in one.
fn is_one_of(target: &str, crates: &[&str]) -> bool {
    crates.iter().any(|name| {
        target
            .strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '_', '-']))
    })
}
