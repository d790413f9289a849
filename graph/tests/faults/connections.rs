//! The connection to PostgreSQL breaks before any message of any write, in either direction. What was being written is
//! there as a whole or not at all; the same again does it, or reports that it was done; and nothing is stuck.

use std::{sync::Arc, time::Duration};

use graph::{
    PostgresCheckpointer, StorageError,
    checkpoint::{Checkpointer, ClaimRequest, Lease},
};

use crate::{
    database::{Dump, Postgres, has_landed, same},
    long,
    operations::{OPERATIONS, Operation, STAGED, World, is_whole, prepare, step, thread},
    proxy::{Direction, Proxy},
    statements::moments,
    storage::{self, Schema},
};

/// The longest that a request may take when its connection breaks.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) async fn within_patience<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_| panic!("stuck: {what}"))
}

/// A prepared database, with a proxy before it and a way around it.
struct Stage {
    side: Postgres,
    proxy: Proxy,
    url: String,
    world: World,
    schema: Schema,
}

impl Stage {
    async fn make() -> Self {
        let schema = Schema::make().await;
        let world = prepare(&storage::connect(schema.url.clone()).await)
            .await
            .expect("prepares");
        let mut side = Postgres::look(&schema.url).await;
        side.save().await;
        let proxy = Proxy::before(&schema.url).await;
        Self {
            side,
            url: proxy.url(&schema.url),
            proxy,
            world,
            schema,
        }
    }

    async fn connect(&self) -> PostgresCheckpointer {
        storage::connect(self.url.clone()).await
    }
}

/// What an operation answers and leaves behind.
struct Outcome {
    answer: Result<String, String>,
    shape: Vec<String>,
}

impl Outcome {
    fn is_as(&self, at: &str, expected: &Self) {
        assert_eq!(self.answer, expected.answer, "{at}");
        same(at, &self.shape, &expected.shape);
    }
}

async fn run(
    operation: &Operation,
    db: &dyn Checkpointer,
    world: &World,
) -> Result<String, StorageError> {
    within_patience(operation.name, (operation.run)(db, world)).await
}

async fn outcome(operation: &Operation, db: &dyn Checkpointer, stage: &mut Stage) -> Outcome {
    let answer = run(operation, db, &stage.world).await;
    Outcome {
        answer: answer.map_err(|error| error.to_string()),
        shape: stage.side.dump().await.shape,
    }
}

/// Which messages to cut before.
#[derive(Clone, Copy)]
struct Cuts {
    /// On a connection that has not said this before, which says more.
    cold: bool,
    first: u64,
    every: usize,
}

