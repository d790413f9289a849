//! Nothing is lost, nothing is done twice, and a chat keeps its order.

use std::time::Duration;

use ports::{Failure, PersonId, ProjectId};

use crate::support::{FRIEND, OWNER, World, eventually, patience};

#[tokio::test]
async fn kill_after_kill_loses_no_message_and_keeps_their_order() {
    let mut world = World::new().await;
    let project = world.project_in("notes", OWNER).await;
    let (mut said, mut kills) = (Vec::new(), 0_usize);
    for round in 0..12_u64 {
        for n in 0..2 {
            let text = format!("message {round}-{n}");
            world.telegram.write(OWNER, &text).await;
            said.push(text);
            world
                .say(
                    &project,
                    &format!("news{round}-{n}"),
                    &format!("news {round}-{n}"),
                )
                .await;
        }
        let running = world.start().await;
        tokio::time::sleep(Duration::from_millis(3 * round)).await;
        running.kill().await;
        world.break_leases().await;
        world.forget_tries().await;
        kills += 1;
    }
    let running = world.start().await;
    world.settled().await;
    let mut heard = world.desk.heard.lock().clone();
    heard.dedup();
    assert_eq!(
        heard, said,
        "in order, and a repetition only right after a kill"
    );
    assert_eq!(world.desk.messages.lock().len(), said.len());
    eventually("all news are there", || async {
        let texts = world.texts(OWNER).await;
        (0..12)
            .flat_map(|round| (0..2).map(move |n| format!("news {round}-{n}")))
            .all(|news| texts.contains(&news))
            .then_some(())
    })
    .await;
    let texts = world.texts(OWNER).await;
    assert!(
        texts.len() <= 24 + kills,
        "at most the one under way at a kill comes twice: {texts:#?}"
    );
    running.stop().await;
}

#[tokio::test]
async fn an_update_is_acknowledged_only_after_it_is_stored_and_counts_once() {
    let world = World::new().await;
    world.telegram.write(OWNER, "build a shop").await;
    let running = world.start().await;
    world.settled().await;
    running.stop().await;
    // The server forgets what was acknowledged, and tells it once more.
    let running = world.start().await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().as_slice(), ["build a shop"]);
    running.stop().await;
}

