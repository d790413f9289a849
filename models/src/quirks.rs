//! What an endpoint refuses of a question, learned from its refusals and remembered for as long as the process lives.

use ports::Schema;
use serde_json::{Value, json};

use crate::wire;

/// What one model at one endpoint will not have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
// Each is a fact for itself; no two of them form a state.
#[allow(clippy::struct_excessive_bools)]
pub(crate) struct Quirks {
    /// Refuses `response_format`: the schema goes into the message.
    no_response_format: bool,
    /// Takes `response_format` and pays no heed to it: the schema goes into the message as well.
    schema_in_message: bool,
    /// How the limit of output tokens is called.
    limit: LimitName,
    no_temperature: bool,
    no_stream_options: bool,
    no_stream: bool,
}

/// Local servers know `max_tokens` and ignore the newer name, which would leave an answer without a limit; newer models of
/// OpenAI refuse the older one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LimitName {
    #[default]
    Old,
    New,
}

impl Quirks {
    /// Learns from a refusal (400, 404, 415 or 422) of `body`. Returns whether asking again in another way makes sense:
    /// only if `body` held what the next question will not hold, so that this comes to an end. Of a worker's question
    /// (`own` is false) only parameters may change.
    pub fn learn(&mut self, status: u16, message: &str, body: &Value, own: bool) -> bool {
        if !matches!(status, 400 | 404 | 415 | 422) {
            return false;
        }
        let message = message.to_lowercase();
        let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
        let sent = |name: &str| body.get(name).is_some_and(|value| !value.is_null());
        let learned = if sent("stream_options") && says(&["stream_options"]) {
            &mut self.no_stream_options
        } else if sent("max_tokens")
            && says(&["max_tokens"])
            // Only where the name is refused; where its value is too large the other name would be as well.
            && says(&["max_completion_tokens", "support", "unrecognized", "unknown"])
            && !says(&["too large", "context length", "exceed"])
        {
            self.limit = LimitName::New;
            return true;
        } else if sent("temperature") && says(&["temperature"]) {
            &mut self.no_temperature
        } else if own
            && sent("response_format")
            && says(&["response_format", "schema", "structured", "json"])
        {
            &mut self.no_response_format
        } else if own && wire::wants_stream(body) && says(&["stream"]) && !says(&["stream_options"])
        {
            &mut self.no_stream
        } else if own
            && sent("response_format")
            && status != 404
            && !says(&["token", "context", "temperature", "model", "stream"])
        {
            // A refusal that does not say what it refuses: the least common thing in the question is the likeliest.
            &mut self.no_response_format
        } else {
            return false;
        };
        *learned = true;
        true
    }

    /// Remembers an answer that was not even JSON although a schema was sent.
    pub fn learn_schema_ignored(&mut self) {
        self.schema_in_message = true;
    }

    /// Rewrites a question of the crew's own into what this endpoint takes.
    pub fn adapt(&self, body: &mut Value, schema: Option<&Schema>) {
        if let Some(schema) = schema {
            if self.no_response_format {
                remove(body, "response_format");
            }
            if self.no_response_format || self.schema_in_message {
                append_to_last_user_message(
                    body,
                    &wire::schema_instruction(&schema.name, &schema.schema),
                );
            }
        }
        self.adapt_parameters(body);
        if self.no_stream {
            remove(body, "stream");
            remove(body, "stream_options");
        }
    }

    /// Rewrites only parameters: for a worker's question, whose messages are its own.
    pub fn adapt_parameters(&self, body: &mut Value) {
        let (from, to) = match self.limit {
            LimitName::Old => ("max_completion_tokens", "max_tokens"),
            LimitName::New => ("max_tokens", "max_completion_tokens"),
        };
        if let Some(limit) = remove(body, from) {
            body[to] = limit;
        }
        if self.no_temperature {
            remove(body, "temperature");
        }
        if self.no_stream_options {
            remove(body, "stream_options");
        }
    }
}

fn remove(body: &mut Value, name: &str) -> Option<Value> {
    body.as_object_mut()?.remove(name)
}

fn append_to_last_user_message(body: &mut Value, text: &str) {
    let Some(messages) = body.get_mut("messages").and_then(Value::as_array_mut) else {
        return;
    };
    let user = messages
        .iter_mut()
        .rfind(|message| message.get("role").and_then(Value::as_str) == Some("user"));
    match user {
        Some(message) => {
            let before = message
                .get("content")
                .and_then(Value::as_str)
                .unwrap_or_default();
            message["content"] = json!(format!("{before}{text}"));
        }
        None => messages.push(json!({"role": "user", "content": text.trim_start()})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body() -> Value {
        json!({"messages": [{"role": "user", "content": "q"}], "max_completion_tokens": 9, "temperature": 0.1,
            "response_format": {"type": "json_schema"}, "stream": true, "stream_options": {"include_usage": true}})
    }

    fn schema() -> Schema {
        Schema {
            name: "Plan".to_owned(),
            schema: json!({"type": "object"}),
        }
    }

    #[test]
    fn each_refusal_is_learned_once_and_then_obeyed() {
        let mut quirks = Quirks::default();
        for message in [
            "Unsupported parameter: 'max_tokens', use 'max_completion_tokens' instead",
            "temperature does not support 0.1",
            "unknown field stream_options",
            "response_format type json_schema is not supported",
        ] {
            let mut sent = body();
            quirks.adapt(&mut sent, Some(&schema()));
            assert!(quirks.learn(400, message, &sent, true), "{message}");
            let mut next = body();
            quirks.adapt(&mut next, Some(&schema()));
            assert!(!quirks.learn(400, message, &next, true), "{message} {next}");
        }
        let mut adapted = body();
        quirks.adapt(&mut adapted, Some(&schema()));
        assert_eq!(adapted["max_completion_tokens"], 9);
        assert!(adapted.get("response_format").is_none() && adapted.get("temperature").is_none());
        assert!(
            adapted["messages"][0]["content"]
                .as_str()
                .unwrap()
                .contains("JSON Schema (Plan)")
        );
    }

    #[test]
    fn an_unexplained_refusal_gives_up_the_schema_first_and_then_the_question() {
        let mut quirks = Quirks::default();
        let mut sent = body();
        quirks.adapt(&mut sent, Some(&schema()));
        assert_eq!(sent["max_tokens"], 9);
        assert!(quirks.learn(400, "Bad Request", &sent, true));
        let mut sent = body();
        quirks.adapt(&mut sent, Some(&schema()));
        assert!(!quirks.learn(400, "Bad Request", &sent, true));
        assert!(!Quirks::default().learn(400, "response_format", &body(), false));
        assert!(!Quirks::default().learn(404, "no such model", &body(), true));
        let too_long = "max_tokens or max_completion_tokens is too large: 9";
        let mut sent = json!({"max_tokens": 9});
        assert!(!Quirks::default().learn(400, too_long, &sent, true));
        sent["response_format"] = json!({});
        assert!(!Quirks::default().learn(400, too_long, &sent, true));
        assert!(!Quirks::default().learn(401, "response_format", &body(), true));
    }
}
