//! Every way in which a checkpointer writes, on a world in which each of them has something to do.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use graph::{
    Cache, DeleteFilter, DocumentKey, DocumentStore, HistoryFilter, Namespace, Parent, Priority,
    Source, StorageError, ThreadStatus, WaitInfo, WaitKind,
    cache::{CacheEntry, CacheLimits, CacheSpace},
    checkpoint::{
        CancelRequest, Checkpointer, ClaimRequest, Commit, Lease, LeaseTerms, NewCheckpoint,
        NewEvent, NewSignal, NewThread, Pruned, Receipt, Then, Write, WriteKind,
    },
    documents::DocumentWrite,
};
use serde_json::{Value, json};

/// What the operations need to know of the world.
#[derive(Clone, Debug)]
pub struct World {
    /// The lease on `busy`.
    pub lease: Lease,
    /// The tip of the head branch of `busy`.
    pub tip: u64,
}

type Run =
    for<'a> fn(&'a dyn Checkpointer, &'a World) -> BoxFuture<'a, Result<String, StorageError>>;

/// A way to write.
#[derive(Clone, Copy)]
pub struct Operation {
    pub name: &'static str,
    /// What it answers is put in words without times and tokens.
    pub run: Run,
}

const HOUR: Duration = Duration::from_hours(1);

pub fn thread(id: &str) -> NewThread {
    NewThread {
        id: id.into(),
        graph: "g".to_owned(),
        parent: None,
        priority: Priority::Medium,
        input: json!({"n": 1}).into(),
    }
}

fn signal(to: &str, key: &str) -> NewSignal {
    NewSignal {
        thread: to.into(),
        kind: "k".to_owned(),
        key: key.to_owned(),
        payload: json!({"from": "outside"}),
        revives: false,
    }
}

fn event(stream: &str) -> NewEvent {
    NewEvent {
        stream: stream.to_owned(),
        name: "e".to_owned(),
        payload: json!([stream]),
        thread: Some("busy".into()),
    }
}

fn write(task: &str) -> Write {
    Write {
        task: task.to_owned(),
        kind: WriteKind::Result,
        name: String::new(),
        round: 0,
        value: json!({"task": task}),
        kept: None,
    }
}

fn wait(id: &str) -> WaitInfo {
    WaitInfo {
        id: id.to_owned(),
        name: id.to_owned(),
        kind: WaitKind::Wait,
        task: "a".to_owned(),
        value: Value::Null,
        signals: vec!["k".to_owned()],
        children: Vec::new(),
        until: None,
    }
}

pub fn checkpoint(parent: u64) -> NewCheckpoint {
    NewCheckpoint {
        parent,
        branch: 0,
        step: parent + 1,
        source: Source::Step,
        appends: json!({"log": ["x"]})
            .as_object()
            .cloned()
            .unwrap_or_default(),
        changes: json!({"n": parent})
            .as_object()
            .cloned()
            .unwrap_or_default(),
        snapshot: None,
        plan: json!({"hops": 1}),
        kept: None,
    }
}

pub fn step(parent: u64) -> Commit {
    Commit {
        checkpoint: Some(checkpoint(parent)),
        ..Commit::on(parent)
    }
}

/// Touches every table, in every way that a commit can.
fn everything(tip: u64) -> Commit {
    Commit {
        writes: vec![write("b")],
        clear_writes: true,
        consumed: vec![1],
        events: vec![event("known"), event("new"), event("known")],
        children: vec![NewThread {
            parent: Some(Parent {
                thread: "busy".into(),
                name: "c".to_owned(),
            }),
            ..thread("busy/c")
        }],
        signals: vec![signal("other", "from busy"), signal("busy", "to itself")],
        cancels: vec![CancelRequest {
            thread: "asks".into(),
            reason: "enough".to_owned(),
        }],
        waits: Some(Vec::new()),
        then: Then::End {
            status: ThreadStatus::Done,
            error: None,
            output: Some(json!(1)),
        },
        ..step(tip)
    }
}

fn said(receipt: &Receipt) -> String {
    let Receipt {
        checkpoint,
        released,
        mail,
        cancel,
        undelivered,
        now: _,
    } = receipt;
    format!(
        "{checkpoint:?} released {released} mail {mail} cancel {cancel:?} undelivered {undelivered:?}"
    )
}

