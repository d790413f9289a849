//! Droid (Factory.ai): `droid exec`, one JSON object a line. It needs an account of its own (`FACTORY_API_KEY`, a secret of the
//! project) and its hosts on the job's allowlist; the model itself is reached through the broker.

use super::{Adapter, Call, Heard, Prompt, event, nothing, sum, text};
use serde_json::json;

pub(super) const ADAPTER: Adapter = Adapter {
    name: "droid",
    program: "droid",
    prompt: Prompt::File,
    arguments,
    environment: nothing,
    files,
    leaves: &[],
    read,
};

fn arguments(call: &Call<'_>) -> Vec<String> {
    // The sandbox around it is what confines it; its own questions would be asked to nobody.
    let mut arguments = vec![
        "exec".to_owned(),
        "--skip-permissions-unsafe".to_owned(),
        "--output-format".to_owned(),
        "stream-json".to_owned(),
        "--cwd".to_owned(),
        call.workspace.display().to_string(),
    ];
    if let Some(model) = call.model {
        arguments.extend(["--model".to_owned(), format!("custom:{model}")]);
    }
    if let Some(session) = call.session {
        arguments.extend(["--session-id".to_owned(), session.to_owned()]);
    }
    arguments.extend(["--file".to_owned(), call.prompt_file.display().to_string()]);
    arguments
}

fn files(call: &Call<'_>) -> Vec<(&'static str, String)> {
    let Some(model) = call.model else {
        return Vec::new();
    };
    let settings = json!({"customModels": [{
        "model": model,
        "displayName": model,
        "baseUrl": call.environment.openai_base_url,
        "apiKey": call.environment.openai_api_key,
        "provider": "generic-chat-completion-api",
    }]});
    vec![(".factory/settings.json", settings.to_string())]
}

fn read(heard: &mut Heard, line: &str) {
    let Some((kind, value)) = event(line) else {
        return;
    };
    heard.keep_session(&value, &["/session_id", "/sessionId"]);
    match kind.as_str() {
        "tool_call" => {
            if let Some(tool) = text(&value, &["/toolName", "/name"]) {
                heard.does(tool);
            }
        }
        "message" if text(&value, &["/role"]) == Some("assistant") => {
            heard.does(text(&value, &["/text"]).unwrap_or_default());
        }
        "completion" | "result" => {
            heard.input_tokens = sum(&value, &["/usage/input_tokens", "/usage/inputTokens"]);
            heard.output_tokens = sum(&value, &["/usage/output_tokens", "/usage/outputTokens"]);
            let words = text(&value, &["/finalText", "/result"]).unwrap_or_default();
            if value.pointer("/is_error") == Some(&serde_json::Value::Bool(true)) {
                heard.trouble = Some(words.to_owned());
            } else {
                heard.says(words);
            }
        }
        "error" => heard.trouble = text(&value, &["/message", "/error"]).map(str::to_owned),
        _ => {}
    }
}
