//! What a container prints: lines of a bounded length, and the end of it all.

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::query_parameters::LogsOptionsBuilder;
use futures::StreamExt as _;
use sandbox::Line;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

use super::{AGAIN, is_missing};

/// A longer line is cut into pieces of this many bytes.
const LINE_BYTES: usize = 64 * 1024;
/// How much of the end of the output is kept.
const TAIL_BYTES: usize = 64 * 1024;
/// Output of which more than this was seen may have gone through several files of the engine.
const ROTATED_BYTES: usize = 8 << 20;

/// Reads the output to its end, also when the engine goes away in between: then the rest is asked for by its time.
pub(super) async fn listen(
    docker: Docker,
    id: String,
    adopted: bool,
    tail: Arc<Mutex<VecDeque<u8>>>,
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
                    keep(&tail, bytes);
                    seen = seen.saturating_add(bytes.len());
                    splitter.push(bytes);
                    for line in splitter.ready.drain(..) {
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
async fn last_words(docker: &Docker, id: &str, tail: &Mutex<VecDeque<u8>>) {
    let options = LogsOptionsBuilder::default()
        .stdout(true)
        .stderr(true)
        .tail("1000");
    let mut output = docker.logs(id, Some(options.build()));
    let found = Mutex::default();
    while let Some(Ok(piece)) = output.next().await {
        keep(&found, &piece.into_bytes());
    }
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !found.is_empty() {
        *tail.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }
}

fn keep(tail: &Mutex<VecDeque<u8>>, bytes: &[u8]) {
    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
    let over = (tail.len() + bytes.len()).saturating_sub(TAIL_BYTES);
    tail.drain(..over);
    tail.extend(bytes);
}

/// Splits what comes into lines of a bounded length.
#[derive(Default)]
struct Splitter {
    partial: Vec<u8>,
    ready: Vec<Line>,
}

impl Splitter {
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = LINE_BYTES - self.partial.len();
            let end = bytes.iter().take(room).position(|byte| *byte == b'\n');
            let taken = end.unwrap_or_else(|| room.min(bytes.len()));
            self.partial.extend(&bytes[..taken]);
            bytes = &bytes[(taken + usize::from(end.is_some()))..];
            if end.is_some() || self.partial.len() == LINE_BYTES {
                let line = std::mem::take(&mut self.partial);
                self.ready.push(Line {
                    text: String::from_utf8_lossy(&line).into_owned(),
                    cut: end.is_none(),
                });
            }
        }
    }
}
