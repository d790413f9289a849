//! The built-in agent.

use crate::endpoint::{Endpoint, Reply, Workspace, calls, run, runs, says};
use serde_json::json;
use worker::agent::{Agent, Options};
use worker::broker::{Broker, Report};
use worker::environment::Environment;

const WRITE_AND_COMMIT: &str =
    "echo hello > hello.txt && git add . && git commit -q -m 'Add hello'";

fn reason(report: &Report) -> &str {
    match report {
        Report::Succeeded { .. } => "",
        Report::Failed { reason, .. } | Report::Blocked { reason, .. } => reason,
    }
}

#[tokio::test]
async fn the_model_works_through_the_shell_until_it_says_that_it_is_done() {
    let endpoint = Endpoint::start([
        runs("cat .artel/TASK.md; ls"),
        runs(WRITE_AND_COMMIT),
        says("I wrote `hello.txt`."),
    ])
    .await;
    let workspace = Workspace::new();
    let report = workspace.run(&endpoint, 1).await;
    let summary = "I wrote `hello.txt`.".to_owned();
    assert_eq!(report, Report::Succeeded { summary });
    assert_eq!(workspace.git(&["show", "HEAD:hello.txt"]), "hello\n");
    assert_eq!(workspace.git(&["status", "--porcelain"]), "");
    let seen = endpoint.seen();
    assert_eq!(seen.headers, ["job-1/one", "developer", "Bearer key"]);
    let first = &seen.asked[0];
    assert_eq!(first["model"], "some-model");
    assert_eq!(first["tools"][0]["function"]["name"], "shell");
    assert_eq!(first["messages"][0]["role"], "system");
    assert_eq!(first["messages"][1]["content"], "# Write a file\n");
    let output = seen.asked[1]["messages"][3]["content"].as_str().unwrap();
    assert!(output.starts_with("# Write a file\n"), "{output}");
    assert_eq!(seen.progress.len(), 2);
    assert_eq!(seen.progress[1]["step"], 2);
    assert_eq!(seen.results.len(), 0, "reporting is the entry's part");
}

#[tokio::test]
async fn a_wrong_tool_call_is_explained_to_the_model() {
    let endpoint = Endpoint::start([
        calls("write_file", "{}"),
        calls("shell", "{\"command\": \"ls"),
        calls("shell", "{\"cmd\": \"ls\"}"),
        runs(WRITE_AND_COMMIT),
        says("done"),
    ])
    .await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(matches!(report, Report::Succeeded { .. }), "{report:?}");
    let outputs = endpoint.outputs();
    assert!(outputs[0].contains("no tool \"write_file\""), "{outputs:?}");
    assert!(outputs[1].contains("not valid JSON"), "{outputs:?}");
    assert!(outputs[2].contains("need `command`"), "{outputs:?}");
}

#[tokio::test]
async fn refusals_for_now_and_broken_connections_are_tried_again() {
    let endpoint = Endpoint::start([
        Reply::Status(429, "0", "{\"error\": {\"message\": \"slow down\"}}"),
        Reply::Broken,
        Reply::Events("data: {\"choices\": [{\"delta\": {\"content\": \"I\"}}]}\n\n".into()),
        runs(WRITE_AND_COMMIT),
        says("done"),
    ])
    .await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(matches!(report, Report::Succeeded { .. }), "{report:?}");
    assert_eq!(endpoint.seen().asked.len(), 5);
}

#[tokio::test]
async fn an_endpoint_that_stays_down_ends_the_attempt_with_its_words() {
    let down = || Reply::Status(503, "0", "{\"error\": {\"message\": \"no capacity\"}}");
    let endpoint = Endpoint::start([down(), down(), down(), down()]).await;
    let report = Workspace::new().run(&endpoint, 1).await;
    let reason = reason(&report);
    assert!(
        reason.contains("4 tries") && reason.contains("no capacity"),
        "{reason}"
    );
}

#[tokio::test]
async fn a_refusal_for_good_is_not_tried_again() {
    let budget = "{\"error\": {\"message\": \"the budget is spent\", \"code\": \"budget\"}}";
    let endpoint = Endpoint::start([Reply::Status(402, "0", budget)]).await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(
        reason(&report).contains("402: the budget is spent"),
        "{report:?}"
    );
}

#[tokio::test]
async fn a_stream_nobody_asked_for_is_understood() {
    let call = json!({"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c",
        "function": {"name": "shell", "arguments": json!({"command": WRITE_AND_COMMIT}).to_string()}}]}}]});
    let endpoint = Endpoint::start([
        Reply::Events(format!("data: {call}\n\ndata: [DONE]\n\n")),
        Reply::Events(
            "data: {\"choices\": [{\"delta\": {\"content\": \"done\"}, \"finish_reason\": \"stop\"}]}\n\n".into(),
        ),
    ])
    .await;
    let report = Workspace::new().run(&endpoint, 1).await;
    let summary = "done".to_owned();
    assert_eq!(report, Report::Succeeded { summary });
}

#[tokio::test]
async fn work_that_is_not_committed_is_pointed_out_once_and_then_blocks() {
    let endpoint = Endpoint::start([
        runs("echo hello > hello.txt"),
        says("done"),
        runs("git add hello.txt && git commit -q -m 'Add hello' && echo x > left.txt"),
        says("really done"),
    ])
    .await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(
        matches!(&report, Report::Blocked { reason, .. }
            if reason.contains("uncommitted changes") && reason.contains("left.txt")),
        "{report:?}"
    );
    let seen = endpoint.seen();
    let told = seen.asked[2]["messages"]
        .as_array()
        .unwrap()
        .last()
        .unwrap();
    assert!(
        told["content"].as_str().unwrap().contains("?? hello.txt"),
        "{told}"
    );
}