/// Cuts before messages of an operation, to the last. Returns how many cuts there were.
async fn cut_everywhere(operation: &Operation, stage: &mut Stage, cuts: Cuts) -> u64 {
    let name = operation.name;
    let mut db = stage.connect().await;
    stage.side.restore().await;
    let first = outcome(operation, &db, stage).await;
    assert!(first.answer.is_ok(), "{name}: {:?}", first.answer);
    let second = outcome(operation, &db, stage).await;
    let mut made = 0;
    for direction in [Direction::ToServer, Direction::ToClient] {
        for n in (cuts.first..).step_by(cuts.every) {
            assert!(n < 200, "{name} never ends");
            stage.side.restore().await;
            let before: Dump = stage.side.dump().await;
            if cuts.cold {
                db = stage.connect().await;
            }
            stage.proxy.cut_before(direction, n);
            let answer = run(operation, &db, &stage.world).await;
            let was_cut = stage.proxy.relent();
            stage.proxy.settled(&mut stage.side.connection).await;
            let after = stage.side.dump().await;
            let at = format!("{name}, cut before message {n} {direction:?}");
            let landed = has_landed(&at, &before, &after, &first.shape);
            match answer {
                Ok(answer) => {
                    assert!(landed, "{at}: it said that it was done");
                    assert_eq!(Ok(answer), first.answer, "{at}");
                }
                Err(StorageError::Backend { .. }) => assert!(was_cut, "{at}: it failed by itself"),
                Err(other) => panic!("{at}: {other:?}"),
            }
            let again = outcome(operation, &db, stage).await;
            again.is_as(
                &format!("{at}: the same again"),
                if landed { &second } else { &first },
            );
            if !was_cut {
                break;
            }
            made += 1;
        }
    }
    made
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_cut_at_any_message_leaves_the_old_or_the_new_state() {
    let mut stage = Stage::make().await;
    // Each operation at every other message, alternately.
    let every = long(1, 2);
    for (operation, first) in OPERATIONS.iter().zip((1..=every as u64).cycle()) {
        let cuts = Cuts {
            cold: false,
            first,
            every,
        };
        let made = cut_everywhere(operation, &mut stage, cuts).await;
        assert!(made >= long(4, 2), "{}: {made} cuts", operation.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_one_transaction_shows_the_old_or_the_new_state_when_its_connection_is_cut() {
    let mut stage = Stage::make().await;
    for staged in STAGED {
        let name = staged.name;
        // Past the proxy.
        let db = storage::connect(stage.schema.url.clone()).await;
        let side = &mut stage.side;
        let seen = moments(staged, &db, &stage.world, async || side.restore().await).await;
        let mut made = 0;
        for direction in [Direction::ToServer, Direction::ToClient] {
            for n in (1..).step_by(long(1, 3)) {
                assert!(n < 200, "{name} never ends");
                stage.side.restore().await;
                let cut = stage.connect().await;
                stage.proxy.cut_before(direction, n);
                let answer = within_patience(name, (staged.run)(&cut, &stage.world)).await;
                let was_cut = stage.proxy.relent();
                stage.proxy.settled(&mut stage.side.connection).await;
                let at = format!("{name}, cut before message {n} {direction:?}");
                assert!(
                    was_cut || answer.is_ok(),
                    "{at}: it failed by itself: {answer:?}"
                );
                is_whole(&at, staged, &db, &stage.world, [&seen[0], &seen[1]]).await;
                if !was_cut {
                    break;
                }
                made += 1;
            }
        }
        assert!(made >= long(12, 4), "{name}: {made} cuts");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_connection_cut_at_a_message_leaves_the_old_or_the_new_state() {
    let mut stage = Stage::make().await;
    // Each operation at other messages.
    let every = long(1, 5);
    let mut all = 0;
    for (operation, first) in OPERATIONS.iter().zip((1..=every as u64).cycle()) {
        let cuts = Cuts {
            cold: true,
            first,
            every,
        };
        all += cut_everywhere(operation, &mut stage, cuts).await;
    }
    println!("{all} new connections were cut");
    assert!(all > 48, "{all} cuts");
}

const SHARERS: usize = 24;

/// Threads under leases, each ready for its first step.
async fn leased(db: &dyn Checkpointer) -> Vec<Lease> {
    db.migrate().await.expect("migrates");
    for n in 0..SHARERS {
        db.create_thread(thread(&format!("t{n:02}")))
            .await
            .expect("creates");
    }
    let claimed = db
        .claim(ClaimRequest {
            owner: "test",
            graphs: &["g".to_owned()],
            limit: SHARERS,
            lease: Duration::from_hours(1),
        })
        .await
        .expect("claims");
    assert_eq!(claimed.claims.len(), SHARERS);
    claimed
        .claims
        .into_iter()
        .map(|claim| claim.lease)
        .collect()
}

/// A step of each thread at the same time; every other caller goes away while it waits, if `leave` says so.
async fn all_at_once(
    db: &Arc<PostgresCheckpointer>,
    leases: &[Lease],
    leave: bool,
) -> Vec<Option<Result<(), StorageError>>> {
    let mut callers = Vec::new();
    for (index, lease) in leases.iter().enumerate() {
        let (db, lease) = (db.clone(), lease.clone());
        let caller = tokio::spawn(async move { db.commit(&lease, step(0)).await.map(|_| ()) });
        if leave && index % 2 == 0 {
            tokio::task::yield_now().await;
            caller.abort();
        }
        callers.push(caller);
    }
    let mut answers = Vec::new();
    for caller in callers {
        answers.push(within_patience("a commit beside others", caller).await.ok());
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_share_a_transaction_are_not_stuck_when_its_connection_is_cut() {
    let schema = Schema::make().await;
    let leases = leased(&storage::connect(schema.url.clone()).await).await;
    let mut side = Postgres::look(&schema.url).await;
    side.save().await;
    let proxy = Proxy::before(&schema.url).await;
    let db = Arc::new(storage::connect(proxy.url(&schema.url)).await);
    let mut cuts = 0;
    for direction in [Direction::ToServer, Direction::ToClient] {
        for (n, leave) in (1..=long(16, 8)).flat_map(|n| [(n, false), (n, true)]) {
            side.restore().await;
            proxy.cut_before(direction, n);
            let answers = all_at_once(&db, &leases, leave).await;
            cuts += u64::from(proxy.relent());
            proxy.settled(&mut side.connection).await;
            let at = format!("cut before message {n} {direction:?}");
            for (lease, answer) in leases.iter().zip(answers) {
                // A caller that went away may have left its step behind, to be written by those who stayed.
                let again = within_patience("the same again", db.commit(lease, step(0))).await;
                let fine = match &answer {
                    Some(Ok(())) => matches!(again, Err(StorageError::NotTheTip { .. })),
                    Some(Err(StorageError::Backend { .. })) | None => {
                        matches!(again, Ok(_) | Err(StorageError::NotTheTip { .. }))
                    }
                    Some(Err(_)) => false,
                };
                assert!(fine, "{at}: {} {answer:?}, then {again:?}", lease.thread);
                let once = db
                    .thread(&lease.thread)
                    .await
                    .expect("reads")
                    .expect("is there");
                assert_eq!((once.checkpoint, once.step), (1, 1), "{at}");
            }
        }
    }
    println!("{cuts} connections with shared transactions were cut");
    assert!(cuts > 16, "{cuts} cuts");
}

/// How long the database may take to answer, in the tests below.
const LIMIT: Duration = Duration::from_millis(200);

/// What runs wait for.
const AWAITED: [&str; 5] = [
    "creating a thread with a lease",
    "signalling a thread",
    "claiming threads",
    "renewing a lease",
    "committing a step",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_hangs_is_given_up_and_leaves_the_old_or_the_new_state() {
    let mut stage = Stage::make().await;
    let awaited: Vec<_> = OPERATIONS
        .iter()
        .filter(|operation| AWAITED.contains(&operation.name))
        .collect();
    assert_eq!(awaited.len(), AWAITED.len());
    let good = storage::connect(stage.schema.url.clone()).await;
    for operation in awaited {
        let name = operation.name;
        stage.side.restore().await;
        let first = outcome(operation, &good, &mut stage).await;
        let second = outcome(operation, &good, &mut stage).await;
        for direction in [Direction::ToServer, Direction::ToClient] {
            let at = format!("{name}, nothing goes through {direction:?}");
            let hasty = stage.connect().await.answer_within(LIMIT);
            let mut failed = false;
            // What hangs may be another connection, on which nothing is asked at the moment.
            for _ in 0..20 {
                stage.side.restore().await;
                let before = stage.side.dump().await;
                stage.proxy.hang_before(direction, 1);
                let answer = run(operation, &hasty, &stage.world).await;
                stage.proxy.relent();
                stage.proxy.settled(&mut stage.side.connection).await;
                let after = stage.side.dump().await;
                let landed = has_landed(&at, &before, &after, &first.shape);
                let again = outcome(operation, &good, &mut stage).await;
                again.is_as(
                    &format!("{at}: the same again"),
                    if landed { &second } else { &first },
                );
                match answer {
                    Ok(_) => assert!(landed, "{at}: it said that it was done"),
                    Err(StorageError::Backend { .. }) => failed = true,
                    Err(other) => panic!("{at}: {other:?}"),
                }
                if failed {
                    break;
                }
            }
            assert!(failed, "{at}: it was answered all the same");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_waits_too_long_for_somebody_else_is_given_up_by_the_server() {
    let schema = Schema::make().await;
    let patient = storage::connect(schema.url.clone()).await;
    let leases = leased(&patient).await;
    let hasty = patient.clone().answer_within(LIMIT);
    let mut side = Postgres::look(&schema.url).await;
    let hold = "begin; select 1 from graph_thread where id = 't03' for update";
    sqlx::raw_sql(hold)
        .execute(&mut side.connection)
        .await
        .expect("locks");
    let answer = within_patience(
        "a commit of a locked thread",
        hasty.commit(&leases[3], step(0)),
    )
    .await;
    assert!(
        matches!(answer, Err(StorageError::Backend { .. })),
        "{answer:?}"
    );
    sqlx::raw_sql("commit")
        .execute(&mut side.connection)
        .await
        .expect("lets go");
    patient
        .commit(&leases[3], step(0))
        .await
        .expect("it had not landed, and lands now");
}
