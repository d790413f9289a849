//! What runs next: the scheduler's memory between two supersteps, and how it follows from what the tasks of one handed back.
//!
//! Trigger channels in LangGraph's sense are the edges themselves: an edge that fires writes the trigger of its target, and
//! a node runs once when any of its triggers was written since it last ran. Written triggers become the plan at once, so no
//! version numbers need to be kept; what must be remembered are half-full joins and deferred nodes.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    builder::{Compiled, Condition},
    command::{END, Outcome, Send, Target},
    state::State,
};

/// Stands in checkpoints as JSON; the short names keep them small.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// The version of this format.
    #[serde(rename = "v", default)]
    pub version: u32,
    /// Nodes to run, by name.
    #[serde(rename = "t", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub nodes: BTreeSet<String>,
    /// Tasks with arguments, in order.
    #[serde(rename = "s", default, skip_serializing_if = "Vec::is_empty")]
    pub sends: Vec<Send>,
    /// Joins that are half full: join to the sources that have run.
    #[serde(rename = "j", default, skip_serializing_if = "BTreeMap::is_empty")]
    pub joins: BTreeMap<String, BTreeSet<String>>,
    /// Triggered nodes that wait until nothing else is left.
    #[serde(rename = "d", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub deferred: BTreeSet<String>,
    /// Nodes that just ran and after which the thread is to stop.
    #[serde(rename = "a", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub pause_after: BTreeSet<String>,
    /// After a rollback, until the first step: the number of the newest signal among the inputs with which it began.
    #[serde(rename = "b", default, skip_serializing_if = "Option::is_none")]
    pub begun: Option<u64>,
    /// After a rollback to before the thread's first input: there is nothing before this.
    #[serde(rename = "n", default, skip_serializing_if = "std::ops::Not::not")]
    pub anew: bool,
    /// Names of children that belong to rounds which were stopped, and how often that happened: a new child of such a name is
    /// another one.
    #[serde(rename = "r", default, skip_serializing_if = "BTreeMap::is_empty")]
    pub renamed: BTreeMap<String, u32>,
    /// Supersteps since the thread last waited.
    #[serde(rename = "c", default, skip_serializing_if = "is_zero")]
    pub hops: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A task that is planned. Sends come first.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Planned {
    /// Its path in the step: the node, or `{index}:{node}` of a send.
    pub key: String,
    pub node: String,
    pub argument: Option<serde_json::Value>,
    /// The place of its writes among those of the step.
    pub order: (bool, usize),
}

/// What is wrong with what a step handed back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error(
        "channel `{channel}` keeps one value, and was updated more than once in one step (by {nodes}); give it a reducer, or let one node write it"
    )]
    Conflict {
        channel: &'static str,
        nodes: String,
    },
    #[error("node `{node}` went to `{target}`, which is no node of the graph")]
    UnknownTarget { node: String, target: String },
    #[error(
        "node `{node}` went to `{target}`, which is not among the declared targets; declare it with `goes` or in `conditional`"
    )]
    Undeclared { node: String, target: String },
    #[error("node `{node}` sent a task to the end; only nodes take tasks")]
    SendToEnd { node: String },
    #[error("node `{node}` sent `{target}` an argument that cannot be written as JSON: {fault}")]
    BadArgument {
        node: String,
        target: String,
        fault: String,
    },
}

/// A task that has finished.
pub(crate) struct Finished<'a, S: State> {
    pub node: &'a str,
    pub outcome: &'a Outcome<S>,
}

