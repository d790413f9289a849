//! The adapters, each with a stand-in for its program that writes down what it was called with, prints what the real one
//! prints, and commits.

use crate::endpoint::{Endpoint, Workspace};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use worker::adapters;

/// What a stand-in was called with, and what came of it.
struct Called {
    arguments: Vec<String>,
    stdin: String,
    environment: String,
    result: Value,
    progress: Vec<String>,
}

/// A folder with the stand-in, and a workspace for as many attempts as wanted.
struct Stage {
    folder: tempfile::TempDir,
    workspace: Workspace,
}

impl Stage {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            workspace: Workspace::new(),
        }
    }

    /// Runs an attempt in which the program prints these lines and then does what the script says.
    async fn attempt(&self, name: &str, model: Option<&str>, prints: &str, then: &str) -> Called {
        let adapter = adapters::named(name).unwrap();
        let folder = self.folder.path();
        std::fs::write(folder.join("prints"), prints).unwrap();
        let program = folder.join(adapter.program);
        let script = format!(
            "#!/bin/sh\nprintf '%s\\n' \"$@\" > {0}/arguments\nenv > {0}/environment\ncat > {0}/stdin\ncat {0}/prints\n{then}\n",
            folder.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let endpoint = Endpoint::start([]).await;
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_artel-agent"));
        command
            .args(["--workspace", self.workspace.path().to_str().unwrap(), name])
            .env_clear()
            .env("PATH", path)
            .env("ARTEL_TASK_ID", "one")
            .env("ARTEL_ATTEMPT", "1")
            .env("ARTEL_BROKER_URL", &endpoint.address)
            .env("ARTEL_BROKER_KEY", "key")
            .env("OPENAI_BASE_URL", format!("{}/v1", endpoint.address))
            .env("OPENAI_API_KEY", "key")
            .env("GIT_AUTHOR_NAME", "a")
            .env("GIT_AUTHOR_EMAIL", "a@example.invalid")
            .env("GIT_COMMITTER_NAME", "a")
            .env("GIT_COMMITTER_EMAIL", "a@example.invalid")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        if let Some(model) = model {
            command.env("ARTEL_MODEL", model);
        }
        command.status().await.unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let seen = endpoint.seen();
        Called {
            arguments: read("arguments").lines().map(str::to_owned).collect(),
            stdin: read("stdin"),
            environment: read("environment"),
            result: seen.results[0].clone(),
            progress: seen
                .progress
                .iter()
                .filter_map(|said| said["text"].as_str().map(str::to_owned))
                .collect(),
        }
    }
}

const COMMITS: &str = "echo x >> x && git add x && git commit -q -m x";

fn has(called: &Called, words: &[&str]) -> bool {
    called
        .arguments
        .windows(words.len())
        .any(|window| window == words)
}

/// Whether the program was told the task and our rules, however it is told.
fn assert_told(called: &Called) {
    let prompt = called
        .arguments
        .iter()
        .find(|argument| argument.ends_with("prompt.md"))
        .map_or_else(
            || called.stdin.clone(),
            |path| std::fs::read_to_string(path).unwrap(),
        );
    assert!(prompt.starts_with("# Write a file\n"), "{prompt}");
    assert!(prompt.contains("commit everything"), "{prompt}");
}

#[tokio::test]
async fn claude_code_is_called_and_read_as_it_works() {
    let stage = Stage::new();
    let prints = r#"{"type":"system","subtype":"init","session_id":"s-1"}
{"type":"assistant","message":{"content":[{"type":"tool_use","name":"Bash"}]},"session_id":"s-1"}
{"type":"result","subtype":"success","is_error":false,"result":"Wrote it.","session_id":"s-1","total_cost_usd":0.5,"usage":{"input_tokens":3,"cache_creation_input_tokens":10,"cache_read_input_tokens":100,"output_tokens":7}}
"#;
    let first = stage
        .attempt("claude-code", Some("opus"), prints, COMMITS)
        .await;
    assert_told(&first);
    assert!(has(
        &first,
        &[
            "--print",
            "--output-format=stream-json",
            "--verbose",
            "--dangerously-skip-permissions"
        ]
    ));
    assert!(has(&first, &["--model", "opus"]));
    assert!(!first.arguments.contains(&"--resume".to_owned()));
    assert!(first.environment.contains("IS_SANDBOX=1"));
    assert!(
        first
            .environment
            .contains("ANTHROPIC_BASE_URL=http://127.0.0.1:")
    );
    assert!(first.environment.contains("ANTHROPIC_API_KEY="));
    assert_eq!(first.result["status"], "succeeded", "{}", first.result);
    let summary = first.result["summary"].as_str().unwrap();
    assert!(summary.starts_with("Wrote it."), "{summary}");
    assert!(
        summary.contains("sent 113 and received 7 tokens, for $0.5000"),
        "{summary}"
    );
    assert_eq!(first.progress, ["Bash"]);
    let second = stage.attempt("claude-code", None, prints, COMMITS).await;
    assert!(has(&second, &["--resume", "s-1"]));
    assert!(!second.arguments.contains(&"--model".to_owned()));
}

