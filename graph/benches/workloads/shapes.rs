//! Shapes that a peer measures itself with, told in this engine's terms: a long chain of nodes that do nothing, a fan-out to a
//! subgraph, and a loop over a wide state whose lists grow. In memory, which is where the engine's own work shows. Every
//! superstep is committed here as well, those of subgraphs too.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use graph::{
    CompiledGraph, Context, END, Engine, Goto, Graph, GraphBuilder, MemoryCheckpointer, START,
    ServeOptions, StartOptions, State, ThreadStatus,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::lab::{Failed, PATIENCE};

/// Nodes of the long chain.
pub const SEQUENTIAL: u32 = 1000;
/// Tasks of the fan-out, each of which runs a subgraph.
const SUBJECTS: usize = 100;
/// How often each subgraph goes round its loop.
const BUMPS: usize = 10;

/// A shape, ready to be run again and again.
pub struct Shape {
    pub name: &'static str,
    engine: Engine,
    input: Value,
    runs: u32,
}

impl Shape {
    async fn new<S: State>(
        name: &'static str,
        graph: CompiledGraph<S>,
        input: Value,
    ) -> Result<Self, Failed> {
        Ok(Self {
            name,
            engine: Engine::builder(Arc::new(MemoryCheckpointer::new()))
                .graph(graph)
                .build()
                .await?,
            input,
            runs: 0,
        })
    }

    /// One thread, from its start to its end.
    pub async fn run(&mut self) -> Result<Duration, Failed> {
        self.runs += 1;
        let thread = format!("{}:{}", self.name, self.runs);
        let engine = &self.engine;
        let begun = Instant::now();
        engine
            .start(
                thread.as_str(),
                self.name,
                &self.input,
                StartOptions::default(),
            )
            .await?;
        tokio::time::timeout(PATIENCE, engine.run_due(ServeOptions::default())).await??;
        let took = begun.elapsed();
        let record = engine.thread(thread.as_str()).await?;
        let record = record.ok_or("it was started")?;
        if record.status != ThreadStatus::Done {
            return Err(format!("{thread} is {:?}: {:?}", record.status, record.error).into());
        }
        engine.delete(thread).await?;
        Ok(took)
    }
}

/// All shapes.
pub async fn all() -> Result<Vec<Shape>, Failed> {
    Ok(vec![
        Shape::new(
            "sequential_1000",
            sequential().compile()?,
            json!({"messages": []}),
        )
        .await?,
        Shape::new(
            "fan_out_to_subgraph_100",
            fan_out()?,
            json!({"subjects": (0..SUBJECTS).map(|_| letters(1000)).collect::<Vec<_>>()}),
        )
        .await?,
        wide("wide_state_25x300", 300, 5, 5).await?,
        wide("wide_state_9x1200", 1200, 3, 3).await?,
    ])
}

// ---- a long chain of nodes that do nothing ----

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
pub struct Messages {
    #[channel(append)]
    messages: Vec<Arc<Value>>,
}

/// The builder, because compiling it is measured too.
pub fn sequential() -> GraphBuilder<Messages> {
    let name = |index: u32| format!("node_{index}");
    let mut builder = Graph::<Messages>::builder("sequential_1000")
        .recursion_limit(SEQUENTIAL.into())
        .edge(START, name(0))
        .edge(name(SEQUENTIAL - 1), END);
    for index in 0..SEQUENTIAL {
        builder = builder.node(name(index), |_: Arc<Messages>, _: Context| async { Ok(()) });
        if index > 0 {
            builder = builder.edge(name(index - 1), name(index));
        }
    }
    builder
}