impl Plan {
    pub const VERSION: u32 = 1;

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.sends.is_empty()
    }

    /// The planned tasks: sends in order, then nodes by name.
    pub fn tasks(&self) -> Vec<Planned> {
        let sends = self.sends.iter().enumerate().map(|(index, send)| Planned {
            key: format!("{index}:{}", send.node),
            node: send.node.clone(),
            argument: Some(send.argument.clone()),
            order: (true, index),
        });
        let nodes = self.nodes.iter().enumerate().map(|(index, node)| Planned {
            key: node.clone(),
            node: node.clone(),
            argument: None,
            order: (false, index),
        });
        sends.chain(nodes).collect()
    }

    /// Names of what runs next, for people.
    pub fn names(&self) -> Vec<String> {
        self.tasks().into_iter().map(|task| task.node).collect()
    }

    /// The plan at the beginning, from the state after the input.
    pub fn entry<S: State>(graph: &Compiled<S>, state: &S) -> Result<Self, PlanError> {
        let mut next = Next::new(graph, BTreeMap::new(), BTreeSet::new());
        next.nodes.extend(graph.entry.iter().cloned());
        next.decide("START", &graph.entry_conditions, state)?;
        Ok(next.finish(0))
    }

    /// The plan after a step. `finished` is in the order of task paths; `before` is the state at the beginning of the step,
    /// `after` the one with all writes.
    pub fn next<S: State>(
        &self,
        graph: &Compiled<S>,
        finished: &[Finished<'_, S>],
        before: Option<&S>,
        after: &S,
    ) -> Result<Self, PlanError> {
        let mut next = Next::new(graph, self.joins.clone(), self.deferred.clone());
        next.follow(finished, before, after)?;
        let mut plan = next.finish(self.hops + 1);
        plan.pause_after = pauses(graph, finished);
        plan.renamed = self.renamed.clone();
        Ok(plan)
    }

    /// The plan when somebody says that a node is done, whether or not it was to run: what else was planned still is.
    pub fn as_if<S: State>(
        &self,
        graph: &Compiled<S>,
        node: &str,
        state: &S,
    ) -> Result<Self, PlanError> {
        let outcome = Outcome::from(());
        let finished = [Finished::<S> {
            node,
            outcome: &outcome,
        }];
        let mut next = Next::new(graph, self.joins.clone(), self.deferred.clone());
        next.deferred.remove(node);
        let others = self.nodes.iter().filter(|planned| *planned != node);
        next.nodes.extend(others.cloned());
        let others = self.sends.iter().filter(|send| send.node != node);
        next.sends.extend(others.cloned());
        next.follow(&finished, None, state)?;
        let mut plan = next.finish(0);
        plan.pause_after = pauses(graph, &finished);
        plan.renamed = self.renamed.clone();
        Ok(plan)
    }

    /// The beginning of a round in the place of one that was stopped: its children's names are taken.
    pub fn instead_of(
        mut self,
        stopped: &Self,
        children: impl IntoIterator<Item = String>,
    ) -> Self {
        self.renamed.clone_from(&stopped.renamed);
        for name in children {
            // A child of a name that was taken before is called so already.
            let name = given_name(&name).to_owned();
            *self.renamed.entry(name).or_default() += 1;
        }
        self
    }

    /// Whether nothing is left to do, not even to stop after a node.
    pub fn is_over(&self) -> bool {
        self.is_empty() && self.pause_after.is_empty()
    }
}

/// The nodes among the finished ones after which the thread is to stop.
fn pauses<S: State>(graph: &Compiled<S>, finished: &[Finished<'_, S>]) -> BTreeSet<String> {
    finished
        .iter()
        .filter(|task| graph.pause_after.contains(task.node))
        .map(|task| task.node.to_owned())
        .collect()
}

/// The name by which the database knows a child: the given one, or a free one after rounds that were stopped had taken it.
pub(crate) fn child_name(renamed: &BTreeMap<String, u32>, name: &str) -> String {
    match renamed.get(name) {
        None => name.to_owned(),
        Some(taken) => format!("{name}{RENAMED}{taken}"),
    }
}

/// The inverse of [`child_name`].
pub(crate) fn given_name(name: &str) -> &str {
    match name.rsplit_once(RENAMED) {
        Some((given, taken)) if !taken.is_empty() && taken.bytes().all(|b| b.is_ascii_digit()) => {
            given
        }
        _ => name,
    }
}

/// Between the given name of a child and how often it was taken before.
const RENAMED: &str = "~";

struct Next<'a, S: State> {
    graph: &'a Compiled<S>,
    nodes: BTreeSet<String>,
    sends: Vec<Send>,
    joins: BTreeMap<String, BTreeSet<String>>,
    deferred: BTreeSet<String>,
}

