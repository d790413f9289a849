use jiff::{SignedDuration, Timestamp};
use ports::{Audience, PersonId, WaitKind};
use store::{ButtonRefusal, NewButton, Standing};

use crate::journal::Journal;
use crate::world::World;

on_both!(
    a_button_pressed_twice_counts_once,
    the_same_press_told_twice_gets_the_same_answer,
    somebody_elses_press_is_refused,
    an_expired_button_is_refused,
    an_unknown_button_is_refused,
    a_button_of_a_closed_question_is_refused,
    two_presses_at_the_same_moment_are_one_answer,
    a_question_for_admins_is_theirs,
);

struct Asked {
    yes: String,
    no: String,
}

impl World {
    async fn person(&self, id: &str, standing: Standing) -> PersonId {
        let person = PersonId::new(id);
        self.store.set_standing(&person, standing).await.unwrap();
        person
    }

    async fn shown(&self, audience: Audience, owner: Option<&PersonId>, lasts_s: i64) -> Asked {
        let mut tokens = Vec::new();
        for choice in ["approve", "reject"] {
            let button = NewButton {
                wait: &"w1".into(),
                choice,
                audience,
                owner,
                revision: 12,
                expires_at: Timestamp::now() + SignedDuration::from_secs(lasts_s),
            };
            tokens.push(self.store.new_button(&button).await.unwrap().token);
        }
        assert!(tokens[0].len() <= 60, "Telegram allows 64 bytes");
        Asked {
            no: tokens.remove(1),
            yes: tokens.remove(0),
        }
    }
}

async fn a_button_pressed_twice_counts_once(world: &World) {
    let owner = world.person("telegram:7", Standing::Allowed).await;
    let asked = world.shown(Audience::Owner, Some(&owner), 60).await;
    let press = world
        .store
        .press_button(&asked.yes, &owner, "telegram:100")
        .await
        .unwrap();
    assert_eq!(
        (press.wait.as_str(), press.choice.as_str(), press.revision),
        ("w1", "approve", 12)
    );
    // The same button once more, and the other one of the same question.
    for token in [&asked.yes, &asked.no] {
        let second = world
            .store
            .press_button(token, &owner, "telegram:101")
            .await;
        assert!(
            matches!(&second, Err(ButtonRefusal::Used { choice, by }) if choice == "approve" && *by == owner),
            "{second:?}"
        );
    }
    // Shown once more, it stays answered.
    let again = world.shown(Audience::Owner, Some(&owner), 60).await;
    let late = world
        .store
        .press_button(&again.no, &owner, "telegram:102")
        .await;
    assert!(matches!(late, Err(ButtonRefusal::Used { .. })), "{late:?}");
}

async fn the_same_press_told_twice_gets_the_same_answer(world: &World) {
    let owner = world.person("telegram:7", Standing::Allowed).await;
    let asked = world.shown(Audience::Owner, Some(&owner), 60).await;
    let press = async || {
        world
            .store
            .press_button(&asked.yes, &owner, "telegram:100")
            .await
            .unwrap()
    };
    assert_eq!(press().await, press().await);
}

async fn somebody_elses_press_is_refused(world: &World) {
    let owner = world.person("telegram:7", Standing::Allowed).await;
    let other = world.person("telegram:8", Standing::Allowed).await;
    let blocked = world.person("telegram:9", Standing::Blocked).await;
    let asked = world.shown(Audience::Owner, Some(&owner), 60).await;
    for person in [&other, &blocked, &PersonId::new("telegram:10")] {
        let refused = world.store.press_button(&asked.yes, person, "k").await;
        assert!(
            matches!(refused, Err(ButtonRefusal::NotYours)),
            "{person}: {refused:?}"
        );
    }
    // It is still the owner's to press.
    world
        .store
        .press_button(&asked.yes, &owner, "k2")
        .await
        .unwrap();

    let anybodys = NewButton {
        wait: &"w2".into(),
        choice: "go",
        audience: Audience::Owner,
        owner: None,
        revision: 1,
        expires_at: Timestamp::now() + SignedDuration::from_mins(1),
    };
    let token = world.store.new_button(&anybodys).await.unwrap().token;
    assert!(matches!(
        world.store.press_button(&token, &blocked, "k3").await,
        Err(ButtonRefusal::NotYours)
    ));
    world
        .store
        .press_button(&token, &other, "k4")
        .await
        .unwrap();
}

async fn an_expired_button_is_refused(world: &World) {
    let owner = world.person("telegram:7", Standing::Allowed).await;
    let asked = world.shown(Audience::Owner, Some(&owner), -60).await;
    assert!(matches!(
        world.store.press_button(&asked.yes, &owner, "k").await,
        Err(ButtonRefusal::Expired)
    ));
}

async fn an_unknown_button_is_refused(world: &World) {
    let owner = world.person("telegram:7", Standing::Admin).await;
    for token in ["", "x", "w1"] {
        assert!(matches!(
            world.store.press_button(token, &owner, "k").await,
            Err(ButtonRefusal::Unknown)
        ));
    }
}

async fn a_button_of_a_closed_question_is_refused(world: &World) {
    let owner = world.person("telegram:7", Standing::Allowed).await;
    let mut journal = Journal::new();
    journal
        .founded()
        .asks("w1", WaitKind::Spec, Audience::Owner)
        .answered("w1", Some("typed on the terminal"));
    world.projector.catch_up(&journal).await.unwrap();
    let asked = world.shown(Audience::Owner, Some(&owner), 60).await;
    assert!(matches!(
        world.store.press_button(&asked.yes, &owner, "k").await,
        Err(ButtonRefusal::Closed)
    ));
}

async fn two_presses_at_the_same_moment_are_one_answer(world: &World) {
    let owner = world.person("telegram:7", Standing::Allowed).await;
    let other = world.another().await;
    let asked = world.shown(Audience::Owner, Some(&owner), 60).await;
    let (yes, no) = tokio::join!(
        world.store.press_button(&asked.yes, &owner, "k1"),
        other.press_button(&asked.no, &owner, "k2")
    );
    let refused = match (&yes, &no) {
        (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => refused,
        both => panic!("one counts: {both:?}"),
    };
    assert!(matches!(refused, ButtonRefusal::Used { .. }), "{refused:?}");
    other.close().await;
}

async fn a_question_for_admins_is_theirs(world: &World) {
    let allowed = world.person("telegram:7", Standing::Allowed).await;
    let admin = world.person("telegram:1", Standing::Admin).await;
    let asked = world.shown(Audience::Admins, None, 60).await;
    assert!(matches!(
        world.store.press_button(&asked.yes, &allowed, "k").await,
        Err(ButtonRefusal::NotYours)
    ));
    world
        .store
        .press_button(&asked.yes, &admin, "k")
        .await
        .unwrap();
}
