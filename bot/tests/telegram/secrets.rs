//! The value of a secret is in the vault and nowhere else.

use serde_json::json;

use crate::support::{OWNER, STRANGER, World, secret_wait};

const CANARY: &str = "canary-value-98765";

/// A message with a secret: stored once, deleted, and kept nowhere.
async fn goes_into_the_vault(make: impl FnOnce(i64) -> serde_json::Value) {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    let message = world.telegram.update(make).await;
    world.settled().await;
    assert_eq!(
        world.desk.secrets.lock().as_slice(),
        [(project, "WEATHER_API_KEY".to_owned(), CANARY.to_owned())]
    );
    assert!(world.telegram.messages().await[&message].deleted);
    let texts = world.texts(OWNER).await;
    assert_eq!(
        texts,
        ["<code>WEATHER_API_KEY</code> is stored; I deleted your message."]
    );
    assert!(world.desk.heard.lock().is_empty());
    assert!(!world.keeps(CANARY));
    running.stop().await;
}

fn from_owner(kind: &str, fields: &serde_json::Value) -> impl FnOnce(i64) -> serde_json::Value {
    let mut message = json!({
        "date": 1_700_000_000, "chat": {"id": OWNER}, "from": {"id": OWNER, "first_name": "Ada"},
    });
    for (name, value) in fields.as_object().unwrap() {
        message[name] = value.clone();
    }
    let kind = kind.to_owned();
    move |id| {
        message["message_id"] = id.into();
        let mut update = json!({});
        update[kind] = message;
        update
    }
}

#[tokio::test]
async fn a_secret_goes_into_the_vault_and_nowhere_else() {
    let text = format!("/secret WEATHER_API_KEY {CANARY}");
    goes_into_the_vault(from_owner("message", &json!({"text": text}))).await;
}

#[tokio::test]
async fn so_does_one_after_spaces_with_the_bots_name_on_several_lines() {
    let text = format!("  \u{200b}/Secret@artel_bot\nWEATHER_API_KEY\n{CANARY}\n");
    goes_into_the_vault(from_owner("message", &json!({"text": text}))).await;
}

#[tokio::test]
async fn so_does_one_below_a_picture() {
    let caption = format!("/secret WEATHER_API_KEY={CANARY}");
    let fields = json!({"caption": caption, "photo": [], "caption_entities": []});
    goes_into_the_vault(from_owner("message", &fields)).await;
}

#[tokio::test]
async fn so_does_one_that_an_edit_made() {
    let text = format!("/secret WEATHER_API_KEY {CANARY}");
    goes_into_the_vault(from_owner("edited_message", &json!({"text": text}))).await;
}

#[tokio::test]
async fn a_secret_that_is_only_quoted_is_not_kept_either() {
    let (mut world, running) = World::running().await;
    world.project_in("notes", OWNER).await;
    let quoting = json!({
        "text": "was that right?",
        "quote": {"text": CANARY},
        "reply_to_message": {"message_id": 3, "text": format!("/secret KEY {CANARY}")},
    });
    world.telegram.update(from_owner("message", &quoting)).await;
    let elsewhere = json!({"text": format!("/secret KEY {CANARY}")});
    world
        .telegram
        .update(from_owner("channel_post", &elsewhere))
        .await;
    let other = json!({"text": format!("/secret@other_bot KEY {CANARY}")});
    world.telegram.update(from_owner("message", &other)).await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().as_slice(), ["was that right?"]);
    assert!(world.desk.secrets.lock().is_empty());
    assert!(!world.keeps(CANARY));
    running.stop().await;
}

#[tokio::test]
async fn a_value_without_a_name_is_neither_kept_nor_repeated() {
    let (mut world, running) = World::running().await;
    world.project_in("notes", OWNER).await;
    let message = world
        .telegram
        .write(OWNER, &format!("/secret {CANARY}"))
        .await;
    world.settled().await;
    world
        .telegram
        .write(OWNER, &format!("/secret {CANARY} WEATHER_API_KEY"))
        .await;
    world.settled().await;
    assert!(world.telegram.messages().await[&message].deleted);
    let texts = world.texts(OWNER).await;
    assert_eq!(texts.len(), 2);
    for text in texts {
        assert!(
            text.contains("/secret NAME VALUE") && !text.contains(CANARY),
            "{text}"
        );
    }
    assert!(world.desk.secrets.lock().is_empty());
    assert!(!world.keeps(CANARY));
    running.stop().await;
}

#[tokio::test]
async fn a_value_typed_as_plain_text_is_not_taken_and_its_writer_hears_how_it_goes() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    world.ask(&project, Some("job-1"), secret_wait("w1")).await;
    for text in [
        CANARY.to_owned(),
        format!("WEATHER_API_KEY: {CANARY}"),
        format!("secret WEATHER_API_KEY {CANARY}"),
    ] {
        let message = world.telegram.write(OWNER, &text).await;
        world.settled().await;
        assert!(world.telegram.messages().await[&message].deleted, "{text}");
    }
    let told = world.texts(OWNER).await;
    let told: Vec<_> = told
        .iter()
        .filter(|text| text.contains("/secret WEATHER_API_KEY VALUE"))
        .collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(world.desk.secrets.lock().is_empty());
    assert!(world.desk.heard.lock().is_empty());
    assert!(!world.keeps(CANARY));
    // Talk about it is talk, and the question's own words answer it.
    world
        .telegram
        .write(OWNER, "where do I get WEATHER_API_KEY?")
        .await;
    world.telegram.write(OWNER, "it is set").await;
    world.settled().await;
    assert_eq!(world.desk.heard.lock().len(), 1);
    assert_eq!(world.desk.answers.lock().len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn a_strangers_secret_is_refused_and_not_kept() {
    let (world, running) = World::running().await;
    world
        .telegram
        .write(STRANGER, &format!("/secret KEY {CANARY}"))
        .await;
    world.settled().await;
    assert!(world.desk.secrets.lock().is_empty());
    assert!(!world.keeps(CANARY));
    running.stop().await;
}

#[tokio::test]
async fn a_secret_belongs_to_the_project_that_the_message_before_it_chose() {
    let (mut world, running) = World::running().await;
    world.project_in("old", OWNER).await;
    world.desk.add("shop");
    world.telegram.write(OWNER, "/project shop").await;
    world
        .telegram
        .write(OWNER, &format!("/secret KEY {CANARY}"))
        .await;
    world.settled().await;
    let secrets = world.desk.secrets.lock().clone();
    assert_eq!(secrets[0].0.as_str(), "shop");
    running.stop().await;
}

#[tokio::test]
async fn asking_how_needs_no_deletion() {
    let (mut world, running) = World::running().await;
    let project = world.project_in("notes", OWNER).await;
    world.ask(&project, Some("job-1"), secret_wait("w1")).await;
    let message = world.telegram.write(OWNER, "/secret WEATHER_API_KEY").await;
    world.settled().await;
    assert!(
        !world
            .telegram
            .messages()
            .await
            .get(&message)
            .is_some_and(|seen| seen.deleted)
    );
    let texts = world.texts(OWNER).await;
    assert!(
        texts
            .iter()
            .any(|text| text.contains("/secret WEATHER_API_KEY VALUE")),
        "{texts:?}"
    );
    running.stop().await;
}
