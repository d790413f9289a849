//! Deleting many threads, forgetting keys, and the survey for both.

use std::time::Duration;

use super::{
    lab::{LONG, Lab, assert_fenced, event, signal},
    retention::{everything, fork, long, prune, result_of},
};
use crate::{
    checkpoint::{
        Commit, DeleteFilter, Deleted, JournalFilter, Keep, NewSignal, Priority, SignalOutcome,
        SurveyFilter, Then, ThreadFilter, ThreadStatus,
    },
    ids::{Cursor, ThreadId},
};

async fn ended(lab: &Lab, id: &str, graph: &str) {
    lab.create_with(id, graph, Priority::Medium).await;
    let claims = lab.try_claim(graph, LONG).await.claims;
    for claim in claims
        .into_iter()
        .filter(|claim| claim.thread.id.as_str() == id)
    {
        let commit = Commit {
            then: Then::End {
                status: ThreadStatus::Done,
                error: None,
                output: None,
            },
            ..Commit::on(0)
        };
        lab.commit(&claim.lease, commit).await;
    }
    assert!(lab.thread(id).await.status.is_ended());
}

fn ids(deleted: &Deleted) -> Vec<&str> {
    deleted.threads.iter().map(ThreadId::as_str).collect()
}

async fn delete(lab: &Lab, filter: DeleteFilter) -> Deleted {
    lab.db
        .retention()
        .delete_threads(&filter)
        .await
        .expect("deletes")
}

/// Graph, prefix, status, age and number; those that have not ended, and those that are due again, stay.
pub async fn threads_are_deleted_by_filter(lab: &Lab) {
    for id in ["a/1", "a/2", "b/1", "c%1", "c_1", "revived"] {
        ended(lab, id, "job").await;
    }
    ended(lab, "a/3", "task").await;
    let running = lab.running("a/runs").await;
    lab.create("a/ready").await;
    let input = NewSignal {
        revives: true,
        ..signal("revived", "more")
    };
    lab.db.signal(input, None).await.expect("sends");
    lab.db.append("e", event("s", "said")).await.expect("says");

    let filter = DeleteFilter {
        unchanged_for: Some(Duration::from_hours(1)),
        ..DeleteFilter::default()
    };
    assert_eq!(
        delete(lab, filter).await,
        Deleted::default(),
        "all are young"
    );
    let filter = DeleteFilter {
        graphs: vec!["job".to_owned(), "nothing".to_owned()],
        prefix: Some("a/".to_owned()),
        limit: Some(1),
        ..DeleteFilter::default()
    };
    let first = delete(lab, filter.clone()).await;
    assert_eq!((ids(&first), first.more), (vec!["a/1"], true));
    let second = delete(lab, filter.clone()).await;
    assert_eq!(ids(&second), ["a/2"]);
    assert_eq!(delete(lab, filter).await, Deleted::default());
    let filter = DeleteFilter {
        prefix: Some("c_".to_owned()),
        ..DeleteFilter::default()
    };
    assert_eq!(ids(&delete(lab, filter).await), ["c_1"], "no wildcard");
    let filter = DeleteFilter {
        statuses: vec![ThreadStatus::Failed],
        ..DeleteFilter::default()
    };
    assert_eq!(ids(&delete(lab, filter).await), [""; 0]);
    let nothing = DeleteFilter {
        limit: Some(0),
        ..DeleteFilter::default()
    };
    assert_eq!(delete(lab, nothing).await, Deleted::default());
    let rest = delete(lab, DeleteFilter::default()).await;
    assert_eq!((ids(&rest), rest.more), (vec!["a/3", "b/1", "c%1"], false));
    let left = lab.db.threads(&ThreadFilter::default()).await;
    let left: Vec<_> = left.expect("lists").into_iter().map(|t| t.id).collect();
    assert_eq!(
        left,
        ["a/ready".into(), "a/runs".into(), ThreadId::from("revived")]
    );
    assert_eq!(lab.step(&running, 0).await, 1, "its lease is not touched");
    // Unless it is meant: then its run is fenced off.
    let filter = DeleteFilter {
        statuses: vec![ThreadStatus::Running, ThreadStatus::Ready],
        prefix: Some("a".to_owned()),
        ..DeleteFilter::default()
    };
    assert_eq!(ids(&delete(lab, filter).await), ["a/ready", "a/runs"]);
    assert_fenced(lab.db.commit(&running, Commit::on(1)).await, &running);
    let entries = lab
        .db
        .journal(&JournalFilter::all(), Cursor::START, 9)
        .await;
    assert_eq!(entries.expect("reads").len(), 1);
}

