//! The conversation always answers, and approves only what was approved.

use nodes::{Policy, signal};
use ports::{Event, PersonId, Role, SaidKind, WaitKind};
use serde_json::json;

use crate::{
    stage::{Stage, change, closed, open_waits, says, spec, task, world},
    world::{Work, World},
};

fn one_task() -> World {
    world(&[task("api", &[])])
}

#[tokio::test]
async fn an_approved_proposal_starts_a_job_and_its_end_is_told_with_the_address() {
    let stage = Stage::new(one_task(), Policy::default()).await;
    stage.build().await;
    let said = stage.said("is live").await;
    assert!(said.contains("http://127.0.0.1:8001/"), "{said}");
    let events = stage.events().await;
    assert!(events.iter().any(|recorded| matches!(
        &recorded.event,
        Event::Said {
            kind: SaidKind::Result,
            ..
        }
    )));
    assert!(
        events
            .iter()
            .any(|recorded| matches!(&recorded.event, Event::SpecApproved { slug, by, .. } if slug == "notes-service" && by == "local:owner"))
    );
    assert!(
        matches!(&events[0].event, Event::ProjectFounded { owner } if owner.as_str() == "local:owner")
    );
}

#[tokio::test]
async fn not_approved_is_no_approval_and_a_typed_yes_is_one() {
    let world = one_task();
    let mut other = spec();
    other["spec"]["name"] = json!("Other notes");
    world.answer(Role::Brainstorm, "conversation", 1, other);
    let stage = Stage::new(world, Policy::default()).await;
    stage.say("m1", "Build me a notes service").await;
    let first = stage.waiting().await;
    assert_eq!(first.wait.kind, WaitKind::Spec);
    stage.say("m2", "not approved").await;
    let second = stage
        .until("another proposal", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.id != first.wait.id)
        })
        .await;
    let events = stage.events().await;
    assert!(second.wait.question.contains("Other notes"));
    assert_eq!(
        closed(&events, &first.wait.id),
        Some("withdrawn".to_owned()),
        "the first one is withdrawn"
    );
    assert!(
        !events
            .iter()
            .any(|recorded| matches!(recorded.event, Event::JobStarted { .. }))
    );
    // The button of the withdrawn proposal does nothing any more.
    stage.press(&first, "approve").await;
    stage.say("m3", "Yes!").await;
    stage.told("spec.approved", None).await;
    let name = stage
        .until("the name", |events| {
            events.iter().find_map(|recorded| match &recorded.event {
                Event::SpecApproved { spec, .. } => Some(spec.name.clone()),
                _ => None,
            })
        })
        .await;
    assert_eq!(name, "Other notes");
}

#[tokio::test]
async fn a_button_pressed_twice_counts_once() {
    let stage = Stage::new(one_task(), Policy::default()).await;
    stage.say("m1", "Build me a notes service").await;
    let wait = stage.waiting().await;
    assert_eq!(stage.press(&wait, "approve").await, graph::Delivered::New);
    assert_eq!(
        stage.press(&wait, "cancel").await,
        graph::Delivered::Duplicate
    );
    stage.said("is live").await;
    let events = stage.events().await;
    let jobs = events
        .iter()
        .filter(|recorded| matches!(recorded.event, Event::JobStarted { .. }))
        .count();
    assert_eq!(jobs, 1);
}

#[tokio::test]
async fn yes_approves_beforehand() {
    let stage = Stage::new(one_task(), Policy::default()).await;
    stage.message("m1", "Build me a notes service", true).await;
    stage.said("is live").await;
    let events = stage.events().await;
    assert!(open_waits(&events).is_empty());
    assert!(events.iter().any(
        |recorded| matches!(&recorded.event, Event::SpecApproved { by, .. } if by == "policy:yes")
    ));
}