// ---- a fan-out to a subgraph ----

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Joke {
    subject: String,
    jokes: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Show {
    subjects: Vec<String>,
    #[channel(append)]
    jokes: Vec<String>,
}

/// A task for each subject, each of which runs a graph of its own: twelve steps.
fn fan_out() -> Result<CompiledGraph<Show>, Failed> {
    let ends = " a".repeat(BUMPS);
    let joke = Graph::<Joke>::builder("joke")
        .node("edit", |joke: Arc<Joke>, _: Context| async move {
            Ok(JokeUpdate::default().subject(format!("{} - hohoho", joke.subject)))
        })
        .node("generate", |joke: Arc<Joke>, _: Context| async move {
            Ok(JokeUpdate::default().jokes(vec![format!("Joke about {}", joke.subject)]))
        })
        .node("bump", |joke: Arc<Joke>, _: Context| async move {
            Ok(JokeUpdate::default().jokes(vec![format!("{} a", joke.jokes[0])]))
        })
        .edge(START, "edit")
        .edge("edit", "generate")
        .edge("generate", "bump")
        .conditional("bump", ["bump", END], move |joke: &Joke| {
            if joke.jokes[0].ends_with(&ends) {
                END
            } else {
                "bump"
            }
        })
        .compile()?;
    Ok(Graph::<Show>::builder("fan_out_to_subgraph_100")
        .subgraph(
            "generate_joke",
            &joke,
            |_, ctx: &Context| Ok(JokeUpdate::default().subject(ctx.argument()?)),
            |joke| ShowUpdate::default().jokes(joke.jokes.clone()),
        )
        .conditional(START, ["generate_joke"], |show: &Show| {
            Goto::sends(
                show.subjects
                    .iter()
                    .map(|subject| graph::Send::new("generate_joke", subject)),
            )
        })
        .edge("generate_joke", END)
        .compile()?)
}

// ---- a loop over a wide state ----

/// A document: shared, not copied, wherever it goes.
type Document = Arc<BTreeMap<String, Arc<Value>>>;

fn or_as_it_was<T>(value: &mut Option<T>, update: Option<T>) {
    if update.is_some() {
        *value = update;
    }
}

fn or_text(value: &mut String, update: String) {
    if !update.is_empty() {
        *value = update;
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Wide {
    #[channel(append)]
    messages: Vec<Document>,
    #[channel(append)]
    trigger_events: Vec<Document>,
    #[channel(reduce = or_text)]
    primary_issue_medium: String,
    autoresponse: Option<Document>,
    #[channel(reduce = or_as_it_was)]
    issue: Option<Document>,
    relevant_rules: Option<Vec<Document>>,
    memory_docs: Option<Vec<Document>>,
    #[channel(append)]
    categorizations: Vec<Document>,
    #[channel(append)]
    responses: Vec<Document>,
    #[channel(reduce = or_as_it_was)]
    user_info: Option<Document>,
    #[channel(reduce = or_as_it_was)]
    crm_info: Option<Document>,
    #[channel(reduce = or_as_it_was)]
    email_thread_id: Option<String>,
    #[channel(merge)]
    slack_participants: BTreeMap<String, Arc<Value>>,
    bot_id: Option<String>,
    #[channel(merge)]
    notified_assignees: BTreeMap<String, Arc<Value>>,
}

/// Made as cheaply as the peer makes them: of bytes that are asked for together, some letters a little more often than others.
fn letters(count: usize) -> String {
    let mut letters = vec![0; count];
    rand::fill(&mut letters[..]);
    for letter in &mut letters {
        *letter = b'a' + *letter % 26;
    }
    String::from_utf8(letters).unwrap_or_default()
}

/// Adds a node that only computes an update.
fn node<F>(builder: GraphBuilder<Wide>, name: &str, update: F) -> GraphBuilder<Wide>
where
    F: Fn(&Wide) -> WideUpdate + Clone + Send + Sync + 'static,
{
    builder.node(name, move |wide: Arc<Wide>, _: Context| -> Ready {
        std::future::ready(Ok(update(&wide)))
    })
}

type Ready = std::future::Ready<Result<WideUpdate, graph::NodeError>>;

fn wide_graph(name: &'static str, limit: usize) -> Result<CompiledGraph<Wide>, Failed> {
    let mut builder = Graph::<Wide>::builder(name);
    builder = node(builder, "one", move |wide| {
        WideUpdate::default()
            .trigger_events(wide.messages.clone())
            .primary_issue_medium(letters(limit))
    });
    builder = node(builder, "two", |wide| {
        let last = wide.trigger_events.last().cloned();
        WideUpdate::default().autoresponse(last.clone()).issue(last)
    });
    builder = node(builder, "three", |wide| {
        let rules = wide.autoresponse.iter().cloned().collect();
        WideUpdate::default().relevant_rules(Some(rules))
    });
    builder = node(builder, "four", |wide| {
        let events = &wide.trigger_events;
        WideUpdate::default()
            .categorizations(events.clone())
            .responses(events.clone())
            .memory_docs(Some(events.clone()))
    });
    builder = node(builder, "five", move |wide| {
        let last = wide.categorizations.last().cloned();
        let entries = last.as_deref().cloned().unwrap_or_default();
        WideUpdate::default()
            .user_info(last.clone())
            .crm_info(last)
            .email_thread_id(Some(letters(limit)))
            .slack_participants(entries.clone())
            .bot_id(Some(letters(limit)))
            .notified_assignees(entries)
    });
    builder = node(builder, "six", |wide| {
        WideUpdate::default().messages(wide.responses.clone())
    });
    Ok(builder
        .edge(START, "one")
        .edge("one", "two")
        .edge("two", "three")
        .edge("two", "four")
        .join(["three", "four"], "five")
        .edge("five", "six")
        .conditional("six", ["one", END], move |wide: &Wide| {
            if wide.messages.len() > limit {
                END
            } else {
                "one"
            }
        })
        // Written down in full when its record is looked at between two runs, a state of some hundred thousand values would
        // leave neither the caches nor the heap as they were; nobody else in this comparison writes it down.
        .output(|wide| json!(wide.messages.len()))
        .compile()?)
}

/// A loop until there are more than `limit` messages, from one message of so many entries with so many parts.
async fn wide(
    name: &'static str,
    limit: usize,
    entries: usize,
    parts: usize,
) -> Result<Shape, Failed> {
    let five = [
        json!("hi?".repeat(10)),
        json!(true),
        json!(1),
        json!(6_327_816_386_138_u64),
        Value::Null,
    ];
    let values: Vec<Value> = five.iter().cycle().take(25).cloned().collect();
    let key = |index: usize| index.to_string().repeat(10);
    let part: serde_json::Map<_, _> = (0..parts)
        .map(|index| (key(index), json!(values)))
        .collect();
    let message: serde_json::Map<_, _> = (0..entries)
        .map(|index| (key(index), json!(part)))
        .collect();
    Shape::new(
        name,
        wide_graph(name, limit)?,
        json!({"messages": [message]}),
    )
    .await
}
