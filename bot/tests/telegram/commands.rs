//! Commands, and input that is not as it should be.

use serde_json::json;

use crate::support::{OWNER, World};

/// What the bot says to one message.
async fn said_to(world: &World, text: &str) -> String {
    let before = world.texts(OWNER).await.len();
    world.telegram.write(OWNER, text).await;
    world.settled().await;
    world.texts(OWNER).await.split_off(before).join("\n")
}

#[tokio::test]
async fn a_name_that_can_be_none_is_refused_and_changes_nothing() {
    let (mut world, running) = World::running().await;
    world.project_in("notes", OWNER).await;
    world.desk.add("notes");
    for command in ["project", "status", "deploy", "rollback", "cancel"] {
        let said = said_to(&world, &format!("/{command} ../../etc/passwd")).await;
        assert!(
            said.contains("no project") && said.contains("/projects"),
            "/{command}: {said}"
        );
    }
    assert!(world.desk.orders.lock().is_empty());
    let chat = world
        .store
        .chat("telegram", &OWNER.to_string())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(chat.project.unwrap().as_str(), "notes");
    running.stop().await;
}

#[tokio::test]
async fn an_unknown_command_is_answered_with_those_that_are_known() {
    let (world, running) = World::running().await;
    let said = said_to(&world, "/frobnicate now").await;
    assert!(
        said.contains("/frobnicate") && said.contains("/status"),
        "{said}"
    );
    assert!(world.desk.heard.lock().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn empty_and_endless_messages_are_answered_and_found_nothing() {
    let (world, running) = World::running().await;
    let said = said_to(&world, "  \n ").await;
    assert_eq!(said, "The message is empty: write what you want.");
    let said = said_to(&world, &"x".repeat(65 * 1024 + 1)).await;
    assert!(said.contains("64 KiB"), "{said}");
    let chat = world
        .store
        .chat("telegram", &OWNER.to_string())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(chat.project, None);
    running.stop().await;
}

#[tokio::test]
async fn commands_without_a_project_say_what_to_do() {
    let (world, running) = World::running().await;
    for command in ["/status", "/deploy", "/rollback", "/cancel", "/retry"] {
        let said = said_to(&world, command).await;
        assert!(said.contains("/project NAME"), "{command}: {said}");
    }
    assert_eq!(
        said_to(&world, "/new").await,
        "Describe it in your next message."
    );
    running.stop().await;
}

#[tokio::test]
async fn new_founds_another_project_and_project_goes_back() {
    let (mut world, running) = World::running().await;
    let notes = world.project_in("notes", OWNER).await;
    world.desk.add("notes");
    world.telegram.write(OWNER, "/new a shop").await;
    world.telegram.write(OWNER, "with a basket").await;
    world.telegram.write(OWNER, "/project notes").await;
    world.telegram.write(OWNER, "with a search").await;
    world.settled().await;
    let messages: Vec<_> = world.desk.messages.lock().values().cloned().collect();
    assert_eq!(messages.len(), 3);
    assert_eq!(messages[0].project, None, "it founds one");
    assert_ne!(messages[1].project, Some(notes.clone()));
    assert!(messages[1].project.is_some());
    assert_eq!(messages[2].project, Some(notes));
    running.stop().await;
}

#[tokio::test]
async fn retry_takes_a_task_a_project_or_nothing() {
    let (mut world, running) = World::running().await;
    world.project_in("notes", OWNER).await;
    world.desk.add("shop");
    for rest in ["", "task-2", "shop", "shop task-3"] {
        said_to(&world, &format!("/retry {rest}")).await;
    }
    let orders = world.desk.orders.lock().clone();
    for (order, parts) in orders.iter().zip([
        ["notes", "None"],
        ["notes", "task-2"],
        ["shop", "None"],
        ["shop", "task-3"],
    ]) {
        assert!(parts.iter().all(|part| order.contains(part)), "{order}");
    }
    assert_eq!(orders.len(), 4);
    running.stop().await;
}

#[tokio::test]
async fn pictures_and_edits_get_a_sentence() {
    let (world, running) = World::running().await;
    let message = |kind: &'static str, fields: serde_json::Value| {
        move |id: i64| {
            let mut message = json!({
                "message_id": id, "chat": {"id": OWNER}, "from": {"id": OWNER, "first_name": "Ada"},
            });
            for (name, value) in fields.as_object().unwrap() {
                message[name] = value.clone();
            }
            json!({kind: message})
        }
    };
    world
        .telegram
        .update(message("message", json!({"voice": {}})))
        .await;
    world
        .telegram
        .update(message("edited_message", json!({"text": "a shop, I mean"})))
        .await;
    world
        .telegram
        .update(message("message", json!({"new_chat_title": "x"})))
        .await;
    world.settled().await;
    let texts = world.texts(OWNER).await;
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert!(texts[0].contains("only read text"));
    assert!(texts[1].contains("new message"));
    assert!(world.desk.heard.lock().is_empty());
    running.stop().await;
}
