//! A task: workers, verification, checks, reviews, merges, and their caps.

use nodes::{Policy, signal};
use ports::{Event, JobStatus, Role, WaitKind};
use protocol::{ResultStatus, WorkerResult};

use crate::{
    stage::{Stage, Waiting, names, open_waits, send_back, task, world},
    world::{Work, World},
};

fn one(works: &[Work]) -> World {
    let world = world(&[task("api", &[])]);
    world.works("job-1/api", works);
    world
}

async fn help(stage: &Stage) -> Waiting {
    stage
        .until("a call for help", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Help)
        })
        .await
}

async fn attempts(stage: &Stage) -> usize {
    names(&stage.events().await)
        .iter()
        .filter(|name| *name == "task.attempt api")
        .count()
}

async fn deployed(stage: &Stage) {
    let Event::JobEnded {
        status, failure, ..
    } = stage.ended("job-1").await
    else {
        panic!()
    };
    assert_eq!((status, failure), (JobStatus::Deployed, None));
}

#[tokio::test]
async fn success_without_a_commit_is_a_failure_with_a_reason() {
    let stage = Stage::new(
        one(&[Work::Nothing, Work::Invented, Work::Commit(vec![])]),
        Policy::default(),
    )
    .await;
    stage.build().await;
    deployed(&stage).await;
    let kinds: Vec<String> = stage
        .events()
        .await
        .into_iter()
        .filter_map(|recorded| match recorded.event {
            Event::TaskWorked {
                failure: Some(failure),
                ..
            } => Some(failure.kind),
            _ => None,
        })
        .collect();
    assert_eq!(kinds, ["head_mismatch", "head_mismatch"]);
    let state = stage.world.state.lock();
    let third = &state.requests[&format!("{}.job-1.api.3", stage.project)];
    assert!(
        third.task.body_markdown.contains("What happened before"),
        "{}",
        third.task.body_markdown
    );
}

#[tokio::test]
async fn a_send_back_that_changes_nothing_is_no_success() {
    let world = one(&[
        Work::Commit(vec![("api.py", "one")]),
        Work::Commit(vec![("api.py", "one")]),
    ]);
    world.answer(Role::Reviewer, "job-1/api", 0, send_back("more"));
    // The second worker reports the head of the first one.
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    deployed(&stage).await;
    assert_eq!(attempts(&stage).await, 2);
}

#[tokio::test]
async fn retries_are_capped_by_number_and_by_fingerprint() {
    let world = one(&[
        Work::Fails("agent_failed", "step 12 broke"),
        Work::Fails("agent_failed", "step 31 broke"),
        Work::Commit(vec![]),
    ]);
    let stage = Stage::new(world, Policy::default()).await;
    stage.build().await;
    let wait = help(&stage).await;
    assert!(
        wait.wait.question.contains("Step 31 broke")
            && wait.wait.question.contains("the end of the log"),
        "{}",
        wait.wait.question
    );
    assert_eq!(
        attempts(&stage).await,
        2,
        "the same failure twice is enough"
    );
    stage.press(&wait, "retry").await;
    deployed(&stage).await;

    let world = one(&[
        Work::Fails("agent_failed", "one thing"),
        Work::Fails("limit_wall", "another thing"),
        Work::Fails("limit_idle", "a third thing"),
        Work::Commit(vec![]),
    ]);
    let stage = Stage::new(world, Policy::default()).await;
    stage.build().await;
    let wait = help(&stage).await;
    assert_eq!(attempts(&stage).await, 3, "three attempts are enough");
    stage.press(&wait, "give_up").await;
    let again = stage
        .until("the job's question", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.thread.ends_with("/job-1"))
        })
        .await;
    stage.press(&again, "give_up").await;
    let Event::JobEnded {
        status, failure, ..
    } = stage.ended("job-1").await
    else {
        panic!()
    };
    assert_eq!(status, JobStatus::Failed);
    assert_eq!(failure.expect("a failure").kind, "tasks_failed");
}

