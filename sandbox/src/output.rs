//! What a command says, as lines and as a bounded tail.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc::Sender;

/// A longer line is cut into pieces of this many bytes.
pub(crate) const LINE_BYTES: usize = 64 * 1024;
/// How much of the end is kept.
const TAIL_BYTES: usize = 64 * 1024;

/// One line of output, without its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The text; what is no UTF-8 is replaced.
    pub text: String,
    /// Whether the line was longer than 64 KiB and goes on in the next one.
    pub cut: bool,
}

/// What the reader and the watcher share.
pub(crate) struct Shared {
    started: Instant,
    last_ms: AtomicU64,
    tail: Mutex<VecDeque<u8>>,
}

impl Shared {
    pub(crate) fn new(started: Instant) -> Arc<Self> {
        Arc::new(Self {
            started,
            last_ms: AtomicU64::new(0),
            tail: Mutex::new(VecDeque::new()),
        })
    }

    /// Milliseconds since the last byte, or since the start.
    pub(crate) fn silent_ms(&self) -> u64 {
        elapsed_ms(self.started).saturating_sub(self.last_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn tail(&self) -> String {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(tail.make_contiguous());
        // The first character may have lost its beginning.
        text.trim_start_matches('\u{fffd}').to_owned()
    }

    fn heard(&self) {
        self.last_ms
            .store(elapsed_ms(self.started), Ordering::Relaxed);
    }

    fn keep(&self, bytes: &[u8]) {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let over = (tail.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        tail.drain(..over);
        tail.extend(bytes);
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
        shared.keep(bytes);
        splitter.push(bytes);
        if read > left {
            dropping = true;
            let mark = format!("\n[output over {most_bytes} bytes; the rest was dropped]\n");
            shared.keep(mark.as_bytes());
            splitter.push(mark.as_bytes());
        }
        for line in splitter.ready.drain(..) {
            // Nobody listens any more: the tail is still kept.
            let _ = lines.send(line).await;
        }
    }
    if let Some(line) = splitter.rest() {
        let _ = lines.send(line).await;
    }
}

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
            if let Some(end) = end {
                self.partial.extend(&bytes[..end]);
                bytes = &bytes[end + 1..];
                self.finish(false);
            } else {
                let taken = room.min(bytes.len());
                self.partial.extend(&bytes[..taken]);
                bytes = &bytes[taken..];
                if self.partial.len() == LINE_BYTES {
                    self.finish(true);
                }
            }
        }
    }

    fn finish(&mut self, cut: bool) {
        let bytes = std::mem::take(&mut self.partial);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(&bytes);
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.ready.push(Line { text, cut });
    }

    fn rest(mut self) -> Option<Line> {
        if self.partial.is_empty() {
            return None;
        }
        self.finish(false);
        self.ready.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_and_a_long_one_is_cut() {
        let mut splitter = Splitter::default();
        splitter.push(b"one\r\ntw");
        splitter.push(b"o\n");
        splitter.push(&vec![b'x'; LINE_BYTES + 3]);
        let texts: Vec<_> = splitter
            .ready
            .iter()
            .map(|line| (line.text.len(), line.cut))
            .collect();
        assert_eq!(texts, [(3, false), (3, false), (LINE_BYTES, true)]);
        assert_eq!(splitter.rest().map(|line| line.text), Some("xxx".into()));
    }

    #[test]
    fn the_tail_keeps_the_end() {
        let shared = Shared::new(Instant::now());
        shared.keep(&vec![b'a'; TAIL_BYTES]);
        shared.keep(b"end");
        let tail = shared.tail();
        assert_eq!(tail.len(), TAIL_BYTES);
        assert!(tail.ends_with("aend"));
    }
}
