//! Lines of a bounded length, and the bounded end of what was said. For whatever has output: a sandbox here, a container elsewhere.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A longer line is cut into pieces of this many bytes.
const LINE_BYTES: usize = 64 * 1024;
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

/// The last 64 KiB of what was said; several may keep and read it at the same time.
#[derive(Debug, Default)]
pub struct Tail(Mutex<VecDeque<u8>>);

impl Tail {
    /// Adds what was said just now.
    pub fn keep(&self, bytes: &[u8]) {
        let mut tail = self.lock();
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let over = (tail.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        tail.drain(..over);
        tail.extend(bytes);
    }

    /// As text by now; what is no UTF-8 is replaced.
    pub fn text(&self) -> String {
        let mut tail = self.lock();
        let text = String::from_utf8_lossy(tail.make_contiguous());
        // The first character may have lost its beginning.
        text.trim_start_matches('\u{fffd}').to_owned()
    }

    /// Puts another one in its place, unless that is empty.
    pub fn replace(&self, other: Self) {
        let other = other.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !other.is_empty() {
            *self.lock() = other;
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Splits what comes in pieces into lines.
#[derive(Debug, Default)]
pub struct Splitter {
    partial: Vec<u8>,
    ready: Vec<Line>,
}

impl Splitter {
    /// Takes the next piece, and gives the lines that it has completed.
    pub fn push(&mut self, mut bytes: &[u8]) -> std::vec::Drain<'_, Line> {
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
        self.ready.drain(..)
    }

    fn finish(&mut self, cut: bool) {
        let bytes = std::mem::take(&mut self.partial);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(&bytes);
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.ready.push(Line { text, cut });
    }

    /// The last line, if it has no end; nothing more comes.
    pub fn rest(&mut self) -> Option<Line> {
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
        let mut lines: Vec<Line> = splitter.push(b"one\r\ntw").collect();
        lines.extend(splitter.push(b"o\n"));
        lines.extend(splitter.push(&vec![b'x'; LINE_BYTES + 3]));
        let texts: Vec<_> = lines
            .iter()
            .map(|line| (line.text.len(), line.cut))
            .collect();
        assert_eq!(texts, [(3, false), (3, false), (LINE_BYTES, true)]);
        assert_eq!(splitter.rest().map(|line| line.text), Some("xxx".into()));
        assert_eq!(splitter.rest(), None);
    }

    #[test]
    fn the_tail_keeps_the_end() {
        let tail = Tail::default();
        tail.keep(&vec![b'a'; TAIL_BYTES]);
        tail.keep(b"end");
        let text = tail.text();
        assert_eq!(text.len(), TAIL_BYTES);
        assert!(text.ends_with("aend"));
        tail.replace(Tail::default());
        assert_eq!(tail.text(), text, "nothing is no end");
        let other = Tail::default();
        // A piece of a character.
        other.keep(b"\xa9 other");
        tail.replace(other);
        assert_eq!(tail.text(), " other");
    }
}