/// However much there was of it.
pub async fn a_deleted_thread_of_many_rows_leaves_nothing_to_its_namesake(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..8 {
        lab.step(&lease, parent).await;
    }
    let commit = Commit {
        writes: (0..1500).map(|n| result_of(&format!("task {n}"))).collect(),
        ..Commit::on(8)
    };
    lab.commit(&lease, commit).await;
    lab.db.signal(signal("t", "k"), None).await.expect("sends");
    fork(lab, 3).await;
    assert!(lab.db.delete_thread(&"t".into()).await.expect("deletes"));
    let nothing = DeleteFilter {
        limit: Some(0),
        ..DeleteFilter::default()
    };
    assert_eq!(
        delete(lab, nothing).await,
        Deleted::default(),
        "all is cleaned up"
    );
    let lease = lab.running("t").await;
    let loaded = lab.load(&lease).await;
    assert!(loaded.writes.is_empty() && loaded.mailbox.is_empty());
    assert!(everything(lab, "t").await.is_empty());
    assert_eq!(lab.db.branches(&"t".into()).await.expect("lists").len(), 1);
    let sent = lab.db.signal(signal("t", "k"), None).await;
    assert_eq!(sent.expect("sends"), SignalOutcome::New);
}

/// Those of consumed signals, when they are old enough; what is in a mailbox stays.
pub async fn forgotten_keys_are_new_again(lab: &Lab) {
    for id in ["t", "other"] {
        let lease = lab.running(id).await;
        for key in ["used", "unread"] {
            lab.db.signal(signal(id, key), None).await.expect("sends");
        }
        let commit = Commit {
            consumed: vec![1],
            ..Commit::on(0)
        };
        lab.commit(&lease, commit).await;
    }
    let retention = lab.db.retention();
    let named = ["t".into(), "none".into()];
    let young = retention.forget_keys(&named, Duration::from_hours(1)).await;
    assert_eq!(young.expect("answers").keys, 0);
    let old = Duration::from_millis(50);
    tokio::time::sleep(old * 4).await;
    let forgotten = retention.forget_keys(&named, old).await.expect("forgets");
    assert_eq!((forgotten.keys, forgotten.more), (1, false));
    let send =
        async |id: &str, key: &str| lab.db.signal(signal(id, key), None).await.expect("sends");
    assert_eq!(send("t", "used").await, SignalOutcome::New);
    assert_eq!(send("t", "unread").await, SignalOutcome::Duplicate);
    assert_eq!(send("other", "used").await, SignalOutcome::Duplicate);
    assert_eq!(lab.keys("t").await, ["unread", "used"], "numbers go on");
}

/// With what a sweep needs.
pub async fn a_survey_goes_through_the_threads_in_the_order_of_their_ids(lab: &Lab) {
    for id in ["a/1", "a/2", "b"] {
        ended(lab, id, "job").await;
    }
    long(lab, "a/3", 6).await;
    prune(&*lab.db, "a/3", Keep::last(2)).await;
    let look = async |filter: SurveyFilter| {
        let found = lab.db.retention().survey(&filter).await.expect("looks");
        found
            .into_iter()
            .map(|thread| (thread.id.to_string(), thread.checkpoints))
            .collect::<Vec<_>>()
    };
    let all = SurveyFilter {
        limit: 10,
        ..SurveyFilter::default()
    };
    let of = |id: &str, checkpoints| (id.to_owned(), checkpoints);
    assert_eq!(
        look(all.clone()).await,
        [of("a/1", 0), of("a/2", 0), of("a/3", 2), of("b", 0)]
    );
    let page = SurveyFilter {
        graphs: vec!["job".to_owned()],
        prefix: Some("a/".to_owned()),
        after: Some("a/1".into()),
        limit: 1,
    };
    assert_eq!(look(page).await, [of("a/2", 0)]);
    let none = SurveyFilter { limit: 0, ..all };
    assert_eq!(look(none).await, []);
}
