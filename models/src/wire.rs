//! The wire format of chat completions: questions are written with `async-openai`'s types, answers are read as plain JSON,
//! because real endpoints leave fields out, add some, send numbers as strings and invent finish reasons.

#[cfg(test)]
mod tests;

use async_openai::types::chat::{
    ChatCompletionRequestAssistantMessage, ChatCompletionRequestAssistantMessageContent,
    ChatCompletionRequestMessage, ChatCompletionRequestSystemMessage,
    ChatCompletionRequestUserMessage, ChatCompletionStreamOptions, CreateChatCompletionRequest,
    ResponseFormat, ResponseFormatJsonSchema,
};
use bytes::Bytes;
use ports::{Message, ModelCall, Speaker};
use serde_json::{Map, Value, json};

use crate::sse;

/// The body of a question of the crew's own.
pub(crate) fn request(
    call: &ModelCall,
    model: &str,
    max_output_tokens: u32,
    temperature: Option<f64>,
) -> Value {
    let request = CreateChatCompletionRequest {
        model: model.to_owned(),
        messages: call.messages.iter().map(message).collect(),
        max_completion_tokens: Some(max_output_tokens),
        response_format: call
            .schema
            .as_ref()
            .map(|schema| ResponseFormat::JsonSchema {
                json_schema: ResponseFormatJsonSchema {
                    description: None,
                    name: schema_name(&schema.name),
                    schema: schema.schema.clone(),
                    // Strict adherence is offered for a small part of JSON Schema only; answers are validated anyway.
                    strict: Some(false),
                },
            }),
        stream: Some(true),
        stream_options: Some(ChatCompletionStreamOptions {
            include_usage: Some(true),
            include_obfuscation: None,
        }),
        ..CreateChatCompletionRequest::default()
    };
    let mut body = serde_json::to_value(request).unwrap_or_default();
    if let Some(temperature) = temperature {
        // Not through the type, whose `f32` would write 0.2 as 0.20000000298023224.
        body["temperature"] = json!(temperature);
    }
    body
}

fn message(message: &Message) -> ChatCompletionRequestMessage {
    let text = message.text.as_str();
    match message.speaker {
        Speaker::System => {
            ChatCompletionRequestMessage::System(ChatCompletionRequestSystemMessage::from(text))
        }
        Speaker::User => {
            ChatCompletionRequestMessage::User(ChatCompletionRequestUserMessage::from(text))
        }
        Speaker::Assistant => {
            ChatCompletionRequestMessage::Assistant(ChatCompletionRequestAssistantMessage {
                content: Some(ChatCompletionRequestAssistantMessageContent::from(text)),
                ..ChatCompletionRequestAssistantMessage::default()
            })
        }
    }
}

/// At most 64 letters, digits, underscores and dashes, as endpoints demand.
fn schema_name(name: &str) -> String {
    let name: String = name
        .chars()
        .take(64)
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect();
    if name.is_empty() {
        "answer".to_owned()
    } else {
        name
    }
}

/// What tells a model the form of its answer where the endpoint does not.
pub(crate) fn schema_instruction(name: &str, schema: &Value) -> String {
    format!(
        "\n\nAnswer with one JSON document and nothing else: no prose, no code fence. It must match this JSON Schema ({name}):\n{schema}"
    )
}

/// Tokens as an endpoint counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub input: u64,
    pub output: u64,
}

/// A call of a tool, put together from its pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub id: String,
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
}

/// An answer, read whole or put together from a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Completion {
    pub text: String,
    pub tool_calls: Vec<ToolCall>,
    pub finish: Option<String>,
    pub tokens: Option<Tokens>,
    pub model: Option<String>,
    /// Bytes of reasoning that came beside the answer; they are paid for and not kept.
    pub reasoning_bytes: usize,
    /// An error that came inside an answer with status 200: its message and its code.
    pub error: Option<(String, Option<u16>)>,
}

