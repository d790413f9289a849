//! Looking inside: the states of subgraphs.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use crate::{
    checkpoint::{StateRows, ThreadRecord},
    error::EngineError,
    ids::ThreadId,
    kept::restore,
    nest::{Nest, Past, Pasts},
    private::chain,
    run::recorded_state,
    state::State,
};

use super::Engine;

/// How often a thread that runs at the moment is looked at until it stands still for a look.
const LOOKS: usize = 8;

/// A subgraph of a thread: one that is under way, or one that has kept something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubgraphInfo {
    /// Where it is: as [`Context::namespace`](crate::Context::namespace) says inside. Of an accumulating one that is not under way:
    /// the nodes.
    pub namespace: Vec<String>,
    /// How many supersteps it has made, in the invocation under way.
    pub step: u64,
    /// The nodes that run next, or wait, a node once for each of its tasks. Empty: it is not under way, or has just ended.
    pub next: Vec<String>,
    /// Whether it is accumulating, and has kept something.
    pub keeps: bool,
}

/// What is known of the inside of a thread at its head.
struct Inside {
    record: ThreadRecord,
    rows: StateRows,
    pasts: Pasts,
    nest: Nest,
}

impl Engine {
    /// The subgraphs of a thread that are under way (those that wait too) or have kept something, in the order of their
    /// namespaces. Nothing is known of stateless ones, and of resumable ones only from their first wait or the end of their first
    /// superstep until the superstep around them has landed.
    pub async fn subgraphs(
        &self,
        thread: impl Into<ThreadId>,
    ) -> Result<Vec<SubgraphInfo>, EngineError> {
        let thread = thread.into();
        let inside = self.look_inside(&thread).await?;
        let mut found = BTreeMap::new();
        for (namespace, path) in inside.paths() {
            let told = inside.nest.told(&path);
            let (step, next) = told.map_err(|fault| unfit(&thread, &namespace, fault))?;
            let keeps = inside.pasts.get(&kept_as(&namespace)).is_some();
            let info = SubgraphInfo {
                namespace: namespace.clone(),
                step,
                next,
                keeps,
            };
            found.insert(namespace, info);
        }
        for nodes in inside.pasts.namespaces() {
            if found.keys().all(|namespace| kept_as(namespace) != nodes) {
                let namespace: Vec<String> = nodes.split('/').map(str::to_owned).collect();
                let info = SubgraphInfo {
                    namespace: namespace.clone(),
                    step: 0,
                    next: Vec::new(),
                    keeps: true,
                };
                found.insert(namespace, info);
            }
        }
        Ok(found.into_values().collect())
    }

    /// The state of a subgraph of a thread now: of one that is under way, after its last superstep; of an accumulating one that is
    /// not, as it was kept. Nothing if nothing is known of it (see [`Engine::subgraphs`]).
    ///
    /// The namespace is that of [`Context::namespace`](crate::Context::namespace); the first part of the path of a
    /// [wait](crate::WaitInfo::task) says it too. `T` is the subgraph's state; another one is an error.
    pub async fn state_inside<T: State>(
        &self,
        thread: impl Into<ThreadId>,
        namespace: &[&str],
    ) -> Result<Option<T>, EngineError> {
        let thread = thread.into();
        let namespace: Vec<String> = namespace.iter().map(|&name| name.to_owned()).collect();
        let inside = self.look_inside(&thread).await?;
        let path = inside.paths().remove(&namespace);
        let state = match path {
            Some(path) => inside.state::<T>(&path, &namespace).map(Some),
            None => inside.kept::<T>(&kept_as(&namespace)),
        };
        state
            .map(|state| state.map(Arc::unwrap_or_clone))
            .map_err(|fault| unfit(&thread, &namespace, fault))
    }

    /// The state that an accumulating subgraph had kept at a checkpoint. Nothing if it had not ended once by then.
    pub async fn state_inside_at<T: State>(
        &self,
        thread: impl Into<ThreadId>,
        checkpoint: u64,
        namespace: &[&str],
    ) -> Result<Option<T>, EngineError> {
        let thread = thread.into();
        self.require(&thread).await?;
        let namespace: Vec<String> = namespace.iter().map(|&name| name.to_owned()).collect();
        let store = &self.shared.store;
        let rows = store.state_rows(&thread, Some(checkpoint)).await?;
        let pasts = Pasts::of(&rows);
        let state = pasts.get(&kept_as(&namespace)).map(Past::state::<T>);
        state
            .transpose()
            .map(|state| state.map(Arc::unwrap_or_clone))
            .map_err(|error| unfit(&thread, &namespace, chain(&error)))
    }

