//! The journal: nothing lost, nothing twice, no gaps, in order.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use serde_json::json;

use super::lab::{Lab, checkpoint, event};
use crate::{
    checkpoint::{Appended, Commit, Entry, JournalFilter, NewEvent},
    ids::Cursor,
};

async fn read(lab: &Lab, filter: &JournalFilter, after: Cursor, limit: usize) -> Vec<Entry> {
    lab.db.journal(filter, after, limit).await.expect("reads")
}

async fn read_all(lab: &Lab) -> Vec<Entry> {
    read(lab, &JournalFilter::all(), Cursor::START, 100_000).await
}

/// From 1, in the order in which they were given, whoever appends.
pub async fn entries_are_numbered_without_gaps_in_their_streams(lab: &Lab) {
    let lease = lab.running("t").await;
    let said = |stream: &str, name: &str| NewEvent {
        thread: Some("t".into()),
        ..event(stream, name)
    };
    let commit = Commit {
        checkpoint: Some(checkpoint(0)),
        events: vec![said("a", "1"), said("b", "2"), said("a", "3")],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    lab.db.append("x", event("b", "4")).await.expect("appends");
    let commit = Commit {
        events: vec![said("b", "5"), said("c", "6")],
        ..Commit::on(1)
    };
    lab.commit(&lease, commit).await;
    let entries = read_all(lab).await;
    let seen: Vec<(&str, u64, &str)> = entries
        .iter()
        .map(|e| (e.stream.as_str(), e.number, e.name.as_str()))
        .collect();
    assert_eq!(
        seen,
        [
            ("a", 1, "1"),
            ("b", 1, "2"),
            ("a", 2, "3"),
            ("b", 2, "4"),
            ("b", 3, "5"),
            ("c", 1, "6")
        ]
    );
    assert!(entries.iter().is_sorted_by(|a, b| a.cursor < b.cursor));
    assert!(entries[0].cursor > Cursor::START);
    assert_eq!(entries[0].payload, json!({"name": "1"}));
    assert_eq!(entries[0].thread, Some("t".into()));
    assert_eq!(entries[3].thread, None);
    let end = lab.db.journal_end().await.expect("reads");
    assert_eq!(end, entries[5].cursor);
    assert!(read(lab, &JournalFilter::all(), end, 10).await.is_empty());
}

/// A second one of the same id changes nothing, whatever stream it names.
pub async fn an_entry_with_an_id_is_appended_once(lab: &Lab) {
    let append = |id, stream, name| lab.db.append(id, event(stream, name));
    assert_eq!(append("x", "s", "1").await.expect("appends"), Appended::New);
    assert_eq!(
        append("x", "s", "2").await.expect("appends"),
        Appended::Duplicate
    );
    assert_eq!(
        append("x", "other", "3").await.expect("appends"),
        Appended::Duplicate
    );
    assert_eq!(append("y", "s", "4").await.expect("appends"), Appended::New);
    let seen: Vec<(String, u64, String)> = read_all(lab)
        .await
        .into_iter()
        .map(|e| (e.stream, e.number, e.name))
        .collect();
    assert_eq!(
        seen,
        [
            ("s".to_owned(), 1, "1".to_owned()),
            ("s".to_owned(), 2, "4".to_owned())
        ]
    );
}

/// One of the writers wins; the streams of the others have no gap.
pub async fn the_same_entry_at_the_same_time_is_appended_once(lab: &Lab) {
    let other = lab.open().await;
    for round in 0..5 {
        let id = format!("id{round}");
        let results = join_all((0..8).map(|i| {
            let db = if i % 2 == 0 { &lab.db } else { &other };
            db.append(&id, event(&format!("s{}", i % 4), "x"))
        }))
        .await;
        let new = results
            .into_iter()
            .filter(|result| *result.as_ref().expect("appends") == Appended::New)
            .count();
        assert_eq!(new, 1);
    }
    let entries = read_all(lab).await;
    assert_eq!(entries.len(), 5);
    gapless(&entries);
}

/// Checks that in each stream the numbers are 1, 2, 3, … in the order of the cursors.
fn gapless(entries: &[Entry]) {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for entry in entries {
        let last = last.entry(&entry.stream).or_default();
        assert_eq!(entry.number, *last + 1, "in {}", entry.stream);
        *last = entry.number;
    }
}

/// By one stream, by several, by thread, by both; after a cursor, up to a limit.
pub async fn filters_choose_streams_and_threads(lab: &Lab) {
    for (i, (stream, thread)) in [
        ("a", Some("t1")),
        ("b", Some("t1")),
        ("a", Some("t2")),
        ("c", None),
        ("a", None),
        ("b", Some("t2")),
    ]
    .into_iter()
    .enumerate()
    {
        let event = NewEvent {
            thread: thread.map(Into::into),
            ..event(stream, &i.to_string())
        };
        lab.db
            .append(&format!("id{i}"), event)
            .await
            .expect("appends");
    }
    let streams = |names: &[&str], thread: Option<&str>| JournalFilter {
        streams: names.iter().map(|name| (*name).to_owned()).collect(),
        thread: thread.map(Into::into),
    };
    for (filter, expected) in [
        (streams(&[], None), "012345"),
        (streams(&["a"], None), "024"),
        (streams(&["a", "c"], None), "0234"),
        (streams(&["none"], None), ""),
        (streams(&["none", "b"], None), "15"),
        (streams(&[], Some("t1")), "01"),
        (streams(&["a", "c"], Some("t2")), "2"),
        (streams(&[], Some("none")), ""),
    ] {
        let all = read(lab, &filter, Cursor::START, 100).await;
        let names: String = all.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, expected, "{filter:?}");
        // The same, one entry at a time.
        let mut after = Cursor::START;
        let mut paged = Vec::new();
        while let Some(entry) = read(lab, &filter, after, 1).await.pop() {
            after = entry.cursor;
            paged.push(entry);
        }
        assert_eq!(paged, all, "{filter:?}");
    }
    assert!(
        read(lab, &JournalFilter::all(), Cursor::START, 0)
            .await
            .is_empty()
    );
    assert!(
        read(lab, &JournalFilter::all(), Cursor(u64::MAX), 10)
            .await
            .is_empty()
    );
}

