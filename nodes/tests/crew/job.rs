//! A job: resources, plan, parallel tasks, release.

use nodes::{Policy, signal};
use ports::{Event, JobStatus, Role, WaitKind};
use serde_json::json;

use crate::{
    stage::{Stage, approve, architecture, names, open_waits, place, send_back, spec, task, world},
    world::{Deploy, Work},
};

fn hold() -> Vec<Work> {
    vec![Work::Held(Box::new(Work::Commit(vec![])))]
}

#[tokio::test]
async fn tasks_run_in_parallel_and_the_next_starts_while_another_still_runs() {
    let world = world(&[
        task("storage", &[]),
        task("search", &[]),
        task("api", &["storage"]),
        task("docs", &["api", "search"]),
    ]);
    world
        .works("job-1/storage", &hold())
        .works("job-1/search", &hold())
        .answer(
            Role::Reviewer,
            "job-1/api",
            0,
            send_back("there is no test"),
        );
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.told("task.attempt", Some("storage")).await;
    stage.told("task.attempt", Some("search")).await;
    world.release("job-1/storage");
    // The third task is worked on, sent back and merged while the second still runs.
    stage.told("task.merged", Some("api")).await;
    assert!(world.held("job-1/search"));
    world.release("job-1/search");
    let Event::JobEnded { status, url, .. } = stage.ended("job-1").await else {
        panic!()
    };
    assert_eq!(
        (status, url.as_deref()),
        (JobStatus::Deployed, Some("http://127.0.0.1:8001/"))
    );
    let names = names(&stage.events().await);
    assert!(place(&names, "task.started api") < place(&names, "task.merged search"));
    assert!(place(&names, "task.started docs") > place(&names, "task.merged search"));
    let nodes: Vec<String> = stage
        .events()
        .await
        .into_iter()
        .filter_map(|recorded| match recorded.event {
            Event::JobNode { node } => Some(node),
            _ => None,
        })
        .collect();
    assert_eq!(nodes, ["zavhoz", "architect", "developers", "devops"]);
    // A send-back goes on on the same branch from the same base, with the comment in the task.
    let state = world.state.lock();
    let first = &state.requests[&format!("{}.job-1.api.1", stage.project)];
    let second = &state.requests[&format!("{}.job-1.api.2", stage.project)];
    assert_eq!(first.repository, second.repository);
    assert_eq!((first.fencing_token, second.fencing_token), (1, 2));
    assert_eq!((first.attempt, second.attempt), (1, 2));
    assert!(second.task.body_markdown.contains("there is no test"));
    assert!(!first.task.body_markdown.contains("Sent back"));
    drop(state);
    assert_eq!(world.forge.pulls().len(), 4);
    for file in [
        "storage.py",
        "search.py",
        "api.py",
        "docs.py",
        "README.md",
        "AGENTS.md",
        "artel.yaml",
        ".github/workflows/ci.yml",
        ".gitignore",
    ] {
        assert!(world.forge.main_file(file).is_some(), "{file}");
    }
}

#[tokio::test]
async fn only_as_many_tasks_run_as_may() {
    let world = world(&[task("a", &[]), task("b", &[]), task("c", &[])]);
    for id in ["a", "b", "c"] {
        world.works(&format!("job-1/{id}"), &hold());
    }
    let policy = Policy {
        max_parallel_tasks: 2,
        ..Policy::default()
    };
    let stage = Stage::new(world.clone(), policy).await;
    stage.build().await;
    stage.told("task.attempt", Some("a")).await;
    stage.told("task.attempt", Some("b")).await;
    assert!(stage.thread_status("job-1/c").await.is_none());
    world.release("job-1/b");
    stage.told("task.attempt", Some("c")).await;
    assert!(world.held("job-1/a"));
    world.release("job-1/a");
    world.release("job-1/c");
    stage.ended("job-1").await;
}

