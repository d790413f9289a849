//! What a container prints: lines of a bounded length, and the end of it all.

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::query_parameters::LogsOptionsBuilder;
use futures::StreamExt as _;
use sandbox::{Line, Splitter, Tail};
use std::sync::Arc;
use tokio::sync::mpsc;

use super::{AGAIN, is_missing};

/// Output of which more than this was seen may have gone through several files of the engine.
const ROTATED_BYTES: usize = 8 << 20;

/// Reads the output to its end, also when the engine goes away in between: then the rest is asked for by its time.
pub(super) async fn listen(
    docker: Docker,
    id: String,
    adopted: bool,
    tail: Arc<Tail>,
    lines: mpsc::Sender<Line>,
) {
    let mut since = 0_i64;
    let mut splitter = Splitter::default();
    let mut seen = 0_usize;
    loop {
        let now = i32::try_from(since).unwrap_or(0);
        let mut options = LogsOptionsBuilder::default()
            .follow(true)
            .stdout(true)
            .stderr(true)
            .since(now);
        if adopted && since == 0 {
            options = options.tail("1000");
        }
        let mut output = docker.logs(&id, Some(options.build()));
        let mut broken = false;
        loop {
            match output.next().await {
                Some(Ok(piece)) => {
                    let bytes = match &piece {
                        LogOutput::StdOut { message }
                        | LogOutput::StdErr { message }
                        | LogOutput::StdIn { message }
                        | LogOutput::Console { message } => message,
                    };
                    tail.keep(bytes);
                    seen = seen.saturating_add(bytes.len());
                    for line in splitter.push(bytes) {
                        // A reader that is too slow, or gone, holds nobody up.
                        let _ = lines.try_send(line);
                    }
                }
                Some(Err(_)) => {
                    broken = true;
                    break;
                }
                None => break,
            }
        }
        let runs = match docker.inspect_container(&id, None).await {
            Ok(about) => about.state.and_then(|state| state.running).unwrap_or(false),
            Err(error) if is_missing(&error) => return,
            Err(_) => true,
        };
        if !runs {
            if let Some(line) = splitter.rest() {
                let _ = lines.try_send(line);
            }
            if broken || seen > ROTATED_BYTES {
                // Files may have been rotated away under a reader that was too slow.
                last_words(&docker, &id, &tail).await;
            }
            return;
        }
        since = jiff::Timestamp::now().as_second();
        tokio::time::sleep(AGAIN).await;
    }
}

/// Replaces the tail by the last lines that the engine has.
async fn last_words(docker: &Docker, id: &str, tail: &Tail) {
    let options = LogsOptionsBuilder::default()
        .stdout(true)
        .stderr(true)
        .tail("1000");
    let mut output = docker.logs(id, Some(options.build()));
    let found = Tail::default();
    while let Some(Ok(piece)) = output.next().await {
        found.keep(&piece.into_bytes());
    }
    tail.replace(found);
}
