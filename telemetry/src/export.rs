//! Spans to an OpenTelemetry collector: OTLP over HTTP with protobuf, in batches, from a thread of its own.
//!
//! The HTTP client is the blocking one because the batching thread is none of the runtime's: it sends the last spans even
//! while the runtime ends.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::trace::{Status, TracerProvider};
use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_otlp::{Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, SpanData, SpanExporter, Tracer,
};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::LookupSpan;

use crate::{Error, Redact};

/// Spans that wait for a slow collector; more are dropped.
const QUEUE: usize = 4096;
/// Spans of one request.
const BATCH: usize = 512;
/// How often spans are sent.
const EVERY: Duration = Duration::from_secs(2);
/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn provider(
    service: &str,
    endpoint: &str,
    redact: Redact,
) -> Result<SdkTracerProvider, Error> {
    let failed = |message: String| Error::Exporter {
        endpoint: endpoint.to_owned(),
        message,
    };
    if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
        return Err(failed(
            "write an address like http://127.0.0.1:4318".to_owned(),
        ));
    }
    let base = endpoint.trim_end_matches('/');
    let address = if base.ends_with("/v1/traces") {
        base.to_owned()
    } else {
        format!("{base}/v1/traces")
    };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(address)
        .with_timeout(PATIENCE)
        .with_http_client(client(&address_host(endpoint)).map_err(failed)?)
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE)
        .with_max_export_batch_size(BATCH)
        .with_scheduled_delay(EVERY)
        .build();
    let processor = BatchSpanProcessor::builder(Outgoing {
        inner: exporter,
        redact,
        outage: Outage::new(address_host(endpoint)),
    })
    .with_batch_config(batches)
    .build();
    let resource = Resource::builder()
        .with_service_name(service.to_owned())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    Ok(SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_resource(resource)
        .build())
}

/// The host of an address that begins with its scheme.
fn address_host(endpoint: &str) -> String {
    let rest = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit('@').next().unwrap_or(authority);
    match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((address, _)) => address.to_owned(),
        None => host.split(':').next().unwrap_or(host).to_owned(),
    }
}

/// A blocking client, made where blocking is allowed. A collector on this machine is not reached through a proxy.
fn client(host: &str) -> Result<reqwest::blocking::Client, String> {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        return Err("no crypto provider is installed; the program installs one first".to_owned());
    }
    let local = host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    let made = std::thread::spawn(move || {
        let mut builder = reqwest::blocking::Client::builder().timeout(PATIENCE);
        if local {
            builder = builder.no_proxy();
        }
        builder.build()
    });
    match made.join() {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the HTTP client could not be made".to_owned()),
    }
}

pub(crate) fn layer<S>(provider: &SdkTracerProvider) -> OpenTelemetryLayer<S, Tracer>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("artel"))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
}

/// Takes secrets out of spans before they leave, and says when they cannot leave.
struct Outgoing<E> {
    inner: E,
    redact: Redact,
    outage: Outage,
}

impl<E: std::fmt::Debug> std::fmt::Debug for Outgoing<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<E: SpanExporter> SpanExporter for Outgoing<E> {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        for span in &mut batch {
            self.redact_span(span);
        }
        let spans = batch.len();
        let sent = self.inner.export(batch).await;
        self.outage.note(spans, sent.as_ref().err());
        // What went wrong is said; the SDK would say it again for every batch.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E> Outgoing<E> {
    fn redact_span(&self, span: &mut SpanData) {
        self.redact_text(&mut span.name);
        self.redact_attributes(&mut span.attributes);
        for event in &mut span.events.events {
            self.redact_text(&mut event.name);
            self.redact_attributes(&mut event.attributes);
        }
        if let Status::Error { description } = &mut span.status {
            self.redact_text(description);
        }
    }

    fn redact_text(&self, text: &mut Cow<'static, str>) {
        let clean = (self.redact)(text);
        if clean != *text {
            *text = Cow::Owned(clean);
        }
    }