#[tokio::test]
async fn a_bad_plan_goes_back_with_the_reason_and_then_to_a_person() {
    let world = world(&[task("a", &["b"]), task("b", &["a"])]);
    let unknown = architecture(&[task("a", &["nowhere"])]);
    let twice = architecture(&[task("a", &[]), task("a", &[])]);
    world
        .answer(Role::Architect, "job-1", 1, unknown)
        .answer(Role::Architect, "job-1", 2, twice)
        .answer(Role::Architect, "job-1", 3, architecture(&[]))
        .answer(
            Role::Architect,
            "job-1",
            4,
            architecture(&[task("api", &[])]),
        )
        .answer(Role::Reviewer, "job-1/api", 0, approve());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    let wait = stage
        .until("a question about the plan", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Help)
        })
        .await;
    assert!(
        wait.wait.question.contains("no tasks"),
        "{}",
        wait.wait.question
    );
    assert_eq!(wait.thread, format!("{}/job-1", stage.project));
    let prompts = world.prompts(Role::Architect);
    assert!(
        prompts[1].contains("a → b → a") || prompts[1].contains("b → a → b"),
        "{}",
        prompts[1]
    );
    assert!(prompts[2].contains("\"nowhere\", which is not in the plan"));
    assert!(prompts[3].contains("two tasks have the id \"a\""));
    stage.reply(&wait, None, "Make it one task").await;
    stage.ended("job-1").await;
    assert!(world.prompts(Role::Architect)[4].contains("Make it one task"));
    assert_eq!(
        world
            .forge
            .log()
            .iter()
            .filter(|line| line.starts_with("committed"))
            .count(),
        1
    );
}

#[tokio::test]
async fn a_missing_secret_waits_on_the_secret_path_and_goes_on_by_itself() {
    let world = world(&[task("api", &[])]);
    let mut spec = spec();
    spec["spec"]["needs"] = json!([{"need": "secret", "name": "WEATHER_API_KEY", "description": "a key of weather.example"}]);
    world.answer(Role::Brainstorm, "conversation", 0, spec);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage
        .message("m1", "Build me a weather service", true)
        .await;
    let wait = stage.waiting().await;
    assert_eq!(wait.wait.kind, WaitKind::Secret);
    assert!(!wait.wait.free_text);
    for text in [
        "WEATHER_API_KEY",
        "artel secrets set notes-service WEATHER_API_KEY",
        "/secret WEATHER_API_KEY",
    ] {
        assert!(wait.wait.question.contains(text), "{}", wait.wait.question);
    }
    world.state.lock().secrets.insert("WEATHER_API_KEY".into());
    stage
        .send(
            &wait.thread,
            signal::SECRET,
            "secret:1",
            &signal::SecretSet {
                name: "WEATHER_API_KEY".into(),
            },
        )
        .await;
    stage.ended("job-1").await;
    let names = names(&stage.events().await);
    assert!(place(&names, "wait.closed") < place(&names, "secret.granted"));
    let state = world.state.lock();
    let granted = state.errands.values().any(|errand| {
        matches!(&errand.work, ports::ErrandWork::Deploy(request) if request.secrets.len() == 1 && request.secrets[0].name == "WEATHER_API_KEY")
    });
    assert!(granted);
}

#[tokio::test]
async fn a_release_that_fails_is_repaired_by_a_task_once() {
    let world = world(&[task("api", &[])]);
    world.state.lock().deploys = vec![Deploy::RolledBack, Deploy::Live];
    world.answer(Role::Reviewer, "job-1/repair-1", 0, approve());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.said("is live").await;
    let names = names(&stage.events().await);
    assert!(place(&names, "task.merged repair-1") > place(&names, "deploy.ended"));
    let state = world.state.lock();
    let request = &state.requests[&format!("{}.job-1.repair-1.1", stage.project)];
    assert!(
        request
            .task
            .body_markdown
            .contains("expected status 200, got 500")
    );
}

#[tokio::test]
async fn a_release_that_fails_again_is_a_typed_failure_when_nobody_is_asked() {
    let world = world(&[task("api", &[])]);
    world.state.lock().deploys = vec![Deploy::RolledBack, Deploy::RolledBack];
    world.answer(Role::Reviewer, "job-1/repair-1", 0, approve());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.message("m1", "Build me a notes service", true).await;
    let Event::JobEnded {
        status, failure, ..
    } = stage.ended("job-1").await
    else {
        panic!()
    };
    assert_eq!(status, JobStatus::Failed);
    let failure = failure.expect("a failure");
    assert_eq!(failure.kind, "release_failed");
    assert!(failure.evidence.contains("it is healthy"), "{failure:?}");
    let said = stage.said("failed").await;
    assert!(said.contains("did not pass its checks"), "{said}");
}