#[tokio::test]
async fn a_server_that_counts_anew_is_still_heard() {
    let world = World::new().await;
    world
        .store
        .store_update("telegram", 999_999_999, r#"{"update_id":999999999}"#)
        .await
        .unwrap();
    world.telegram.write(OWNER, "build a shop").await;
    let running = world.start().await;
    eventually("it is heard", || async {
        (!world.desk.heard.lock().is_empty()).then_some(())
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn what_the_database_refuses_is_kept_and_holds_up_its_chat_but_no_other() {
    let (world, running) = World::running().await;
    world
        .desk
        .fail(2, Failure::new("database", "the disk is full").retryable());
    world.telegram.write(OWNER, "first").await;
    world.telegram.write(OWNER, "second").await;
    world.telegram.write(OWNER, "third").await;
    world.settled().await;
    assert_eq!(
        world.desk.heard.lock().as_slice(),
        ["first", "second", "third"]
    );
    assert!(world.texts(OWNER).await.is_empty(), "nobody was bothered");
    running.stop().await;
}

#[tokio::test]
async fn what_keeps_failing_is_put_aside_and_the_admins_and_its_writer_are_told() {
    let (world, running) = World::running().await;
    world
        .desk
        .fail(5, Failure::new("database", "the disk is full").retryable());
    world.telegram.write(OWNER, "first").await;
    world.settled().await;
    world.telegram.write(OWNER, "second").await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().as_slice(), ["second"]);
    let notices = world.desk.notices.lock().clone();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!(notices[0].0, "telegram.put_aside");
    assert!(notices[0].1.contains("the disk is full"), "{notices:?}");
    let texts = world.texts(OWNER).await;
    assert!(
        texts.len() == 1 && texts[0].contains("the disk is full"),
        "{texts:?}"
    );
    running.stop().await;
}

#[tokio::test]
async fn what_took_the_program_down_each_time_is_put_aside_and_the_admins_are_told() {
    let world = World::new().await;
    let raw = r#"{"update_id":1,"message":{"message_id":1,"chat":{"id":4200001},"from":{"id":4200001},"text":"boom"}}"#;
    world.store.store_update("telegram", 1, raw).await.unwrap();
    for _ in 0..store::MAX_INBOX_ATTEMPTS {
        assert!(world.store.begin_update("telegram", 1).await.unwrap());
    }
    let running = world.start().await;
    eventually("the admins are told", || async {
        (world.desk.notices.lock().len() == 1).then_some(())
    })
    .await;
    eventually("it is put aside", || async {
        world
            .store
            .unhandled_updates("telegram", 1)
            .await
            .unwrap()
            .is_empty()
            .then_some(())
    })
    .await;
    assert!(world.desk.heard.lock().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn ends_of_the_program_are_no_tries() {
    let world = World::new().await;
    world.telegram.write(OWNER, "/help").await;
    for _ in 0..6 {
        world
            .telegram
            .answer_once("sendMessage", 502, "<html>bad gateway</html>")
            .await;
        let calls = world.telegram.calls("sendmessage").await.len();
        world
            .telegram
            .refuse_once("sendMessage", patience(600))
            .await;
        let running = world.start().await;
        eventually("the server asked for patience", || async {
            (world.telegram.calls("sendmessage").await.len() >= calls + 2).then_some(())
        })
        .await;
        running.stop().await;
    }
    let running = world.start().await;
    world.settled().await;
    assert!(world.texts(OWNER).await[0].contains("/new"));
    assert!(world.desk.notices.lock().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_chat_that_the_server_slows_down_holds_up_no_other() {
    let (world, running) = World::running().await;
    world
        .telegram
        .refuse_once("sendMessage", patience(600))
        .await;
    world.telegram.write(OWNER, "/help").await;
    eventually("the server asked for patience", || async {
        (!world.telegram.calls("sendmessage").await.is_empty()).then_some(())
    })
    .await;
    // More than are looked at together.
    for n in 0..60 {
        world.telegram.write(OWNER, &format!("waiting {n}")).await;
    }
    world.telegram.write(FRIEND, "build a shop").await;
    eventually("the other chat is heard", || async {
        (world.desk.heard.lock().as_slice() == ["build a shop"]).then_some(())
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn an_order_that_takes_long_does_not_silence_its_chat() {
    let (mut world, running) = World::running().await;
    world.project_in("notes", OWNER).await;
    world.telegram.write(OWNER, "/rollback").await;
    world.telegram.write(OWNER, "how far are you?").await;
    eventually("the question is heard", || async {
        (!world.desk.heard.lock().is_empty()).then_some(())
    })
    .await;
    assert!(world.texts(OWNER).await.is_empty());
    world.desk.rolled_back.notify_one();
    world.settled().await;
    assert_eq!(
        world.texts(OWNER).await,
        ["There is no release to go back to."]
    );
    running.stop().await;
}

#[tokio::test]
async fn a_crash_after_pairing_makes_no_project_of_the_code() {
    let world = World::new().await;
    let newcomer = 77;
    let code = world
        .store
        .new_pairing_code(Duration::from_mins(5))
        .await
        .unwrap();
    // As far as the first try came: noted, paired, and not yet said.
    let raw = format!(
        r#"{{"update_id":5,"artel_pairing":true,"message":{{"message_id":1,"chat":{{"id":77}},"from":{{"id":77}},"text":"{}"}}}}"#,
        code.expose()
    );
    world.store.store_update("telegram", 5, &raw).await.unwrap();
    world.store.begin_update("telegram", 5).await.unwrap();
    let who = PersonId::new(format!("telegram:{newcomer}"));
    world.store.pair(&who, "Eve", code.expose()).await.unwrap();
    let running = world.start().await;
    world
        .telegram
        .wait_for("the greeting", crate::support::SOON, |seen| {
            seen.chat == newcomer && seen.text.contains("/new")
        })
        .await;
    assert!(world.desk.heard.lock().is_empty());
    running.stop().await;
    // And a project that was founded in a try that was broken off is founded once.
    let key = "telegram:6";
    let raw = r#"{"update_id":6,"message":{"message_id":2,"chat":{"id":77},"from":{"id":77},"text":"a shop"}}"#;
    world.store.store_update("telegram", 6, raw).await.unwrap();
    let founded = ProjectId::founded_by(key);
    world
        .store
        .set_current_project("telegram", "77", Some(&founded))
        .await
        .unwrap();
    let running = world.start().await;
    eventually("it is heard", || async {
        (!world.desk.heard.lock().is_empty()).then_some(())
    })
    .await;
    let message = world.desk.messages.lock()[key].clone();
    assert_eq!(message.project, None, "it founds, as it did at first");
    running.stop().await;
}