    async fn look_inside(&self, thread: &ThreadId) -> Result<Inside, EngineError> {
        let store = &self.shared.store;
        let mut looks = 0;
        loop {
            looks += 1;
            let rows = store.state_rows(thread, None).await?;
            let writes = store.pending_writes(thread).await?;
            let record = self.require(thread).await?;
            let stood_still = (record.branch, record.checkpoint) == (rows.branch, rows.checkpoint);
            if stood_still || looks >= LOOKS {
                let mut nest = Nest::default();
                // Writes of a later checkpoint say nothing of this one.
                for write in writes.into_iter().filter(|_| stood_still) {
                    nest.put(write);
                }
                return Ok(Inside {
                    record,
                    pasts: Pasts::of(&rows),
                    rows,
                    nest,
                });
            }
        }
    }
}

impl Inside {
    /// The paths of the subgraphs under way, by namespace.
    fn paths(&self) -> BTreeMap<Vec<String>, String> {
        let mut paths: BTreeMap<Vec<String>, (Vec<u64>, String)> = BTreeMap::new();
        for path in self.nest.recorded() {
            // Tasks and supersteps take turns.
            let tasks = path.split('/').step_by(2).map(str::to_owned).collect();
            let steps = path.split('/').skip(1).step_by(2);
            let steps: Vec<u64> = steps.filter_map(|step| step.parse().ok()).collect();
            match paths.get(&tasks) {
                // What an earlier superstep left is of no account any more.
                Some((later, _)) if *later > steps => {}
                _ => _ = paths.insert(tasks, (steps, path.to_owned())),
            }
        }
        paths
            .into_iter()
            .map(|(tasks, (_, path))| (tasks, path))
            .collect()
    }

    /// The state of a subgraph under way.
    fn state<T: State>(&self, path: &str, namespace: &[String]) -> Result<Arc<T>, String> {
        let state = recorded_state(
            self.nest.records(path).into_iter().flatten(),
            || self.before::<T>(path, namespace),
            || self.around::<T>(path, namespace),
        );
        state.map(Arc::new)
    }

    /// What an accumulating subgraph had kept.
    fn kept<T: State>(&self, kept_as: &str) -> Result<Option<Arc<T>>, String> {
        let state = self.pasts.get(kept_as).map(Past::state::<T>);
        state.transpose().map_err(|error| chain(&error))
    }

    /// What an accumulating subgraph under way began with.
    fn before<T: State>(&self, path: &str, namespace: &[String]) -> Result<Arc<T>, String> {
        // It may have ended before in the same task.
        if let Some((name, round)) = path.rsplit_once(':')
            && name
                .rsplit('/')
                .next()
                .is_some_and(|task| task.contains('+'))
            && let Some(earlier) = round
                .parse::<u32>()
                .ok()
                .and_then(|round| round.checked_sub(1))
        {
            let earlier = match earlier {
                0 => name.to_owned(),
                earlier => format!("{name}:{earlier}"),
            };
            if self.nest.records(&earlier).is_some() {
                return self.state(&earlier, namespace);
            }
        }
        let kept_as = kept_as(namespace);
        let mut past = self.pasts.get(&kept_as).cloned().unwrap_or_default();
        for (at, _) in path.match_indices('/').skip(1).step_by(2) {
            // Or before in a superstep of a graph around it.
            let around = path[..at].rsplit_once('/').map_or("", |(path, _)| path);
            for kept in self.nest.kept(around)? {
                if kept.namespace == kept_as {
                    past.add(&kept);
                }
            }
        }
        past.state().map_err(|error| chain(&error))
    }

    /// The state of the graph around, which is of the same type.
    fn around<T: State>(&self, path: &str, namespace: &[String]) -> Result<Arc<T>, String> {
        let around = path.rsplitn(3, '/').nth(2);
        match (around, namespace.split_last()) {
            (Some(around), Some((_, namespace))) => self.state(around, namespace),
            _ => restore(&self.record.input, &mut self.rows.clone()).map_err(|error| chain(&error)),
        }
    }
}

/// What an accumulating subgraph is kept under: nodes in the place of tasks.
fn kept_as(namespace: &[String]) -> String {
    let nodes: Vec<String> = namespace
        .iter()
        .map(|task| {
            let (task, name) = task
                .split_once('+')
                .map_or((task.as_str(), None), |(task, name)| (task, Some(name)));
            let node = task.split_once(':').map_or(task, |(_, node)| node);
            match name {
                Some(name) => format!("{node}+{}", name.split(':').next().unwrap_or(name)),
                None => node.to_owned(),
            }
        })
        .collect();
    nodes.join("/")
}

fn unfit(thread: &ThreadId, namespace: &[String], fault: String) -> EngineError {
    EngineError::StateInside {
        thread: thread.clone(),
        namespace: namespace.join("/"),
        fault,
    }
}