#[tokio::test]
async fn a_taken_port_is_changed_and_other_trouble_goes_to_a_person() {
    let world = world(&[task("api", &[])]);
    world.state.lock().deploys = vec![
        Deploy::Fails("port_taken"),
        Deploy::Fails("disk_full"),
        Deploy::Live,
    ];
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    let wait = stage
        .until("help", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Help)
        })
        .await;
    assert!(
        wait.wait.question.contains("disk_full"),
        "{}",
        wait.wait.question
    );
    stage.press(&wait, "retry").await;
    let Event::JobEnded { url, .. } = stage.ended("job-1").await else {
        panic!()
    };
    assert_eq!(url.as_deref(), Some("http://127.0.0.1:8002/"));
}

#[tokio::test]
async fn a_deploy_can_need_an_approval() {
    let world = world(&[task("api", &[])]);
    let policy = Policy {
        approve_deploy: true,
        ..Policy::default()
    };
    let stage = Stage::new(world, policy).await;
    stage.build().await;
    let wait = stage
        .until("a question", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Deploy)
        })
        .await;
    stage.press(&wait, "give_up").await;
    let Event::JobEnded {
        status, failure, ..
    } = stage.ended("job-1").await
    else {
        panic!()
    };
    assert_eq!(
        (status, failure.map(|failure| failure.kind)),
        (JobStatus::Failed, Some("not_deployed".into()))
    );
}

#[tokio::test]
async fn cancelling_stops_workers_errands_and_questions() {
    let world = world(&[task("a", &[]), task("b", &[]), task("c", &[])]);
    world
        .works("job-1/a", &hold())
        .works("job-1/b", &[Work::Fails("agent_failed", "it broke")]);
    world.state.lock().hold_checks = true;
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.told("task.attempt", Some("a")).await;
    let wait = stage
        .until("a question about b", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.thread.ends_with("/b"))
        })
        .await;
    stage.told("task.pull_request", Some("c")).await;
    stage
        .until("checks that run", |_| {
            (!world.state.lock().errands.is_empty()).then_some(())
        })
        .await;
    stage
        .engine
        .cancel(format!("{}/job-1", stage.project), "enough")
        .await
        .expect("cancelled");
    let Event::JobEnded { status, .. } = stage.ended("job-1").await else {
        panic!()
    };
    assert_eq!(status, JobStatus::Cancelled);
    for id in ["a", "b", "c"] {
        stage.told("task.ended", Some(id)).await;
    }
    stage.said("was stopped").await;
    let events = stage.events().await;
    assert_eq!(
        crate::stage::closed(&events, &wait.wait.id),
        Some("withdrawn".to_owned())
    );
    assert!(open_waits(&events).is_empty());
    let ended = names(&events)
        .iter()
        .filter(|name| *name == "job.ended")
        .count();
    assert_eq!(ended, 1);
    let state = world.state.lock();
    assert!(
        state
            .cancelled_workers
            .contains(&format!("{}.job-1.a.1", stage.project))
    );
    assert!(
        state
            .cancelled_errands
            .iter()
            .any(|key| key.contains("/c:") && key.ends_with("checks:1")),
        "{:?}",
        state.cancelled_errands
    );
}

#[tokio::test]
async fn a_failed_task_does_not_stop_the_others_and_can_be_started_again() {
    let world = world(&[task("a", &[]), task("b", &[]), task("c", &["a"])]);
    world
        .works("job-1/a", &[Work::Fails("agent_failed", "it broke")])
        .answer(Role::Reviewer, "job-1/a.2", 0, approve());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    let wait = stage
        .until("a question about a", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.thread.ends_with("/a"))
        })
        .await;
    stage.told("task.merged", Some("b")).await;
    stage.press(&wait, "give_up").await;
    let again = stage
        .until("a question about the job", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.thread.ends_with("/job-1"))
        })
        .await;
    assert!(
        again.wait.question.contains("`a` failed, and 1 more wait"),
        "{}",
        again.wait.question
    );
    stage.press(&again, "retry").await;
    stage.ended("job-1").await;
    assert!(world.forge.main_file("a.py").is_some() && world.forge.main_file("c.py").is_some());
}

#[tokio::test]
async fn the_budget_is_raised_by_its_owner_only() {
    let world = world(&[task("api", &[])]);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.say("m1", "Build me a notes service").await;
    let proposal = stage.waiting().await;
    world.state.lock().out_of_money = true;
    stage.press(&proposal, "approve").await;
    let wait = stage
        .until("a question about money", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Budget)
        })
        .await;
    assert!(
        wait.wait.question.contains("100 tokens of 100 tokens"),
        "{}",
        wait.wait.question
    );
    stage.press(&wait, "raise").await;
    stage.told("budget.raised", None).await;
    stage.ended("job-1").await;
}
