//! The engine with the crew on it, served in the background; signals from the world are delivered, events can be waited for.

use std::{sync::Arc, time::Duration};

use graph::{
    Cursor, Delivered, Engine, JournalFilter, MemoryCheckpointer, Observer, ServeOptions,
    StartOptions, ThreadStatus, checkpoint::Checkpointer,
};
use nodes::{Policy, signal};
use ports::{Answer, Event, OpenWait, PersonId, ProjectId, Recorded, Role, WaitId, threads};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::world::World;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// The name under which stages claim threads.
const OWNER: &str = "stage";

pub struct Stage {
    pub world: World,
    pub engine: Engine,
    pub project: ProjectId,
    stop: CancellationToken,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub fn project() -> ProjectId {
    ProjectId::founded_by("test")
}

impl Stage {
    pub async fn new(world: World, policy: Policy) -> Self {
        Self::on(Arc::new(MemoryCheckpointer::new()), world, policy, None).await
    }

    /// A stage on a store that an earlier one may have used.
    pub async fn on(
        store: Arc<dyn Checkpointer>,
        world: World,
        policy: Policy,
        observer: Option<Arc<dyn Observer>>,
    ) -> Self {
        let crew = world.crew(policy);
        let (conversation, job, task) = nodes::graphs(&crew).expect("the graphs compile");
        let mut builder = Engine::builder(store)
            .graph(conversation)
            .graph(job)
            .graph(task);
        if let Some(observer) = observer {
            builder = builder.observer(observer);
        }
        let engine = builder.build().await.expect("an engine");
        // Whoever had the stage before is dead, so nobody needs to wait for its leases.
        engine
            .checkpointer()
            .break_leases(OWNER)
            .await
            .expect("a store");
        let stop = CancellationToken::new();
        let project = project();
        engine
            .start(
                threads::conversation(&project),
                nodes::conversation::GRAPH,
                &nodes::conversation::found(project.clone(), PersonId::new("local:owner")),
                StartOptions::default(),
            )
            .await
            .expect("a conversation");
        let options = ServeOptions {
            lease: Duration::from_millis(300),
            poll: Duration::from_millis(20),
            drain: Duration::from_millis(200),
            owner: OWNER.to_owned(),
            ..ServeOptions::default()
        };
        let serving = engine.clone();
        let stopping = stop.clone();
        tokio::spawn(async move { serving.serve(options, stopping).await });
        tokio::spawn(deliver(engine.clone(), world.clone(), stop.clone()));
        Self {
            world,
            engine,
            project,
            stop,
        }
    }

    pub async fn say(&self, key: &str, text: &str) {
        self.message(key, text, false).await;
    }

    pub async fn message(&self, key: &str, text: &str, yes: bool) {
        let message = signal::Message {
            key: key.to_owned(),
            from: PersonId::new("local:owner"),
            text: text.to_owned(),
            yes,
        };
        self.send(
            &threads::conversation(&self.project),
            signal::MESSAGE,
            key,
            &message,
        )
        .await;
    }

    pub async fn send(
        &self,
        thread: &str,
        kind: &str,
        key: &str,
        payload: &(impl serde::Serialize + ?Sized + Sync),
    ) -> Delivered {
        self.engine
            .signal(thread, kind, key, payload)
            .await
            .expect("a signal")
    }

    /// Presses a button (or types, with an empty choice).
    pub async fn press(&self, wait: &Waiting, choice: &str) -> Delivered {
        self.reply(wait, Some(choice), "").await
    }

    pub async fn reply(&self, wait: &Waiting, choice: Option<&str>, text: &str) -> Delivered {
        let kind = signal::answer(&wait.wait.id);
        assert_eq!(kind, wait.interrupt);
        let answer = Answer {
            choice: choice.map(str::to_owned),
            text: text.to_owned(),
            by: "local:owner".into(),
        };
        self.send(&wait.thread, &kind, &kind, &answer).await
    }

    pub async fn events(&self) -> Vec<Recorded> {
        let filter = JournalFilter::stream(self.project.as_str());
        let entries = self
            .engine
            .journal()
            .read(&filter, Cursor::START, 10_000)
            .await
            .expect("a journal");
        entries
            .iter()
            .filter_map(|entry| Recorded::from_journal(&entry.payload))
            .collect()
    }