impl<'a, S: State> Next<'a, S> {
    /// Goes where the finished tasks lead.
    fn follow(
        &mut self,
        finished: &[Finished<'_, S>],
        before: Option<&S>,
        after: &S,
    ) -> Result<(), PlanError> {
        for task in finished {
            let Some(node) = self.graph.nodes.get(task.node) else {
                continue;
            };
            self.nodes.extend(node.edges.iter().cloned());
            for index in &node.joins {
                self.arrive(*index, task.node);
            }
            if !node.conditions.is_empty() {
                match before {
                    // Others ran beside it, whose writes it must not see.
                    Some(before) if finished.len() > 1 => {
                        let mut own = before.clone();
                        for update in &task.outcome.updates {
                            own.apply(update.clone());
                        }
                        self.decide(task.node, &node.conditions, &own)?;
                    }
                    _ => self.decide(task.node, &node.conditions, after)?,
                }
            }
            for target in &task.outcome.goto {
                self.go(task.node, target, &node.goes)?;
            }
        }
        Ok(())
    }

    fn new(
        graph: &'a Compiled<S>,
        joins: BTreeMap<String, BTreeSet<String>>,
        deferred: BTreeSet<String>,
    ) -> Self {
        Self {
            graph,
            nodes: BTreeSet::new(),
            sends: Vec::new(),
            joins,
            deferred,
        }
    }

    fn arrive(&mut self, index: usize, node: &str) {
        let join = &self.graph.joins[index];
        let arrived = self.joins.entry(join.key.clone()).or_default();
        arrived.insert(node.to_owned());
        if join.sources.iter().all(|source| arrived.contains(source)) {
            self.joins.remove(&join.key);
            if join.target != END {
                self.nodes.insert(join.target.clone());
            }
        }
    }

    fn decide(
        &mut self,
        node: &str,
        conditions: &[(Condition<S>, BTreeSet<String>)],
        state: &S,
    ) -> Result<(), PlanError> {
        for (condition, declared) in conditions {
            for target in condition(state).targets {
                self.go(node, &target, declared)?;
            }
        }
        Ok(())
    }

    fn go(
        &mut self,
        node: &str,
        target: &Target,
        declared: &BTreeSet<String>,
    ) -> Result<(), PlanError> {
        let name = match target {
            Target::Node(name) => name,
            Target::Send(send) => &send.node,
        };
        if name == END {
            return match target {
                Target::Node(_) => Ok(()),
                Target::Send(_) => Err(PlanError::SendToEnd {
                    node: node.to_owned(),
                }),
            };
        }
        if !self.graph.nodes.contains_key(name) {
            return Err(PlanError::UnknownTarget {
                node: node.to_owned(),
                target: name.clone(),
            });
        }
        if !declared.contains(name) {
            return Err(PlanError::Undeclared {
                node: node.to_owned(),
                target: name.clone(),
            });
        }
        match target {
            Target::Node(name) => {
                self.nodes.insert(name.clone());
            }
            Target::Send(send) => {
                if let Some(fault) = &send.fault {
                    return Err(PlanError::BadArgument {
                        node: node.to_owned(),
                        target: name.clone(),
                        fault: fault.clone(),
                    });
                }
                self.sends.push(send.clone());
            }
        }
        Ok(())
    }

    fn finish(mut self, hops: u64) -> Plan {
        let graph = self.graph;
        let is_deferred = |node: &String| graph.nodes.get(node).is_some_and(|n| n.options.deferred);
        let (deferred, nodes): (BTreeSet<String>, BTreeSet<String>) =
            self.nodes.into_iter().partition(is_deferred);
        self.deferred.extend(deferred);
        let mut plan = Plan {
            version: Plan::VERSION,
            nodes,
            sends: self.sends,
            joins: self.joins,
            deferred: self.deferred,
            pause_after: BTreeSet::new(),
            begun: None,
            anew: false,
            renamed: BTreeMap::new(),
            hops,
        };
        if plan.is_empty() {
            plan.nodes = std::mem::take(&mut plan.deferred);
        }
        plan
    }
}

/// Finds a last-value channel with two updates.
pub(crate) fn conflicts<S: State>(finished: &[Finished<'_, S>]) -> Result<(), PlanError> {
    use crate::state::{Reducer, Update};
    for (index, channel) in S::CHANNELS.iter().enumerate() {
        if channel.reducer != Reducer::Last {
            continue;
        }
        let writers: Vec<&str> = finished
            .iter()
            .flat_map(|task| {
                task.outcome
                    .updates
                    .iter()
                    .map(|update| (task.node, update))
            })
            .filter(|(_, update)| update.touches(index))
            .map(|(node, _)| node)
            .collect();
        if writers.len() > 1 {
            let nodes: Vec<String> = writers.iter().map(|node| format!("`{node}`")).collect();
            return Err(PlanError::Conflict {
                channel: channel.name,
                nodes: nodes.join(", "),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_plan_is_small_in_a_checkpoint() {
        let plan = Plan {
            version: Plan::VERSION,
            nodes: BTreeSet::from(["work".to_owned()]),
            hops: 7,
            ..Plan::default()
        };
        assert_eq!(
            serde_json::to_value(&plan).expect("is JSON"),
            json!({"v": 1, "t": ["work"], "c": 7})
        );
    }

    #[test]
    fn a_plan_of_the_first_release_can_be_read() {
        let stored = json!({
            "v": 1, "t": ["b"], "s": [{"n": "work", "a": {"x": 1}}], "j": {"a+b>c": ["a"]}, "d": ["last"], "a": ["b"], "c": 3
        });
        let plan: Plan = serde_json::from_value(stored.clone()).expect("is a plan");
        assert_eq!(plan.names(), ["work", "b"]);
        assert_eq!(plan.tasks()[0].key, "0:work");
        assert_eq!(serde_json::to_value(&plan).expect("is JSON"), stored);
    }
}
