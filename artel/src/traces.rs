//! How what happens for one job becomes one trace, although its threads sleep between runs, its errands wait in a table, and
//! any of it may go on in another process: the trace is that of the job's name.

use std::sync::Arc;

use graph::{Observer, Point};
use tracing::Span;

/// Puts a span, which nobody has entered yet, into the trace of the job that a thread works for. A run of a conversation stays
/// a trace of its own: a conversation lasts as long as its project.
pub fn join(span: &Span, thread: &str) {
    if let Some(job) = job(thread) {
        telemetry::join_trace(span, job);
    }
}

/// Puts runs into the traces of their jobs, and lets the next one look on as well.
pub fn observer(next: Option<Arc<dyn Observer>>) -> Arc<dyn Observer> {
    Arc::new(move |point: &Point<'_>| {
        if let Point::RunStarted { thread, span } = point {
            join(span, thread.as_str());
        }
        if let Some(next) = &next {
            next.on(point);
        }
    })
}

/// The thread of the job: `{project}/job-1` of `{project}/job-1/storage`.
fn job(thread: &str) -> Option<&str> {
    let (project, rest) = thread.split_once('/')?;
    let job = rest.split('/').next().unwrap_or(rest);
    Some(&thread[..=project.len() + job.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_and_its_tasks_are_one_trace() {
        assert_eq!(job("p/job-1/storage"), Some("p/job-1"));
        assert_eq!(job("p/job-1"), Some("p/job-1"));
        assert_eq!(job("p"), None);
    }
}
