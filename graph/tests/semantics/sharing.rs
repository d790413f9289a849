//! What is shared between the run, its tasks and a database in memory, instead of being copied or written down.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use graph::{Context, END, Graph, START, State, ThreadStatus};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;

use crate::lab::{promise, run, start_and_run, thread};

/// What was done to loads, by their labels.
static DONE: Mutex<BTreeMap<String, [usize; 3]>> = Mutex::new(BTreeMap::new());
const CLONED: usize = 0;
const WRITTEN: usize = 1;
const READ: usize = 2;

fn done(label: &str, what: usize) -> usize {
    let done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    done.get(label).map_or(0, |counts| counts[what])
}

/// A value that counts what is done to it.
#[derive(Debug, Default, PartialEq)]
struct Load(String);

impl Load {
    fn count(&self, what: usize) {
        let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
        done.entry(self.0.clone()).or_default()[what] += 1;
    }
}

impl Clone for Load {
    fn clone(&self) -> Self {
        self.count(CLONED);
        Self(self.0.clone())
    }
}

impl Serialize for Load {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.count(WRITTEN);
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Load {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let load = Self(String::deserialize(deserializer)?);
        load.count(READ);
        Ok(load)
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Cart {
    load: Load,
    /// Shared, so that copies of the list are cheap.
    #[channel(append)]
    loads: Vec<Arc<Load>>,
    steps: u64,
}

/// Loads, then walks 50 steps, asks, and walks on to the end.
fn walk(label: String) -> graph::CompiledGraph<Cart> {
    Graph::<Cart>::builder("g")
        .node("load", move |_: Arc<Cart>, _: Context| {
            let label = label.clone();
            async move {
                Ok(CartUpdate::default()
                    .load(Load(label.clone()))
                    .loads(vec![Arc::new(Load(format!("{label}, listed")))]))
            }
        })
        .node("walk", |cart: Arc<Cart>, _: Context| async move {
            Ok(CartUpdate::default().steps(cart.steps + 1))
        })
        .node("ask", |cart: Arc<Cart>, ctx: Context| async move {
            ctx.interrupt::<()>("go on", &()).await?;
            Ok(CartUpdate::default().steps(cart.steps + 1))
        })
        .edge(START, "load")
        .edge("load", "walk")
        .conditional("walk", ["walk", "ask", END], |cart: &Cart| {
            match cart.steps {
                50 => "ask",
                100 => END,
                _ => "walk",
            }
        })
        .edge("ask", "walk")
        .output(|cart| json!(cart.steps))
        .compile()
        .expect("compiles")
}

promise! {
    async fn a_state_is_not_cloned_however_many_steps_are_taken(lab) {
        let label = format!("a state on {}", lab.store.name());
        let engine = lab.engine(walk(label.clone())).await;
        let asked = start_and_run(&engine).await;
        engine.answer("t", &asked.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(thread(&engine).await.output, Some(json!(100)));
        // Where values are kept, the update that brought it is kept beside the state.
        let kept = usize::from(lab.store.keeps_values());
        assert_eq!(done(&label, CLONED), kept);
        let cart: Cart = engine.state("t").await.expect("reads");
        assert_eq!(cart.load, Load(label));
    }
}

#[tokio::test]
async fn values_are_not_written_down_in_memory() {
    let lab = crate::lab::Lab::memory();
    let label = "a value in memory".to_owned();
    let listed = format!("{label}, listed");
    let engine = lab.engine(walk(label.clone())).await;
    let asked = start_and_run(&engine).await;
    engine
        .answer("t", &asked.waits[0].id, &())
        .await
        .expect("is taken");
    run(&engine).await;
    assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    let cart: Cart = engine.state("t").await.expect("reads");
    assert_eq!(cart.loads.len(), 1);
    for label in [label.as_str(), &listed] {
        assert_eq!((done(label, WRITTEN), done(label, READ)), (0, 0), "{label}");
    }
    assert_eq!(done(&listed, CLONED), 0);
    // But they can be, by whoever asks.
    let at = engine.state_at("t", 30).await.expect("reads");
    assert_eq!(
        (&at["load"], &at["loads"], &at["steps"]),
        (&json!(label), &json!([listed]), &json!(29))
    );
}

/// What another release of the program might make of the same thread.
#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Wagon {
    load: String,
    #[channel(append)]
    loads: Vec<String>,
    steps: u64,
    wheels: u64,
}

promise! {
    async fn a_thread_goes_on_with_a_state_of_another_type(lab) {
        let engine = lab.engine(walk("one type".to_owned())).await;
        let asked = start_and_run(&engine).await;
        let graph = Graph::<Wagon>::builder("g")
            .node("ask", |wagon: Arc<Wagon>, ctx: Context| async move {
                ctx.interrupt::<()>("go on", &()).await?;
                Ok(WagonUpdate::default().wheels(wagon.steps))
            })
            .edge(START, "ask")
            .edge("ask", END)
            .compile()
            .expect("compiles");
        let engine = lab.engine(graph).await;
        engine.answer("t", &asked.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(
            thread(&engine).await.output,
            Some(json!({"load": "one type", "loads": ["one type, listed"], "steps": 50, "wheels": 50}))
        );
    }
}

promise! {
    async fn what_a_thread_returned_is_there_also_while_it_goes_on(lab) {
        let graph = Graph::<Cart>::builder("g")
            .node("walk", |cart: Arc<Cart>, ctx: Context| async move {
                if cart.steps == 1 {
                    ctx.interrupt::<()>("go on", &()).await?;
                }
                Ok(CartUpdate::default().steps(cart.steps + 1))
            })
            .edge(START, "walk")
            .edge("walk", END)
            .compile()
            .expect("compiles");
        let engine = lab.engine(graph).await;
        let first = json!({"load": "", "loads": [], "steps": 1});
        assert_eq!(start_and_run(&engine).await.output, Some(first.clone()));
        engine.input("t", "again", &CartUpdate::default(), graph::Busy::Reject).await.expect("begins again");
        run(&engine).await;
        let asked = thread(&engine).await;
        assert_eq!((asked.status, asked.output), (ThreadStatus::Waiting, Some(first)));
        engine.answer("t", &asked.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(thread(&engine).await.output.expect("has ended")["steps"], json!(2));
    }
}
