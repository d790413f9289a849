//! What runs inside a task remembers: the progress of its subgraphs, and what accumulating ones keep with the thread.

use std::{any::Any, collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    checkpoint::{Channels, KeptWrite, StateRow, StateRows, Write, WriteKey, WriteKind},
    command::Handover,
    plan::Plan,
    private::chain,
    run::is_inside,
    state::{Changes, ChannelError, Extent, Reducer, State, rebuild_from, snapshot},
};

/// The first character of stored channels that are no fields of the state. No field can be called so.
pub(crate) const HIDDEN: char = '~';
/// What the state of an accumulating subgraph is stored under, before its namespace.
const KEPT: &str = "~sub:";
/// The full values in the place of its changes.
const FULL: &str = "~full";

/// Everything that has been written (or is to be) under a task by what runs inside it, by task path. It is the same in a
/// run that goes on and in one that has read it from the database, so there is one way to go on.
#[derive(Debug, Default)]
pub(crate) struct Nest {
    writes: BTreeMap<String, Vec<Write>>,
    records: BTreeMap<String, BTreeMap<u32, Recorded>>,
    /// Whether some of it was written in an earlier run.
    pub recalled: bool,
}

/// A record, as the database gave it.
#[derive(Clone, Debug)]
pub(crate) enum Recorded {
    Json(Value),
    Kept(KeptWrite),
}

impl Recorded {
    /// Without the types of its values. The error says what cannot be read.
    pub fn record(&self) -> Result<Record, String> {
        let value = match self {
            Self::Json(value) => value.clone(),
            Self::Kept(kept) => kept.value().map_err(|error| chain(&error))?,
        };
        serde_json::from_value(value).map_err(|error| error.to_string())
    }
}

impl Nest {
    /// Takes a write up; one of the same key is replaced.
    pub fn put(&mut self, write: Write) {
        if write.kind == WriteKind::Sub {
            let recorded = match write.kept {
                Some(kept) => Recorded::Kept(kept),
                None => Recorded::Json(write.value),
            };
            if let Some(records) = self.records.get_mut(&write.task) {
                records.insert(write.round, recorded);
            } else {
                let records = BTreeMap::from([(write.round, recorded)]);
                self.records.insert(write.task, records);
            }
            return;
        }
        let writes = self.writes.entry(write.task.clone()).or_default();
        match writes.iter_mut().find(|other| other.has_key(&write)) {
            Some(present) => *present = write,
            None => writes.push(write),
        }
    }

    /// What a task inside has written.
    pub fn writes(&self, task: &str) -> Vec<Write> {
        self.writes.get(task).cloned().unwrap_or_default()
    }

    pub fn get(&self, task: &str, kind: WriteKind, name: &str, round: u32) -> Option<&Value> {
        self.writes
            .get(task)?
            .iter()
            .find(|write| (write.kind, write.round) == (kind, round) && write.name == name)
            .map(|write| &write.value)
    }

    /// The records of a subgraph, by superstep.
    pub fn records(&self, path: &str) -> Option<&BTreeMap<u32, Recorded>> {
        self.records.get(path)
    }

    /// The paths of the subgraphs of which there are records.
    pub fn recorded(&self) -> impl Iterator<Item = &str> {
        self.records.keys().map(String::as_str)
    }

    /// How many supersteps a subgraph has made, and the nodes that are to run next. The error says what cannot be read.
    pub fn told(&self, path: &str) -> Result<(u64, Vec<String>), String> {
        let mut told = (0, Vec::new());
        for (round, recorded) in self.records(path).into_iter().flatten() {
            let plan = recorded.record()?.plan.unwrap_or_default();
            told = (u64::from(*round), plan.names());
        }
        Ok(told)
    }

    /// What accumulating subgraphs have added in the supersteps of a subgraph.
    pub fn kept(&self, path: &str) -> Result<Vec<Kept>, String> {
        let mut all = Vec::new();
        for (_, recorded) in self.records(path).into_iter().flatten() {
            let record = recorded.record()?;
            if record.base {
                all.clear();
            }
            all.extend(record.kept);
        }
        Ok(all)
    }

