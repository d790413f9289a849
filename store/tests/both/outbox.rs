use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ports::{Audience, JobKind, SaidKind, WaitKind};
use sea_query::{Expr, Query};
use store::{Delivery, IntentKind};

use crate::journal::{Journal, P, spec};
use crate::world::World;

on_both!(
    messages_keep_their_order_in_a_chat,
    one_key_is_one_message_in_each_project,
    progress_is_one_message_that_is_edited,
    a_closed_question_loses_its_buttons,
    a_question_that_was_closed_before_it_was_sent_is_not_asked,
    a_chat_that_has_to_be_left_alone_is_left_alone,
    what_can_never_be_sent_is_given_up,
    notices_go_to_admins_and_are_counted_on_one_message,
    a_notice_calls_again_after_a_day,
    two_senders_never_have_the_same_message,
    a_dead_senders_message_goes_to_the_next,
    a_chat_that_joins_later_hears_what_comes,
    every_chat_of_a_project_hears_of_it,
);

impl World {
    async fn listens(&self, chat: &str) {
        self.store
            .set_current_project("telegram", chat, Some(&P.into()))
            .await
            .unwrap();
    }

    async fn next(&self) -> Vec<Delivery> {
        self.store.next_deliveries("telegram", 10).await.unwrap()
    }

    /// The one that is due, sent; an edit of a progress message is due a little later than its news.
    async fn send(&self, message: &str) -> Delivery {
        let mut due = self.next().await;
        let patience = Instant::now() + store::PROGRESS_PACE * 3;
        while due.is_empty() && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(50)).await;
            due = self.next().await;
        }
        assert_eq!(due.len(), 1, "{due:?}");
        let delivery = due.remove(0);
        self.store.delivery_sent(&delivery, message).await.unwrap();
        delivery
    }

    async fn say(&self, journal: &Journal) {
        self.projector.catch_up(journal).await.unwrap();
    }
}

async fn messages_keep_their_order_in_a_chat(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal.founded();
    for number in 0..30 {
        journal.said(&format!("r{number}"), SaidKind::News, &number.to_string());
    }
    world.say(&journal).await;
    for number in 0..30 {
        assert_eq!(world.send("m").await.text, number.to_string());
    }
    assert_eq!(world.next().await, []);
}

async fn one_key_is_one_message_in_each_project(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal
        .founded()
        .said("k", SaidKind::News, "one")
        .said("k", SaidKind::News, "one")
        .about("pbbbbbbbbbb", None, None)
        .founded()
        .said("k", SaidKind::News, "another project's");
    world.say(&journal).await;
    assert_eq!(world.send("m1").await.text, "one");
    assert_eq!(world.next().await, []);
    for project in [P, "pbbbbbbbbbb"] {
        let messages = world.store.messages(&project.into(), 10).await.unwrap();
        assert_eq!(messages.len(), 1, "{project}");
    }
}

async fn progress_is_one_message_that_is_edited(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal
        .founded()
        .specified("notes")
        .job("job-1", JobKind::New { spec: spec() });
    world.say(&journal).await;
    let first = world.send("m1").await;
    assert_eq!(
        (first.kind, first.message_id.as_deref()),
        (IntentKind::Progress, None)
    );
    journal
        .node("architect")
        .planned(&[("a", &[])])
        .node("developers");
    world.say(&journal).await;
    assert_eq!(
        world.next().await,
        [],
        "edits do not follow on each other's heels"
    );
    let second = world.send("m1").await;
    assert_eq!(second.intent, first.intent);
    assert_eq!(second.message_id.as_deref(), Some("m1"));
    assert!(
        second.text.contains("0 of 1 tasks merged"),
        "{}",
        second.text
    );
    journal
        .node("developers")
        .spent("s1", ports::Role::Developer, None);
    world.say(&journal).await;
    assert_eq!(world.next().await, [], "the same text is no new revision");
    journal.whole_task("a", 1).ended(ports::JobStatus::Failed);
    world.say(&journal).await;
    let last = world.send("m1").await;
    assert!(last.text.contains("failed: it broke"), "{}", last.text);
    assert_eq!(last.message_id.as_deref(), Some("m1"));
}