#[tokio::test]
async fn questions_are_asked_together_and_after_three_rounds_a_proposal_is_made() {
    let world = one_task();
    let ask = json!({"turn": "ask", "questions": [
        {"question": "Should notes survive a restart?", "options": ["Yes", "No"]},
        {"question": "Who may write?", "options": ["Everybody", "Some"]}
    ]});
    for turn in 0..4 {
        world.answer(Role::Brainstorm, "conversation", turn, &ask);
    }
    // The fourth round is refused, and the repair proposes.
    world.answer(Role::Brainstorm, "conversation", 4, spec());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.say("m1", "Build me a notes service").await;
    let mut seen = Vec::new();
    for round in 0..3 {
        let wait = stage
            .until("a round of questions", |events| {
                open_waits(events)
                    .pop()
                    .filter(|wait| !seen.contains(&wait.wait.id))
            })
            .await;
        assert_eq!(wait.wait.kind, WaitKind::Clarify);
        assert!(
            wait.wait.question.contains("1. Should notes") && wait.wait.question.contains("2. Who")
        );
        seen.push(wait.wait.id.clone());
        match round {
            0 => drop(stage.press(&wait, "suggested").await),
            1 => drop(stage.reply(&wait, None, "Only me").await),
            _ => stage.say("m2", "whatever you think").await,
        }
    }
    stage
        .until("a proposal", |events| {
            open_waits(events)
                .pop()
                .filter(|wait| wait.wait.kind == WaitKind::Spec)
        })
        .await;
    let prompts = world.prompts(Role::Brainstorm);
    assert!(
        prompts[3].contains("No more questions may be asked"),
        "{}",
        prompts[3]
    );
    assert!(
        prompts[3].contains("first suggestion of every question") && prompts[3].contains("Only me")
    );
}

#[tokio::test]
async fn a_question_is_answered_while_a_job_runs() {
    let world = one_task();
    world.works("job-1/api", &[Work::Held(Box::new(Work::Commit(vec![])))]);
    world.answer(
        Role::Brainstorm,
        "conversation/aside",
        0,
        json!({"turn": "answer", "text": "The worker writes `api`."}),
    );
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.told("task.attempt", Some("api")).await;
    stage.say("m2", "How far are you?").await;
    stage.said("The worker writes `api`.").await;
    // The tape has no second answer: the record, and what the conversation knows itself, answer.
    stage.say("m3", "And now?").await;
    let said = stage.said("Here is where things stand").await;
    assert!(said.contains("job-1 is running"), "{said}");
    // A plain status needs no model.
    stage
        .send(
            stage.project.as_str(),
            signal::ORDER,
            "o1",
            &json!({"key": "o1", "by": "local:owner", "order": "status"}),
        )
        .await;
    stage
        .until("a second status", |events| {
            (says(events)
                .iter()
                .filter(|text| text.contains("job-1 is running"))
                .count()
                == 2)
                .then_some(())
        })
        .await;
    world.release("job-1/api");
    stage.said("is live").await;
    // Asides took no turn: the next change is turn 1.
    world.answer(Role::Brainstorm, "conversation", 1, change("Search"));
    stage.say("m4", "Add a search").await;
    assert!(stage.waiting().await.wait.question.contains("Search"));
}

#[tokio::test]
async fn steering_reaches_the_job_and_its_next_workers() {
    let world = world(&[task("storage", &[]), task("api", &["storage"])]);
    world.works(
        "job-1/storage",
        &[Work::Held(Box::new(Work::Commit(vec![])))],
    );
    world.answer(
        Role::Brainstorm,
        "conversation/aside",
        0,
        json!({"turn": "steer", "text": "Use SQLite."}),
    );
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.told("task.attempt", Some("storage")).await;
    stage.say("m2", "Use SQLite for it").await;
    stage.said("Passed on to job-1: Use SQLite.").await;
    stage.told("job.steered", None).await;
    stage
        .until("the wish in the job", |_| {
            world.held("job-1/storage").then_some(())
        })
        .await;
    // The wish is in the job's mailbox before the first task's result, so the second task's worker knows it.
    world.release("job-1/storage");
    stage.said("is live").await;
    let state = world.state.lock();
    let request = &state.requests[&format!("{}.job-1.api.1", stage.project)];
    assert!(
        request.task.body_markdown.contains("Use SQLite."),
        "{}",
        request.task.body_markdown
    );
}

