//! A panic is a log line like any other: redacted, and as JSON where the others are.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};

/// Logs panics instead of printing them.
pub(crate) fn log() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        let location = location.as_deref().unwrap_or("unknown");
        let message = message(panic.payload());
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        // Taken only where RUST_BACKTRACE asks for it.
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            tracing::error!(location, os_thread = thread, %backtrace, "panicked: {message}");
        } else {
            tracing::error!(location, os_thread = thread, "panicked: {message}");
        }
    }));
}

fn message(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}
