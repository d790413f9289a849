//! The W3C trace context: how a trace that began here goes on where a job is carried out.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use sha2::{Digest, Sha256};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const TRACEPARENT: &str = "traceparent";

/// The current span as a `traceparent`, to be stored with a job; `None` when nothing is traced.
pub fn current_traceparent() -> Option<String> {
    let context = Span::current().context();
    if !context.span().span_context().is_valid() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&context, &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// Makes a span, which nobody has entered yet, a child of a stored `traceparent`. Returns whether it is now: not when the
/// text is no trace context, and not when nothing is traced.
pub fn set_parent(span: &Span, traceparent: &str) -> bool {
    let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
    // Out of nothing, so that an invalid text does not mean the current span.
    let nothing = opentelemetry::Context::new();
    let context = TraceContextPropagator::new().extract_with_context(&nothing, &carrier);
    context.span().span_context().is_valid() && span.set_parent(context).is_ok()
}

/// Puts a span, which nobody has entered yet, into the trace of a name: the same name is the same trace in every process and
/// after every restart, without anything being stored. The spans of such a trace have a common parent that is itself never
/// sent. Returns whether it is there now: not when nothing is traced.
pub fn join_trace(span: &Span, name: &str) -> bool {
    let digest: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    let mut trace = [0; 16];
    trace.copy_from_slice(&digest[..16]);
    let mut parent = [0; 8];
    parent.copy_from_slice(&digest[16..24]);
    let parent = SpanContext::new(
        TraceId::from_bytes(trace),
        SpanId::from_bytes(parent),
        TraceFlags::SAMPLED,
        true,
        TraceState::NONE,
    );
    let context = opentelemetry::Context::new().with_remote_span_context(parent);
    span.set_parent(context).is_ok()
}
