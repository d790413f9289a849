//! Server-sent events out of pieces of bytes: only their data, which is all that chat completions use.

/// The longest event that is read; a longer one is an error, so that a broken endpoint cannot fill the memory.
const MAX_EVENT_BYTES: usize = 8 * 1024 * 1024;

/// An event that is longer than anything an endpoint has a reason to send.
#[derive(Debug, thiserror::Error)]
#[error("one event of the stream is longer than 8 MiB")]
pub(crate) struct EventTooLong;

/// Collects pieces of a stream into events.
#[derive(Default)]
pub(crate) struct Decoder {
    line: Vec<u8>,
    data: String,
    has_data: bool,
    after_cr: bool,
}

impl Decoder {
    /// Takes one piece and returns the data of every event that it completed.
    pub fn feed(&mut self, piece: &[u8]) -> Result<Vec<String>, EventTooLong> {
        let mut events = Vec::new();
        let mut rest = piece;
        if std::mem::take(&mut self.after_cr) && rest.first() == Some(&b'\n') {
            rest = &rest[1..];
        }
        while let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.push(&rest[..end])?;
            self.end_line(&mut events);
            let carriage_return = rest[end] == b'\r';
            rest = &rest[end + 1..];
            if carriage_return {
                match rest.first() {
                    Some(b'\n') => rest = &rest[1..],
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
        }
        self.push(rest)?;
        Ok(events)
    }

    fn push(&mut self, part: &[u8]) -> Result<(), EventTooLong> {
        if self.line.len() + self.data.len() + part.len() > MAX_EVENT_BYTES {
            return Err(EventTooLong);
        }
        self.line.extend_from_slice(part);
        Ok(())
    }

    /// The last event of a stream that ended without the empty line after it.
    pub fn finish(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        if !self.line.is_empty() {
            self.end_line(&mut events);
        }
        self.end_event(&mut events);
        events
    }

    fn end_line(&mut self, events: &mut Vec<String>) {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        if line.is_empty() {
            self.end_event(events);
        } else if let Some(data) = line.strip_prefix("data:") {
            self.push_data(data.strip_prefix(' ').unwrap_or(data));
        } else if line.starts_with('{') {
            // Some servers write an error as bare JSON into a stream that they have begun.
            self.push_data(&line);
        }
    }

    fn push_data(&mut self, data: &str) {
        if self.has_data {
            self.data.push('\n');
        }
        self.data.push_str(data);
        self.has_data = true;
    }

    fn end_event(&mut self, events: &mut Vec<String>) {
        if std::mem::take(&mut self.has_data) {
            events.push(std::mem::take(&mut self.data));
        }
    }
}

/// One event on the wire.
pub(crate) fn event(data: &str) -> bytes::Bytes {
    let mut out = String::with_capacity(data.len() + 8);
    for line in data.split('\n') {
        out.push_str("data: ");
        out.push_str(line);
        out.push('\n');
    }
    out.push('\n');
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str, step: usize) -> Vec<String> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for piece in text.as_bytes().chunks(step) {
            events.extend(decoder.feed(piece).unwrap());
        }
        events.extend(decoder.finish());
        events
    }

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let text = ": hello\r\n\r\ndata: {\"a\":\"é\"}\r\n\r\nevent: x\ndata:one\ndata: two\n\nid: 1\n\ndata: [DONE]";
        for step in 1..text.len() {
            assert_eq!(
                decode(text, step),
                ["{\"a\":\"é\"}", "one\ntwo", "[DONE]"],
                "{step}"
            );
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let written = [event("a\nb"), event("[DONE]")].concat();
        assert_eq!(
            decode(std::str::from_utf8(&written).unwrap(), 3),
            ["a\nb", "[DONE]"]
        );
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut decoder = Decoder::default();
        assert!(decoder.feed(&vec![b'x'; MAX_EVENT_BYTES + 1]).is_err());
    }
}
