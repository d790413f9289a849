//! The model's endpoint: OpenAI's chat completions with tool calls, as real endpoints speak it.

use super::{Options, tools};
use crate::http;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// Longest pause that an endpoint can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(1);
/// Tool outputs at the end of the conversation that are never shortened.
const FRESH_OUTPUTS: usize = 6;
/// What is left of an old output in a conversation that grew too long, in bytes.
const OLD_OUTPUT_BYTES: usize = 600;

/// One call of a tool, as the model wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ToolCall {
    pub(super) id: String,
    pub(super) name: String,
    /// JSON, if the model kept to it.
    pub(super) arguments: String,
}

/// What the model answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) calls: Vec<ToolCall>,
    /// It reached its length limit.
    pub(super) cut_off: bool,
}

impl Answer {
    /// The answer as a message of the conversation.
    pub(super) fn message(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.text});
        if !self.calls.is_empty() {
            let calls: Vec<Value> = self
                .calls
                .iter()
                .map(|call| {
                    json!({"id": call.id, "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments}})
                })
                .collect();
            message["tool_calls"] = calls.into();
            if self.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        message
    }
}

/// Why one try gave nothing.
enum Failed {
    /// Another try may help, after this pause if the endpoint named one.
    Retry(String, Option<Duration>),
    /// The conversation is too long.
    TooLong(String),
    /// No try will help.
    Fatal(String),
}

/// A client of the endpoint.
pub(super) struct Model<'a> {
    client: reqwest::Client,
    options: &'a Options,
}

impl<'a> Model<'a> {
    pub(super) fn new(options: &'a Options) -> Result<Self, String> {
        let environment = &options.environment;
        let client = http::client(&environment.openai_base_url, environment.idle)
            .map_err(|error| format!("cannot make an HTTP client: {}", http::chain(&error)))?;
        Ok(Self { client, options })
    }