    /// Whether a subgraph inside a task has a node that cleans up.
    pub fn cleans(&self, task: &str) -> bool {
        self.records
            .iter()
            .filter(|(path, _)| *path == task || is_inside(path, task))
            .flat_map(|(_, records)| records.values())
            .any(|recorded| recorded.record().is_ok_and(|record| record.cleans))
    }

    /// Forgets what a task has written. Returns the keys.
    pub fn forget_task(&mut self, task: &str) -> Vec<WriteKey> {
        let writes = self.writes.remove(task);
        writes
            .into_iter()
            .flatten()
            .map(|write| write.key())
            .collect()
    }

    /// Forgets what the tasks of a superstep have written, which has come to its end, and what ran inside them. Returns the keys.
    pub fn forget_step(&mut self, path: &str, step: u64) -> Vec<WriteKey> {
        if self.writes.is_empty() && self.records.len() <= 1 {
            return Vec::new();
        }
        let prefix = format!("{path}/{step}/");
        let mut keys = Vec::new();
        for task in under(&self.writes, &prefix) {
            let writes = self.writes.remove(&task);
            keys.extend(writes.into_iter().flatten().map(|write| write.key()));
        }
        for task in under(&self.records, &prefix) {
            let rounds = self.records.remove(&task).into_iter().flatten();
            keys.extend(rounds.map(|(round, _)| record_key(&task, round)));
        }
        keys
    }

    /// Forgets the records before a superstep. Returns the keys.
    pub fn forget_before(&mut self, path: &str, step: u32) -> Vec<WriteKey> {
        let Some(records) = self.records.get_mut(path) else {
            return Vec::new();
        };
        let left = records.split_off(&step);
        let gone = std::mem::replace(records, left);
        gone.into_keys()
            .map(|round| record_key(path, round))
            .collect()
    }
}

/// The keys that begin with a prefix.
fn under<V>(map: &BTreeMap<String, V>, prefix: &str) -> Vec<String> {
    map.range(prefix.to_owned()..)
        .map(|(path, _)| path)
        .take_while(|path| path.starts_with(prefix))
        .cloned()
        .collect()
}

fn record_key(path: &str, round: u32) -> WriteKey {
    WriteKey {
        task: path.to_owned(),
        kind: WriteKind::Sub,
        name: String::new(),
        round,
    }
}

/// What a superstep of a subgraph has changed: stored under [`WriteKind::Sub`], with the superstep as the round. Number 0 is
/// the input, if nothing else has been recorded when it is needed. From time to time, one holds all that those before it did,
/// which are forgotten then.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What it began with; in the first record only.
    #[serde(rename = "i", default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Input>,
    #[serde(rename = "a", default, skip_serializing_if = "Map::is_empty")]
    pub appends: Channels,
    #[serde(rename = "c", default, skip_serializing_if = "Map::is_empty")]
    pub changes: Channels,
    /// Whether it stands for all records before it.
    #[serde(rename = "b", default, skip_serializing_if = "std::ops::Not::not")]
    pub base: bool,
    /// The full values of all channels but the append ones, after the changes.
    #[serde(rename = "f", default, skip_serializing_if = "Option::is_none")]
    pub full: Option<Channels>,
    /// Whether the graph has a node that cleans up when the thread is cancelled; said with the input.
    #[serde(rename = "x", default, skip_serializing_if = "std::ops::Not::not")]
    pub cleans: bool,
    /// What runs next.
    #[serde(rename = "p", default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// What accumulating subgraphs inside have added.
    #[serde(rename = "k", default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<Kept>,
    /// Commands to the parent: it was the last superstep.
    #[serde(rename = "h", default, skip_serializing_if = "Vec::is_empty")]
    pub handovers: Vec<Handover>,
}

/// What a subgraph began with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Input {
    /// This update.
    Update(Value),
    /// This update on top of what it had kept.
    Kept(Value),
    /// The state of the graph around it.
    State,
}

