//! Strangers, groups, and buttons of somebody else.

use ports::PersonId;
use store::Standing;

use crate::support::{
    ADMIN, FRIEND, GROUP, OWNER, SOON, STRANGER, World, eventually, help_wait, in_group,
};

#[tokio::test]
async fn a_flood_of_a_stranger_gets_one_sentence_back() {
    let (world, running) = World::running().await;
    for n in 0..30 {
        let text = match n % 3 {
            0 => "/status",
            1 => "build me a bank",
            _ => "let me in",
        };
        world.telegram.write(STRANGER, text).await;
    }
    world.telegram.press(STRANGER, 1, "token").await;
    world.settled().await;
    let texts = world.texts(STRANGER).await;
    assert_eq!(texts.len(), 1, "{texts:?}");
    assert!(texts[0].contains("pairing code"));
    assert!(world.desk.heard.lock().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_stranger_whom_the_server_slows_down_is_not_waited_for() {
    let (world, running) = World::running().await;
    world
        .telegram
        .refuse_once("sendMessage", crate::support::patience(600))
        .await;
    world.telegram.write(STRANGER, "hello").await;
    world.settled().await;
    running.stop().await;
}

#[tokio::test]
async fn chatter_does_not_use_the_pairing_code_up() {
    let (world, running) = World::running().await;
    let code = world
        .store
        .new_pairing_code(std::time::Duration::from_mins(5))
        .await
        .unwrap();
    for _ in 0..20 {
        world.telegram.write(STRANGER, "hello").await;
    }
    world
        .telegram
        .write(STRANGER, &code.expose().to_lowercase())
        .await;
    world
        .telegram
        .wait_for("the greeting", SOON, |seen| seen.text.contains("/new"))
        .await;
    world.telegram.write(STRANGER, "build a shop").await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().as_slice(), ["build a shop"]);
    running.stop().await;
}

#[tokio::test]
async fn in_a_group_the_bot_answers_only_who_speaks_to_it() {
    let (world, running) = World::running().await;
    eventually("it knows its name", || async {
        (!world.telegram.calls("setmycommands").await.is_empty()).then_some(())
    })
    .await;
    let telegram = &world.telegram;
    telegram.update(in_group(OWNER, "lunch?")).await;
    telegram.update(in_group(STRANGER, "yes, at twelve")).await;
    telegram.update(in_group(OWNER, "/status@other_bot")).await;
    world.settled().await;
    assert!(world.texts(GROUP).await.is_empty());
    telegram
        .update(in_group(OWNER, "@artel_bot build a menu"))
        .await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().as_slice(), ["build a menu"]);
    telegram
        .update(in_group(STRANGER, "@artel_bot build a bank"))
        .await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().len(), 1);
    assert!(world.texts(GROUP).await[0].contains("pairing code"));
    running.stop().await;
}

#[tokio::test]
async fn a_button_counts_once_and_only_for_whom_it_is() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", GROUP).await;
    world.ask(&project, Some("job-1"), help_wait("w1")).await;
    let (id, question) = world
        .telegram
        .wait_for("the question", SOON, |seen| !seen.buttons.is_empty())
        .await;
    let (retry, give_up) = (&question.buttons[0].1, &question.buttons[1].1);
    world.telegram.press(STRANGER, id, give_up).await;
    world.telegram.press(FRIEND, id, give_up).await;
    world.telegram.press(OWNER, id, "made-up").await;
    world.settled().await;
    assert!(world.desk.answers.lock().is_empty());
    world.telegram.press(OWNER, id, retry).await;
    world.settled().await;
    world.telegram.press(OWNER, id, retry).await;
    world.telegram.press(OWNER, id, give_up).await;
    world.settled().await;
    let answers = world.desk.answers.lock().clone();
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].1.choice.as_deref(), Some("retry"));
    let words: Vec<String> = world
        .telegram
        .calls("answercallbackquery")
        .await
        .iter()
        .map(|call| call["text"].as_str().unwrap().to_owned())
        .collect();
    for (times, part) in [
        (1, "not yours"),
        (1, "for somebody else"),
        (1, "unknown"),
        (1, "Noted"),
        (2, "answered already"),
    ] {
        let found = words.iter().filter(|word| word.contains(part)).count();
        assert_eq!(found, times, "{part}: {words:?}");
    }
    running.stop().await;
}

#[tokio::test]
async fn whoever_leaves_the_configuration_loses_what_it_gave() {
    let world = World::new().await;
    let who = |id: i64| PersonId::new(format!("telegram:{id}"));
    for (id, standing) in [(1, Standing::Allowed), (2, Standing::Admin)] {
        world.store.set_standing(&who(id), standing).await.unwrap();
    }
    let code = world
        .store
        .new_pairing_code(std::time::Duration::from_mins(5))
        .await
        .unwrap();
    world
        .store
        .pair(&who(3), "Eve", code.expose())
        .await
        .unwrap();
    let running = world.start().await;
    for (id, standing) in [
        (1, Standing::Stranger),
        (2, Standing::Stranger),
        (3, Standing::Allowed),
        (OWNER, Standing::Allowed),
        (ADMIN, Standing::Admin),
    ] {
        let known = world.store.person(&who(id)).await.unwrap().unwrap();
        assert_eq!(known.standing, standing, "{id}");
    }
    running.stop().await;
}