    fn redact_attributes(&self, attributes: &mut [KeyValue]) {
        for attribute in attributes {
            match &mut attribute.value {
                Value::String(text) => *text = self.clean(text),
                Value::Array(Array::String(texts)) => {
                    for text in texts {
                        *text = self.clean(text);
                    }
                }
                _ => {}
            }
        }
    }

    fn clean(&self, text: &StringValue) -> StringValue {
        (self.redact)(text.as_str()).into()
    }
}

/// Keeps count of what a collector did not take, and says so: at once, then every few minutes, and when it is over.
struct Outage {
    /// Nothing else of its address, which may hold a password.
    host: String,
    missed: Mutex<Option<Missed>>,
}

/// What was missed since the collector took something.
struct Missed {
    spans: usize,
    said: Instant,
}

impl Outage {
    /// How often an outage that goes on is said again.
    const REMINDER: Duration = Duration::from_mins(5);

    fn new(host: String) -> Self {
        Self {
            host,
            missed: Mutex::new(None),
        }
    }

    fn note(&self, spans: usize, error: Option<&OTelSdkError>) {
        let host = self.host.as_str();
        let mut missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(error) = error else {
            if let Some(missed) = missed.take() {
                let lost = missed.spans;
                tracing::info!(host, lost, "the collector takes spans again");
            }
            return;
        };
        let first = missed.is_none();
        let missed = missed.get_or_insert_with(|| Missed {
            spans: 0,
            said: Instant::now(),
        });
        missed.spans += spans;
        if first || missed.said.elapsed() >= Self::REMINDER {
            missed.said = Instant::now();
            tracing::warn!(
                host,
                lost = missed.spans,
                %error,
                "spans do not reach the collector and are lost; check that it runs and that OTEL_EXPORTER_OTLP_ENDPOINT \
                 is its address for OTLP over HTTP"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn an_outage_is_said_once_and_its_end_too() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (dispatch, _guard) = crate::build(&crate::Options {
            output: crate::Output::Writer(lines.clone()),
            ..crate::Options::new("test")
        })
        .unwrap();
        let said = || String::from_utf8(lines.lock().unwrap().clone()).unwrap();
        let error = OTelSdkError::InternalFailure("refused".to_owned());
        tracing::dispatcher::with_default(&dispatch, || {
            let outage = Outage::new("collector.example".to_owned());
            outage.note(5, None);
            assert_eq!(said(), "");
            for _ in 0..100 {
                outage.note(5, Some(&error));
            }
            assert_eq!(said().lines().count(), 1, "{}", said());
            assert!(
                said().contains("refused") && said().contains("collector.example"),
                "{}",
                said()
            );

            // It goes on: said again after a while, with what was lost until then.
            if let Some(missed) = outage.missed.lock().unwrap().as_mut() {
                missed.said = Instant::now().checked_sub(Outage::REMINDER).unwrap();
            }
            outage.note(5, Some(&error));
            outage.note(5, Some(&error));
            assert_eq!(said().lines().count(), 2, "{}", said());
            assert!(said().contains("lost=505"), "{}", said());

            outage.note(5, None);
            outage.note(5, None);
            assert_eq!(said().lines().count(), 3, "{}", said());
            assert!(said().contains("again") && said().contains("lost=510"));
            // The next one is said at once.
            outage.note(5, Some(&error));
            assert_eq!(said().lines().count(), 4, "{}", said());
        });
    }

    #[test]
    fn the_host_of_an_address_is_found() {
        for (address, host) in [
            ("http://127.0.0.1:4318", "127.0.0.1"),
            ("https://me:pw@collector.example/x", "collector.example"),
            ("http://[::1]:4318/v1/traces", "::1"),
            ("http://localhost", "localhost"),
        ] {
            assert_eq!(address_host(address), host);
        }
    }
}
