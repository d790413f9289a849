//! Codex: `codex exec`, one JSON object a line. It speaks OpenAI's Responses to the broker.

use super::{Adapter, Call, Heard, Prompt, event, nothing, sum, text};

pub(super) const ADAPTER: Adapter = Adapter {
    name: "codex",
    program: "codex",
    prompt: Prompt::Stdin,
    arguments,
    environment: nothing,
    files: nothing,
    leaves: &[],
    read,
};

fn arguments(call: &Call<'_>) -> Vec<String> {
    let mut arguments = vec![
        "exec".to_owned(),
        "--json".to_owned(),
        "--skip-git-repo-check".to_owned(),
    ];
    let mut set = |name: &str, value: &str| {
        // Values are TOML; a JSON string is one.
        let value = serde_json::Value::from(value);
        arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
    };
    // The sandbox around it is what confines it. (As settings, because `resume` has no options for them.)
    set("approval_policy", "never");
    set("sandbox_mode", "danger-full-access");
    set("model_provider", "artel");
    set("model_providers.artel.name", "artel");
    set(
        "model_providers.artel.base_url",
        &call.environment.openai_base_url,
    );
    set("model_providers.artel.env_key", "OPENAI_API_KEY");
    set("model_providers.artel.wire_api", "responses");
    // The model's provider would search in the worker's stead; the broker takes that tool out anyway.
    set("web_search", "disabled");
    if let Some(model) = call.model {
        set("model", model);
    }
    if let Some(session) = call.session {
        arguments.extend(["resume".to_owned(), session.to_owned()]);
    }
    arguments.push("-".to_owned());
    arguments
}

fn read(heard: &mut Heard, line: &str) {
    let Some((kind, value)) = event(line) else {
        return;
    };
    match kind.as_str() {
        "thread.started" => heard.keep_session(&value, &["/thread_id"]),
        "item.started" => {
            if let Some(words) = text(&value, &["/item/command", "/item/text"]) {
                heard.does(words);
            }
        }
        "item.completed" if text(&value, &["/item/type"]) == Some("agent_message") => {
            heard.says(text(&value, &["/item/text"]).unwrap_or_default());
        }
        // Cached tokens are part of the input tokens here.
        "turn.completed" => {
            heard.input_tokens += sum(&value, &["/usage/input_tokens"]);
            heard.output_tokens += sum(&value, &["/usage/output_tokens"]);
            // It says `error` also when it connects once more; what it came over is no trouble.
            heard.trouble = None;
        }
        "turn.failed" | "error" => {
            let words = text(&value, &["/error/message", "/message"]).unwrap_or("no reason given");
            heard.trouble = Some(words.to_owned());
        }
        _ => {}
    }
}
