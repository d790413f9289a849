//! A program's output, line by line, however long its lines are.

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// What of a line is kept, in bytes; the rest of it is read and dropped.
const KEPT: usize = 256 * 1024;

/// How much is read at a time, in bytes.
const CHUNK: usize = 16 * 1024;

/// Splits what is read into lines.
pub(super) struct Lines<R> {
    from: R,
    buffer: Vec<u8>,
    /// What was read and not looked at yet.
    rest: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            buffer: Vec::new(),
            rest: Vec::new(),
        }
    }

    /// The next line, without its end; none after the last one.
    pub(super) async fn next(&mut self) -> std::io::Result<Option<String>> {
        loop {
            let end = self.rest.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(self.rest.len());
            let room = KEPT.saturating_sub(self.buffer.len()).min(taken);
            self.buffer.extend_from_slice(&self.rest[..room]);
            self.rest.drain(..(taken + usize::from(end.is_some())));
            if end.is_some() {
                return Ok(Some(self.line()));
            }
            self.rest.reserve(CHUNK);
            if self.from.read_buf(&mut self.rest).await? == 0 {
                return Ok((!self.buffer.is_empty()).then(|| self.line()));
            }
        }
    }

    fn line(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.buffer).into_owned();
        self.buffer.clear();
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(text: &[u8]) -> Vec<String> {
        let mut lines = Lines::new(text);
        let mut seen = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            seen.push(line);
        }
        seen
    }

    #[tokio::test]
    async fn lines_come_one_by_one_and_the_last_needs_no_end() {
        assert_eq!(all(b"a\n\nb").await, ["a", "", "b"]);
        assert!(all(b"").await.is_empty());
    }

    #[tokio::test]
    async fn what_is_too_long_is_cut_and_the_next_line_is_whole() {
        let mut text = vec![b'x'; KEPT * 3];
        text.extend(b"\nnext\n");
        let lines = all(&text).await;
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [KEPT, 4]);
        assert_eq!(lines[1], "next");
    }
}
