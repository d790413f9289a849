//! Claude Code: `claude --print`, one JSON object a line. It speaks Anthropic's Messages to the broker.

use super::{Adapter, Call, Heard, Prompt, event, nothing, sum, text};

pub(super) const ADAPTER: Adapter = Adapter {
    name: "claude-code",
    program: "claude",
    prompt: Prompt::Stdin,
    arguments,
    environment,
    files: nothing,
    leaves: &[],
    read,
};

fn arguments(call: &Call<'_>) -> Vec<String> {
    // The sandbox around it is what confines it; its own questions would be asked to nobody.
    let mut arguments = vec![
        "--print".to_owned(),
        "--output-format=stream-json".to_owned(),
        "--verbose".to_owned(),
        "--dangerously-skip-permissions".to_owned(),
    ];
    if let Some(model) = call.model {
        arguments.extend(["--model".to_owned(), model.to_owned()]);
    }
    if let Some(session) = call.session {
        arguments.extend(["--resume".to_owned(), session.to_owned()]);
    }
    arguments
}

fn environment(call: &Call<'_>) -> Vec<(&'static str, String)> {
    vec![
        // Without the version, as this client has it; the key is the job's.
        ("ANTHROPIC_BASE_URL", call.environment.broker_url.clone()),
        ("ANTHROPIC_API_KEY", call.environment.broker_key.clone()),
        ("IS_SANDBOX", "1".to_owned()),
        ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1".to_owned()),
    ]
}

fn read(heard: &mut Heard, line: &str) {
    let Some((kind, value)) = event(line) else {
        return;
    };
    heard.keep_session(&value, &["/session_id"]);
    match kind.as_str() {
        "assistant" => {
            if let Some(words) = text(&value, &["/message/content/0/text"]) {
                heard.does(words);
            } else if let Some(tool) = text(&value, &["/message/content/0/name"]) {
                heard.does(tool);
            }
        }
        "result" => {
            // The sums of the whole run.
            heard.input_tokens = sum(
                &value,
                &[
                    "/usage/input_tokens",
                    "/usage/cache_creation_input_tokens",
                    "/usage/cache_read_input_tokens",
                ],
            );
            heard.output_tokens = sum(&value, &["/usage/output_tokens"]);
            heard.cost_usd = value
                .pointer("/total_cost_usd")
                .and_then(serde_json::Value::as_f64);
            let words = text(&value, &["/result", "/subtype"]).unwrap_or_default();
            if value.pointer("/is_error") == Some(&serde_json::Value::Bool(true)) {
                heard.trouble = Some(words.to_owned());
            } else {
                heard.says(words);
            }
        }
        _ => {}
    }
}
