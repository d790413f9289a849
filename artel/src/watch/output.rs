//! A worker's output, for people.

use protocol::{EventKind, WorkerEvent};
use store::WorkerLine;

/// Most characters that are kept of one thing that a worker says.
const MOST: usize = 8000;

/// A worker's output, put together again from what its spawner tells: each time, the end of all of it.
#[derive(Default)]
pub(super) struct Output {
    /// The end of what was kept.
    known: String,
    /// The line that goes on, and what told of it.
    rest: String,
    told: (i64, i64),
}

impl Output {
    /// What is kept of an event, for people.
    pub(super) fn line(&mut self, event: &WorkerEvent) -> Option<WorkerLine> {
        let (kind, text) = match &event.kind {
            EventKind::Phase { name } => ("phase", name.clone()),
            EventKind::Progress { text, .. } => ("progress", text.clone()),
            EventKind::Log { tail } => {
                self.told = (event.at.as_millisecond(), seq(event));
                ("log", self.whole_lines(tail))
            }
            EventKind::Refused { host, reason } => ("refused", format!("{host}: {reason}")),
            EventKind::Started { .. } | EventKind::Usage { .. } => return None,
        };
        (!text.is_empty()).then(|| WorkerLine {
            at_ms: event.at.as_millisecond(),
            seq: seq(event),
            kind: kind.to_owned(),
            text: text.chars().take(MOST).collect(),
        })
    }

    /// The lines that are new in this end of the output, and whole.
    fn whole_lines(&mut self, tail: &str) -> String {
        let new = what_is_new(&self.known, tail);
        let whole = new.rfind('\n').map_or(0, |end| end + 1);
        let (lines, rest) = new.split_at(whole);
        self.rest = rest.to_owned();
        tail[..tail.len() - rest.len()].clone_into(&mut self.known);
        lines.to_owned()
    }

    /// The last line, if it had no end.
    pub(super) fn end(self) -> Option<WorkerLine> {
        let (at_ms, seq) = self.told;
        (!self.rest.is_empty()).then(|| WorkerLine {
            at_ms: at_ms + 1,
            seq,
            kind: "log".to_owned(),
            text: self.rest,
        })
    }
}

fn seq(event: &WorkerEvent) -> i64 {
    i64::try_from(event.seq).unwrap_or(i64::MAX)
}

/// What follows in `tail` after the end of what is known; all of it, when nothing of it is known.
fn what_is_new<'a>(known: &str, tail: &'a str) -> &'a str {
    known
        .char_indices()
        .find_map(|(start, _)| tail.strip_prefix(&known[start..]))
        .unwrap_or(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_put_together_from_its_ends_line_by_line_and_once() {
        let mut output = Output::default();
        assert_eq!(output.whole_lines("one\ntw"), "one\n");
        assert_eq!(output.whole_lines("one\ntwo\nthree\n"), "two\nthree\n");
        // What was said first is out of sight meanwhile.
        assert_eq!(output.whole_lines("ee\nfour\nfive"), "four\n");
        assert_eq!(output.whole_lines("ee\nfour\nfive"), "");
        assert_eq!(output.end().unwrap().text, "five");
    }

    #[test]
    fn output_of_which_nothing_is_known_is_all_new() {
        let mut output = Output::default();
        assert_eq!(output.whole_lines("a\n"), "a\n");
        assert_eq!(output.whole_lines("ü\n"), "ü\n");
        assert!(output.end().is_none());
    }

    #[test]
    fn lines_that_are_said_again_are_kept_again() {
        let mut output = Output::default();
        assert_eq!(output.whole_lines("ok\n"), "ok\n");
        assert_eq!(output.whole_lines("ok\nok\n"), "ok\n");
    }
}