impl Completion {
    /// Reads a whole answer. `None`: this is no chat completion at all.
    pub fn from_body(body: &Value) -> Option<Self> {
        let mut completion = Self::default();
        completion.absorb(body);
        let known = body.get("choices").is_some() || completion.error.is_some();
        known.then(|| {
            // A whole answer has ended, whether the endpoint says how or not.
            completion.finish.get_or_insert_with(|| "stop".to_owned());
            completion
        })
    }

    /// Takes one chunk of a stream. Returns whether anything that is paid for came with it.
    pub fn absorb(&mut self, chunk: &Value) -> bool {
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            let code = error
                .get("code")
                .or_else(|| error.get("status"))
                .and_then(number);
            self.error = Some((
                error_message(chunk),
                code.and_then(|code| u16::try_from(code).ok()),
            ));
        }
        if let Some(model) = chunk.get("model").and_then(Value::as_str) {
            self.model = Some(model.to_owned());
        }
        let usage = chunk
            .get("usage")
            .or_else(|| chunk.pointer("/x_groq/usage"));
        if let Some(tokens) = usage.and_then(tokens) {
            self.tokens = Some(tokens);
        }
        let Some(choice) = chunk.pointer("/choices/0") else {
            return false;
        };
        if let Some(reason) = choice
            .get("finish_reason")
            .filter(|reason| !reason.is_null())
        {
            self.finish = Some(reason.as_str().unwrap_or("stop").to_owned());
        }
        let part = ["delta", "message"]
            .iter()
            .find_map(|name| choice.get(name).filter(|part| !part.is_null()))
            .unwrap_or(choice);
        let before = self.size();
        self.absorb_part(part);
        self.size() > before
    }

    fn absorb_part(&mut self, part: &Value) {
        for name in ["content", "refusal", "text"] {
            if let Some(content) = part.get(name) {
                push_text(&mut self.text, content);
            }
        }
        for name in ["reasoning_content", "reasoning"] {
            if let Some(text) = part.get(name).and_then(Value::as_str) {
                self.reasoning_bytes += text.len();
            }
        }
        let calls = part.get("tool_calls").and_then(Value::as_array);
        for call in calls.into_iter().flatten() {
            let index = call
                .get("index")
                .and_then(number)
                .and_then(|index| usize::try_from(index).ok())
                .unwrap_or_else(|| self.index_of(call));
            // Nobody calls that many tools in one answer; a larger index is not worth its memory.
            if index >= 256 {
                continue;
            }
            if self.tool_calls.len() <= index {
                self.tool_calls.resize_with(index + 1, ToolCall::default);
            }
            let slot = &mut self.tool_calls[index];
            if let Some(id) = call.get("id").and_then(Value::as_str)
                && slot.id.is_empty()
            {
                id.clone_into(&mut slot.id);
            }
            let function = call.get("function").unwrap_or(call);
            if let Some(name) = function.get("name").and_then(Value::as_str)
                && slot.name.is_empty()
            {
                name.clone_into(&mut slot.name);
            }
            match function.get("arguments") {
                Some(Value::String(text)) => slot.arguments.push_str(text),
                Some(Value::Null) | None => {}
                Some(other) => slot.arguments.push_str(&other.to_string()),
            }
        }
    }

    /// Where a piece without an index belongs: one with a new id begins a call, any other goes on with the last one.
    fn index_of(&self, call: &Value) -> usize {
        let id = call.get("id").and_then(Value::as_str).unwrap_or_default();
        match self.tool_calls.last() {
            None => 0,
            Some(last) if id.is_empty() || last.id == id => self.tool_calls.len() - 1,
            Some(_) => self.tool_calls.len(),
        }
    }

    /// Bytes that the model wrote so far.
    pub fn size(&self) -> usize {
        let calls = self.tool_calls.iter();
        self.text.len()
            + self.reasoning_bytes
            + calls
                .map(|call| call.name.len() + call.arguments.len())
                .sum::<usize>()
    }

    /// The endpoint's count of tokens, or an estimate where it did not count: better too many than money unseen, and never
    /// more than was set aside.
    pub fn tokens_or_estimate(&self, most: Tokens) -> Tokens {
        self.tokens.unwrap_or_else(|| Tokens {
            input: most.input,
            output: estimate_tokens(self.size()).min(most.output),
        })
    }

    /// The answer as the body of a chat completion.
    pub fn to_body(&self, id: &str, created: i64, model: &str) -> Value {
        let mut message = json!({"role": "assistant", "content": self.text});
        if !self.tool_calls.is_empty() {
            if self.text.is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = self
                .tool_calls
                .iter()
                .map(|call| {
                    json!({
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    })
                })
                .collect();
        }
        let mut body = json!({
            "id": id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [{
                "index": 0,
                "message": message,
                "finish_reason": self.finish.as_deref().unwrap_or("stop"),
            }],
        });
        if let Some(tokens) = self.tokens {
            body["usage"] = usage_value(tokens);
        }
        body
    }
}