#[tokio::test]
async fn a_change_extends_the_running_project_and_one_sent_meanwhile_is_queued() {
    let world = one_task();
    world
        .works("job-1/api", &[Work::Held(Box::new(Work::Commit(vec![])))])
        .answer(Role::Brainstorm, "conversation/aside", 0, change("Search"))
        .answer(
            Role::Architect,
            "job-2",
            0,
            json!({"overview": "a filter", "tasks": [task("search", &[])]}),
        )
        .answer(Role::Reviewer, "job-2/search", 0, crate::stage::approve());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.told("task.attempt", Some("api")).await;
    stage.say("m2", "Add a search").await;
    let wait = stage.waiting().await;
    stage.press(&wait, "approve").await;
    stage.said("is next: it starts when job-1 has ended").await;
    world.release("job-1/api");
    stage.ended("job-1").await;
    let Event::JobEnded { status, url, .. } = stage.ended("job-2").await else {
        panic!()
    };
    assert_eq!(status, ports::JobStatus::Deployed);
    assert_eq!(
        url.as_deref(),
        Some("http://127.0.0.1:8001/"),
        "the same port"
    );
    stage.said("**Search** is live").await;
    assert!(
        world.forge.main_file("search.py").is_some() && world.forge.main_file("api.py").is_some()
    );
    let prompt = world.prompts(Role::Architect).pop().expect("a second plan");
    assert!(
        prompt.contains("api.py") && prompt.contains("find notes by a word"),
        "{prompt}"
    );
    let state = world.state.lock();
    let checks: Vec<usize> = state
        .errands
        .values()
        .filter_map(|errand| match &errand.work {
            ports::ErrandWork::Deploy(request) => Some(request.acceptance.len()),
            ports::ErrandWork::Checks { .. } => None,
        })
        .collect();
    assert_eq!(
        checks,
        [1, 2],
        "the second deploy checks the change as well"
    );
}

#[tokio::test]
async fn messages_that_cannot_be_used_get_one_clear_sentence() {
    let stage = Stage::new(one_task(), Policy::default()).await;
    stage.say("m1", "  \n ").await;
    stage.said("That message was empty").await;
    stage.say("m2", &"x".repeat(1024 * 1024)).await;
    let said = stage.said("1024 KiB").await;
    assert!(said.contains("at most 64 KiB"), "{said}");
    assert_eq!(stage.world.questions().len(), 0, "no model was asked");
    let received = stage
        .events()
        .await
        .iter()
        .filter(|recorded| matches!(&recorded.event, Event::MessageReceived { text, .. } if text.len() <= 8 * 1024))
        .count();
    assert_eq!(received, 2, "both are in the journal, the long one cut");
}

#[tokio::test]
async fn a_malformed_answer_is_repaired_and_prose_ends_in_a_typed_failure() {
    let world = one_task();
    let mut lacking = spec();
    lacking["spec"]["acceptance"] = json!([]);
    world
        .answer(
            Role::Brainstorm,
            "conversation",
            0,
            "{\"turn\": \"propose_project\", \"spec\": {\"name\": 7}}",
        )
        .answer(Role::Brainstorm, "conversation", 1, lacking)
        .answer(
            Role::Brainstorm,
            "conversation",
            2,
            format!("Of course!\n```json\n{}\n```", spec()),
        );
    for turn in 3..6 {
        world.answer(
            Role::Brainstorm,
            "conversation",
            turn,
            "I would rather talk about it.",
        );
    }
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.say("m1", "Build me a notes service").await;
    let wait = stage.waiting().await;
    let prompts = world.prompts(Role::Brainstorm);
    assert!(
        prompts[1].contains("spec.name: invalid type"),
        "{}",
        prompts[1]
    );
    assert!(prompts[2].contains("spec.acceptance: is empty"));
    stage.press(&wait, "cancel").await;
    stage.said("Dropped").await;
    stage.say("m2", "Build something else").await;
    let said = stage.said("I could not work on that").await;
    assert!(
        said.contains("no usable BrainstormTurn in 3 tries (it holds no JSON object)"),
        "{said}"
    );
    assert_eq!(world.questions().len(), 6);
}

#[tokio::test]
async fn a_tape_says_so_and_secrets_stay_out_of_prompts_and_events() {
    let world = one_task();
    world.state.lock().tape = Some("demo".into());
    world.state.lock().secret_value = Some("hunter2-canary".into());
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage
        .say("m1", "Build me a notes service, my key is hunter2-canary")
        .await;
    let wait = stage.waiting().await;
    assert!(
        wait.wait.question.contains("from the demo tape"),
        "{}",
        wait.wait.question
    );
    stage.press(&wait, "approve").await;
    let said = stage.said("is live").await;
    assert!(said.contains("from the demo tape"), "{said}");
    for prompt in world.prompts(Role::Brainstorm) {
        assert!(!prompt.contains("hunter2-canary"));
        assert!(prompt.contains("<data from=\"local:owner\">"), "{prompt}");
    }
    let events = serde_json::to_string(&stage.events().await).expect("json");
    assert!(!events.contains("hunter2-canary"));
    let state: nodes::Conversation = stage
        .engine
        .state(stage.project.as_str())
        .await
        .expect("state");
    assert!(
        !serde_json::to_string(&state)
            .expect("json")
            .contains("hunter2-canary")
    );
}

