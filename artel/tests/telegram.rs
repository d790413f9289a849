//! The main job through Telegram, with the real binary and a Bot API server over HTTP.

mod support;

use std::time::Duration;

use support::telegram::{Seen, TOKEN, Telegram};
use support::{Home, address_in, eventually, get};

const OWNER: i64 = 4_200_001;
const STRANGER: i64 = 4_200_666;
const SOON: Duration = Duration::from_mins(2);
const WORK: Duration = Duration::from_secs(100);

fn home_for(telegram: &Telegram) -> Home {
    let mut home = Home::with_tape();
    home.set("TELEGRAM_BOT_TOKEN", TOKEN);
    home.set("TELEGRAM_API_URL", &telegram.url);
    home.set("ALLOWED_USERS", &OWNER.to_string());
    home.set("ADMIN_CHAT_IDS", &OWNER.to_string());
    home
}

/// The token behind the button that approves a proposal.
fn build_button(proposal: &Seen) -> String {
    let (_, token) = proposal
        .buttons
        .iter()
        .find(|(label, _)| label.contains("Build"))
        .unwrap_or_else(|| panic!("no button builds it: {proposal:#?}"));
    token.clone()
}

#[tokio::test]
async fn from_start_through_the_buttons_to_the_url() {
    let telegram = Telegram::start().await;
    let home = home_for(&telegram);
    let mut up = home.start(&["up"]);

    telegram.write(OWNER, "/start").await;
    telegram
        .wait_for("a greeting", SOON, |seen| {
            seen.chat == OWNER && seen.text.contains("/new")
        })
        .await;
    telegram.strange_update().await;

    telegram
        .write(OWNER, "I want to keep notes on my machine")
        .await;
    let (id, proposal) = telegram
        .wait_for("a proposal with buttons", SOON, |seen| {
            !seen.buttons.is_empty()
        })
        .await;
    assert!(
        proposal.text.contains("demo tape"),
        "a run from a tape says so: {}",
        proposal.text
    );
    let approve = build_button(&proposal);

    // A stranger's press does nothing; neither does a second one of the owner's.
    telegram.press(STRANGER, id, &approve).await;
    telegram.press(OWNER, id, &approve).await;
    telegram.press(OWNER, id, &approve).await;
    let (progress, _) = telegram
        .wait_for("a progress message", SOON, |seen| {
            seen.text.contains("Serve HTTP") && seen.text.contains("of 4 tasks")
        })
        .await;

    // While it works, the status and a plain question are answered.
    telegram.write(OWNER, "/status").await;
    telegram
        .wait_for("the status", SOON, |seen| {
            seen.text.contains("storage") && seen.text.contains("page")
        })
        .await;
    let question = telegram.write(OWNER, "How far are you?").await;
    telegram
        .wait_for("an answer", SOON, |seen| {
            seen.text.contains("job-1") || seen.text.contains("of 4")
        })
        .await;
    assert!(question > 0);

    let (_, result) = telegram
        .wait_for("the URL", WORK, |seen| {
            seen.text.contains("http://127.0.0.1:") && seen.text.contains("demo tape")
        })
        .await;
    let url = address_in(&result.text).unwrap();
    assert_eq!(get(&format!("{url}/health")).await.0, 200);

    let messages = telegram.messages().await;
    assert!(
        messages[&progress].edits >= 2,
        "progress is one message, edited in place: {messages:#?}"
    );
    let jobs = home.status("notes").await;
    assert_eq!(jobs["job"]["id"], "job-1", "two presses started one job");

    // The next message extends the running project.
    telegram.write(OWNER, "Add a search").await;
    let (id, proposal) = telegram
        .wait_for("a proposal for the change", SOON, |seen| {
            seen.text.contains("earch") && !seen.buttons.is_empty()
        })
        .await;
    let approve = build_button(&proposal);
    telegram.press(OWNER, id, &approve).await;
    eventually("the change is live", WORK, || async {
        let (status, body) = get(&format!(
            "{}/notes?q=zebra-crossing",
            url.trim_end_matches('/')
        ))
        .await;
        (status == 200 && body == "{\"notes\": []}").then_some(())
    })
    .await;

    // Everything that came is acknowledged, nothing was said to the stranger but that they are one.
    eventually("all updates are acknowledged", SOON, || async {
        (telegram.acknowledged().await >= 1000 + 9).then_some(())
    })
    .await;
    assert!(
        telegram
            .messages()
            .await
            .values()
            .all(|seen| seen.chat == OWNER)
    );
    assert_eq!(up.terminate(SOON).await, 0);
    home.run(&["remove", "notes", "--yes"]).await.success();
}