    /// Asks until there is an answer, or no hope.
    pub(super) async fn ask(&self, messages: &[Value]) -> Result<Answer, String> {
        let mut room = self.options.context_bytes;
        let mut pauses = self.options.retry_pauses.iter();
        let mut shrunk = 0;
        loop {
            match self.once(&fitted(messages, room)).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Fatal(reason)) => return Err(reason),
                Err(Failed::TooLong(reason)) => {
                    shrunk += 1;
                    if shrunk > 4 {
                        return Err(reason);
                    }
                    println!("artel-agent: the conversation is too long for the model; shortened");
                    room /= 2;
                }
                Err(Failed::Retry(reason, asked)) => {
                    let Some(pause) = pauses.next() else {
                        let tries = self.options.retry_pauses.len() + 1;
                        return Err(format!(
                            "the model gave no answer in {tries} tries: {reason}"
                        ));
                    };
                    let pause = asked.map_or(*pause, |asked| asked.min(MAX_RETRY_AFTER));
                    println!(
                        "artel-agent: {reason}; trying again in {} ms",
                        pause.as_millis()
                    );
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn once(&self, messages: &[Value]) -> Result<Answer, Failed> {
        let environment = &self.options.environment;
        let url = format!("{}/chat/completions", environment.openai_base_url);
        let lost = |error: reqwest::Error| {
            Failed::Retry(
                format!("no answer from the model: {}", http::chain(&error)),
                None,
            )
        };
        let started = Instant::now();
        let mut response = self
            .client
            .post(url)
            .bearer_auth(&environment.openai_api_key)
            .header("X-Artel-Thread", header_text(&environment.thread))
            .header("X-Artel-Role", "developer")
            .json(&json!({
                "model": environment.model, "messages": messages, "tools": tools(),
            }))
            .send()
            .await
            .map_err(lost)?;
        let status = response.status();
        let retry_after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let streamed = response
            .headers()
            .get("content-type")
            .and_then(|value| value.to_str().ok())
            .is_some_and(|kind| kind.starts_with("text/event-stream"));
        let body = http::body(&mut response, MAX_ANSWER_BYTES)
            .await
            .map_err(lost)?;
        if body.len() >= MAX_ANSWER_BYTES {
            return Err(Failed::Fatal(format!(
                "the model's answer has more than {MAX_ANSWER_BYTES} bytes"
            )));
        }
        if !status.is_success() {
            return Err(refused(status.as_u16(), &body, retry_after));
        }
        let answer = if streamed {
            from_stream(&body)
        } else {
            serde_json::from_str(&body)
                .map_err(|error| format!("is not JSON: {error}"))
                .and_then(|value| from_json(&value))
        };
        let took = started.elapsed().as_secs();
        answer.map_err(|reason| {
            Failed::Retry(format!("the model's answer after {took} s {reason}"), None)
        })
    }
}

fn refused(status: u16, body: &str, retry_after: Option<Duration>) -> Failed {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let words = value["error"]["message"]
        .as_str()
        .or_else(|| value["error"].as_str())
        .unwrap_or(body);
    let words: String = words.chars().take(500).collect();
    let reason = format!("the model endpoint answered {status}: {words}");
    match status {
        408 | 425 | 429 | 500..=599 => Failed::Retry(reason, retry_after),
        400 | 413 if body.contains("context_length") || body.contains("maximum context") => {
            Failed::TooLong(reason)
        }
        _ => Failed::Fatal(reason),
    }
}

/// Reads a whole answer. Unknown fields and finish reasons do not matter.
fn from_json(value: &Value) -> Result<Answer, String> {
    let choice = &value["choices"][0];
    let message = &choice["message"];
    if !message.is_object() {
        return Err("has no message".to_owned());
    }
    let mut answer = Answer {
        text: text_of(&message["content"]),
        cut_off: choice["finish_reason"] == "length",
        ..Answer::default()
    };
    for (index, call) in message["tool_calls"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let arguments = match &call["function"]["arguments"] {
            Value::String(text) => text.clone(),
            Value::Null => "{}".to_owned(),
            other => other.to_string(),
        };
        answer.calls.push(ToolCall {
            id: call_id(call["id"].as_str().unwrap_or_default(), index),
            name: call["function"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            arguments,
        });
    }
    Ok(answer)
}

/// Puts an answer together that came in server-sent events although nobody asked for them.
fn from_stream(body: &str) -> Result<Answer, String> {
    let mut answer = Answer::default();
    let mut ended = false;
    for data in body.lines().filter_map(|line| line.strip_prefix("data:")) {
        let data = data.trim();
        if data == "[DONE]" {
            ended = true;
            break;
        }
        let Ok(value) = serde_json::from_str::<Value>(data) else {
            return Err("has an event that is not JSON".to_owned());
        };
        if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
            return Err(format!("ends with an error: {error}"));
        }
        let choice = &value["choices"][0];
        if let Some(reason) = choice["finish_reason"].as_str() {
            ended = true;
            answer.cut_off = reason == "length";
        }
        let delta = &choice["delta"];
        answer.text.push_str(&text_of(&delta["content"]));
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"]
                .as_u64()
                .and_then(|index| usize::try_from(index).ok())
                .unwrap_or(answer.calls.len().saturating_sub(1));
            if index > 63 {
                return Err("calls more than 64 tools at once".to_owned());
            }
            while answer.calls.len() <= index {
                let id = call_id("", answer.calls.len());
                answer.calls.push(ToolCall {
                    id,
                    name: String::new(),
                    arguments: String::new(),
                });
            }
            let call = &mut answer.calls[index];
            if let Some(id) = part["id"].as_str().filter(|id| !id.is_empty()) {
                id.clone_into(&mut call.id);
            }
            call.name
                .push_str(part["function"]["name"].as_str().unwrap_or_default());
            call.arguments
                .push_str(part["function"]["arguments"].as_str().unwrap_or_default());
        }
    }
    if ended {
        Ok(answer)
    } else {
        Err("ended early".to_owned())
    }
}

/// Text, whether it is a string or a list of parts.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .filter_map(|part| part["text"].as_str())
            .collect::<Vec<_>>()
            .concat(),
        _ => String::new(),
    }
}