fn usage_value(tokens: Tokens) -> Value {
    json!({
        "prompt_tokens": tokens.input,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.input + tokens.output,
    })
}

/// A whole answer as the stream that a caller asked for.
pub(crate) fn body_to_events(body: &Value, include_usage: bool) -> Vec<Bytes> {
    let mut head = Map::new();
    for name in ["id", "created", "model"] {
        if let Some(value) = body.get(name) {
            head.insert(name.to_owned(), value.clone());
        }
    }
    head.insert("object".to_owned(), json!("chat.completion.chunk"));
    let chunk = |choices: Value, usage: Option<&Value>| {
        let mut chunk = head.clone();
        chunk.insert("choices".to_owned(), choices);
        if let Some(usage) = usage {
            chunk.insert("usage".to_owned(), usage.clone());
        }
        sse::event(&Value::Object(chunk).to_string())
    };
    let choice = body.pointer("/choices/0").cloned().unwrap_or(Value::Null);
    let mut delta = choice.get("message").cloned().unwrap_or_else(|| json!({}));
    if let Some(calls) = delta.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for (index, call) in calls.iter_mut().enumerate() {
            call["index"] = json!(index);
        }
    }
    let finish = choice
        .get("finish_reason")
        .filter(|reason| reason.is_string())
        .cloned()
        .unwrap_or_else(|| json!("stop"));
    let mut events = vec![
        chunk(
            json!([{"index": 0, "delta": delta, "finish_reason": null}]),
            None,
        ),
        chunk(
            json!([{"index": 0, "delta": {}, "finish_reason": finish}]),
            None,
        ),
    ];
    if include_usage && let Some(usage) = body.get("usage") {
        events.push(chunk(json!([]), Some(usage)));
    }
    events.push(sse::event("[DONE]"));
    events
}

/// A third of the bytes: more than any tokenizer makes of prose or code, so that a reservation is seldom too small.
pub(crate) fn estimate_tokens(bytes: usize) -> u64 {
    u64::try_from(bytes.div_ceil(3)).unwrap_or(u64::MAX)
}

/// Whether an answer is longer than `most` tokens beyond any doubt: by the endpoint's own count, or by what it wrote, where no
/// tokenizer puts as many bytes into a token over a whole answer. Some count a few tokens that the limit leaves out.
pub(crate) fn is_beyond(most: u64, counted: Option<u64>, written: usize) -> bool {
    const ROOM: u64 = 256;
    const BYTES_A_TOKEN: usize = 8;
    let written = u64::try_from(written / BYTES_A_TOKEN).unwrap_or(u64::MAX);
    counted.unwrap_or(0).max(written) > most.saturating_add(ROOM)
}

/// Bytes that the model wrote with one chunk, in all of its choices.
pub(crate) fn written(chunk: &Value) -> usize {
    let text = |value: &Value| match value {
        Value::String(text) => text.len(),
        Value::Array(_) | Value::Object(_) => value.to_string().len(),
        _ => 0,
    };
    let choices = chunk["choices"].as_array();
    choices
        .into_iter()
        .flatten()
        .map(|choice| {
            let delta = if choice["delta"].is_object() {
                &choice["delta"]
            } else {
                choice
            };
            let names = [
                "content",
                "refusal",
                "text",
                "reasoning_content",
                "reasoning",
            ];
            let calls = delta["tool_calls"].as_array().into_iter().flatten();
            names.iter().map(|name| text(&delta[*name])).sum::<usize>()
                + calls
                    .map(|call| {
                        text(&call["function"]["name"]) + text(&call["function"]["arguments"])
                    })
                    .sum::<usize>()
        })
        .sum()
}

