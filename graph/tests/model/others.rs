//! What the other databases do in random worlds, beyond the limits within which all are explored: what the one in memory does.

use std::path::Path;

use graph::{PostgresCheckpointer, SqliteCheckpointer, checkpoint::Checkpointer};
use proptest::{
    collection::vec,
    prelude::any,
    strategy::{Strategy as _, ValueTree as _},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous};

use crate::{
    explore::{Moment, nobody_is_stuck},
    flaws::Database,
    long,
    promises::letters,
    run::Names,
    storage::{self, Schema},
    world::{Action, Limits, View, World},
};

/// The longest that the fair end of a world may take.
const END: usize = 200;

/// The same world twice: in memory, and in another database.
struct Twins<'a> {
    moment: Moment,
    world: World,
    view: View,
    db: Database<'a>,
    way: Vec<Action>,
}

impl<'a> Twins<'a> {
    async fn begin(store: &'a dyn Checkpointer, names: Names, cancels: bool) -> Self {
        let limits = Limits {
            runners: 3,
            crashes: 2,
            lapses: 2,
            lost: 2,
            // What a claim brings along is up to the database.
            fresh: false,
            cancels,
            // Their clocks cannot be moved.
            deadline: false,
            letters: letters(),
        };
        let world = World::new(names, limits.clone());
        world.begin(store).await;
        Self {
            moment: Moment::begin(limits),
            view: View::of(store, &world.names).await,
            world,
            db: Database { store, flaw: None },
            way: Vec::new(),
        }
    }

    /// Does the same in both, and compares all that can be seen.
    async fn both(&mut self, action: Action) {
        self.way.push(action);
        let way = &self.way;
        let after = self.moment.after(action, None);
        self.moment = after.unwrap_or_else(|| panic!("it cannot be done in memory: {way:?}"));
        let is_done = self.world.act(&self.db, &self.view, action).await;
        assert!(is_done, "it cannot be done: {way:?}");
        self.view = View::of(self.db.store, &self.world.names).await;
        assert_eq!(self.world.wrong, None, "{way:?}");
        let text = format!("{}\n{}", self.view.text, self.world.in_words(&self.view));
        assert_eq!(text, format!("{:?}", self.moment), "{way:?}");
    }
}

/// Random worlds, from a fixed seed: what fails fails again. Returns how many things happened.
async fn do_the_same(store: &dyn Checkpointer, worlds: usize) -> usize {
    store.migrate().await.expect("migrates");
    let mut random = TestRunner::new_with_rng(
        Config::default(),
        TestRng::deterministic_rng(RngAlgorithm::ChaCha),
    );
    let mut happened = 0;
    for n in 0..worlds {
        let choices = vec(any::<u16>(), 40)
            .new_tree(&mut random)
            .expect("choices")
            .current();
        let mut twins = Twins::begin(store, Names(format!("{n:03}/")), n % 4 == 3).await;
        for choice in choices {
            let actions = twins.moment.actions();
            let Some(action) = actions.get(usize::from(choice) % actions.len().max(1)) else {
                break;
            };
            twins.both(*action).await;
        }
        // Then whatever must happen happens.
        let before = twins.way.len();
        while let Some(action) = twins.moment.fair_actions().first().copied() {
            twins.both(action).await;
            assert!(
                twins.way.len() < before + END,
                "never ends: {:?}",
                twins.way
            );
        }
        assert!(
            nobody_is_stuck(&twins.moment),
            "{:?}: {:?}",
            twins.way,
            twins.moment
        );
        happened += twins.way.len();
    }
    println!("{happened} things happened in {worlds} worlds");
    happened
}

/// Nobody pulls the plug.
async fn hurried_sqlite(path: &Path) -> SqliteCheckpointer {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Off);
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .connect_with(options)
        .await
        .expect("opens");
    SqliteCheckpointer::from_pool(pool)
}

async fn hurried_postgres(schema: &Schema) -> PostgresCheckpointer {
    storage::connect(format!("{}%20-csynchronous_commit%3Doff", schema.url)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_does_what_memory_does() {
    let (path, _dir) = storage::sqlite_path();
    let store = hurried_sqlite(&path).await;
    let happened = do_the_same(&store, long(1000, 12)).await;
    assert!(happened > 12 * 12, "{happened}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_does_what_memory_does() {
    let schema = Schema::make().await;
    let store = hurried_postgres(&schema).await;
    let happened = do_the_same(&store, long(500, 8)).await;
    assert!(happened > 8 * 12, "{happened}");
}