#[tokio::test]
async fn a_stranger_gets_one_sentence_and_the_pairing_code_lets_them_in() {
    let telegram = Telegram::start().await;
    let mut home = home_for(&telegram);
    home.set("ALLOWED_USERS", "");
    let mut up = home.start(&["up"]);
    let line = up
        .line("the pairing code", SOON, |line| {
            line.contains("pairing code")
        })
        .await;
    let code = line
        .split_whitespace()
        .find(|word| {
            word.len() >= 6
                && word
                    .bytes()
                    .all(|b| b.is_ascii_digit() || b.is_ascii_uppercase() || b == b'-')
        })
        .unwrap()
        .to_owned();

    telegram.write(STRANGER, "build me a bank").await;
    let (_, refusal) = telegram
        .wait_for("a refusal", SOON, |seen| seen.chat == STRANGER)
        .await;
    assert!(refusal.text.contains("pairing code"), "{}", refusal.text);
    assert!(
        home.run(&["projects", "--json"])
            .await
            .success()
            .stdout
            .trim()
            .is_empty(),
        "nothing was founded"
    );

    telegram.write(STRANGER, &code).await;
    telegram
        .wait_for("a welcome", SOON, |seen| {
            seen.chat == STRANGER && seen.text.contains("/new")
        })
        .await;
    telegram.write(STRANGER, "I want to keep notes").await;
    telegram
        .wait_for("a proposal", SOON, |seen| {
            seen.chat == STRANGER && !seen.buttons.is_empty()
        })
        .await;
    assert_eq!(up.terminate(SOON).await, 0);
}

#[tokio::test]
async fn what_was_said_while_the_bot_was_down_or_slowed_down_still_arrives_once() {
    let telegram = Telegram::start().await;
    let home = home_for(&telegram);
    telegram
        .write(OWNER, "I want to keep notes on my machine")
        .await;
    telegram
        .refuse_once("sendMessage", serde_json::json!({"ok": false, "error_code": 429, "description": "Too Many Requests: retry after 1", "parameters": {"retry_after": 1}}))
        .await;
    let mut up = home.start(&["up"]);
    let (id, proposal) = telegram
        .wait_for("a proposal with buttons", SOON, |seen| {
            !seen.buttons.is_empty()
        })
        .await;
    // Between Telegram's acceptance and our record a message may come twice; this test is about everything else.
    eventually("the delivery is recorded", SOON, || async {
        home.count("select count(*) from deliveries where status = 'sent'")
            .await
            .filter(|&sent| sent > 0)
    })
    .await;
    up.kill().await;
    let mut up = home.start(&["up"]);
    let approve = build_button(&proposal);
    telegram.press(OWNER, id, &approve).await;
    telegram
        .wait_for("progress", SOON, |seen| seen.text.contains("of 4 tasks"))
        .await;
    telegram.write(OWNER, "/cancel").await;
    telegram
        .wait_for("the job is stopped", SOON, |seen| {
            seen.text.to_lowercase().contains("cancel")
        })
        .await;
    let proposals = telegram
        .messages()
        .await
        .values()
        .filter(|seen| seen.text.contains("Keep short notes"))
        .count();
    assert_eq!(proposals, 1, "the proposal came once");
    assert_eq!(up.terminate(SOON).await, 0);
}

#[tokio::test]
async fn a_secret_that_was_written_is_deleted_from_the_chat() {
    let telegram = Telegram::start().await;
    let home = home_for(&telegram);
    let mut up = home.start(&["up"]);
    telegram
        .write(OWNER, "I want to keep notes on my machine")
        .await;
    telegram
        .wait_for("a proposal", SOON, |seen| !seen.buttons.is_empty())
        .await;
    let canary = "canary-value-of-the-secret-98765";
    let message = telegram
        .write(OWNER, &format!("/secret WEATHER_API_KEY {canary}"))
        .await;
    telegram
        .wait_for("an acknowledgement", SOON, |seen| {
            seen.text.contains("WEATHER_API_KEY")
        })
        .await;
    eventually("the message is deleted", SOON, || async {
        telegram
            .messages()
            .await
            .get(&message)
            .is_some_and(|seen| seen.deleted)
            .then_some(())
    })
    .await;
    assert_eq!(up.terminate(SOON).await, 0);
    let found = std::process::Command::new("grep")
        .args(["-rlF", canary])
        .arg(home.path())
        .output()
        .unwrap();
    assert!(
        found.stdout.is_empty(),
        "the value stands in {}",
        String::from_utf8_lossy(&found.stdout)
    );
}