#[tokio::test]
async fn a_worker_without_money_asks_the_owner() {
    let world = one(&[
        Work::Fails("budget", "the budget is used up"),
        Work::Commit(vec![]),
    ]);
    let stage = Stage::new(world, Policy::default()).await;
    stage.message("m1", "Build me a notes service", true).await;
    let wait = stage
        .until("a question about money", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Budget)
        })
        .await;
    assert_eq!(attempts(&stage).await, 1);
    stage.press(&wait, "raise").await;
    deployed(&stage).await;
}

#[tokio::test]
async fn a_result_of_an_earlier_attempt_does_not_count() {
    let world = one(&[
        Work::Fails("agent_failed", "it broke"),
        Work::Held(Box::new(Work::Commit(vec![]))),
    ]);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage
        .until("the second worker", |_| {
            world.held("job-1/api").then_some(())
        })
        .await;
    let thread = format!("{}/job-1/api", stage.project);
    let first = world.state.lock().requests[&format!("{}.job-1.api.1", stage.project)].clone();
    let mut stale = WorkerResult::of(&first, ResultStatus::Succeeded, first.created_at);
    stale.head_sha = Some("e".repeat(40));
    stage
        .send(&thread, ports::RESULT_SIGNAL, "worker:stale", &stale)
        .await;
    // One with the right request, but an old token.
    let second = world.state.lock().requests[&format!("{}.job-1.api.2", stage.project)].clone();
    let mut stale = WorkerResult::of(&second, ResultStatus::Succeeded, second.created_at);
    stale.fencing_token = 1;
    stage
        .send(&thread, ports::RESULT_SIGNAL, "worker:stale2", &stale)
        .await;
    stage
        .until("both passed over", |_| {
            world.held("job-1/api").then_some(())
        })
        .await;
    world.release("job-1/api");
    deployed(&stage).await;
    assert_eq!(attempts(&stage).await, 2);
}

#[tokio::test]
async fn a_worker_that_says_nothing_is_stopped_and_replaced() {
    let world = one(&[Work::Held(Box::new(Work::Nothing)), Work::Commit(vec![])]);
    let mut policy = Policy {
        worker_margin_s: 0,
        ..Policy::default()
    };
    policy.limits.wall_s = 1;
    let stage = Stage::new(world.clone(), policy).await;
    stage.build().await;
    deployed(&stage).await;
    assert!(
        world
            .state
            .lock()
            .cancelled_workers
            .contains(&format!("{}.job-1.api.1", stage.project))
    );
}

#[tokio::test]
async fn failed_checks_go_back_with_their_log() {
    let world = one(&[
        Work::Commit(vec![("api.py", "one")]),
        Work::Commit(vec![("api.py", "two")]),
    ]);
    let thread = format!("{}/job-1/api", crate::stage::project());
    world.state.lock().failing_checks.insert(thread, 1);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    deployed(&stage).await;
    let state = world.state.lock();
    let second = &state.requests[&format!("{}.job-1.api.2", stage.project)];
    assert!(second.task.body_markdown.contains("AssertionError: 1 != 2"));
    let reviews = state
        .asked
        .iter()
        .filter(|call| call.role == Role::Reviewer)
        .count();
    assert_eq!(reviews, 1, "what does not pass its checks is not reviewed");
}

#[tokio::test]
async fn review_rounds_are_capped_and_then_a_person_decides() {
    let world = one(&[Work::Commit(vec![])]);
    for turn in 0..3 {
        world.answer(
            Role::Reviewer,
            "job-1/api",
            turn,
            send_back(&format!("point {turn}")),
        );
    }
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    let wait = help(&stage).await;
    let values: Vec<&str> = wait
        .wait
        .options
        .iter()
        .map(|option| option.value.as_str())
        .collect();
    assert_eq!(values, ["retry", "merge", "give_up"]);
    assert!(
        wait.wait.question.contains("sent back 3 times") && wait.wait.question.contains("point 2")
    );
    assert_eq!(attempts(&stage).await, 3);
    stage.press(&wait, "retry").await;
    deployed(&stage).await;
    assert_eq!(
        attempts(&stage).await,
        4,
        "another round, which was approved"
    );
    assert!(
        world.prompts(Role::Reviewer)[3].contains("point 1"),
        "earlier comments are at hand"
    );
}

