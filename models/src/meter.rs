//! What is read out of answers in Anthropic's Messages and OpenAI's Responses while they pass through: what they took,
//! whether they have ended, and whether they failed. Everything else belongs to the worker and its endpoint.

use ports::{Usage, WireFormat};
use serde_json::Value;

use crate::config::Price;
use crate::wire::{self, Tokens, error_message, estimate_tokens};

/// Tokens as these formats count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Read, and neither from the cache nor into it.
    pub input: u64,
    /// Read from the endpoint's cache.
    pub cache_read: u64,
    /// Read and written into that cache.
    pub cache_write: u64,
    pub output: u64,
}

impl Counts {
    /// As the ledger has it: what was read is one number, and the price knows about the parts.
    pub fn usage(self, price: Option<&Price>) -> Usage {
        let Self {
            input,
            cache_read,
            cache_write,
            output,
        } = self;
        Usage {
            input_tokens: input.saturating_add(cache_read).saturating_add(cache_write),
            output_tokens: output,
            cost_usd: price
                .map(|price| price.cost_with_cache(input, cache_read, cache_write, output)),
        }
    }

    /// Counts of a stream grow, and endpoints leave some of them out in between.
    fn grow(&mut self, other: Self) {
        self.input = self.input.max(other.input);
        self.cache_read = self.cache_read.max(other.cache_read);
        self.cache_write = self.cache_write.max(other.cache_write);
        self.output = self.output.max(other.output);
    }
}

/// An error inside an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Broken {
    pub message: String,
    /// The status that it would have had, had it come before the answer began.
    pub status: Option<u16>,
    /// The event or body, for the worker to read.
    pub body: Value,
}

/// Reads along.
#[derive(Debug)]
pub(crate) struct Meter {
    format: WireFormat,
    counts: Option<Counts>,
    /// Bytes that the model wrote, for endpoints that do not count.
    written: usize,
    /// The answer is whole.
    pub ended: bool,
    pub broken: Option<Broken>,
}

impl Meter {
    pub fn new(format: WireFormat) -> Self {
        Self {
            format,
            counts: None,
            written: 0,
            ended: false,
            broken: None,
        }
    }

    /// Reads a whole body. False: that is no answer in this format.
    pub fn whole(&mut self, body: &Value) -> bool {
        self.ended = true;
        match self.format {
            WireFormat::CountTokens => {
                self.counts = Some(Counts::default());
                body["input_tokens"].is_u64()
            }
            WireFormat::Messages => {
                self.written = body["content"].to_string().len();
                self.count(&body["usage"]);
                body["content"].is_array()
            }
            WireFormat::Responses => {
                self.written = body["output"].to_string().len();
                self.count(&body["usage"]);
                body["output"].is_array()
            }
        }
    }

    /// Reads an event of a stream.
    pub fn event(&mut self, event: &Value) {
        let kind = event["type"].as_str().unwrap_or_default();
        match self.format {
            WireFormat::Messages | WireFormat::CountTokens => match kind {
                "message_start" => self.count(&event["message"]["usage"]),
                "message_delta" => self.count(&event["usage"]),
                "content_block_delta" => {
                    for name in ["text", "partial_json", "thinking"] {
                        self.written += event["delta"][name].as_str().map_or(0, str::len);
                    }
                }
                "message_stop" => self.ended = true,
                _ => {}
            },
            WireFormat::Responses => match kind {
                "response.completed" | "response.incomplete" => {
                    self.count(&event["response"]["usage"]);
                    self.ended = true;
                }
                "response.failed" => {
                    self.count(&event["response"]["usage"]);
                    self.fail(&event["response"]["error"], event);
                }
                _ if kind.strip_suffix(".delta").is_some() => {
                    self.written += event["delta"].as_str().map_or(0, str::len);
                }
                _ => {}
            },
        }
        // Both formats have it, and so have endpoints that break in another form.
        if kind == "error" || (kind.is_empty() && event["error"].is_object()) {
            let inner = &event["error"];
            self.fail(if inner.is_null() { event } else { inner }, event);
        }
    }

    fn fail(&mut self, error: &Value, event: &Value) {
        let kind = ["type", "code"]
            .iter()
            .filter_map(|name| error[*name].as_str())
            .find(|kind| *kind != "error")
            .unwrap_or_default();
        let status = match kind {
            "overloaded_error" | "server_is_overloaded" | "slow_down" => Some(529),
            "rate_limit_error" | "rate_limit_exceeded" => Some(429),
            "timeout_error" => Some(504),
            "api_error" | "server_error" => Some(500),
            "invalid_request_error" | "invalid_prompt" | "context_length_exceeded" => Some(400),
            "authentication_error" | "invalid_api_key" => Some(401),
            "billing_error" | "insufficient_quota" => Some(402),
            "permission_error" => Some(403),
            "not_found_error" | "model_not_found" => Some(404),
            "request_too_large" => Some(413),
            _ => None,
        };
        self.broken = Some(Broken {
            message: error_message(error),
            status,
            body: event.clone(),
        });
    }