async fn claim(
    db: &dyn Checkpointer,
    limit: usize,
    lease: Duration,
) -> Result<Vec<(Lease, u32)>, StorageError> {
    let claimed = db
        .claim(ClaimRequest {
            owner: "test",
            graphs: &["g".to_owned()],
            limit,
            lease,
        })
        .await?;
    Ok(claimed
        .claims
        .into_iter()
        .map(|claim| (claim.lease, claim.takeovers))
        .collect())
}

async fn only(db: &dyn Checkpointer, id: &str, lease: Duration) -> Result<Lease, StorageError> {
    let claimed = claim(db, 1, lease).await?;
    let (lease, _) = claimed.into_iter().next().expect("something is due");
    assert_eq!(lease.thread.as_str(), id);
    Ok(lease)
}

fn namespace() -> Namespace {
    Namespace::from(["notes"])
}

fn document(key: &str) -> DocumentKey {
    DocumentKey {
        namespace: namespace(),
        key: key.to_owned(),
    }
}

fn put(key: &str, value: Value) -> DocumentWrite {
    DocumentWrite::Put {
        at: document(key),
        value,
        ttl: Some(HOUR),
    }
}

fn documents(db: &dyn Checkpointer) -> Arc<dyn DocumentStore> {
    db.documents().expect("has documents")
}

fn cache(db: &dyn Checkpointer) -> Arc<dyn Cache> {
    db.cache().expect("has a cache")
}

fn cached(key: &str) -> CacheEntry {
    CacheEntry {
        key: key.to_owned(),
        value: json!({"cached": key}),
        ttl: Some(HOUR),
    }
}

/// How many checkpoints `old` has.
const STEPS: u64 = 4;

/// A thread that has ended, with some history and a signal that it has used.
async fn prepare_old(db: &dyn Checkpointer) -> Result<(), StorageError> {
    db.create_thread(thread("old")).await?;
    let lease = only(db, "old", HOUR).await?;
    db.signal(signal("old", "used"), None).await?;
    for parent in 0..STEPS {
        let consumed = if parent == 0 { vec![1] } else { Vec::new() };
        let step = Commit {
            consumed,
            writes: vec![write("a")],
            ..step(parent)
        };
        db.commit(&lease, step).await?;
    }
    let ends = Commit {
        then: Then::End {
            status: ThreadStatus::Done,
            error: None,
            output: None,
        },
        ..Commit::on(STEPS)
    };
    db.commit(&lease, ends).await?;
    Ok(())
}

/// A thread with a history of two branches, unread signals and pending writes under a lease; one that waits; one that has
/// failed; one that nobody has run; one whose run died; one with a history that has ended; a stream; a document; and something
/// that is cached.
pub async fn prepare(db: &dyn Checkpointer) -> Result<World, StorageError> {
    db.migrate().await?;
    prepare_old(db).await?;
    documents(db).write(vec![put("known", json!(1))]).await?;
    let space = CacheSpace::new("g", "n");
    cache(db)
        .put(&space, vec![cached("known")], CacheLimits::default())
        .await?;
    db.create_thread(thread("busy")).await?;
    let lease = only(db, "busy", HOUR).await?;
    db.commit(&lease, step(0)).await?;
    db.signal(signal("busy", "1"), None).await?;
    db.signal(signal("busy", "2"), None).await?;
    let early = Commit {
        writes: vec![write("a"), write("c")],
        events: vec![event("known")],
        waits: Some(vec![wait("open")]),
        ..Commit::on(1)
    };
    db.commit(&lease, early).await?;
    db.fork(&"busy".into(), checkpoint(0)).await?;

    db.create_thread(thread("asks")).await?;
    let asks = only(db, "asks", HOUR).await?;
    let waits = Commit {
        waits: Some(vec![wait("question")]),
        then: Then::Wait {
            mail_seen: 0,
            wake_at: None,
        },
        ..step(0)
    };
    db.commit(&asks, waits).await?;

    db.create_thread(thread("failed")).await?;
    let failed = only(db, "failed", HOUR).await?;
    let fails = Commit {
        then: Then::End {
            status: ThreadStatus::Failed,
            error: Some("it broke".to_owned()),
            output: None,
        },
        ..Commit::on(0)
    };
    db.commit(&failed, fails).await?;

    db.create_thread(thread("dead")).await?;
    only(db, "dead", Duration::ZERO).await?;
    db.create_thread(thread("other")).await?;
    Ok(World { lease, tip: 1 })
}

macro_rules! operation {
    ($name:literal, |$db:ident, $world:ident| $body:expr) => {
        Operation {
            name: $name,
            run: |$db, $world| {
                let _ = $world;
                async move { $body }.boxed()
            },
        }
    };
}

