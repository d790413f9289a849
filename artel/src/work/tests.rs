//! How threads are served.

use graph::{
    Context, END, Engine, Graph, HistoryFilter, START, SqliteCheckpointer, StartOptions, State,
};
use serde::{Deserialize, Serialize};

use std::path::Path;

use super::*;

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Counter {
    n: u64,
}

/// 150 steps.
async fn engine(path: &Path) -> Engine {
    let graph = Graph::<Counter>::builder("count")
        .node("up", |state: Arc<Counter>, _: Context| async move {
            Ok(CounterUpdate::default().n(state.n + 1))
        })
        .edge(START, "up")
        .conditional(
            "up",
            ["up", END],
            |state: &Counter| {
                if state.n < 150 { "up" } else { END }
            },
        )
        .compile()
        .unwrap();
    let store = Arc::new(SqliteCheckpointer::open(path).await.unwrap());
    Engine::builder(store).graph(graph).build().await.unwrap()
}

async fn steps(engine: &Engine) -> usize {
    let all = HistoryFilter {
        limit: Some(1000),
        ..HistoryFilter::default()
    };
    engine.history("t", all).await.unwrap().len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_runs_threads_forgets_their_old_steps() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(&folder.path().join("threads.db")).await;
    engine
        .start("t", "count", &(), StartOptions::default())
        .await
        .unwrap();
    engine.run_due(ServeOptions::default()).await.unwrap();
    // The input, and what came of it.
    assert_eq!(steps(&engine).await, 151);
    // Everything stays if that is said, and else what is younger than is said.
    assert!(serving("test".to_owned(), None).sweep.is_none());
    let month = serving("test".to_owned(), Some(Duration::from_hours(24 * 30)));
    let policy = month.sweep.unwrap().policy;
    let swept = engine.sweep(&policy, None).await.unwrap();
    assert_eq!((swept.seen, swept.checkpoints), (1, 0));
    // The newest hundred, and the input, which is never forgotten.
    let kept = 101;
    // As if all of it were old. It looks again and again, however the thread comes to lie there.
    let mut options = serving("test".to_owned(), Some(Duration::ZERO));
    options.sweep.as_mut().unwrap().every = Duration::from_millis(50);
    let stop = CancellationToken::new();
    let server = tokio::spawn({
        let (engine, stop) = (engine.clone(), stop.clone());
        async move { engine.serve(options, stop).await }
    });
    tokio::time::timeout(Duration::from_mins(1), async {
        while steps(&engine).await > kept {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("it sweeps by itself");
    stop.cancel();
    server.await.unwrap().unwrap();
    assert_eq!(steps(&engine).await, kept);
    assert_eq!(engine.state::<Counter>("t").await.unwrap().n, 150);
}
