use store::{InboxFailure, MAX_INBOX_ATTEMPTS, Stored};

use crate::world::World;

on_both!(
    an_update_is_stored_once_and_handled_once,
    the_offset_follows_from_what_is_stored,
    an_update_that_always_fails_is_put_aside,
    an_update_that_takes_the_process_down_is_put_aside,
    a_secret_in_an_update_is_forgotten,
);

const T: &str = "telegram";

async fn an_update_is_stored_once_and_handled_once(world: &World) {
    let store = &world.store;
    let raw = r#"{"update_id":5,  "text":"häßlich \u0000"}"#;
    assert_eq!(store.store_update(T, 5, raw).await.unwrap(), Stored::New);
    assert_eq!(store.store_update(T, 5, "{}").await.unwrap(), Stored::Known);
    assert_eq!(
        store.store_update("other", 5, "{}").await.unwrap(),
        Stored::New
    );
    store.store_update(T, 4, "four").await.unwrap();
    let rows = store.unhandled_updates(T, 10).await.unwrap();
    let order: Vec<_> = rows.iter().map(|r| r.update_id).collect();
    assert_eq!(order, [4, 5]);
    assert_eq!(rows[1].raw, raw, "as it came");
    assert!(store.begin_update(T, 5).await.unwrap());
    store.update_handled(T, 5).await.unwrap();
    assert!(!store.begin_update(T, 5).await.unwrap());
    assert_eq!(store.unhandled_updates(T, 10).await.unwrap().len(), 1);
    assert_eq!(store.store_update(T, 5, raw).await.unwrap(), Stored::Known);
}

async fn the_offset_follows_from_what_is_stored(world: &World) {
    assert_eq!(world.store.last_update_id(T).await.unwrap(), None);
    for id in [10, 12, 11] {
        world.store.store_update(T, id, "{}").await.unwrap();
        world.store.update_handled(T, id).await.unwrap();
    }
    assert_eq!(world.store.last_update_id(T).await.unwrap(), Some(12));
}

async fn an_update_that_always_fails_is_put_aside(world: &World) {
    let store = &world.store;
    store.store_update(T, 1, "{}").await.unwrap();
    for number in 1..=MAX_INBOX_ATTEMPTS {
        assert!(store.begin_update(T, 1).await.unwrap());
        let failure = store.update_failed(T, 1, "no such thing").await.unwrap();
        let expected = if number < MAX_INBOX_ATTEMPTS {
            InboxFailure::Again
        } else {
            InboxFailure::Dead
        };
        assert_eq!(failure, expected, "{number}");
    }
    assert_eq!(store.unhandled_updates(T, 10).await.unwrap(), []);
}

async fn an_update_that_takes_the_process_down_is_put_aside(world: &World) {
    let store = &world.store;
    store.store_update(T, 1, "{}").await.unwrap();
    for _ in 0..MAX_INBOX_ATTEMPTS {
        assert!(store.begin_update(T, 1).await.unwrap());
    }
    assert!(!store.begin_update(T, 1).await.unwrap());
    assert_eq!(store.unhandled_updates(T, 10).await.unwrap(), []);
}

async fn a_secret_in_an_update_is_forgotten(world: &World) {
    let store = &world.store;
    store
        .store_update(T, 1, "/secret KEY hunter2")
        .await
        .unwrap();
    store.forget_update(T, 1).await.unwrap();
    let rows = store.unhandled_updates(T, 10).await.unwrap();
    assert_eq!(rows[0].raw, "{}");
}