macro_rules! commit {
    ($name:literal, |$world:ident| $commit:expr) => {
        operation!($name, |db, $world| {
            let receipt = db.commit(&$world.lease, $commit).await?;
            Ok(said(&receipt))
        })
    };
}

/// All of them. A new way to write belongs here.
pub const OPERATIONS: &[Operation] = &[
    operation!("creating a thread", |db, world| {
        Ok(format!("{:?}", db.create_thread(thread("new")).await?))
    }),
    operation!("creating a thread with a lease", |db, world| {
        let terms = LeaseTerms {
            owner: "creator",
            lease: HOUR,
        };
        let (created, claim) = db.create_leased(thread("new"), terms).await?;
        Ok(format!("{created:?} {}", claim.is_some()))
    }),
    operation!("signalling a thread", |db, world| {
        Ok(format!("{:?}", db.signal(signal("asks", "s"), None).await?))
    }),
    operation!("answering a question", |db, world| {
        let outcome = db.signal(signal("asks", "s"), Some("question")).await?;
        Ok(format!("{outcome:?}"))
    }),
    operation!("signalling a thread that has ended", |db, world| {
        let revives = NewSignal {
            revives: true,
            ..signal("failed", "s")
        };
        Ok(format!("{:?}", db.signal(revives, None).await?))
    }),
    operation!("cancelling a thread", |db, world| {
        let request = CancelRequest {
            thread: "asks".into(),
            reason: "enough".to_owned(),
        };
        Ok(format!("{:?}", db.cancel(request).await?))
    }),
    operation!("reopening a thread", |db, world| {
        Ok(format!("{:?}", db.reopen(&"failed".into()).await?))
    }),
    operation!("deleting a thread", |db, world| {
        Ok(format!("{:?}", db.delete_thread(&"busy".into()).await?))
    }),
    operation!("claiming threads", |db, world| {
        let claimed = claim(db, 10, HOUR).await?;
        let mut claimed: Vec<_> = claimed
            .iter()
            .map(|(lease, takeovers)| format!("{} {takeovers}", lease.thread))
            .collect();
        claimed.sort();
        Ok(claimed.join(", "))
    }),
    operation!("renewing a lease", |db, world| {
        let renewed = db
            .renew(std::slice::from_ref(&world.lease), HOUR * 2)
            .await?;
        Ok(format!("{renewed:?}"))
    }),
    operation!("breaking leases", |db, world| {
        Ok(format!("{:?}", db.break_leases("test").await?))
    }),
    operation!("forking a thread", |db, world| {
        let forked = db.fork(&"busy".into(), checkpoint(world.tip)).await?;
        Ok(format!("{forked:?}"))
    }),
    operation!("making a branch the head", |db, world| {
        Ok(format!("{:?}", db.set_head(&"busy".into(), 1).await?))
    }),
    operation!("appending to the journal", |db, world| {
        Ok(format!("{:?}", db.append("id", event("known")).await?))
    }),
    operation!("appending to a new stream", |db, world| {
        Ok(format!("{:?}", db.append("id", event("new")).await?))
    }),
    operation!("copying a thread", |db, world| {
        let (from, to) = ("busy".into(), "copy".into());
        Ok(format!(
            "{:?}",
            db.retention().copy_thread(&from, &to).await?
        ))
    }),
    operation!("deleting many threads", |db, world| {
        let filter = DeleteFilter {
            prefix: Some("old".to_owned()),
            ..DeleteFilter::default()
        };
        // What is left of them is cleared away when there is time.
        let deleted = db.retention().delete_threads(&filter).await?;
        Ok(format!("{:?}", deleted.threads))
    }),
    operation!("forgetting keys of signals", |db, world| {
        let threads = ["old".into()];
        let forgotten = db.retention().forget_keys(&threads, Duration::ZERO).await?;
        Ok(format!("{forgotten:?}"))
    }),
    operation!("writing documents", |db, world| {
        let writes = vec![
            put("new", json!({"n": 1})),
            put("known", json!(2)),
            DocumentWrite::Delete {
                at: document("gone"),
            },
        ];
        documents(db).write(writes).await?;
        Ok(String::new())
    }),
    operation!("clearing the cache of a node", |db, world| {
        let cleared = cache(db).clear(&CacheSpace::new("g", "n")).await?;
        Ok(format!("{cleared}"))
    }),
    commit!("committing a step", |world| step(world.tip)),
    commit!("committing a step with events", |world| Commit {
        events: vec![event("known"), event("new")],
        ..step(world.tip)
    }),
    commit!("committing a step with what it used", |world| Commit {
        consumed: vec![1, 2],
        clear_writes: true,
        ..step(world.tip)
    }),
    commit!("committing pending writes", |world| Commit {
        writes: vec![write("a"), write("b")],
        events: vec![event("known")],
        ..Commit::on(world.tip)
    }),
    commit!("committing children", |world| Commit {
        children: ["x", "y"]
            .map(|name| NewThread {
                parent: Some(Parent {
                    thread: "busy".into(),
                    name: name.to_owned(),
                }),
                ..thread(&format!("busy/{name}"))
            })
            .into(),
        ..step(world.tip)
    }),
    commit!("committing signals", |world| Commit {
        signals: vec![
            signal("asks", "x"),
            signal("other", "y"),
            signal("nobody", "z")
        ],
        ..step(world.tip)
    }),
    commit!("committing a wait", |world| Commit {
        consumed: vec![1, 2],
        waits: Some(vec![wait("next")]),
        then: Then::Wait {
            mail_seen: 2,
            wake_at: Some("2200-01-01T00:00:00Z".parse().expect("a time")),
        },
        ..step(world.tip)
    }),
    commit!("committing a wait with news in the mailbox", |world| {
        Commit {
            waits: Some(vec![wait("next")]),
            then: Then::Wait {
                mail_seen: 1,
                wake_at: None,
            },
            ..step(world.tip)
        }
    }),
    commit!("giving a lease back", |world| Commit {
        then: Then::Yield,
        ..Commit::on(world.tip)
    }),
    commit!("committing the end", |world| everything(world.tip)),
];