/// Writers of several streams, through several handles, while one reader follows all of it by cursor: what it sees in the
/// end is what there is, each entry once, in order. A reader that skips what becomes visible late fails here.
pub async fn a_reader_that_follows_misses_nothing_and_sees_nothing_twice(lab: &Lab) {
    const WRITERS: usize = 8;
    const EACH: usize = 12;
    let handles = [lab.db.clone(), lab.open().await];
    let done = Arc::new(AtomicBool::new(false));
    let reader = {
        let (db, done) = (lab.open().await, done.clone());
        tokio::spawn(async move {
            let mut seen: Vec<Entry> = Vec::new();
            let mut after = Cursor::START;
            let mut idle = 0;
            while idle < 500 {
                let finished = done.load(Ordering::SeqCst);
                let new = db
                    .journal(&JournalFilter::all(), after, 7)
                    .await
                    .expect("reads");
                match new.last() {
                    Some(last) => after = last.cursor,
                    None if finished && seen.len() == WRITERS * EACH * 2 => break,
                    None => {
                        idle += usize::from(finished);
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                seen.extend(new);
            }
            seen
        })
    };
    let mut leases = Vec::new();
    for i in 0..WRITERS {
        leases.push(lab.running(&format!("t{i}")).await);
    }
    let writers = leases.into_iter().enumerate().map(|(i, lease)| {
        let db = handles[i % 2].clone();
        tokio::spawn(async move {
            for n in 0..EACH {
                let (own, shared) = (format!("s{i}"), format!("shared{}", i % 3));
                if n % 3 == 2 {
                    for stream in [own, shared] {
                        let id = format!("{i} {n} {stream}");
                        db.append(&id, event(&stream, "x")).await.expect("appends");
                    }
                } else {
                    let commit = Commit {
                        events: vec![event(&own, "x"), event(&shared, "x")],
                        ..Commit::on(0)
                    };
                    db.commit(&lease, commit).await.expect("commits");
                }
            }
        })
    });
    for writer in join_all(writers).await {
        writer.expect("a writer does not panic");
    }
    done.store(true, Ordering::SeqCst);
    let seen = reader.await.expect("the reader does not panic");
    assert_eq!(seen, read_all(lab).await);
    assert_eq!(seen.len(), WRITERS * EACH * 2);
    assert!(seen.iter().is_sorted_by(|a, b| a.cursor < b.cursor));
    gapless(&seen);
}

/// A refused commit in between takes no number either.
pub async fn commits_at_the_same_time_leave_no_gap_in_a_shared_stream(lab: &Lab) {
    let handles = [lab.db.clone(), lab.open().await];
    let mut leases = Vec::new();
    for i in 0..6 {
        leases.push(lab.running(&format!("t{i}")).await);
    }
    let runs = leases.into_iter().enumerate().map(|(i, lease)| {
        let db = handles[i % 2].clone();
        tokio::spawn(async move {
            for parent in 0..6 {
                // Every third commit stands on the wrong checkpoint first.
                if parent % 3 == 1 {
                    let wrong = Commit {
                        checkpoint: Some(checkpoint(parent + 5)),
                        events: vec![event("shared", "wrong")],
                        ..Commit::on(parent + 5)
                    };
                    db.commit(&lease, wrong).await.expect_err("is refused");
                }
                let commit = Commit {
                    checkpoint: Some(checkpoint(parent)),
                    events: vec![event("shared", &format!("{i} {parent}"))],
                    ..Commit::on(parent)
                };
                db.commit(&lease, commit).await.expect("commits");
            }
        })
    });
    for run in join_all(runs).await {
        run.expect("a run does not panic");
    }
    let entries = read_all(lab).await;
    assert_eq!(entries.len(), 36);
    assert!(entries.iter().all(|entry| entry.name != "wrong"));
    gapless(&entries);
}

/// Deleting a thread deletes nothing of what it said.
pub async fn the_journal_outlives_its_thread(lab: &Lab) {
    let lease = lab.running("t").await;
    let said = NewEvent {
        thread: Some("t".into()),
        ..event("t", "said")
    };
    let commit = Commit {
        events: vec![said],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    let before = read_all(lab).await;
    assert_eq!(before.len(), 1);
    lab.db.delete_thread(&"t".into()).await.expect("deletes");
    assert_eq!(read_all(lab).await, before);
    let filter = JournalFilter {
        thread: Some("t".into()),
        ..JournalFilter::all()
    };
    assert_eq!(read(lab, &filter, Cursor::START, 10).await, before);
    lab.db
        .append("later", event("t", "more"))
        .await
        .expect("appends");
    assert_eq!(read_all(lab).await[1].number, 2, "numbers go on");
}