    fn count(&mut self, usage: &Value) {
        let number = |path: &str| usage.pointer(path).and_then(Value::as_u64);
        let Some(input) = number("/input_tokens").or_else(|| number("/output_tokens").map(|_| 0))
        else {
            return;
        };
        let output = number("/output_tokens").unwrap_or(0);
        let found = if self.format == WireFormat::Responses {
            // Here cached tokens are a part of those read.
            let cached = number("/input_tokens_details/cached_tokens").unwrap_or(0);
            Counts {
                input: input.saturating_sub(cached),
                cache_read: cached.min(input),
                cache_write: 0,
                output,
            }
        } else {
            Counts {
                input,
                cache_read: number("/cache_read_input_tokens").unwrap_or(0),
                cache_write: number("/cache_creation_input_tokens").unwrap_or(0),
                output,
            }
        };
        self.counts.get_or_insert_default().grow(found);
    }

    /// Whether anything came that is paid for.
    pub fn took_something(&self) -> bool {
        self.counts.is_some() || self.written > 0
    }

    /// Whether this is more than an answer of so many tokens can be.
    pub fn is_beyond(&self, most: u64) -> bool {
        wire::is_beyond(most, self.counts.map(|counts| counts.output), self.written)
    }

    /// Bytes that the model wrote.
    pub fn written(&self) -> usize {
        self.written
    }

    /// The endpoint's counts, and estimates for what it did not count.
    pub fn counts(&self, most: Tokens) -> Counts {
        let written = estimate_tokens(self.written).min(most.output);
        match self.counts {
            // A stream that broke has told what it read, and hardly what it wrote.
            Some(counts) if !self.ended => Counts {
                output: counts.output.max(written),
                ..counts
            },
            Some(counts) => counts,
            None => Counts {
                input: most.input,
                output: written,
                ..Counts::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const MOST: Tokens = Tokens {
        input: 900,
        output: 50,
    };

    #[test]
    fn a_message_is_counted_at_its_start_and_at_its_end() {
        let mut meter = Meter::new(WireFormat::Messages);
        meter.event(&json!({"type": "message_start", "message": {"usage":
            {"input_tokens": 10, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 100, "output_tokens": 1}}}));
        assert!(!meter.ended && meter.took_something());
        meter.event(&json!({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 25}}));
        meter.event(&json!({"type": "message_stop"}));
        assert!(meter.ended);
        let mut price = Price::new(10.0, 100.0, jiff::civil::date(2026, 5, 1));
        price.cache_read_per_million_usd = Some(1.0);
        let usage = meter.counts(MOST).usage(Some(&price));
        assert_eq!((usage.input_tokens, usage.output_tokens), (1110, 25));
        // 10 plain, 100 written at the plain price, 1000 from the cache, 25 written by the model.
        let expected = (110.0 * 10.0 + 1000.0 + 25.0 * 100.0) / 1e6;
        assert!((usage.cost_usd.unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn cached_tokens_of_a_response_are_counted_once() {
        let mut meter = Meter::new(WireFormat::Responses);
        meter.event(&json!({"type": "response.output_text.delta", "delta": "hello"}));
        meter.event(
            &json!({"type": "response.completed", "response": {"usage": {"input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 60}, "output_tokens": 7}}}),
        );
        let counts = meter.counts(MOST);
        assert_eq!(
            (counts.input, counts.cache_read, counts.output),
            (40, 60, 7)
        );
        assert_eq!(counts.usage(None).input_tokens, 100);
    }

    #[test]
    fn what_is_not_counted_is_estimated() {
        let mut meter = Meter::new(WireFormat::Messages);
        assert!(!meter.took_something());
        meter.event(&json!({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "twelve bytes"}}));
        let counts = meter.counts(MOST);
        assert_eq!((counts.input, counts.output), (900, 4));
        // And of a stream that broke, what was written beyond the count at its start.
        meter.event(&json!({"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}));
        let counts = meter.counts(MOST);
        assert_eq!((counts.input, counts.output), (5, 4));
    }

    #[test]
    fn errors_inside_of_an_answer_are_found_in_each_form() {
        for (format, event, status) in [
            (
                WireFormat::Messages,
                json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
                Some(529),
            ),
            (
                WireFormat::Responses,
                json!({"type": "error", "code": "rate_limit_exceeded", "message": "Overloaded"}),
                Some(429),
            ),
            (
                WireFormat::Responses,
                json!({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "Overloaded"}}}),
                Some(500),
            ),
            (
                WireFormat::Messages,
                json!({"error": {"message": "Overloaded"}}),
                None,
            ),
        ] {
            let mut meter = Meter::new(format);
            meter.event(&event);
            let broken = meter.broken.unwrap();
            assert_eq!(broken.status, status, "{event}");
            assert_eq!(broken.message, "Overloaded", "{event}");
        }
    }
}