    /// Waits until the events say what `look` looks for.
    pub async fn until<T>(&self, what: &str, look: impl Fn(&[Recorded]) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let events = self.events().await;
            if let Some(found) = look(&events) {
                return found;
            }
            if tokio::time::Instant::now() > deadline {
                let threads = self.engine.threads(&graph::ThreadFilter::default()).await;
                let threads: Vec<String> = threads
                    .unwrap_or_default()
                    .iter()
                    .map(|t| {
                        format!(
                            "{}: {:?} {:?} {:?}",
                            t.id,
                            t.status,
                            t.error,
                            t.waits.iter().map(|w| &w.signals).collect::<Vec<_>>()
                        )
                    })
                    .collect();
                panic!(
                    "{what} did not happen; threads: {threads:#?}\nevents: {:#?}",
                    names(&events)
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until an event of this name was said about a task (or about none).
    pub async fn told(&self, name: &str, task: Option<&str>) {
        self.until(&format!("{name} of {task:?}"), |events| {
            events
                .iter()
                .find(|recorded| {
                    recorded.event.name() == name
                        && recorded.task.as_ref().map(ports::TaskId::as_str) == task
                })
                .map(|_| ())
        })
        .await;
    }

    /// Waits for the latest open wait.
    pub async fn waiting(&self) -> Waiting {
        self.until("an open wait", |events| open_waits(events).pop())
            .await
    }

    /// Waits until something is said that contains this text.
    pub async fn said(&self, text: &str) -> String {
        self.until(&format!("saying {text:?}"), |events| {
            says(events).into_iter().find(|said| said.contains(text))
        })
        .await
    }

    /// Waits until the job with this name has ended.
    pub async fn ended(&self, job: &str) -> Event {
        self.until(&format!("the end of {job}"), |events| {
            events
                .iter()
                .find(|recorded| {
                    recorded.job.as_ref().is_some_and(|id| id.as_str() == job)
                        && matches!(recorded.event, Event::JobEnded { .. })
                })
                .map(|recorded| recorded.event.clone())
        })
        .await
    }

    pub async fn thread_status(&self, thread: &str) -> Option<ThreadStatus> {
        self.engine
            .thread(format!("{}/{thread}", self.project))
            .await
            .expect("a store")
            .map(|thread| thread.status)
    }

    /// Approves the proposal of the first message.
    pub async fn build(&self) {
        self.say("m1", "Build me a notes service").await;
        let wait = self.waiting().await;
        self.press(&wait, "approve").await;
    }
}

async fn deliver(engine: Engine, world: World, stop: CancellationToken) {
    let mut cursor = Cursor::START;
    while !stop.is_cancelled() {
        let due = world.state.lock().due.first().cloned();
        if let Some(due) = due {
            let sent = engine
                .signal(due.thread.as_str(), &due.kind, &due.key, &due.payload)
                .await;
            if sent.is_ok() {
                world.state.lock().due.retain(|other| other.key != due.key);
            }
            continue;
        }
        if let Ok(entries) = engine
            .journal()
            .read(&JournalFilter::all(), cursor, 1000)
            .await
        {
            for entry in entries {
                cursor = entry.cursor;
                if let Some(Recorded {
                    event:
                        Event::BudgetRaised {
                            limit_usd,
                            limit_tokens,
                            ..
                        },
                    ..
                }) = Recorded::from_journal(&entry.payload)
                {
                    let mut state = world.state.lock();
                    state.spent.limit_usd = limit_usd;
                    state.spent.limit_tokens = limit_tokens;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A wait as the journal opened it.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    pub wait: OpenWait,
    pub thread: String,
    pub interrupt: String,
}

pub fn open_waits(events: &[Recorded]) -> Vec<Waiting> {
    let mut open: Vec<Waiting> = Vec::new();
    for recorded in events {
        match &recorded.event {
            Event::WaitOpened {
                wait,
                thread,
                interrupt,
            } => open.push(Waiting {
                wait: wait.clone(),
                thread: thread.clone(),
                interrupt: interrupt.clone(),
            }),
            Event::WaitClosed { wait, .. } => open.retain(|known| known.wait.id != *wait),
            _ => {}
        }
    }
    open
}

/// How a wait was closed; `withdrawn` when nobody answered.
pub fn closed(events: &[Recorded], id: &WaitId) -> Option<String> {
    events.iter().find_map(|recorded| match &recorded.event {
        Event::WaitClosed { wait, answer, .. } if wait == id => {
            Some(answer.clone().unwrap_or_else(|| "withdrawn".to_owned()))
        }
        _ => None,
    })
}

pub fn says(events: &[Recorded]) -> Vec<String> {
    events
        .iter()
        .filter_map(|recorded| match &recorded.event {
            Event::Said { text, .. } => Some(text.clone()),
            _ => None,
        })
        .collect()
}

/// The events as `name task` lines, in order.
pub fn names(events: &[Recorded]) -> Vec<String> {
    events
        .iter()
        .map(|recorded| match &recorded.task {
            Some(task) => format!("{} {task}", recorded.event.name()),
            None => recorded.event.name().to_owned(),
        })
        .collect()
}

pub fn place(names: &[String], name: &str) -> usize {
    names
        .iter()
        .position(|found| found == name)
        .unwrap_or_else(|| panic!("{name} is not in {names:#?}"))
}

pub fn spec() -> Value {
    json!({"turn": "propose_project", "spec": {
        "name": "Notes service", "goal": "store notes", "features": ["store a note"],
        "acceptance": [{"name": "it is healthy", "type": "http", "path": "/health", "expect": {"status": 200}}]
    }})
}

pub fn change(title: &str) -> Value {
    json!({"turn": "propose_change", "change": {
        "title": title, "description": "find notes by a word",
        "acceptance": [{"name": "a note is found", "type": "http", "path": "/notes?q=x", "expect": {"status": 200}}]
    }})
}

pub fn task(id: &str, depends_on: &[&str]) -> Value {
    json!({"id": id, "title": format!("Write {id}"), "description": format!("Write {id}.py"), "scope": [format!("{id}.py")],
        "acceptance": ["it works"], "depends_on": depends_on})
}

pub fn architecture(tasks: &[Value]) -> Value {
    json!({
        "overview": "one file for each part",
        "manifest": {"checks": "python3 -m unittest", "service": {"command": ["python3", "app.py"], "health": "/health"}},
        "readme": "# Notes", "agents_md": "Standard library only.", "tasks": tasks
    })
}

pub fn approve() -> Value {
    json!({"verdict": "approve", "comments": []})
}

pub fn send_back(comment: &str) -> Value {
    json!({"verdict": "send_back", "comments": [comment]})
}

/// A world in which a project with these tasks is built without trouble.
pub fn world(tasks: &[Value]) -> World {
    let world = World::default();
    world
        .answer(Role::Brainstorm, "conversation", 0, spec())
        .answer(Role::Architect, "job-1", 0, architecture(tasks));
    for task in tasks {
        let id = task["id"].as_str().expect("an id");
        for turn in 0..10 {
            world.answer(Role::Reviewer, &format!("job-1/{id}"), turn, approve());
        }
    }
    world
}
