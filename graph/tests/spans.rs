//! What can be seen of a run from outside: spans in spans, with ids.
#![allow(missing_docs)]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use graph::{
    Context, END, Engine, Graph, MemoryCheckpointer, NodeError, Point, START, ServeOptions,
    StartOptions, State,
};
use serde::{Deserialize, Serialize};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{
    Layer,
    layer::{Context as Around, SubscriberExt},
    registry::LookupSpan,
};

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Notes {
    #[channel(append)]
    log: Vec<String>,
}

/// A span: the names of the spans around it from the outside to itself, and its fields.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    fields: HashMap<&'static str, String>,
}

#[derive(Clone, Default)]
struct Eyes(Arc<Mutex<Vec<Seen>>>);

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let text = format!("{value:?}").trim_matches('"').to_owned();
        self.fields.insert(field.name(), text);
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Eyes {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, around: Around<'_, S>) {
        let span = around.span(id).unwrap();
        let names: Vec<_> = span.scope().from_root().map(|span| span.name()).collect();
        let mut seen = Seen {
            path: names.join("/"),
            fields: HashMap::new(),
        };
        attributes.record(&mut seen);
        self.0.lock().unwrap().push(seen);
    }
}

async fn node(_: Arc<Notes>, ctx: Context) -> Result<NotesUpdate, NodeError> {
    let said: String = ctx
        .step("say", |_| async {
            tracing::info_span!("effect").in_scope(|| ());
            Ok::<_, NodeError>("said".to_owned())
        })
        .await?;
    Ok(NotesUpdate::default().log(vec![said]))
}

// One thread, so that the subscriber of this test hears everything.
#[tokio::test]
async fn a_run_is_spans_in_spans_with_their_ids() {
    let eyes = Eyes::default();
    let _guard =
        tracing::subscriber::set_default(tracing_subscriber::registry().with(eyes.clone()));
    let graph = Graph::<Notes>::builder("notes")
        .node("left", node)
        .node("right", node)
        .edge(START, "left")
        .edge(START, "right")
        .edge("left", END)
        .edge("right", END)
        .compile()
        .unwrap();
    let runs = Arc::new(Mutex::new(Vec::new()));
    let started = runs.clone();
    let engine = Engine::builder(Arc::new(MemoryCheckpointer::new()))
        .graph(graph)
        .observer(Arc::new(move |point: &Point<'_>| {
            if let Point::RunStarted { thread, span } = point {
                let name = span.metadata().map(tracing::Metadata::name);
                started.lock().unwrap().push((thread.to_string(), name));
            }
        }))
        .build()
        .await
        .unwrap();
    engine
        .start(
            "p/job-1",
            "notes",
            &serde_json::json!({}),
            StartOptions::default(),
        )
        .await
        .unwrap();
    engine.run_due(ServeOptions::default()).await.unwrap();

    assert_eq!(*runs.lock().unwrap(), [("p/job-1".to_owned(), Some("run"))]);
    let seen = eyes.0.lock().unwrap().clone();
    let of = |path: &str| -> Vec<&Seen> { seen.iter().filter(|span| span.path == path).collect() };
    assert_eq!(of("run").len(), 1);
    assert_eq!(of("run/superstep").len(), 1);
    // Nodes that run side by side are both part of it.
    let mut nodes: Vec<_> = of("run/superstep/node")
        .iter()
        .map(|span| span.fields["node"].clone())
        .collect();
    nodes.sort();
    assert_eq!(nodes, ["left", "right"]);
    assert_eq!(of("run/superstep/node/step/effect").len(), 2);
    for path in [
        "run",
        "run/superstep",
        "run/superstep/node",
        "run/superstep/node/step",
    ] {
        for span in of(path) {
            assert_eq!(span.fields["thread"], "p/job-1", "{span:?}");
        }
    }
    assert_eq!(of("run/superstep/node")[0].fields["attempt"], "1");
    assert_eq!(of("run/superstep/node/step")[0].fields["name"], "say");
    // The database: a fresh thread came with its claim; keeping a step, committing the superstep.
    let operations = |path: &str| -> Vec<String> {
        of(path)
            .iter()
            .map(|span| span.fields["operation"].clone())
            .collect()
    };
    assert!(operations("run/db").is_empty());
    assert_eq!(operations("run/superstep/node/db"), ["commit", "commit"]);
    assert_eq!(operations("run/superstep/db"), ["commit"]);
    assert!(operations("db").contains(&"claim".to_owned()));
}