async fn a_closed_question_loses_its_buttons(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal
        .founded()
        .asks("w1", WaitKind::Spec, Audience::Owner);
    world.say(&journal).await;
    let asked = world.send("m1").await;
    let wait = asked.wait.unwrap();
    assert!(wait.open && wait.options.len() == 2);
    let shown = world
        .store
        .message_of_wait("telegram", "7", &"w1".into())
        .await
        .unwrap();
    assert_eq!(shown.as_deref(), Some("m1"));
    journal.answered("w1", Some("approve"));
    world.say(&journal).await;
    let closed = world.send("m1").await;
    assert_eq!(closed.message_id.as_deref(), Some("m1"));
    let wait = closed.wait.unwrap();
    assert!(!wait.open);
    assert_eq!(wait.answer.as_deref(), Some("approve"));
    assert_eq!(world.next().await, []);
}

async fn a_question_that_was_closed_before_it_was_sent_is_not_asked(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal
        .founded()
        .asks("w1", WaitKind::Spec, Audience::Owner)
        .answered("w1", Some("approve"))
        .said("r1", SaidKind::News, "on we go");
    world.say(&journal).await;
    assert_eq!(world.send("m1").await.text, "on we go");
    assert_eq!(world.next().await, []);
}

async fn a_chat_that_has_to_be_left_alone_is_left_alone(world: &World) {
    world.listens("7").await;
    world.listens("8").await;
    let mut journal = Journal::new();
    journal
        .founded()
        .said("r1", SaidKind::News, "one")
        .said("r2", SaidKind::News, "two");
    world.say(&journal).await;
    let due = world.next().await;
    assert_eq!(due.len(), 2, "one for each chat");
    let limited = due.iter().find(|d| d.chat == "7").unwrap();
    let store = &world.store;
    store
        .retry_delivery(limited, Duration::from_hours(1), "429: slow down")
        .await
        .unwrap();
    let fine = due.iter().find(|d| d.chat == "8").unwrap();
    store.delivery_sent(fine, "m1").await.unwrap();
    let next = world.send("m2").await;
    assert_eq!((next.chat.as_str(), next.text.as_str()), ("8", "two"));
    assert_eq!(world.next().await, []);

    // The time is over: what was put off comes first.
    store
        .retry_delivery(limited, Duration::ZERO, "429: slow down")
        .await
        .unwrap();
    let again = world.send("m3").await;
    assert_eq!((again.text.as_str(), again.attempts), ("one", 2));
    assert_eq!(world.send("m4").await.text, "two");
    assert_eq!(world.next().await, []);
}

async fn what_can_never_be_sent_is_given_up(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal
        .founded()
        .said("r1", SaidKind::News, "one")
        .said("r2", SaidKind::News, "two");
    world.say(&journal).await;
    let due = world.next().await;
    world
        .store
        .delivery_failed(&due[0], "403: blocked")
        .await
        .unwrap();
    assert_eq!(world.send("m2").await.text, "two");
    assert_eq!(world.next().await, []);
    world.projector.rebuild(&journal).await.unwrap();
    assert_eq!(world.next().await, []);
}

async fn notices_go_to_admins_and_are_counted_on_one_message(world: &World) {
    world.listens("7").await;
    world
        .store
        .set_admin_chats("telegram", &["1".to_owned()])
        .await
        .unwrap();
    let mut journal = Journal::new();
    journal.founded().notice("disk", "the disk is nearly full");
    world.say(&journal).await;
    let first = world.send("m1").await;
    assert_eq!((first.chat.as_str(), first.times), ("1", 1));
    for free in ["2 GB", "1 GB"] {
        journal.notice("disk", &format!("the disk is nearly full: {free} left"));
    }
    journal.notice("net", "the net is down");
    world.say(&journal).await;
    let folded = world.send("m1").await;
    assert_eq!(folded.message_id.as_deref(), Some("m1"));
    assert_eq!(folded.times, 3);
    assert!(folded.text.ends_with("1 GB left"));
    assert_eq!(world.send("m2").await.text, "the net is down");

    // Another admin chat hears what happens from now on; the first one no more.
    world
        .store
        .set_admin_chats("telegram", &["2".to_owned()])
        .await
        .unwrap();
    assert_eq!(world.next().await, []);
    journal.notice("cpu", "hot");
    world.say(&journal).await;
    let next = world.send("m3").await;
    assert_eq!((next.chat.as_str(), next.text.as_str()), ("2", "hot"));
}

