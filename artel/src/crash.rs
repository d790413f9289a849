//! Dying on purpose, for the test that kills the program at every boundary of its work.
//!
//! Only in builds with debug assertions: with `ARTEL_CRASH_FILE`, the program ends itself with SIGKILL the first time that it
//! comes to each boundary, having written the boundary's name into that file, so that it gets past it the next time.

use std::sync::Arc;

use graph::Observer;

/// What dies at boundaries, if this run is told to.
#[cfg(debug_assertions)]
pub fn observer() -> Option<Arc<dyn Observer>> {
    use graph::Point;

    std::env::var_os("ARTEL_CRASH_FILE")?;
    let observer = |point: &Point<'_>| match point {
        Point::NodeStarted { thread, node, .. } => at("node-started", thread.as_str(), node),
        Point::StepRemembering { thread, node, name } => {
            at(
                "step-remembering",
                thread.as_str(),
                &format!("{node} {name}"),
            );
        }
        Point::StepRemembered { thread, node, name } => {
            at(
                "step-remembered",
                thread.as_str(),
                &format!("{node} {name}"),
            );
        }
        Point::BeforeCommit { thread, nodes } => {
            at("before-commit", thread.as_str(), &nodes.join("+"));
        }
        Point::AfterCommit { thread, nodes } => {
            at("after-commit", thread.as_str(), &nodes.join("+"));
        }
        _ => {}
    };
    Some(Arc::new(observer))
}

/// Dies here, if this run is told to and did not die here before.
#[cfg(debug_assertions)]
pub fn at(point: &str, thread: &str, place: &str) {
    use std::io::{Read, Seek, Write};

    static ONE_AT_A_TIME: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
    let Some(path) = std::env::var_os("ARTEL_CRASH_FILE") else {
        return;
    };
    let _guard = ONE_AT_A_TIME.lock();
    // The task is part of a boundary's name, the project's id is not.
    let line = format!("{point} {} {place}", ports::threads::within_project(thread));
    let Ok(mut file) = std::fs::OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .open(path)
    else {
        return;
    };
    let mut known = String::new();
    let _ = file.rewind();
    let _ = file.read_to_string(&mut known);
    if known.lines().any(|seen| seen == line) {
        return;
    }
    let _ = writeln!(file, "{line}");
    let _ = file.sync_all();
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// Nothing dies on purpose in a release.
#[cfg(not(debug_assertions))]
pub fn observer() -> Option<Arc<dyn Observer>> {
    None
}

/// Nothing dies on purpose in a release.
#[cfg(not(debug_assertions))]
pub fn at(_point: &str, _thread: &str, _place: &str) {}
