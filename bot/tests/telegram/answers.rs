//! Typed answers to what a job asks.

use ports::{Audience, Choice, OpenWait, WaitKind};

use crate::support::{FRIEND, OWNER, World, help_wait};

async fn asked() -> (World, crate::support::Running) {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    world.ask(&project, Some("job-1"), help_wait("w1")).await;
    (world, running)
}

#[tokio::test]
async fn the_whole_words_of_a_choice_answer_the_one_question_of_a_job() {
    for text in ["retry", "  TRY AGAIN\n", "Retry"] {
        let (world, running) = asked().await;
        world.telegram.write(OWNER, text).await;
        world.settled().await;
        let answers = world.desk.answers.lock().clone();
        assert_eq!(answers.len(), 1, "{text:?}");
        assert_eq!(answers[0].1.choice.as_deref(), Some("retry"));
        assert_eq!(answers[0].1.by, format!("telegram:{OWNER}"));
        assert!(world.desk.heard.lock().is_empty());
        running.stop().await;
    }
}

#[tokio::test]
async fn anything_more_than_the_choice_is_a_message() {
    let (world, running) = asked().await;
    for text in [
        "do not try again",
        "not approved",
        "retry, but slowly",
        "again",
    ] {
        world.telegram.write(OWNER, text).await;
    }
    world.settled().await;
    assert!(world.desk.answers.lock().is_empty());
    assert_eq!(world.desk.heard.lock().len(), 4);
    running.stop().await;
}

#[tokio::test]
async fn the_conversations_own_questions_are_left_to_it() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    let proposal = OpenWait {
        kind: WaitKind::Spec,
        options: vec![Choice::new("approve", "Build it")],
        ..help_wait("w1")
    };
    world.ask(&project, None, proposal).await;
    world.telegram.write(OWNER, "approve").await;
    world.settled().await;
    assert!(world.desk.answers.lock().is_empty());
    assert_eq!(world.desk.heard.lock().as_slice(), ["approve"]);
    // A word that fits both is the conversation's.
    let deploy = OpenWait {
        kind: WaitKind::Deploy,
        options: vec![Choice::new("approve", "Deploy it")],
        ..help_wait("w2")
    };
    world.ask(&project, Some("job-1"), deploy).await;
    world.telegram.write(OWNER, "approve").await;
    world.telegram.write(OWNER, "deploy it").await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().len(), 2);
    assert_eq!(world.desk.answers.lock().len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn with_two_questions_open_nobody_guesses() {
    let (mut world, running) = asked().await;
    world
        .ask(&"notes".into(), Some("job-1"), help_wait("w2"))
        .await;
    world.telegram.write(OWNER, "retry").await;
    world.settled().await;
    assert!(world.desk.answers.lock().is_empty());
    assert_eq!(world.desk.heard.lock().as_slice(), ["retry"]);
    running.stop().await;
}

#[tokio::test]
async fn only_who_is_asked_can_answer_in_words() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", FRIEND).await;
    world.ask(&project, Some("job-1"), help_wait("w1")).await;
    world.telegram.write(FRIEND, "retry").await;
    world.settled().await;
    assert!(world.desk.answers.lock().is_empty(), "the owner is asked");
    running.stop().await;
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    let wait = OpenWait {
        audience: Audience::Admins,
        ..help_wait("w1")
    };
    world.ask(&project, Some("job-1"), wait).await;
    world.telegram.write(OWNER, "retry").await;
    world.settled().await;
    assert!(world.desk.answers.lock().is_empty(), "the admins are asked");
    running.stop().await;
}

#[tokio::test]
async fn an_answer_that_was_decided_before_a_crash_stays_an_answer() {
    let mut world = World::new().await;
    world.project_in("notes", OWNER).await;
    // As far as the first try came: decided, and answered; the question is closed by now.
    let raw = format!(
        r#"{{"update_id":5,"artel_answers":{{"wait":"w1","choice":"retry"}},"message":{{"message_id":1,"chat":{{"id":{OWNER}}},"from":{{"id":{OWNER}}},"text":"retry"}}}}"#
    );
    world.store.store_update("telegram", 5, &raw).await.unwrap();
    let running = world.start().await;
    crate::support::eventually("it is handled", || async {
        let rows = world.store.unhandled_updates("telegram", 1).await.unwrap();
        rows.is_empty().then_some(())
    })
    .await;
    assert!(world.desk.heard.lock().is_empty(), "it is no message");
    running.stop().await;
}
