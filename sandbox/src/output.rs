//! What a command says, as lines and as a bounded tail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc::Sender;

use crate::lines::{Line, Splitter, Tail};

/// What the reader and the watcher share.
pub(crate) struct Shared {
    started: Instant,
    last_ms: AtomicU64,
    tail: Tail,
}

impl Shared {
    pub(crate) fn new(started: Instant) -> Arc<Self> {
        Arc::new(Self {
            started,
            last_ms: AtomicU64::new(0),
            tail: Tail::default(),
        })
    }

    /// Milliseconds since the last byte, or since the start.
    pub(crate) fn silent_ms(&self) -> u64 {
        elapsed_ms(self.started).saturating_sub(self.last_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn tail(&self) -> String {
        self.tail.text()
    }

    fn heard(&self) {
        self.last_ms
            .store(elapsed_ms(self.started), Ordering::Relaxed);
    }
}

pub(crate) fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Reads until the last writer is gone. A reader of lines that is slower than the command slows
/// the command down; one that went away does not.
pub(crate) async fn pump(
    mut pipe: Receiver,
    shared: Arc<Shared>,
    lines: Sender<Line>,
    most_bytes: u64,
) {
    let mut chunk = vec![0; 16 * 1024];
    let mut splitter = Splitter::default();
    let mut total = 0_u64;
    let mut dropping = false;
    loop {
        let read = match pipe.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        shared.heard();
        if dropping {
            continue;
        }
        let left = usize::try_from(most_bytes.saturating_sub(total)).unwrap_or(usize::MAX);
        let bytes = &chunk[..read.min(left)];
        total += bytes.len() as u64;
        shared.tail.keep(bytes);
        let mut ready: Vec<Line> = splitter.push(bytes).collect();
        if read > left {
            dropping = true;
            let mark = format!("\n[output over {most_bytes} bytes; the rest was dropped]\n");
            shared.tail.keep(mark.as_bytes());
            ready.extend(splitter.push(mark.as_bytes()));
        }
        for line in ready {
            // Nobody listens any more: the tail is still kept.
            let _ = lines.send(line).await;
        }
    }
    if let Some(line) = splitter.rest() {
        let _ = lines.send(line).await;
    }
}