/// What an error body says, in whatever form it says it; at most 300 characters.
pub(crate) fn error_message(body: &Value) -> String {
    let text = [
        "/error/message",
        "/error",
        "/message",
        "/detail",
        "/errors/0/message",
        "/0/error/message",
    ]
    .iter()
    .find_map(|path| match body.pointer(path) {
        Some(Value::String(text)) if !text.is_empty() => Some(text.clone()),
        _ => None,
    })
    .unwrap_or_else(|| body.to_string());
    text.chars().take(300).collect()
}

/// The JSON in an answer that wraps it in a code fence or thinks aloud before it; any other text as it is.
pub(crate) fn bare_json(text: &str) -> &str {
    let mut text = text.trim();
    if text.starts_with("<think>")
        && let Some((_, rest)) = text.split_once("</think>")
    {
        text = rest.trim();
    }
    if let Some(fenced) = text.strip_prefix("```")
        && let Some((_language, inside)) = fenced.split_once('\n')
        && let Some((inside, "")) = inside.rsplit_once("```")
    {
        text = inside.trim();
    }
    text
}

/// Whether an answer is JSON, whatever its schema.
pub(crate) fn is_json(text: &str) -> bool {
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

/// The text of the last message of a role in a request body.
pub(crate) fn last_text(body: &Value, role: &str) -> String {
    let messages = body.get("messages").and_then(Value::as_array);
    let last = messages
        .into_iter()
        .flatten()
        .rfind(|message| message.get("role").and_then(Value::as_str) == Some(role));
    let mut text = String::new();
    if let Some(content) = last.and_then(|message| message.get("content")) {
        push_text(&mut text, content);
    }
    text
}

/// How many messages of the assistant a request body holds: a worker's turn.
pub(crate) fn assistant_messages(body: &Value) -> u32 {
    let messages = body.get("messages").and_then(Value::as_array);
    let count = messages
        .into_iter()
        .flatten()
        .filter(|message| message.get("role").and_then(Value::as_str) == Some("assistant"))
        .count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Whether a request body asks for a stream.
pub(crate) fn wants_stream(body: &Value) -> bool {
    body.get("stream").and_then(Value::as_bool) == Some(true)
}

/// Whether a request body asks for the usage at the end of its stream.
pub(crate) fn wants_usage(body: &Value) -> bool {
    body.pointer("/stream_options/include_usage")
        .and_then(Value::as_bool)
        == Some(true)
}

fn push_text(out: &mut String, content: &Value) {
    match content {
        Value::String(text) => out.push_str(text),
        Value::Array(parts) => {
            for part in parts {
                if let Some(text) = part
                    .as_str()
                    .or_else(|| part.get("text").and_then(Value::as_str))
                {
                    out.push_str(text);
                }
            }
        }
        _ => {}
    }
}

fn tokens(usage: &Value) -> Option<Tokens> {
    let get = |names: [&str; 2]| {
        names
            .iter()
            .find_map(|name| usage.get(name).and_then(number))
    };
    let (input, output) = (
        get(["prompt_tokens", "input_tokens"]),
        get(["completion_tokens", "output_tokens"]),
    );
    // A usage of nothing at all is what some servers send in every chunk but the last.
    if input.unwrap_or(0) == 0 && output.unwrap_or(0) == 0 {
        return None;
    }
    Some(Tokens {
        input: input.unwrap_or(0),
        output: output.unwrap_or(0),
    })
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64().or_else(|| {
            let float = number.as_f64().filter(|f| (0.0..1e15).contains(f))?;
            // In range and not negative, as just checked.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            Some(float as u64)
        }),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}