#[tokio::test]
async fn a_person_can_merge_against_the_reviewer() {
    let world = one(&[Work::Commit(vec![])]);
    for turn in 0..3 {
        world.answer(
            Role::Reviewer,
            "job-1/api",
            turn,
            send_back("a matter of taste"),
        );
    }
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    let wait = help(&stage).await;
    stage.press(&wait, "merge").await;
    deployed(&stage).await;
    assert_eq!(attempts(&stage).await, 3);
}

#[tokio::test]
async fn a_moved_base_means_a_rebase_and_new_checks_but_no_new_review() {
    let world = one(&[Work::Commit(vec![])]);
    world.forge.intrude(2);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    deployed(&stage).await;
    let names = names(&stage.events().await);
    let count = |name: &str| names.iter().filter(|found| *found == name).count();
    assert_eq!(count("task.checked api"), 3);
    assert_eq!(count("task.reviewed api"), 1);
    assert!(
        world.forge.main_file("other-0").is_some() && world.forge.main_file("api.py").is_some()
    );
}

#[tokio::test]
async fn a_base_that_always_moves_ends_at_a_person() {
    let world = one(&[Work::Commit(vec![])]);
    world.forge.intrude(6);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    let wait = help(&stage).await;
    assert!(
        wait.wait.question.contains("was moved 5 times"),
        "{}",
        wait.wait.question
    );
    stage.press(&wait, "retry").await;
    deployed(&stage).await;
}

#[tokio::test]
async fn a_conflict_goes_back_with_the_files() {
    let world = world(&[task("a", &[]), task("b", &[])]);
    world
        .works("job-1/a", &[Work::Commit(vec![("shared.py", "a")])])
        .works(
            "job-1/b",
            &[
                Work::Held(Box::new(Work::Commit(vec![("shared.py", "b")]))),
                // What the merge of both looks like: nothing of it differs from the default branch.
                Work::Commit(vec![("shared.py", "a"), ("b.py", "b")]),
            ],
        );
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.told("task.merged", Some("a")).await;
    stage
        .until("the second worker", |_| world.held("job-1/b").then_some(()))
        .await;
    world.release("job-1/b");
    deployed(&stage).await;
    let state = world.state.lock();
    let second = &state.requests[&format!("{}.job-1.b.2", stage.project)];
    assert!(
        second.task.body_markdown.contains("in conflict with main")
            && second.task.body_markdown.contains("shared.py"),
        "{}",
        second.task.body_markdown
    );
}

#[tokio::test]
async fn a_retry_that_came_before_the_question_does_not_answer_it() {
    let world = one(&[
        Work::Fails("agent_failed", "it broke"),
        Work::Held(Box::new(Work::Fails("agent_failed", "it broke"))),
        Work::Commit(vec![]),
    ]);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage
        .until("the second worker", |_| {
            world.held("job-1/api").then_some(())
        })
        .await;
    let thread = format!("{}/job-1/api", stage.project);
    stage
        .send(&thread, signal::RETRY, "early", &signal::Retry::default())
        .await;
    world.release("job-1/api");
    let wait = help(&stage).await;
    assert_eq!(attempts(&stage).await, 2);
    stage
        .send(&thread, signal::RETRY, "now", &signal::Retry::default())
        .await;
    deployed(&stage).await;
    assert_eq!(
        crate::stage::closed(&stage.events().await, &wait.wait.id),
        Some("retry".to_owned())
    );
}
