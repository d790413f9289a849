//! aider: plain text. It commits by itself, and takes up a session by reading its chat history again.

use super::{Adapter, Call, Heard, Prompt, nothing};

pub(super) const ADAPTER: Adapter = Adapter {
    name: "aider",
    program: "aider",
    prompt: Prompt::File,
    arguments,
    environment,
    files: nothing,
    // Its map of the repository, among others.
    leaves: &[".aider*"],
    read,
};

fn arguments(call: &Call<'_>) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "--yes-always",
        "--no-check-update",
        "--no-show-model-warnings",
        "--no-show-release-notes",
        "--no-analytics",
        "--no-gitignore",
        "--no-pretty",
        "--no-stream",
        "--no-fancy-input",
    ]
    .map(str::to_owned)
    .into();
    // Not in the workspace: they are nothing to commit.
    for (option, file) in [
        ("--chat-history-file", "aider.chat.md"),
        ("--input-history-file", "aider.input"),
    ] {
        arguments.extend([
            option.to_owned(),
            call.home.join(file).display().to_string(),
        ]);
    }
    if let Some(model) = call.model {
        arguments.extend(["--model".to_owned(), format!("openai/{model}")]);
    }
    if call.session.is_some() {
        arguments.push("--restore-chat-history".to_owned());
    }
    arguments.extend([
        "--message-file".to_owned(),
        call.prompt_file.display().to_string(),
    ]);
    arguments
}

fn environment(call: &Call<'_>) -> Vec<(&'static str, String)> {
    vec![("OPENAI_API_BASE", call.environment.openai_base_url.clone())]
}

fn read(heard: &mut Heard, line: &str) {
    let line = line.trim();
    // There is one session a home.
    heard.session = Some("history".to_owned());
    // Such as: `Tokens: 2.1k sent, 43 received. Cost: $0.01 message, $0.02 session.`
    if let Some(rest) = line.strip_prefix("Tokens: ") {
        let count = |word: &str| {
            rest.split(", ")
                .flat_map(|part| part.split(". "))
                .find_map(|part| part.trim_end_matches('.').strip_suffix(word))
                .and_then(|number| tokens(number.trim()))
        };
        heard.input_tokens += count(" sent").unwrap_or_default();
        heard.output_tokens += count(" received").unwrap_or_default();
        let cost = rest
            .rsplit('$')
            .next()
            .and_then(|cost| cost.strip_suffix(" session."))
            .and_then(|cost| cost.parse().ok());
        heard.cost_usd = cost.or(heard.cost_usd);
    } else if let Some(words) = line.strip_prefix("Commit ") {
        heard.says(&format!("Commit {words}"));
    } else if !line.is_empty() {
        heard.does(line);
    }
}

/// A number as aider writes it: `43`, `2.1k`, `12k`, `1.2M`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // bounded just before
fn tokens(text: &str) -> Option<u64> {
    let (number, factor) = match text.strip_suffix('k') {
        Some(number) => (number, 1e3),
        None => match text.strip_suffix('M') {
            Some(number) => (number, 1e6),
            None => (text, 1.0),
        },
    };
    let number: f64 = number.replace(',', "").parse().ok()?;
    Some((number * factor).round().clamp(0.0, 1e15) as u64)
}
