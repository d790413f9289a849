use std::time::Duration;

use ports::PersonId;
use store::{MAX_PAIRING_ATTEMPTS, PairingRefusal, Standing};

use crate::world::World;

on_both!(
    a_stranger_is_paired_by_the_code_that_is_shown,
    a_wrong_code_is_worth_nothing_after_too_many_tries,
    an_expired_code_is_refused,
    a_code_is_used_once,
    a_blocked_person_cannot_be_paired,
    a_person_keeps_their_standing_when_they_write_again,
    the_code_itself_is_not_stored,
);

const LONG: Duration = Duration::from_mins(10);

async fn a_stranger_is_paired_by_the_code_that_is_shown(world: &World) {
    let person = PersonId::new("telegram:7");
    let met = world.store.meet(&person, "Ada").await.unwrap();
    assert_eq!(met.standing, Standing::Stranger);
    let code = world.store.new_pairing_code(LONG).await.unwrap();
    assert!(matches!(
        world.store.pair(&person, "Ada", "AAAA-AAAA").await,
        Err(PairingRefusal::Wrong)
    ));
    // As people type it.
    let typed = code.expose().to_lowercase().replace('-', " ");
    let paired = world.store.pair(&person, "Ada", &typed).await.unwrap();
    assert_eq!(paired.standing, Standing::Allowed);
    assert!(paired.paired_at.is_some());
}

async fn a_wrong_code_is_worth_nothing_after_too_many_tries(world: &World) {
    let person = PersonId::new("telegram:7");
    let code = world.store.new_pairing_code(LONG).await.unwrap();
    for _ in 0..MAX_PAIRING_ATTEMPTS {
        assert!(matches!(
            world.store.pair(&person, "Eve", "WRONG").await,
            Err(PairingRefusal::Wrong)
        ));
    }
    assert!(matches!(
        world.store.pair(&person, "Eve", code.expose()).await,
        Err(PairingRefusal::NoCode)
    ));
    let fresh = world.store.new_pairing_code(LONG).await.unwrap();
    assert!(matches!(
        world.store.pair(&person, "Eve", code.expose()).await,
        Err(PairingRefusal::Wrong)
    ));
    world
        .store
        .pair(&person, "Eve", fresh.expose())
        .await
        .unwrap();
}

async fn an_expired_code_is_refused(world: &World) {
    let code = world.store.new_pairing_code(Duration::ZERO).await.unwrap();
    assert!(matches!(
        world
            .store
            .pair(&"telegram:7".into(), "Ada", code.expose())
            .await,
        Err(PairingRefusal::NoCode)
    ));
}

async fn a_code_is_used_once(world: &World) {
    let code = world.store.new_pairing_code(LONG).await.unwrap();
    let other = world.another().await;
    let (one, two) = ("telegram:7".into(), "telegram:8".into());
    let (a, b) = tokio::join!(
        world.store.pair(&one, "Ada", code.expose()),
        other.pair(&two, "Bob", code.expose())
    );
    assert_eq!(
        usize::from(a.is_ok()) + usize::from(b.is_ok()),
        1,
        "{a:?} {b:?}"
    );
    other.close().await;
}

async fn a_blocked_person_cannot_be_paired(world: &World) {
    let person = PersonId::new("telegram:7");
    world
        .store
        .set_standing(&person, Standing::Blocked)
        .await
        .unwrap();
    let code = world.store.new_pairing_code(LONG).await.unwrap();
    assert!(matches!(
        world.store.pair(&person, "Eve", code.expose()).await,
        Err(PairingRefusal::Blocked)
    ));
}

async fn a_person_keeps_their_standing_when_they_write_again(world: &World) {
    let person = PersonId::new("telegram:1");
    world
        .store
        .set_standing(&person, Standing::Admin)
        .await
        .unwrap();
    let met = world.store.meet(&person, "Grace").await.unwrap();
    assert_eq!(
        (met.name.as_str(), met.standing),
        ("Grace", Standing::Admin)
    );
    let code = world.store.new_pairing_code(LONG).await.unwrap();
    let paired = world
        .store
        .pair(&person, "Grace", code.expose())
        .await
        .unwrap();
    assert_eq!(paired.standing, Standing::Admin);
    assert_eq!(world.store.people().await.unwrap(), [paired]);
}

async fn the_code_itself_is_not_stored(world: &World) {
    let code = world.store.new_pairing_code(LONG).await.unwrap();
    let query = sea_query::Query::select()
        .column("hash")
        .from("pairing_codes")
        .take();
    let row = world
        .store
        .db()
        .fetch_optional(&query)
        .await
        .unwrap()
        .unwrap();
    let hash = row.text("hash").unwrap();
    assert_eq!(hash.len(), 64);
    assert!(!hash.contains(&code.expose().replace('-', "")));
    assert!(!format!("{code:?}").contains(code.expose()));
}
