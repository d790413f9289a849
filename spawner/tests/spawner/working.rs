//! Work that goes well, and work that comes to nothing.

use crate::stage::{
    SOON, Stage, Turn, assert_succeeded, git, kind, phases, runs, runtime, says, until,
};
use protocol::{EventKind, ResultStatus};
use spawner::Options;
use std::time::Duration;

const COMMIT: &str = "echo hello > hello.txt && git add hello.txt && git commit -q -m 'Add hello'";

/// Reports success to the broker, as an agent does that knows the contract.
const REPORT: &str = r#"python3 - <<'EOF'
import json, os, urllib.request
body = json.dumps({"status": "succeeded", "summary": "did it"}).encode()
request = urllib.request.Request(os.environ["ARTEL_BROKER_URL"] + "/v1/result", body,
    {"Authorization": "Bearer " + os.environ["ARTEL_BROKER_KEY"]})
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
EOF
true"#;

#[tokio::test]
async fn the_agents_commit_ends_up_on_the_branch() {
    let stage = Stage::new([
        runs("cat .artel/TASK.md"),
        runs(COMMIT),
        says("Added `hello.txt`."),
    ])
    .await;
    let mut request = stage.request("r1", 3);
    request.fencing_token = 42;
    request.task.acceptance = vec!["hello.txt says hello".into()];
    let result = stage.run(&request).await;
    assert_succeeded(&result);
    assert_eq!(result.summary_markdown, "Added `hello.txt`.");
    assert_eq!((result.attempt, result.fencing_token), (3, 42));
    assert_eq!(result.head_sha, stage.pushed());
    assert_eq!(stage.show("hello.txt"), "hello\n");
    assert_eq!(result.usage.input_tokens, 300);
    assert_eq!(result.usage.output_tokens, 30);
    assert!((result.usage.cost_usd.unwrap() - 0.03).abs() < 1e-9);
    assert!(result.usage.wall_s > 0.0);

    let events = stage.events("r1").await;
    let seen = phases(&events);
    assert_eq!(
        seen,
        [
            "queued",
            "cloning",
            "starting",
            "running",
            "running: step 1",
            "running: step 2",
            "pushing"
        ]
    );
    assert!(
        events
            .iter()
            .any(|e| matches!(&e.kind, EventKind::Started { spawner } if spawner == "local"))
    );
    assert!(
        events
            .iter()
            .any(|e| matches!(&e.kind, EventKind::Usage { usage } if usage.input_tokens == 300))
    );
    assert!(
        events
            .iter()
            .any(|e| matches!(&e.kind, EventKind::Log { tail } if tail.contains("hello")))
    );
    assert!(events.windows(2).all(|pair| pair[0].seq < pair[1].seq));

    let calls = stage.calls();
    assert_eq!(calls[0].thread, "job-1/one");
    assert_eq!(calls[0].project.as_str(), "p");
    assert_eq!(calls[0].request.as_str(), "r1");
    let task = calls[0].body["messages"][1]["content"].as_str().unwrap();
    assert!(task.contains("- hello.txt says hello"), "{task}");
    let delivered = stage
        .transport
        .next_result(Duration::ZERO)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(delivered.result, result);
    assert!(
        stage
            .transport
            .next_result(Duration::ZERO)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn a_send_back_goes_on_in_the_same_workspace_and_conversation() {
    let stage = Stage::new([runs(COMMIT), says("done")]).await;
    assert_succeeded(&stage.run(&stage.request("r1", 1)).await);
    stage.push([
        runs("test -e hello.txt && echo bye >> hello.txt && git commit -qam 'Say goodbye'"),
        says("done again"),
    ]);
    let mut request = stage.request("r2", 2);
    request.task.body_markdown = "Say goodbye, too.".into();
    assert_succeeded(&stage.run(&request).await);
    assert_eq!(stage.show("hello.txt"), "hello\nbye\n");
    let calls = stage.calls();
    let messages = calls[2].body["messages"].as_array().unwrap();
    assert!(messages.len() > 5, "the conversation goes on");
    assert!(
        messages.last().unwrap()["content"]
            .as_str()
            .unwrap()
            .contains("Say goodbye, too.")
    );
}

#[tokio::test]
async fn a_branch_that_was_rebased_elsewhere_is_what_the_next_attempt_goes_on_from() {
    let stage = Stage::new([]).await;
    assert_succeeded(&stage.run_script(COMMIT).await);
    let author = stage.folder.path().join("author");
    let bare = stage.bare();
    let bare = bare.to_str().unwrap();
    std::fs::write(author.join("other.txt"), "other\n").unwrap();
    git(&author, &["add", "."]);
    git(&author, &["commit", "-q", "-m", "Other work"]);
    git(&author, &["push", "-q", bare, "main"]);
    git(&author, &["fetch", "-q", bare, "task/one:rebased"]);
    git(&author, &["rebase", "-q", "main", "rebased"]);
    git(
        &author,
        &["push", "-q", "--force", bare, "rebased:task/one"],
    );
    let base = git(&author, &["rev-parse", "main"]).trim().to_owned();

    // Left by the former attempt, and in the way of nothing.
    std::fs::write(stage.workspace().join("notes.txt"), "unfinished\n").unwrap();
    let script = "cat other.txt hello.txt notes.txt > all.txt && rm notes.txt && git add all.txt && git commit -qm All";
    let mut request = stage.script("r2", 2, script);
    request.repository.base_sha = base;
    assert_succeeded(&stage.run(&request).await);
    assert_eq!(stage.show("all.txt"), "other\nhello\nunfinished\n");
}

#[tokio::test]
async fn work_that_a_dead_attempt_left_uncommitted_is_there_for_the_next_one() {
    let stage = Stage::new([]).await;
    let result = stage
        .run_script("echo half > half.txt; touch .git/index.lock; exit 3")
        .await;
    assert_eq!(kind(&result), spawner::kind::AGENT_FAILED);
    let finish = "cat half.txt && git add half.txt && git commit -q -m Half";
    assert_succeeded(&stage.run(&stage.script("r2", 2, finish)).await);
    assert_eq!(stage.show("half.txt"), "half\n");
}

#[tokio::test]
async fn success_without_a_commit_is_none() {
    let stage = Stage::new([]).await;
    let result = stage.run_script("true").await;
    assert_eq!(result.status, ResultStatus::Failed);
    assert_eq!(kind(&result), spawner::kind::NO_COMMIT);
    assert_eq!(stage.pushed(), None);

    // Not even when the worker reports one itself.
    let result = stage.run(&stage.script("r2", 2, REPORT)).await;
    assert_eq!(kind(&result), spawner::kind::NO_COMMIT);
    let elsewhere = format!("git checkout -q -b elsewhere; {COMMIT}; {REPORT}");
    let result = stage.run(&stage.script("r3", 3, &elsewhere)).await;
    assert_eq!(
        kind(&result),
        spawner::kind::NO_COMMIT,
        "a commit elsewhere is none"
    );
}

#[tokio::test]
async fn what_goes_wrong_before_the_work_is_named() {
    let stage = Stage::new([]).await;
    let mut request = stage.script("r1", 1, "true");
    request.agent.command = vec!["/no/such/agent".into()];
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::AGENT_MISSING);
    let message = result.failure.unwrap().message;
    for words in ["/no/such/agent", "an admin", "docs/agents.md"] {
        let found = message.to_lowercase().contains(&words.to_lowercase());
        assert!(found, "{words} in {message}");
    }

    let mut request = stage.request("r2", 2);
    request.agent.adapter = "telepathy".into();
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::AGENT_MISSING);

    let mut request = stage.request("r3", 3);
    request.repository.base_sha = "0123456789012345678901234567890123456789".into();
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::BASE_MISSING);

    let mut request = stage.request("r4", 4);
    request.repository.source = protocol::Source::Path("/no/such/repository.git".into());
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::REPOSITORY_MISSING);

    if !crate::IN_DOCKER {
        let mut request = stage.request("r5", 5);
        request.docker = true;
        let result = stage.run(&request).await;
        assert_eq!(kind(&result), spawner::kind::UNSUPPORTED);
        let said = result.failure.unwrap().message;
        assert!(
            said.contains("SPAWNER_RUNTIME=sysbox-runc") && said.contains("docs/sysbox.md"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_cancel_ends_a_running_worker_that_does_not_listen() {
    let stage = Stage::new([]).await;
    // It ignores the gentle way.
    let request = stage.script(
        "r1",
        1,
        "trap '' TERM; touch here; sleep 600 & wait; sleep 600",
    );
    stage.submit(&request).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    stage.transport.cancel("r1").await.unwrap();
    let result = stage.result("r1").await;
    assert_eq!(result.status, ResultStatus::Cancelled);
    assert_eq!(kind(&result), spawner::kind::CANCELLED);
    let folder = stage.home().join("workspaces/p/job-1/one~/broker");
    assert_eq!(
        std::fs::read_dir(folder).unwrap().count(),
        0,
        "the broker went with its job"
    );
}

#[tokio::test]
async fn a_worker_whose_budget_is_used_up_elsewhere_is_stopped_with_that_reason() {
    let stage = patient(Duration::from_millis(500), []).await;
    let request = stage.script("r1", 1, "touch here; sleep 600");
    stage.submit(&request).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    stage.transport.unpaid("another").await.unwrap();
    stage.transport.unpaid("r1").await.unwrap();
    let result = stage.result("r1").await;
    assert_eq!(result.status, ResultStatus::Failed);
    assert_eq!(kind(&result), spawner::kind::BUDGET);
    assert!(here.exists(), "the workspace is kept for when it is raised");
}

/// With a spawner that waits so long for a worker that is not paid any more.
async fn patient(patience: Duration, turns: impl IntoIterator<Item = Turn>) -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
    let tune = |options: &mut Options| options.unpaid_patience = patience;
    Stage::tuned(folder, runtime, cleanup, turns, tune).await
}

/// Longer than any test lasts.
const LONG: Duration = Duration::from_mins(10);

/// What a worker is in that may end what it does, and ask nothing more.
const ENDING: &str = "ending: the budget is used up";

/// Waits for `go` in the workspace.
const UNTIL_GO: &str = "touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go";

#[tokio::test]
async fn what_a_worker_completes_without_a_further_question_is_taken_when_its_budget_is_used_up() {
    let stage = patient(LONG, []).await;
    let request = stage.script("r1", 1, &format!("{UNTIL_GO}; {COMMIT}"));
    stage.submit(&request).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    stage.transport.unpaid("r1").await.unwrap();
    stage.until_phase("r1", ENDING).await;
    std::fs::write(stage.workspace().join("go"), "").unwrap();
    let result = stage.result("r1").await;
    assert_succeeded(&result);
    assert_eq!(stage.pushed(), result.head_sha);
}

#[tokio::test]
async fn an_agent_whose_budget_is_used_up_ends_its_command_and_asks_nothing_more() {
    let turns = [runs(&format!("{UNTIL_GO}; touch done")), says("done")];
    let stage = patient(LONG, turns).await;
    stage.submit(&stage.request("r1", 1)).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    stage.transport.unpaid("r1").await.unwrap();
    stage.until_phase("r1", ENDING).await;
    std::fs::write(stage.workspace().join("go"), "").unwrap();
    let result = stage.result("r1").await;
    assert_eq!(kind(&result), spawner::kind::BUDGET);
    assert_eq!(stage.calls().len(), 1);
    assert!(stage.workspace().join("done").exists());
}

#[tokio::test]
async fn a_job_that_is_cancelled_after_its_budget_was_used_up_ends_at_once_as_cancelled() {
    let stage = patient(LONG, []).await;
    stage
        .submit(&stage.script("r1", 1, "touch here; sleep 600"))
        .await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    stage.transport.unpaid("r1").await.unwrap();
    stage.transport.cancel("r1").await.unwrap();
    let result = stage.result("r1").await;
    assert_eq!(kind(&result), spawner::kind::CANCELLED);
}

#[tokio::test]
async fn a_job_that_was_cancelled_before_it_began_never_begins() {
    let stage = Stage::new([]).await;
    stage.transport.cancel("r1").await.unwrap();
    let result = stage.run_script("touch here").await;
    assert_eq!(kind(&result), spawner::kind::CANCELLED);
    assert!(!stage.workspace().exists());
}

#[tokio::test]
async fn a_later_attempt_takes_the_place_of_an_earlier_one_and_never_the_other_way() {
    let stage = Stage::new([]).await;
    stage
        .submit(&stage.script("r1", 1, "touch here; sleep 600"))
        .await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    let second = stage.script("r2", 2, &format!("rm here; {COMMIT}"));
    assert_succeeded(&stage.run(&second).await);
    let first = stage.result("r1").await;
    assert_eq!(first.status, ResultStatus::Cancelled);
    assert_eq!(kind(&first), spawner::kind::SUPERSEDED);
    let late = stage.script("r0", 1, "git reset -q --hard HEAD~1");
    assert_eq!(kind(&stage.run(&late).await), spawner::kind::SUPERSEDED);
    assert!(stage.workspace().join("hello.txt").exists());
}

#[tokio::test]
async fn tasks_run_side_by_side() {
    let stage = Stage::new([]).await;
    // Each waits for the other one's sign, which goes through the host's view of the workspaces.
    let one = stage.script(
        "r1",
        1,
        &format!("touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {COMMIT}"),
    );
    let mut two = stage.script(
        "r2",
        1,
        &format!("touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {COMMIT}"),
    );
    two.task_id = "two".into();
    two.repository.branch = "task/two".into();
    stage.submit(&one).await;
    stage.submit(&two).await;
    let places = [
        stage.workspace(),
        stage.home().join("workspaces/p/job-1/two"),
    ];
    until(async || {
        places
            .iter()
            .all(|place| place.join("here").exists())
            .then_some(())
    })
    .await;
    for place in &places {
        std::fs::write(place.join("go"), "").unwrap();
    }
    assert_succeeded(&stage.result("r1").await);
    assert_succeeded(&stage.result("r2").await);
}

#[tokio::test]
async fn a_spawner_that_is_shut_down_leaves_its_job_to_the_next_one() {
    let stage = Stage::new([]).await;
    stage
        .submit(&stage.script("r1", 1, "touch here; sleep 600"))
        .await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    let transport = std::sync::Arc::clone(&stage.transport);
    let _folder = stage.shut_down().await;
    assert!(transport.result("r1").await.unwrap().is_none());
    let offered = transport.next_job(SOON).await.unwrap().unwrap();
    assert_eq!(
        (offered.request.request_id.as_str(), offered.deliveries),
        ("r1", 2)
    );
}

#[tokio::test]
async fn a_spawner_that_is_drained_finishes_what_runs() {
    let stage = Stage::new([]).await;
    let request = stage.script(
        "r1",
        1,
        &format!("touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {COMMIT}"),
    );
    stage.submit(&request).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    let alive = stage.transport.spawners().await.unwrap();
    assert_eq!(alive[0].spawner, "local");
    stage.transport.drain(None).await.unwrap();
    stage.submit(&stage.script("r2", 2, "true")).await;
    std::fs::write(stage.workspace().join("go"), "").unwrap();
    assert_succeeded(&stage.result("r1").await);
    let left = stage.transport.next_job(SOON).await.unwrap().unwrap();
    assert_eq!(left.request.request_id, "r2");
    // It has said farewell, and nobody counts on it.
    until(async || {
        let seen = stage.transport.seen_spawners().await.unwrap();
        seen.is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_report_that_was_recorded_before_a_crash_is_not_worked_for_again() {
    let stage = Stage::new([]).await;
    let script = format!(
        "echo run >> runs.txt; git add runs.txt; git commit -qm Run; {REPORT}; touch here; sleep 600"
    );
    stage.submit(&stage.script("r1", 1, &script)).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    let stage = stage.restart().await;
    assert_succeeded(&stage.result("r1").await);
    assert_eq!(stage.show("runs.txt"), "run\n");
}

#[tokio::test]
async fn the_workers_notes_are_not_taken_over() {
    let stage = Stage::new([]).await;
    let result = stage
        .run_script("git add -f .artel/TASK.md; git commit -qm Notes")
        .await;
    assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED);
    assert!(result.failure.unwrap().evidence.contains(".artel/TASK.md"));
}

#[tokio::test]
async fn tasks_of_the_same_name_in_different_jobs_have_workspaces_of_their_own() {
    let stage = Stage::new([]).await;
    assert_succeeded(&stage.run_script(COMMIT).await);
    let mut other = stage.script("r2", 1, &format!("test ! -e hello.txt; {COMMIT}"));
    other.job_id = "job-2".into();
    other.repository.branch = "task/other".into();
    assert_succeeded(&stage.run(&other).await);
    spawner::remove_workspaces(&stage.home(), "p").unwrap();
    assert!(!stage.home().join("workspaces/p").exists());
}