/// Some endpoints give no ids; within an answer the place is one.
fn call_id(given: &str, index: usize) -> String {
    if given.is_empty() {
        format!("call-{index}")
    } else {
        given.to_owned()
    }
}

/// The conversation within about `room` bytes: old outputs lose their middle, the newest stay.
fn fitted(messages: &[Value], room: usize) -> Vec<Value> {
    let mut messages = messages.to_vec();
    let size = |message: &Value| message.to_string().len();
    let mut total: usize = messages.iter().map(size).sum();
    let outputs: Vec<usize> = (0..messages.len())
        .filter(|index| messages[*index]["role"] == "tool")
        .collect();
    for index in outputs.iter().rev().skip(FRESH_OUTPUTS).rev() {
        if total <= room {
            break;
        }
        let message = &mut messages[*index];
        let text = message["content"].as_str().unwrap_or_default();
        if text.len() > OLD_OUTPUT_BYTES {
            let mut kept = super::shell::HeadAndTail::new(OLD_OUTPUT_BYTES);
            kept.push(text.as_bytes());
            let before = size(message);
            message["content"] = kept.text().into();
            total = total - before + size(message);
        }
    }
    messages
}

/// A header value holds visible ASCII only; anything else is left out.
fn header_text(text: &str) -> String {
    text.chars()
        .filter(char::is_ascii_graphic)
        .take(200)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_real_endpoints_write_them() {
        let answer = from_json(
            &json!({"choices": [{"finish_reason": "eos_token", "message": {
                "role": "assistant", "reasoning_content": "hm",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "tool_calls": [{"function": {"name": "shell", "arguments": {"command": "ls"}}}],
            }}]}),
        )
        .unwrap();
        assert_eq!(answer.text, "ab");
        assert_eq!(answer.calls[0].id, "call-0");
        assert_eq!(answer.calls[0].arguments, "{\"command\":\"ls\"}");
        assert!(from_json(&json!({"choices": []})).is_err());
    }

    #[test]
    fn a_stream_is_put_together_and_one_that_ends_early_is_an_error() {
        let events = [
            json!({"choices": [{"delta": {"role": "assistant", "content": "Let me "}}]}),
            json!({"choices": [{"delta": {"content": "look."}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "shell", "arguments": "{\"command\":"}}]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "\"ls\"}"}}]}}]}),
            json!({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}),
        ];
        let lines: Vec<String> = events.iter().map(|e| format!("data: {e}\n\n")).collect();
        let answer = from_stream(&lines.concat()).unwrap();
        assert_eq!(answer.text, "Let me look.");
        assert_eq!(answer.calls[0].arguments, "{\"command\":\"ls\"}");
        assert!(from_stream(&lines[..3].concat()).is_err());
        assert!(from_stream("data: {\"error\": {\"message\": \"overloaded\"}}\n\n").is_err());
    }

    #[test]
    fn a_conversation_that_grew_too_long_loses_the_middle_of_its_oldest_outputs() {
        let mut messages = vec![json!({"role": "system", "content": "s"})];
        for n in 0..20 {
            messages.push(json!({"role": "assistant", "content": format!("step {n}")}));
            messages
                .push(json!({"role": "tool", "tool_call_id": "x", "content": "y".repeat(5000)}));
        }
        assert_eq!(
            fitted(&messages, 1_000_000),
            messages,
            "one that fits stays as it is"
        );
        let short = fitted(&messages, 60_000);
        assert_eq!(
            short.len(),
            messages.len(),
            "no message is dropped: turns are counted"
        );
        let bytes: usize = short.iter().map(|m| m.to_string().len()).sum();
        assert!(bytes <= 60_000, "{bytes}");
        assert_eq!(short.last(), messages.last());
    }
}
