//! Servers that differ, are busy, or belong to somebody else.

use serde_json::json;

use crate::support::{OWNER, PATIENCE, SOON, World, eventually, patience, refusal};

#[tokio::test]
async fn a_server_without_menus_names_and_deletion_works() {
    let world = World::new().await;
    for method in [
        "setMyCommands",
        "getMe",
        "deleteMessage",
        "answerCallbackQuery",
    ] {
        world.telegram.forget_method(method).await;
    }
    let running = world.start().await;
    world.telegram.write(OWNER, "/help").await;
    world
        .telegram
        .wait_for("the help", SOON, |seen| seen.text.contains("/new"))
        .await;
    world.telegram.write(OWNER, "/secret KEY canary").await;
    world
        .telegram
        .wait_for("a word about the message", SOON, |seen| {
            seen.text.contains("could <b>not</b> delete")
        })
        .await;
    running.stop().await;
}

#[tokio::test]
async fn updates_of_kinds_that_nobody_knows_are_passed_over() {
    let (world, running) = World::running().await;
    world.telegram.strange_update().await;
    for strange in [
        json!({"message": null}),
        json!({"message": {"message_id": "seven", "chat": 7}}),
        json!({"callback_query": {"id": 7}}),
        json!({"edited_message": {"text": "x"}}),
        json!({"my_chat_member": {"chat": {"id": 1}}}),
    ] {
        world.telegram.update(|_| strange).await;
    }
    world.telegram.write(OWNER, "build a shop").await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().as_slice(), ["build a shop"]);
    assert!(world.texts(OWNER).await.is_empty());
    running.stop().await;
}

#[tokio::test]
async fn polls_that_fail_are_repeated_and_a_conflict_that_stays_is_told() {
    let world = World::new().await;
    world
        .telegram
        .answer_once("getUpdates", 502, "<html>bad gateway</html>")
        .await;
    world
        .telegram
        .answer_once("getUpdates", 200, r#"{"ok":true,"result":[{"no":"id"}]}"#)
        .await;
    world.telegram.refuse_once("getUpdates", patience(1)).await;
    for _ in 0..4 {
        let conflict = refusal(409, "Conflict: terminated by other getUpdates request");
        world.telegram.refuse_once("getUpdates", conflict).await;
    }
    world.telegram.write(OWNER, "build a shop").await;
    let running = world.start().await;
    eventually("it is heard", || async {
        (world.desk.heard.lock().as_slice() == ["build a shop"]).then_some(())
    })
    .await;
    let notices = world.desk.notices.lock().clone();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!(notices[0].0, "telegram.conflict");
    running.stop().await;
}

#[tokio::test]
async fn a_token_that_stays_unknown_ends_the_bot_and_is_not_repeated() {
    let world = World::new().await;
    for _ in 0..3 {
        world
            .telegram
            .refuse_once("getUpdates", refusal(401, "Unauthorized"))
            .await;
    }
    let error = world.start().await.ended().await.unwrap_err().to_string();
    assert!(error.contains("TELEGRAM_BOT_TOKEN"), "{error}");
}

#[tokio::test]
async fn no_error_tells_the_token() {
    crate::support::provide_crypto();
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let server = format!("http://somebody:password-canary@{address}");
    let api = bot::api::Api::new("123:token-canary", &server).unwrap();
    for error in [
        api.name().await.unwrap_err(),
        api.updates(0).await.map(|_| ()).unwrap_err(),
        api.send(1, "x", &[]).await.unwrap_err(),
    ] {
        let text = format!("{error} {error:?}");
        assert!(!text.contains("canary"), "{text}");
        assert!(text.contains("127.0.0.1"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_holds_no_poll_open_is_not_asked_without_a_pause() {
    let world = World::new().await;
    for _ in 0..400 {
        world
            .telegram
            .answer_once("getUpdates", 200, r#"{"ok":true,"result":[]}"#)
            .await;
    }
    let begun = std::time::Instant::now();
    let running = world.start().await;
    // Whatever the machine does meanwhile, there is a pause before each of them but the first.
    let polls = eventually("it asks again and again", || async {
        let polls = world.telegram.calls("getupdates").await.len();
        (polls > 10).then_some(polls)
    })
    .await;
    let least = PATIENCE * u32::try_from(polls - 1).unwrap() / 2;
    let took = begun.elapsed();
    assert!(took >= least, "{polls} polls in {took:?}");
    running.stop().await;
}
