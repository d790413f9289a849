//! What the crew says: as messages that fit, once, edited in place, and kept until the server takes it.

use ports::Event;

use crate::support::{OWNER, SOON, World, eventually, help_wait, patience, refusal};

fn long_text() -> String {
    let parts = (0..4).map(|n| format!("part{n} {}", "x".repeat(3000)));
    parts.collect::<Vec<_>>().join("\n\n")
}

async fn parts_in_order(world: &World) {
    world
        .telegram
        .wait_for("the last part", SOON, |seen| seen.text.contains("part3"))
        .await;
    let texts = world.texts(OWNER).await;
    assert_eq!(texts.len(), 4);
    for (n, text) in texts.iter().enumerate() {
        assert!(text.starts_with(&format!("part{n}")), "in order");
    }
}

#[tokio::test]
async fn a_slow_down_between_parts_repeats_none_even_after_a_kill() {
    let mut world = World::new().await;
    let project = world.project_in("notes", OWNER).await;
    world.say(&project, "long", &long_text()).await;
    world.telegram.pass("sendMessage", 2).await;
    world.telegram.refuse_once("sendMessage", patience(1)).await;
    let running = world.start().await;
    eventually("the server asked for patience", || async {
        (world.telegram.calls("sendmessage").await.len() == 3).then_some(())
    })
    .await;
    running.kill().await;
    world.break_leases().await;
    let running = world.start().await;
    parts_in_order(&world).await;
    assert_eq!(
        world.telegram.calls("sendmessage").await.len(),
        5,
        "two parts, a refusal, two parts"
    );
    running.stop().await;
}

#[tokio::test]
async fn a_question_is_edited_in_place_when_it_is_answered() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    world.ask(&project, Some("job-1"), help_wait("w1")).await;
    let (id, asked) = world
        .telegram
        .wait_for("the question", SOON, |seen| !seen.buttons.is_empty())
        .await;
    let labels: Vec<&str> = asked
        .buttons
        .iter()
        .map(|(label, _)| label.as_str())
        .collect();
    assert_eq!(labels, ["Try again", "Give up"]);
    world
        .telegram
        .refuse_once("editMessageText", patience(1))
        .await;
    let closed = Event::WaitClosed {
        wait: "w1".into(),
        answer: Some("retry".to_owned()),
        by: None,
    };
    world.tell(&project, Some("job-1"), closed).await;
    let (edited, seen) = world
        .telegram
        .wait_for("the answer on the question", SOON, |seen| {
            seen.text.contains("→ Try again")
        })
        .await;
    assert_eq!(edited, id, "the same message");
    assert!(seen.buttons.is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_question_that_was_deleted_is_answered_in_a_new_message() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    world.ask(&project, Some("job-1"), help_wait("w1")).await;
    let (id, _) = world
        .telegram
        .wait_for("the question", SOON, |seen| !seen.buttons.is_empty())
        .await;
    world.telegram.lose(id).await;
    let closed = Event::WaitClosed {
        wait: "w1".into(),
        answer: None,
        by: None,
    };
    world.tell(&project, Some("job-1"), closed).await;
    world
        .telegram
        .wait_for("it is said anew", SOON, |seen| {
            seen.text.contains("withdrawn")
        })
        .await;
    running.stop().await;
}

#[tokio::test]
async fn formatting_that_the_server_cannot_read_is_left_away_and_the_words_arrive() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    let cannot = refusal(
        400,
        "Bad Request: can't parse entities: Unsupported start tag",
    );
    world.telegram.refuse_once("sendMessage", cannot).await;
    world.say(&project, "news", "**bold** & `1 < 2`").await;
    let (_, seen) = world
        .telegram
        .wait_for("the words", SOON, |seen| seen.text.contains("bold"))
        .await;
    assert_eq!(seen.text, "bold & 1 < 2");
    running.stop().await;
}

#[tokio::test]
async fn a_chat_that_blocked_the_bot_is_given_up_and_the_admins_hear_of_it() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    let blocked = refusal(403, "Forbidden: bot was blocked by the user");
    world.telegram.refuse_once("sendMessage", blocked).await;
    world.say(&project, "lost", "nobody hears this").await;
    eventually("the admins are told", || async {
        let notices = world.desk.notices.lock();
        notices
            .iter()
            .any(|(fingerprint, text)| {
                *fingerprint == format!("telegram.refused:{OWNER}") && text.contains("blocked")
            })
            .then_some(())
    })
    .await;
    // What comes later is tried again.
    world.say(&project, "later", "somebody may hear this").await;
    world
        .telegram
        .wait_for("later news", SOON, |seen| seen.text.contains("may hear"))
        .await;
    assert_eq!(world.texts(OWNER).await.len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn what_a_broken_server_did_not_take_is_sent_when_it_is_mended() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    for (status, body) in [
        (502, "<html><h1>502 Bad Gateway</h1></html>".to_owned()),
        (500, refusal(500, "Internal Server Error").to_string()),
        (200, "<html>captive portal</html>".to_owned()),
        (404, "<html>404 nginx</html>".to_owned()),
        (200, r#"{"ok":tr"#.to_owned()),
    ] {
        world
            .telegram
            .answer_once("sendMessage", status, &body)
            .await;
    }
    world.say(&project, "news", "it works").await;
    world
        .telegram
        .wait_for("the news", SOON, |seen| seen.text == "it works")
        .await;
    assert!(world.desk.notices.lock().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn the_group_that_became_a_supergroup_is_found_there() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", -5).await;
    let mut moved = refusal(
        400,
        "Bad Request: group chat was upgraded to a supergroup chat",
    );
    moved["parameters"]["migrate_to_chat_id"] = (-1_005).into();
    world.telegram.refuse_once("sendMessage", moved).await;
    world.say(&project, "news", "hello").await;
    let (_, seen) = world
        .telegram
        .wait_for("the news", SOON, |seen| seen.text == "hello")
        .await;
    assert_eq!(seen.chat, -1_005);
    running.stop().await;
}
