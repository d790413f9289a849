//! Where a subgraph runs: the task around it, its paths, and what it may keep.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{
    checkpoint::Commit,
    context::TaskContext,
    error::NodeError,
    nest::{Kept, Nest, Past},
    subgraph::{MAX_DEPTH, SubgraphMemory},
};

use super::{Broken, RunShared};

/// Where one invocation of a subgraph runs.
pub(crate) struct Place {
    /// Its path in the superstep of the thread: the task around it, and the name of the invocation if it has one. What it
    /// records stands under it, and what its tasks write under `{path}/{superstep}/{task}`.
    pub path: String,
    /// The tasks around it, from the outside in.
    pub namespace: Vec<String>,
    /// The same by nodes: what the state of an accumulating one is kept under.
    pub kept_as: String,
    /// The number of the thread's superstep.
    pub root_step: u64,
    depth: usize,
    /// Whether its supersteps are recorded.
    pub records: bool,
    /// The memory of the thread's task around all of it.
    pub nest: Arc<Mutex<Nest>>,
    /// The task around it.
    pub outer: Arc<TaskContext>,
    /// What accumulating subgraphs inside have added in its supersteps.
    pub kept: Mutex<Vec<Kept>>,
}

impl Place {
    /// Inside a task. A task whose node is the subgraph has no name for it.
    pub fn inside(
        outer: &Arc<TaskContext>,
        memory: SubgraphMemory,
        name: Option<&str>,
    ) -> Result<Self, NodeError> {
        let around = outer.place.as_deref();
        let depth = around.map_or(0, |place| place.depth) + 1;
        if depth > MAX_DEPTH {
            return Err(NodeError::msg(format!(
                "node `{}` would run a subgraph inside {MAX_DEPTH} others, which is as deep as they go",
                outer.node
            ))
            .fatal());
        }
        let nest = match around {
            Some(place) => place.nest.clone(),
            None => outer.memo.lock().nest(),
        };
        let (suffix, kept_suffix) = match name {
            None => (String::new(), String::new()),
            Some(name) => {
                let round = outer.memo.lock().round("invoke", name);
                let kept = format!("+{name}");
                match round {
                    0 => (kept.clone(), kept),
                    _ => (format!("{kept}:{round}"), kept),
                }
            }
        };
        let task = outer.task.rsplit('/').next().unwrap_or_default();
        let mut namespace = outer.namespace().to_vec();
        namespace.push(format!("{task}{suffix}"));
        let node = &outer.node;
        Ok(Self {
            path: format!("{}{suffix}", outer.task),
            kept_as: match around {
                Some(place) => format!("{}/{node}{kept_suffix}", place.kept_as),
                None => format!("{node}{kept_suffix}"),
            },
            namespace,
            root_step: around.map_or(outer.step, |place| place.root_step),
            depth,
            records: memory != SubgraphMemory::Stateless
                && around.is_none_or(|place| place.records),
            nest,
            outer: outer.clone(),
            kept: Mutex::default(),
        })
    }

    /// Whether so many subgraphs are around it that its tasks should not be polled on the stack of theirs.
    pub fn is_deep(&self) -> bool {
        self.depth.is_multiple_of(2)
    }

    /// The tasks around it, from the inside out.
    fn around(&self) -> impl Iterator<Item = &TaskContext> {
        std::iter::successors(Some(&*self.outer), |task| {
            task.place.as_ref().map(|place| &*place.outer)
        })
    }

    /// Commits what its tasks have done, together with what others of the thread commit at the moment. What the tasks around it
    /// have learned comes along: a signal is used when that for which it was used has landed.
    pub async fn share(&self, run: &Arc<RunShared>, mut commit: Commit) -> Result<(), Broken> {
        if !self.records {
            return Ok(());
        }
        for task in self.around() {
            task.memo.lock().flush_memory(&mut commit);
        }
        if !commit.forget.is_empty() {
            let Commit { forget, writes, .. } = &mut commit;
            writes.retain(|write| !forget.iter().any(|key| write.is(key)));
        }
        {
            let mut nest = self.nest.lock();
            commit
                .writes
                .iter()
                .cloned()
                .for_each(|write| nest.put(write));
        }
        run.share(commit).await
    }

    /// Leaves something to be kept with the task around it.
    pub fn leave(&self, left: Commit) {
        {
            let mut nest = self.nest.lock();
            left.writes
                .iter()
                .cloned()
                .for_each(|write| nest.put(write));
        }
        self.outer.memo.lock().absorb(left);
    }

    /// What is kept under its name, with what the superstep has added so far.
    pub fn past(&self) -> Past {
        let around: Vec<_> = self.around().collect();
        let mut past = self
            .outer
            .run
            .pasts
            .lock()
            .get(&self.kept_as)
            .cloned()
            .unwrap_or_default();
        for task in around.into_iter().rev() {
            let landed = task.place.as_ref().map(|place| place.kept.lock().clone());
            let ended = task.memo.lock().kept.clone();
            landed
                .into_iter()
                .flatten()
                .chain(ended)
                .filter(|kept| kept.namespace == self.kept_as)
                .for_each(|kept| past.add(&kept));
        }
        past
    }

    /// An accumulating subgraph can be reached only once at a time.
    pub fn claim(&self, run: &RunShared) -> Result<(), NodeError> {
        let mut claims = run.claims.lock();
        let paths = claims.entry(self.kept_as.clone()).or_default();
        if let Some(other) = paths.iter().find(|other| are_parallel(other, &self.path)) {
            return Err(NodeError::msg(format!(
                "the accumulating subgraph `{}` was reached by two tasks of one superstep (`{other}` and `{}`), and its state can follow only one of them; make it resumable, or reach it once",
                self.kept_as, self.path
            ))
            .fatal());
        }
        if !paths.contains(&self.path) {
            paths.push(self.path.clone());
        }
        Ok(())
    }
}

/// Whether two paths part at a task, and not at a superstep: the one has not run before the other.
fn are_parallel(one: &str, other: &str) -> bool {
    let task = |part: &str| part.split('+').next().unwrap_or_default().to_owned();
    one.split('/')
        .zip(other.split('/'))
        .enumerate()
        .find(|(_, (a, b))| a != b)
        // Tasks and supersteps take turns. Two invocations by one task follow one another.
        .is_some_and(|(index, (a, b))| index % 2 == 0 && task(a) != task(b))
}

#[cfg(test)]
mod tests {
    use super::are_parallel;

    #[test]
    fn paths_are_parallel_when_they_part_at_a_task() {
        assert!(are_parallel("0:a", "1:a"));
        assert!(are_parallel("x/1/0:a", "x/1/1:a"));
        assert!(!are_parallel("x/1/a", "x/2/a"));
        assert!(!are_parallel("x", "x"));
        assert!(!are_parallel("x+one", "x+one:1"));
        assert!(are_parallel("0:x/1/a", "1:x/2/a"));
        assert!(!are_parallel("x/10/a", "x/1/a"));
    }
}