/// A way to write that is not one transaction: each moment of it shows the old state or the new one, and the same again goes on
/// with it.
#[derive(Clone, Copy)]
pub struct Staged {
    pub name: &'static str,
    /// Does all of it.
    pub run: Run,
    /// What of it can be seen.
    pub look: Run,
}

macro_rules! staged {
    ($name:literal, |$db:ident| $run:expr, $look:expr) => {
        Staged {
            name: $name,
            run: |$db, _| async move { $run }.boxed(),
            look: |$db, _| async move { $look }.boxed(),
        }
    };
}

/// All of them.
pub const STAGED: &[Staged] = &[
    staged!(
        "pruning a thread",
        |db| {
            let thread = "old".into();
            let before = STEPS - 1;
            let snapshot = json!({"n": 1}).as_object().cloned().unwrap_or_default();
            let snapshots = BTreeMap::from([(before, snapshot)]);
            loop {
                let pruned = db.retention().prune(&thread, before, &snapshots).await?;
                match pruned {
                    Pruned::Done { more: true, .. } => {}
                    Pruned::Done { .. } => return Ok(String::new()),
                    needs @ Pruned::Needs(_) => panic!("{needs:?}"),
                }
            }
        },
        {
            let thread = "old".into();
            let history = db.history(&thread, &HistoryFilter::default()).await?;
            let mut seen = Vec::new();
            for record in history {
                let state = db.state_rows(&thread, Some(record.checkpoint)).await?;
                // Whatever rows it is in.
                let items: usize = state
                    .rows
                    .iter()
                    .map(|row| row.appends["log"].as_array().map_or(0, Vec::len))
                    .sum();
                seen.push((record.checkpoint, items));
            }
            Ok(format!("{seen:?}"))
        }
    ),
    staged!(
        "putting something into the cache",
        |db| {
            let space = CacheSpace::new("g", "n");
            let cache = cache(db);
            let entries = vec![cached("new")];
            cache.put(&space, entries, CacheLimits::default()).await?;
            Ok(String::new())
        },
        {
            let keys = ["known", "new"].map(str::to_owned);
            let found = cache(db).get(&CacheSpace::new("g", "n"), &keys).await?;
            Ok(format!("{found:?}"))
        }
    ),
];

/// After a fault in the middle: what can be seen is `old` or `new`; and the same again does it.
pub async fn is_whole(
    at: &str,
    staged: &Staged,
    db: &dyn Checkpointer,
    world: &World,
    seen: [&str; 2],
) {
    let look = async || {
        (staged.look)(db, world)
            .await
            .unwrap_or_else(|error| panic!("{at}: {error}"))
    };
    let now = look().await;
    assert!(
        seen.contains(&now.as_str()),
        "{at}: {now}, neither {seen:?}"
    );
    let again = (staged.run)(db, world).await;
    assert!(again.is_ok(), "{at}: the same again: {again:?}");
    assert_eq!(look().await, seen[1], "{at}: the same again");
}