#[tokio::test]
async fn codex_is_called_and_read_as_it_works() {
    let stage = Stage::new();
    let prints = r#"{"type":"thread.started","thread_id":"t-1"}
{"type":"item.started","item":{"type":"command_execution","command":"ls"}}
{"type":"item.completed","item":{"type":"agent_message","text":"Done."}}
{"type":"turn.completed","usage":{"input_tokens":50,"cached_input_tokens":20,"output_tokens":5}}
"#;
    let first = stage
        .attempt("codex", Some("a-model"), prints, COMMITS)
        .await;
    assert_told(&first);
    assert_eq!(
        first.arguments[..3],
        ["exec", "--json", "--skip-git-repo-check"]
    );
    assert!(has(&first, &["-c", "model=\"a-model\""]));
    assert!(has(&first, &["-c", "sandbox_mode=\"danger-full-access\""]));
    let base_url = |argument: &String| {
        argument.starts_with("model_providers.artel.base_url=\"http://127.0.0.1:")
            && argument.ends_with("/v1\"")
    };
    assert!(first.arguments.iter().any(base_url));
    assert!(has(
        &first,
        &["-c", "model_providers.artel.wire_api=\"responses\""]
    ));
    assert_eq!(first.arguments.last().unwrap(), "-");
    assert_eq!(first.result["status"], "succeeded", "{}", first.result);
    let summary = first.result["summary"].as_str().unwrap();
    assert!(
        summary.contains("sent 50 and received 5 tokens."),
        "{summary}"
    );
    // A connection that was lost and made again (seen of 0.169.0).
    let lost = r#"{"type":"error","message":"Reconnecting... 1/5 (stream disconnected before completion)"}
"#;
    let second = stage
        .attempt("codex", None, &format!("{lost}{prints}"), COMMITS)
        .await;
    assert!(has(&second, &["resume", "t-1", "-"]));
    assert_eq!(second.result["status"], "succeeded", "{}", second.result);
    let third = stage
        .attempt("codex", None, &format!("{prints}{lost}"), COMMITS)
        .await;
    let reason = third.result["reason"].as_str().unwrap();
    assert!(reason.contains("Reconnecting"), "{reason}");
}

#[tokio::test]
async fn droid_is_called_and_read_as_it_works() {
    let stage = Stage::new();
    let prints = r#"{"type":"system","subtype":"init","session_id":"d-1"}
{"type":"tool_call","toolName":"Create"}
{"type":"completion","finalText":"Done.","session_id":"d-1","usage":{"input_tokens":9,"output_tokens":1}}
"#;
    let first = stage
        .attempt("droid", Some("a-model"), prints, COMMITS)
        .await;
    assert_told(&first);
    assert!(has(
        &first,
        &[
            "exec",
            "--skip-permissions-unsafe",
            "--output-format",
            "stream-json",
            "--cwd"
        ]
    ));
    assert!(has(&first, &["--model", "custom:a-model"]));
    let home = stage.workspace.path().join(".artel/home/droid");
    let settings = std::fs::read_to_string(home.join(".factory/settings.json")).unwrap();
    let settings: Value = serde_json::from_str(&settings).unwrap();
    assert_eq!(settings["customModels"][0]["apiKey"], "key");
    assert!(
        first
            .environment
            .contains(&format!("HOME={}", home.display()))
    );
    assert_eq!(first.result["status"], "succeeded", "{}", first.result);
    let second = stage.attempt("droid", None, prints, COMMITS).await;
    assert!(has(&second, &["--session-id", "d-1"]));
}

#[tokio::test]
async fn gemini_is_called_and_read_as_it_works() {
    let stage = Stage::new();
    let prints = r#"{"type":"init","session_id":"g-1","model":"m"}
{"type":"message","role":"assistant","content":"All ","delta":true}
{"type":"tool_use","tool_name":"write_file"}
{"type":"message","role":"assistant","content":"done.","delta":true}
{"type":"result","status":"success","stats":{"input_tokens":30,"output_tokens":4,"total_tokens":34}}
"#;
    let first = stage
        .attempt("gemini", Some("a-model"), prints, COMMITS)
        .await;
    assert_told(&first);
    assert!(has(
        &first,
        &[
            "--skip-trust",
            "--yolo",
            "--output-format",
            "stream-json",
            "--model",
            "a-model"
        ]
    ));
    assert_eq!(first.result["status"], "succeeded", "{}", first.result);
    let summary = first.result["summary"].as_str().unwrap();
    assert!(summary.starts_with("All done."), "{summary}");
    assert!(summary.contains("sent 30 and received 4"), "{summary}");
    let second = stage.attempt("gemini", None, prints, COMMITS).await;
    assert!(has(&second, &["--resume", "g-1"]));
}

