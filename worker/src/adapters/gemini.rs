//! Gemini CLI: headless when its input is a pipe, one JSON object a line. It speaks Google's own wire format, which the broker
//! does not: it needs a key of its own (`GEMINI_API_KEY`, a secret of the project) and its host on the job's allowlist. So its
//! tokens are counted by itself.

use super::{Adapter, Call, Heard, Prompt, event, nothing, sum, text};

pub(super) const ADAPTER: Adapter = Adapter {
    name: "gemini",
    program: "gemini",
    prompt: Prompt::Stdin,
    arguments,
    environment: nothing,
    files: nothing,
    leaves: &[],
    read,
};

fn arguments(call: &Call<'_>) -> Vec<String> {
    // The sandbox around it is what confines it; its own questions would be asked to nobody.
    let mut arguments = vec![
        // Without it, what `--yolo` allows is taken back in a folder that nobody has called trusted.
        "--skip-trust".to_owned(),
        "--yolo".to_owned(),
        "--output-format".to_owned(),
        "stream-json".to_owned(),
    ];
    if let Some(model) = call.model {
        arguments.extend(["--model".to_owned(), model.to_owned()]);
    }
    if let Some(session) = call.session {
        arguments.extend(["--resume".to_owned(), session.to_owned()]);
    }
    arguments
}

fn read(heard: &mut Heard, line: &str) {
    let Some((kind, value)) = event(line) else {
        return;
    };
    match kind.as_str() {
        "init" => heard.keep_session(&value, &["/session_id", "/sessionId"]),
        "tool_use" => {
            if let Some(tool) = text(&value, &["/tool_name"]) {
                heard.does(tool);
            }
        }
        "message" if text(&value, &["/role"]) == Some("assistant") => {
            let words = text(&value, &["/content"]).unwrap_or_default();
            if value.pointer("/delta") == Some(&serde_json::Value::Bool(true)) {
                heard.summary.push_str(words);
            } else {
                heard.says(words);
            }
        }
        "error" => heard.trouble = text(&value, &["/message"]).map(str::to_owned),
        "result" => {
            heard.input_tokens = sum(&value, &["/stats/input_tokens"]);
            heard.output_tokens = sum(&value, &["/stats/output_tokens"]);
            if text(&value, &["/status"]) == Some("success") {
                heard.trouble = None;
            } else {
                let words = text(&value, &["/error/message"]).unwrap_or("no reason given");
                heard.trouble = Some(words.to_owned());
            }
        }
        _ => {}
    }
}