async fn a_notice_calls_again_after_a_day(world: &World) {
    world
        .store
        .set_admin_chats("telegram", &["1".to_owned()])
        .await
        .unwrap();
    let mut journal = Journal::new();
    journal.notice("disk", "full").notice("disk", "full");
    world.say(&journal).await;
    assert_eq!(world.send("m1").await.times, 2);
    journal.notice("disk", "full");
    journal.entries.last_mut().unwrap().at += jiff::SignedDuration::from_hours(25);
    world.say(&journal).await;
    let again = world.send("m2").await;
    assert_eq!((again.message_id, again.times), (None, 1));
}

async fn two_senders_never_have_the_same_message(world: &World) {
    world.listens("7").await;
    world.listens("8").await;
    let mut journal = Journal::new();
    journal.founded();
    for number in 0..8 {
        journal.said(&format!("r{number}"), SaidKind::News, &number.to_string());
    }
    world.say(&journal).await;
    let done = Arc::new(AtomicUsize::new(0));
    let mut senders = Vec::new();
    for _ in 0..3 {
        let store = world.another().await;
        let done = done.clone();
        senders.push(tokio::spawn(async move {
            let mut sent = Vec::new();
            let deadline = Instant::now() + Duration::from_secs(20);
            // Once all is sent, look a few times more: whatever comes then came twice.
            let mut looks_left = 10;
            while looks_left > 0 && Instant::now() < deadline {
                if done.load(Ordering::SeqCst) >= 16 {
                    looks_left -= 1;
                }
                for delivery in store.next_deliveries("telegram", 10).await.unwrap() {
                    sent.push((delivery.chat.clone(), delivery.intent.clone()));
                    store.delivery_sent(&delivery, "m").await.unwrap();
                    done.fetch_add(1, Ordering::SeqCst);
                }
            }
            store.close().await;
            sent
        }));
    }
    let mut sent = Vec::new();
    for sender in senders {
        sent.extend(sender.await.unwrap());
    }
    sent.sort();
    let all = sent.len();
    sent.dedup();
    assert_eq!((all, sent.len()), (16, 16));
}

async fn a_dead_senders_message_goes_to_the_next(world: &World) {
    world.listens("7").await;
    let mut journal = Journal::new();
    journal.founded().said("r1", SaidKind::News, "one");
    world.say(&journal).await;
    assert_eq!(world.next().await.len(), 1);
    assert_eq!(world.next().await, [], "it is in somebody's hands");
    let lease_over = Query::update()
        .table("deliveries")
        .value("lease_ms", Expr::val(0_i64))
        .take();
    world.store.db().execute(&lease_over).await.unwrap();
    assert_eq!(world.send("m1").await.text, "one");
    assert_eq!(world.next().await, []);
}

async fn a_chat_that_joins_later_hears_what_comes(world: &World) {
    let mut journal = Journal::new();
    journal.founded().said("r1", SaidKind::News, "long ago");
    world.say(&journal).await;
    world.listens("7").await;
    assert_eq!(world.next().await, []);
    journal.said("r2", SaidKind::News, "now");
    world.say(&journal).await;
    assert_eq!(world.send("m1").await.text, "now");
}

async fn every_chat_of_a_project_hears_of_it(world: &World) {
    world.listens("7").await;
    // It talks about something else by now, and still hears of the first project.
    world
        .store
        .set_current_project("telegram", "7", Some(&"pcccccccccc".into()))
        .await
        .unwrap();
    world
        .store
        .set_current_project("terminal", "local", Some(&P.into()))
        .await
        .unwrap();
    let mut journal = Journal::new();
    journal.founded().said("r1", SaidKind::News, "one");
    world.say(&journal).await;
    assert_eq!(world.send("m1").await.chat, "7");
    let terminal = world.store.next_deliveries("terminal", 5).await.unwrap();
    assert_eq!(terminal.len(), 1);
    assert_eq!(
        world
            .store
            .chat_projects("telegram", "7")
            .await
            .unwrap()
            .len(),
        2
    );
    let chat = world.store.chat("telegram", "7").await.unwrap().unwrap();
    assert_eq!(chat.project, Some("pcccccccccc".into()));
}