#[tokio::test]
async fn opencode_is_called_and_read_as_it_works() {
    let stage = Stage::new();
    let prints = r#"{"type":"step_start","sessionID":"o-1","part":{}}
{"type":"tool_use","sessionID":"o-1","part":{"tool":"bash","state":{"title":"List files"}}}
{"type":"step_finish","sessionID":"o-1","part":{"cost":0.25,"tokens":{"input":10,"output":2,"reasoning":1,"cache":{"read":5,"write":5}}}}
{"type":"text","sessionID":"o-1","part":{"text":"Done."}}
{"type":"step_finish","sessionID":"o-1","part":{"cost":0.25,"tokens":{"input":10,"output":2,"reasoning":0,"cache":{"read":0,"write":0}}}}
"#;
    let first = stage
        .attempt("opencode", Some("a-model"), prints, COMMITS)
        .await;
    assert_told(&first);
    assert!(has(
        &first,
        &["run", "--format", "json", "--model", "artel/a-model"]
    ));
    let configuration = first
        .environment
        .lines()
        .find_map(|line| line.strip_prefix("OPENCODE_CONFIG_CONTENT="))
        .unwrap();
    let configuration: Value = serde_json::from_str(configuration).unwrap();
    assert!(configuration["provider"]["artel"]["models"]["a-model"].is_object());
    assert_eq!(first.result["status"], "succeeded", "{}", first.result);
    let summary = first.result["summary"].as_str().unwrap();
    assert!(
        summary.contains("sent 30 and received 5 tokens, for $0.5000"),
        "{summary}"
    );
    let second = stage.attempt("opencode", None, prints, COMMITS).await;
    assert!(has(&second, &["--session", "o-1"]));
}

#[tokio::test]
async fn aider_is_called_and_read_as_it_works() {
    let stage = Stage::new();
    let prints = "Aider v1\nTokens: 2.1k sent, 43 received. Cost: $0.01 message, $0.02 session.\nCommit abc feat: x\nTokens: 3k sent, 7 received. Cost: $0.01 message, $0.03 session.\n";
    let first = stage
        .attempt("aider", Some("a-model"), prints, COMMITS)
        .await;
    assert_told(&first);
    assert!(has(&first, &["--model", "openai/a-model"]));
    assert!(
        !first
            .arguments
            .contains(&"--restore-chat-history".to_owned())
    );
    assert!(
        first
            .environment
            .contains("OPENAI_API_BASE=http://127.0.0.1:")
    );
    assert_eq!(first.result["status"], "succeeded", "{}", first.result);
    let summary = first.result["summary"].as_str().unwrap();
    assert!(summary.starts_with("Commit abc feat: x"), "{summary}");
    assert!(
        summary.contains("sent 5100 and received 50 tokens, for $0.0300"),
        "{summary}"
    );
    // It leaves its map of the repository beside the files (seen of 0.86.2).
    let maps =
        format!("mkdir -p .aider.tags.cache.v4 && touch .aider.tags.cache.v4/x && {COMMITS}");
    let second = stage.attempt("aider", None, prints, &maps).await;
    assert_eq!(second.result["status"], "succeeded", "{}", second.result);
    assert!(
        second
            .arguments
            .contains(&"--restore-chat-history".to_owned())
    );
}

#[tokio::test]
async fn an_agent_that_ends_badly_or_says_so_or_commits_nothing_has_failed() {
    let stage = Stage::new();
    let called = stage
        .attempt("claude-code", None, "not JSON\n", "exit 3")
        .await;
    assert_eq!(called.result["status"], "failed");
    let reason = called.result["reason"].as_str().unwrap();
    assert!(
        reason.contains("claude ended with exit status: 3"),
        "{reason}"
    );
    let error = r#"{"type":"result","subtype":"error_max_turns","is_error":true,"session_id":"s"}"#;
    let called = stage.attempt("claude-code", None, error, COMMITS).await;
    let reason = called.result["reason"].as_str().unwrap();
    assert!(
        reason.contains("claude reported: error_max_turns"),
        "{reason}"
    );
    let called = Stage::new().attempt("codex", None, "", "true").await;
    let reason = called.result["reason"].as_str().unwrap();
    assert!(reason.starts_with("no commit"), "{reason}");
    let left = format!("{COMMITS} && echo left > left");
    let called = Stage::new().attempt("codex", None, "", &left).await;
    assert_eq!(called.result["status"], "blocked");
}

#[tokio::test]
async fn an_agent_that_is_not_installed_is_named() {
    let stage = Stage::new();
    let endpoint = Endpoint::start([]).await;
    let status = crate::command::agent(&stage.workspace, &endpoint, &["droid"]).await;
    assert!(!status.success());
    let result = endpoint.seen().results[0].clone();
    let reason = result["reason"].as_str().unwrap();
    assert!(reason.starts_with("cannot run droid: "), "{reason}");
}
