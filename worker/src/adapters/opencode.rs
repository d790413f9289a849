//! OpenCode: `opencode run`, one JSON object a line. The broker is a provider of its own in the configuration that it gets
//! through its environment.

use super::{Adapter, Call, Heard, Prompt, event, nothing, sum, text};
use serde_json::json;

pub(super) const ADAPTER: Adapter = Adapter {
    name: "opencode",
    program: "opencode",
    prompt: Prompt::Stdin,
    arguments,
    environment,
    files: nothing,
    leaves: &[],
    read,
};

fn arguments(call: &Call<'_>) -> Vec<String> {
    let mut arguments = vec!["run".to_owned(), "--format".to_owned(), "json".to_owned()];
    if let Some(model) = call.model {
        arguments.extend(["--model".to_owned(), format!("artel/{model}")]);
    }
    if let Some(session) = call.session {
        arguments.extend(["--session".to_owned(), session.to_owned()]);
    }
    arguments
}

fn environment(call: &Call<'_>) -> Vec<(&'static str, String)> {
    let models: serde_json::Map<_, _> = call
        .model
        .map(|model| (model.to_owned(), json!({"name": model})))
        .into_iter()
        .collect();
    let configuration = json!({
        "autoupdate": false,
        "share": "disabled",
        // The sandbox around it is what confines it; its own questions would be asked to nobody.
        "permission": {"edit": "allow", "bash": "allow", "webfetch": "allow"},
        "provider": {"artel": {
            "npm": "@ai-sdk/openai-compatible",
            "name": "Artel",
            "options": {
                "baseURL": call.environment.openai_base_url,
                "apiKey": "{env:OPENAI_API_KEY}",
            },
            "models": models,
        }},
    });
    vec![("OPENCODE_CONFIG_CONTENT", configuration.to_string())]
}

fn read(heard: &mut Heard, line: &str) {
    let Some((kind, value)) = event(line) else {
        return;
    };
    heard.keep_session(&value, &["/sessionID"]);
    match kind.as_str() {
        "text" => heard.says(text(&value, &["/part/text"]).unwrap_or_default()),
        "tool_use" => {
            if let Some(words) = text(&value, &["/part/state/title", "/part/tool"]) {
                heard.does(words);
            }
        }
        "step_finish" => {
            heard.input_tokens += sum(
                &value,
                &[
                    "/part/tokens/input",
                    "/part/tokens/cache/read",
                    "/part/tokens/cache/write",
                ],
            );
            heard.output_tokens += sum(&value, &["/part/tokens/output", "/part/tokens/reasoning"]);
            if let Some(cost) = value
                .pointer("/part/cost")
                .and_then(serde_json::Value::as_f64)
            {
                heard.cost_usd = Some(heard.cost_usd.unwrap_or_default() + cost);
            }
        }
        "error" => {
            let words = text(&value, &["/error/data/message", "/error/name", "/error"]);
            heard.trouble = words.map(str::to_owned);
        }
        _ => {}
    }
}
