//! Where log lines pass the redactor.

use std::io::{self, Write};
use std::sync::PoisonError;

use serde_json::{Map, Value};
use tracing_subscriber::fmt::MakeWriter;

use crate::{Format, Output, Redact};

/// Makes a writer for each event, which holds the event back until it is whole: a secret may be written in pieces.
pub(crate) struct Redacting {
    output: Output,
    redact: Redact,
    format: Format,
}

impl Redacting {
    pub fn new(output: Output, redact: Redact, format: Format) -> Self {
        Self {
            output,
            redact,
            format,
        }
    }

    fn write(&self, event: &[u8]) -> io::Result<()> {
        let text = String::from_utf8_lossy(event);
        let clean = match self.format {
            Format::Text => (self.redact)(&text),
            Format::Json => self.clean_json(&text),
        };
        match &self.output {
            Output::Stderr => io::stderr().lock().write_all(clean.as_bytes()),
            Output::Writer(writer) => {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                writer.write_all(clean.as_bytes())?;
                writer.flush()
            }
        }
    }

    /// A secret with a quote or a line break in it looks different inside JSON: it is sought in the values themselves.
    fn clean_json(&self, text: &str) -> String {
        match serde_json::from_str(text) {
            Ok(line) => format!("{}\n", self.clean_value(line)),
            Err(_) => (self.redact)(text),
        }
    }

    fn clean_value(&self, value: Value) -> Value {
        match value {
            Value::String(text) => Value::String((self.redact)(&text)),
            Value::Array(values) => values
                .into_iter()
                .map(|value| self.clean_value(value))
                .collect(),
            Value::Object(fields) => fields
                .into_iter()
                .map(|(name, value)| ((self.redact)(&name), self.clean_value(value)))
                .collect::<Map<_, _>>()
                .into(),
            // A secret may be all digits; what the redactor does not know stays a number.
            Value::Number(number) => {
                let text = number.to_string();
                let clean = (self.redact)(&text);
                if clean == text {
                    Value::Number(number)
                } else {
                    Value::String(clean)
                }
            }
            other => other,
        }
    }
}

impl<'a> MakeWriter<'a> for Redacting {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            to: self,
            event: Vec::with_capacity(256),
        }
    }
}

/// One event.
pub(crate) struct Line<'a> {
    to: &'a Redacting,
    event: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.event.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if !self.event.is_empty() {
            // There is nowhere left to say that a log line could not be written.
            let _ = self.to.write(&self.event);
        }
    }
}