/// What an accumulating subgraph has added in one invocation.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Kept {
    #[serde(rename = "n")]
    pub namespace: String,
    #[serde(rename = "a", default, skip_serializing_if = "Map::is_empty")]
    pub appends: Channels,
    #[serde(rename = "c", default, skip_serializing_if = "Map::is_empty")]
    pub changes: Channels,
    /// Instead of the changes: the full values of all channels but the append ones, after a long invocation.
    #[serde(rename = "f", default, skip_serializing_if = "Option::is_none")]
    pub full: Option<Channels>,
    /// The state after it, if it was made in this run.
    #[serde(skip)]
    pub live: Option<Arc<dyn Live>>,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// A state of whatever type.
pub(crate) trait Live: Send + Sync {
    /// The values of all channels but the append ones, and those of the append ones.
    fn parts(&self) -> Result<(Channels, Channels), ChannelError>;
    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

impl<T: State> Live for T {
    fn parts(&self) -> Result<(Channels, Channels), ChannelError> {
        let mut appends = Map::new();
        for (index, channel) in T::CHANNELS.iter().enumerate() {
            if channel.reducer == Reducer::Append {
                appends.insert(channel.name.to_owned(), self.channel(index)?);
            }
        }
        Ok((snapshot(self, Extent::Usual)?, appends))
    }

    fn any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// What is kept of one accumulating subgraph, as far as a run knows it.
#[derive(Clone, Default)]
pub(crate) struct Past {
    /// The full values of its channels but the append ones, at some time.
    full: Option<Channels>,
    /// What changed since, oldest first.
    changes: Vec<Channels>,
    /// All items of append channels.
    appends: Channels,
    /// Instead of all that, the state itself, if it was made in this run.
    live: Option<Arc<dyn Live>>,
}

impl Past {
    pub fn add(&mut self, kept: &Kept) {
        if let Some(live) = &kept.live {
            *self = Self {
                live: Some(live.clone()),
                ..Self::default()
            };
            return;
        }
        self.open();
        append(&mut self.appends, kept.appends.clone());
        self.change(match &kept.full {
            Some(full) => whole(full.clone()),
            None => kept.changes.clone(),
        });
    }

    /// Adds changes, as they are stored.
    fn change(&mut self, mut changes: Channels) {
        match changes.remove(FULL) {
            Some(Value::Object(full)) => {
                self.full = Some(full);
                self.changes.clear();
            }
            _ => self.changes.push(changes),
        }
    }

    /// Takes a living state apart, so that changes can be added.
    fn open(&mut self) {
        if let Some((full, appends)) = self.live.take().and_then(|live| live.parts().ok()) {
            *self = Self {
                full: Some(full),
                appends,
                ..Self::default()
            };
        }
    }

    /// The state, put together from what is known of it.
    pub fn state<T: State>(&self) -> Result<Arc<T>, ChannelError> {
        let live = self
            .live
            .clone()
            .and_then(|live| live.any().downcast().ok());
        if let Some(live) = live {
            return Ok(live);
        }
        let mut state = T::default();
        rebuild_from(
            &mut state,
            self.full.clone(),
            self.appends.clone(),
            self.changes.clone(),
        )?;
        Ok(Arc::new(state))
    }

