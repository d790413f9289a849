//! The clock of the host that runs threads is of no account on PostgreSQL: with a database whose clock is an hour ahead of this
//! process's, or behind, everything about time is the same. If any statement took its time from here, leases would have run out before
//! they began, or never would.
//!
//! The database's clock is moved by putting another `now()` before its own in the search path.

mod storage;

macro_rules! cases {
    ($lab:expr) => {
        graph::checkpointer_conformance!(@cases $lab;
            claims::an_expired_lease_is_taken_over,
            claims::a_renewed_lease_is_kept_and_a_lost_one_is_said_to_be_lost,
            claims::an_expired_lease_that_nobody_took_still_counts,
            claims::broken_leases_are_claimed_at_once,
            claims::urgent_threads_are_claimed_first,
            claims::a_low_thread_that_waited_long_goes_first,
            claims::a_timer_wakes_by_the_clock_of_the_database,
            claims::a_yielded_thread_is_due_at_once,
            signals::a_signal_wakes_a_waiting_thread,
            commits::all_parts_of_a_commit_land,
            retention::young_checkpoints_are_kept_by_the_clock_of_the_database,
            deletion::forgotten_keys_are_new_again,
            documents::what_has_expired_is_not_there,
            documents::reading_refreshes_when_asked,
        );
    };
}

mod ahead {
    use graph::conformance::Lab;

    use crate::storage::{self, Schema};

    async fn lab() -> Lab {
        let schema = Schema::make_with_clock("1 hour").await;
        let url = schema.url.clone();
        Lab::new(move || storage::connect(url.clone()), schema).await
    }

    cases!(lab());
}

mod behind {
    use graph::conformance::Lab;

    use crate::storage::{self, Schema};

    async fn lab() -> Lab {
        let schema = Schema::make_with_clock("-1 hour").await;
        let url = schema.url.clone();
        Lab::new(move || storage::connect(url.clone()), schema).await
    }

    cases!(lab());
}

#[tokio::test]
async fn the_clock_is_moved() {
    use graph::checkpoint::{Checkpointer, NewThread, Priority};

    let schema = storage::Schema::make_with_clock("1 hour").await;
    let db = storage::connect(schema.url.clone()).await;
    db.migrate().await.expect("migrates");
    let thread = NewThread {
        id: "t".into(),
        graph: "g".to_owned(),
        parent: None,
        priority: Priority::Medium,
        input: serde_json::json!({}).into(),
    };
    db.create_thread(thread).await.expect("creates");
    let thread = db
        .thread(&"t".into())
        .await
        .expect("reads")
        .expect("is there");
    let ahead = thread.created_at.duration_since(jiff::Timestamp::now());
    assert!(ahead > jiff::SignedDuration::from_mins(50), "{ahead}");
}
