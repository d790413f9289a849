//! Every way in which a checkpointer writes, on a world in which each of them has something to do.

use std::time::Duration;

use futures::{FutureExt as _, future::BoxFuture};
use graph::{
    Parent, Priority, Source, StorageError, ThreadStatus, WaitInfo, WaitKind,
    checkpoint::{
        CancelRequest, Checkpointer, ClaimRequest, Commit, Lease, NewCheckpoint, NewEvent,
        NewSignal, NewThread, Receipt, Then, Write, WriteKind,
    },
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
        priority: Priority::Normal,
        input: json!({"n": 1}),
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

/// A thread with a history of two branches, unread signals and pending writes under a lease; one that waits; one that has
/// failed; one that nobody has run; one whose run died; and a stream.
pub async fn prepare(db: &dyn Checkpointer) -> Result<World, StorageError> {
    db.migrate().await?;
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