#[tokio::test]
async fn orders_deploy_again_retry_and_cancel() {
    let stage = Stage::new(one_task(), Policy::default()).await;
    let order = |key: &str, what: &str| json!({"key": key, "by": PersonId::new("local:owner"), "order": what});
    stage
        .send(
            stage.project.as_str(),
            signal::ORDER,
            "o1",
            &order("o1", "deploy"),
        )
        .await;
    stage.said("There is nothing to deploy yet").await;
    stage.build().await;
    stage.said("is live").await;
    stage
        .send(
            stage.project.as_str(),
            signal::ORDER,
            "o2",
            &order("o2", "deploy"),
        )
        .await;
    let Event::JobEnded { status, .. } = stage.ended("job-2").await else {
        panic!()
    };
    assert_eq!(status, ports::JobStatus::Deployed);
    stage
        .send(
            stage.project.as_str(),
            signal::ORDER,
            "o3",
            &order("o3", "retry"),
        )
        .await;
    stage.said("Nothing failed").await;
    stage
        .send(
            stage.project.as_str(),
            signal::ORDER,
            "o4",
            &order("o4", "archive"),
        )
        .await;
    stage.said("put away").await;
    let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
    loop {
        let thread = stage
            .engine
            .thread(stage.project.as_str())
            .await
            .expect("a store");
        if thread.expect("a conversation").status == graph::ThreadStatus::Done {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "the conversation does not end"
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_job_that_breaks_down_is_told_and_can_be_tried_again() {
    let world = one_task();
    let stage = Stage::new(world.clone(), Policy::default()).await;
    world.state.lock().port_panics = true;
    stage.build().await;
    let said = stage.said("failed").await;
    assert!(said.contains("broke down"), "{said}");
    let Event::JobEnded {
        status, failure, ..
    } = stage.ended("job-1").await
    else {
        panic!()
    };
    assert_eq!(status, ports::JobStatus::Failed);
    assert_eq!(failure.expect("a failure").kind, "thread_failed");
    world.state.lock().port_panics = false;
    world.answer(
        Role::Brainstorm,
        "conversation",
        1,
        json!({"turn": "order", "order": "retry"}),
    );
    world
        .answer(
            Role::Architect,
            "job-2",
            0,
            crate::stage::architecture(&[task("api", &[])]),
        )
        .answer(Role::Reviewer, "job-2/api", 0, crate::stage::approve());
    stage.say("m2", "try it again").await;
    stage.said("is live").await;
}

#[tokio::test]
async fn a_breaking_change_is_asked_for_as_one_and_a_dropped_one_changes_nothing() {
    let world = one_task();
    let mut breaking = change("Rename the path");
    breaking["change"]["breaking"] = json!(true);
    world.answer(Role::Brainstorm, "conversation", 1, breaking);
    let stage = Stage::new(world.clone(), Policy::default()).await;
    stage.build().await;
    stage.said("is live").await;
    stage.say("m2", "Rename /notes to /items").await;
    let wait = stage.waiting().await;
    assert_eq!(wait.wait.kind, WaitKind::BreakingChange);
    assert!(
        wait.wait.question.contains("rely on"),
        "{}",
        wait.wait.question
    );
    stage.say("m3", "drop it").await;
    stage.said("Dropped").await;
    assert_eq!(
        closed(&stage.events().await, &wait.wait.id),
        Some("cancel".to_owned())
    );
    assert!(stage.thread_status("job-2").await.is_none());
}

#[test]
fn the_picture_shows_the_whole_crew() {
    let picture = nodes::picture(&one_task().crew(Policy::default())).expect("the graphs compile");
    let mermaid = picture.to_mermaid();
    for node in [
        "brainstorm",
        "zavhoz",
        "architect",
        "developers",
        "developer",
        "reviewer",
        "devops",
    ] {
        assert!(mermaid.contains(&format!("\"{node}\"")), "{mermaid}");
    }
    assert!(picture.to_svg().starts_with("<svg"));
    assert!(picture.to_dot().contains("starts tasks"));
}