#[tokio::test]
async fn a_model_that_commits_nothing_is_told_once_and_then_failed() {
    let endpoint = Endpoint::start([says("done"), says("done, I said")]).await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(
        matches!(&report, Report::Failed { reason, .. } if reason.starts_with("no commit")),
        "{report:?}"
    );
}

#[tokio::test]
async fn a_model_that_cannot_go_on_says_what_is_missing() {
    let endpoint = Endpoint::start([says("BLOCKED: which port?\nThe task names two.")]).await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(
        matches!(&report, Report::Blocked { reason, .. } if reason == "which port?"),
        "{report:?}"
    );
}

#[tokio::test]
async fn steps_and_empty_answers_have_a_limit() {
    let endpoint = Endpoint::start((0..10).map(|n| runs(&format!("echo {n}")))).await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(reason(&report).contains("within 10 steps"), "{report:?}");

    let endpoint = Endpoint::start((0..4).map(|_| says(" "))).await;
    let report = Workspace::new().run(&endpoint, 1).await;
    assert!(reason(&report).contains("empty or cut-off"), "{report:?}");
}

#[tokio::test]
async fn the_wall_limit_ends_a_command_and_the_attempt() {
    let endpoint = Endpoint::start([runs("sleep 60")]).await;
    let workspace = Workspace::new();
    let mut options = workspace.options(&endpoint, 1);
    options.environment.wall = std::time::Duration::from_millis(700);
    let report = run(options).await;
    assert!(
        reason(&report).contains("did not finish within"),
        "{report:?}"
    );
}

#[tokio::test]
async fn a_send_back_goes_on_in_the_same_conversation() {
    let endpoint = Endpoint::start([runs(WRITE_AND_COMMIT), says("done")]).await;
    let workspace = Workspace::new();
    workspace.run(&endpoint, 1).await;
    workspace.task("# Write a file\n\n## Review\nSay goodbye, too.\n");
    endpoint.push([
        runs("echo goodbye >> hello.txt && git commit -qam 'Say goodbye'"),
        says("done again"),
    ]);
    let report = workspace.run(&endpoint, 2).await;
    assert!(matches!(report, Report::Succeeded { .. }), "{report:?}");
    let seen = endpoint.seen();
    let messages = seen.asked[2]["messages"].as_array().unwrap();
    assert_eq!(messages[4]["content"], "done");
    let revised = messages[5]["content"].as_str().unwrap();
    assert!(revised.contains("Say goodbye, too."), "{revised}");
    assert_eq!(workspace.git(&["rev-list", "--count", "HEAD"]), "3\n");
}

#[tokio::test]
async fn a_run_that_was_over_asks_the_model_nothing_again() {
    let endpoint = Endpoint::start([runs(WRITE_AND_COMMIT), says("done")]).await;
    let workspace = Workspace::new();
    let base = workspace.git(&["rev-parse", "HEAD"]).trim().to_owned();
    let with_base = || {
        let options = workspace.options(&endpoint, 1);
        let environment = Environment {
            base_sha: Some(base.clone()),
            ..options.environment.clone()
        };
        Options {
            environment,
            ..options
        }
    };
    run(with_base()).await;
    let report = run(with_base()).await;
    assert!(matches!(report, Report::Succeeded { .. }), "{report:?}");
    assert_eq!(endpoint.seen().asked.len(), 2);
}

#[tokio::test]
async fn a_final_answer_that_was_never_reported_is_reported_by_the_next_attempt_unasked() {
    let endpoint = Endpoint::start([runs(WRITE_AND_COMMIT), says("done")]).await;
    let workspace = Workspace::new();
    workspace.run(&endpoint, 1).await;
    let report = workspace.run(&endpoint, 2).await;
    assert!(matches!(report, Report::Succeeded { .. }), "{report:?}");
    assert_eq!(endpoint.seen().asked.len(), 2);
}

#[tokio::test]
async fn an_attempt_after_a_reported_one_asks_the_model_again() {
    let endpoint =
        Endpoint::start([runs(WRITE_AND_COMMIT), says("done"), says("still done")]).await;
    let workspace = Workspace::new();
    let options = workspace.options(&endpoint, 1);
    let broker = Broker::new(&options.environment).unwrap();
    let agent = Agent::new(options, broker);
    agent.run().await;
    agent.reported().unwrap();
    let report = workspace.run(&endpoint, 2).await;
    assert!(matches!(report, Report::Succeeded { summary } if summary == "still done"));
    assert_eq!(endpoint.seen().asked.len(), 3);
}

#[tokio::test]
async fn a_task_that_is_missing_is_named() {
    let endpoint = Endpoint::start([]).await;
    let workspace = Workspace::new();
    std::fs::remove_file(workspace.task_file()).unwrap();
    let report = workspace.run(&endpoint, 1).await;
    assert!(reason(&report).contains("TASK.md"), "{report:?}");
}

#[tokio::test]
async fn commands_do_not_see_the_keys() {
    let endpoint = Endpoint::start([
        runs("echo \"[$OPENAI_API_KEY$ARTEL_BROKER_KEY]\""),
        says("BLOCKED: enough"),
    ])
    .await;
    let workspace = Workspace::new();
    let status = crate::command::agent(&workspace, &endpoint, &[]).await;
    assert_eq!(status.code(), Some(1));
    assert!(
        endpoint.outputs()[0].starts_with("[]"),
        "{:?}",
        endpoint.outputs()
    );
    assert_eq!(endpoint.seen().results[0]["status"], "blocked");
}