    fn stored(&self) -> Value {
        let mut past = self.clone();
        past.open();
        serde_json::to_value(StoredPast {
            full: past.full,
            changes: past.changes,
        })
        .unwrap_or_default()
    }
}

/// A [`Past`] in a snapshot.
#[derive(Serialize, Deserialize)]
struct StoredPast {
    #[serde(rename = "f", default, skip_serializing_if = "Option::is_none")]
    full: Option<Channels>,
    #[serde(rename = "c", default, skip_serializing_if = "Vec::is_empty")]
    changes: Vec<Channels>,
}

/// Puts what was added to each namespace together, as far as that takes no knowledge of its type.
pub(crate) fn fold_kept(all: &mut Vec<Kept>) {
    let mut folded: Vec<Kept> = Vec::new();
    for mut kept in all.drain(..) {
        let full = match (&kept.live, kept.full.take()) {
            (Some(live), _) => live.parts().ok().map(|(full, _)| full),
            (None, full) => full,
        };
        let same = folded
            .iter_mut()
            .rfind(|other| other.namespace == kept.namespace);
        match (same, full) {
            (Some(same), Some(full)) => {
                append(&mut same.appends, kept.appends);
                same.changes = Channels::new();
                same.full = Some(full);
                same.live = kept.live;
            }
            (_, full) => {
                if full.is_some() {
                    kept.changes.clear();
                }
                folded.push(Kept { full, ..kept });
            }
        }
    }
    *all = folded;
}

/// Full values, in the place of changes.
fn whole(full: Channels) -> Channels {
    Map::from_iter([(FULL.to_owned(), Value::Object(full))])
}

fn append(all: &mut Channels, more: Channels) {
    for (channel, items) in more {
        match (all.get_mut(&channel), items) {
            (Some(Value::Array(list)), Value::Array(items)) => list.extend(items),
            (_, items) => {
                all.insert(channel, items);
            }
        }
    }
}

/// What all accumulating subgraphs of a thread have kept, by namespace.
#[derive(Clone, Default)]
pub(crate) struct Pasts(BTreeMap<String, Past>);

impl Pasts {
    /// Those at a checkpoint.
    pub fn of(rows: &StateRows) -> Self {
        match &rows.state {
            Some(state) => state.pasts(),
            None => Self::read(&rows.rows),
        }
    }

    /// Reads them from the rows of a branch.
    fn read(rows: &[StateRow]) -> Self {
        let mut pasts = Self::default();
        for row in rows {
            let hidden = |channels: &Channels| -> Vec<(String, Value)> {
                channels
                    .iter()
                    .filter_map(|(name, value)| {
                        Some((name.strip_prefix(KEPT)?.to_owned(), value.clone()))
                    })
                    .collect()
            };
            for (name, items) in hidden(&row.appends) {
                // Neither a namespace nor a channel contains a colon, but for the numbers of tasks, which are not in these.
                if let Some((namespace, channel)) = name.split_once(':') {
                    let past = pasts.0.entry(namespace.to_owned()).or_default();
                    append(
                        &mut past.appends,
                        Map::from_iter([(channel.to_owned(), items)]),
                    );
                }
            }
            if let Some(snapshot) = &row.snapshot {
                for (namespace, value) in hidden(snapshot) {
                    if let Ok(stored) = serde_json::from_value::<StoredPast>(value) {
                        let past = pasts.0.entry(namespace).or_default();
                        past.full = stored.full;
                        past.changes = stored.changes;
                    }
                }
            } else {
                for (namespace, value) in hidden(&row.changes) {
                    if let Ok(changes) = serde_json::from_value::<Vec<Channels>>(value) {
                        let past = pasts.0.entry(namespace).or_default();
                        for changes in changes {
                            past.change(changes);
                        }
                    }
                }
            }
        }
        pasts
    }

    pub fn get(&self, namespace: &str) -> Option<&Past> {
        self.0.get(namespace)
    }

    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Takes up what a superstep has added, and puts it into what is stored of the step.
    pub fn add(&mut self, added: Vec<Kept>, changes: &mut Changes) {
        for kept in added {
            self.0.entry(kept.namespace.clone()).or_default().add(&kept);
            let hidden = kept
                .appends
                .into_iter()
                .map(|(channel, items)| (format!("{KEPT}{}:{channel}", kept.namespace), items))
                .collect();
            append(&mut changes.appends, hidden);
            let changed = kept.full.map_or(kept.changes, whole);
            let change = Value::Array(vec![Value::Object(changed)]);
            append(
                &mut changes.changes,
                Map::from_iter([(format!("{KEPT}{}", kept.namespace), change)]),
            );
        }
    }

    /// Puts them into a snapshot.
    pub fn put(&self, snapshot: &mut Channels) {
        for (namespace, past) in &self.0 {
            snapshot.insert(format!("{KEPT}{namespace}"), past.stored());
        }
    }
}
