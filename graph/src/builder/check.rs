//! The check of a whole graph, and putting it together.

use std::{
    any::TypeId,
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use crate::{
    brisk::Brisk,
    command::{END, START},
    shape::{EdgeKind, Shape, ShapeEdge, ShapeNode},
    state::State,
};

use super::{
    CompileError, CompiledGraph, Fault, GraphBuilder,
    compiled::{Compiled, Conditions, Join, Node},
    name_fault,
};

impl<S: State> GraphBuilder<S> {
    /// Checks the graph, and names everything that is wrong with it at once.
    pub fn compile(mut self) -> Result<CompiledGraph<S>, CompileError> {
        let mut faults = std::mem::take(&mut self.faults);
        let mut names = BTreeSet::new();
        for (name, options, _) in &self.nodes {
            if let Some(key) = options
                .cache
                .as_ref()
                .and_then(|policy| policy.key.as_ref())
                && key.state != TypeId::of::<S>()
            {
                faults.push(Fault::CacheOfOtherState {
                    node: name.clone(),
                    state: key.state_name,
                });
            }
            if let Some(fault) = name_fault(name) {
                faults.push(Fault::BadName {
                    node: name.clone(),
                    fault,
                });
            }
            if !names.insert(name.as_str()) {
                faults.push(Fault::DuplicateNode(name.clone()));
            }
        }
        if self.recursion_limit == 0 {
            faults.push(Fault::NoSteps);
        }
        let shape = self.shape(&names, &mut faults);
        shape.check(self.on_cancel.as_deref(), &mut faults);
        if !faults.is_empty() {
            return Err(CompileError {
                graph: self.name,
                faults,
            });
        }
        Ok(self.assemble(shape))
    }

    fn shape(&self, names: &BTreeSet<&str>, faults: &mut Vec<Fault>) -> Shape {
        let mut edges: Vec<ShapeEdge> = Vec::new();
        let mut known = HashSet::new();
        let mut add =
            |faults: &mut Vec<Fault>, from: &str, to: &str, kind: EdgeKind, label: &str| {
                let from_known = names.contains(from)
                    || (from == START && !matches!(kind, EdgeKind::Command | EdgeKind::Error));
                if !from_known {
                    faults.push(Fault::UnknownSource {
                        from: from.to_owned(),
                        to: to.to_owned(),
                    });
                }
                let to_known = names.contains(to) || (to == END && kind != EdgeKind::Error);
                if !to_known {
                    faults.push(Fault::UnknownTarget {
                        from: from.to_owned(),
                        to: to.to_owned(),
                    });
                }
                // The label follows from the kind.
                if from_known && to_known && known.insert((from.to_owned(), to.to_owned(), kind)) {
                    edges.push(ShapeEdge {
                        from: from.to_owned(),
                        to: to.to_owned(),
                        kind,
                        label: label.to_owned(),
                    });
                }
            };
        for (from, to) in &self.edges {
            add(faults, from, to, EdgeKind::Static, "");
        }
        for (from, to) in &self.joins {
            if from.is_empty() {
                faults.push(Fault::EmptyJoin(to.clone()));
            }
            for source in from {
                if source == START {
                    faults.push(Fault::UnknownSource {
                        from: source.clone(),
                        to: to.clone(),
                    });
                } else {
                    add(faults, source, to, EdgeKind::Join, "");
                }
            }
        }
        for (from, targets, _) in &self.conditions {
            if targets.is_empty() {
                faults.push(Fault::NoTargets(from.clone()));
            }
            for to in targets {
                add(faults, from, to, EdgeKind::Conditional, "");
            }
        }
        for (from, targets) in &self.goes {
            for to in targets {
                add(faults, from, to, EdgeKind::Command, "");
            }
        }
        let mut handled = BTreeSet::new();
        for (node, handler) in &self.on_error {
            add(faults, node, handler, EdgeKind::Error, "error");
            if node == handler {
                faults.push(Fault::HandlesItself(node.clone()));
            }
            if !handled.insert(node) {
                faults.push(Fault::TwoHandlers(node.clone()));
            }
        }
        for name in self
            .on_cancel
            .iter()
            .chain(&self.pause_before)
            .chain(&self.pause_after)
        {
            if !names.contains(name.as_str()) {
                faults.push(Fault::UnknownNode(name.clone()));
            }
        }
        if !edges.iter().any(|edge| edge.from == START) {
            faults.push(Fault::NoEntry);
        }
        Shape {
            name: self.name.clone(),
            nodes: self
                .nodes
                .iter()
                .map(|(name, options, _)| ShapeNode {
                    name: name.clone(),
                    deferred: options.deferred,
                    on_cancel: self.on_cancel.as_deref() == Some(name),
                    inside: self.insides.get(name).cloned().map(Box::new),
                })
                .collect(),
            edges,
        }
    }

    fn assemble(self, shape: Shape) -> CompiledGraph<S> {
        let joins: Vec<Join> = self
            .joins
            .into_iter()
            .map(|(from, target)| {
                let sources: BTreeSet<String> = from.into_iter().collect();
                let list: Vec<&str> = sources.iter().map(String::as_str).collect();
                Join {
                    key: format!("{}>{target}", list.join("+")),
                    sources,
                    target,
                }
            })
            .collect();
        let mut edges: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (from, to) in self.edges {
            if to != END {
                edges.entry(from).or_default().push(to);
            }
        }
        let mut conditions: BTreeMap<String, Conditions<S>> = BTreeMap::new();
        for (from, targets, condition) in self.conditions {
            conditions
                .entry(from)
                .or_default()
                .push((condition, targets.into_iter().collect()));
        }
        let mut goes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, targets) in self.goes {
            goes.entry(from).or_default().extend(targets);
        }
        let mut on_error: BTreeMap<String, String> = self.on_error.into_iter().collect();
        let caches = self
            .nodes
            .iter()
            .any(|(_, options, _)| options.cache.is_some());
        let nodes = self
            .nodes
            .into_iter()
            .map(|(name, options, run)| {
                let node = Node {
                    name: name.as_str().into(),
                    run,
                    options,
                    brisk: Brisk::default(),
                    edges: edges.remove(&name).unwrap_or_default(),
                    joins: (0..joins.len())
                        .filter(|index| joins[*index].sources.contains(&name))
                        .collect(),
                    conditions: conditions.remove(&name).unwrap_or_default(),
                    goes: goes.remove(&name).unwrap_or_default(),
                    on_error: on_error.remove(&name),
                };
                (name, Arc::new(node))
            })
            .collect();
        CompiledGraph {
            inner: Arc::new(Compiled {
                name: self.name.into(),
                nodes,
                entry: edges.remove(START).unwrap_or_default(),
                entry_conditions: conditions.remove(START).unwrap_or_default(),
                joins,
                on_cancel: self.on_cancel,
                output: self.output,
                recursion_limit: self.recursion_limit,
                parallel: self.parallel,
                pause_before: self.pause_before,
                pause_after: self.pause_after,
                shape,
                caches,
            }),
        }
    }
}
