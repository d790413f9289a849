//! The W3C trace context: how a trace that began here goes on where a job is carried out.

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
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
