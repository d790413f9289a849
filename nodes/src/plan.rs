//! Checks a plan: a directed acyclic graph of tasks whose ids can be branches.

use std::collections::BTreeMap;

use petgraph::{algo::tarjan_scc, graph::DiGraph};
use ports::{Plan, Slug, TaskId};

/// The most tasks of a plan.
pub const MAX_TASKS: usize = 20;

/// The longest title of a task, in characters.
const MAX_TITLE_CHARS: usize = 200;

/// What is wrong with a plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// It has none.
    #[error("the plan has no tasks; name at least one")]
    NoTasks,
    /// It has too many.
    #[error("the plan has {0} tasks; at most {MAX_TASKS} are allowed, so join small ones")]
    TooMany(usize),
    /// An id cannot be part of a branch's name.
    #[error(
        "the task id {0:?} cannot be used: write 1 to 40 lower-case letters, digits and single hyphens, like \"storage\""
    )]
    BadId(String),
    /// Two tasks have one id.
    #[error("two tasks have the id {0:?}; every id must be unique in the plan")]
    Duplicate(String),
    /// A field is empty.
    #[error("the task {task:?} has no {field}")]
    Empty {
        /// The task.
        task: String,
        /// The field.
        field: &'static str,
    },
    /// A title is too long to be a line.
    #[error(
        "the title of task {0:?} is longer than {MAX_TITLE_CHARS} characters; write a short line"
    )]
    LongTitle(String),
    /// A dependency that is not a task.
    #[error(
        "the task {task:?} depends on {unknown:?}, which is not in the plan; the tasks are: {known}"
    )]
    UnknownDependency {
        /// The task.
        task: String,
        /// What it names.
        unknown: String,
        /// The ids that exist.
        known: String,
    },
    /// Tasks wait for each other.
    #[error("the dependencies go round in a circle: {0}; remove one of them")]
    Cycle(String),
}

/// Checks everything that the types cannot say; the first thing that is wrong comes back.
pub fn check(plan: &Plan) -> Result<(), PlanError> {
    if plan.tasks.is_empty() {
        return Err(PlanError::NoTasks);
    }
    if plan.tasks.len() > MAX_TASKS {
        return Err(PlanError::TooMany(plan.tasks.len()));
    }
    let mut graph = DiGraph::<&TaskId, ()>::new();
    let mut nodes = BTreeMap::new();
    for task in &plan.tasks {
        let id = task.id.as_str();
        if Slug::parse(id).is_err() {
            return Err(PlanError::BadId(id.chars().take(60).collect()));
        }
        if nodes.insert(&task.id, graph.add_node(&task.id)).is_some() {
            return Err(PlanError::Duplicate(id.to_owned()));
        }
        for (field, text) in [("title", &task.title), ("description", &task.description)] {
            if text.trim().is_empty() {
                return Err(PlanError::Empty {
                    task: id.to_owned(),
                    field,
                });
            }
        }
        if task.title.chars().count() > MAX_TITLE_CHARS {
            return Err(PlanError::LongTitle(id.to_owned()));
        }
    }
    for task in &plan.tasks {
        for dependency in &task.depends_on {
            let Some(&on) = nodes.get(dependency) else {
                return Err(PlanError::UnknownDependency {
                    task: task.id.to_string(),
                    unknown: dependency.as_str().chars().take(60).collect(),
                    known: nodes
                        .keys()
                        .map(|id| id.as_str())
                        .collect::<Vec<_>>()
                        .join(", "),
                });
            };
            graph.add_edge(nodes[&task.id], on, ());
        }
    }
    for component in tarjan_scc(&graph) {
        let in_circle =
            component.len() > 1 || graph.find_edge(component[0], component[0]).is_some();
        if in_circle {
            return Err(PlanError::Cycle(circle(&graph, &component)));
        }
    }
    Ok(())
}

/// One circle inside a strongly connected component, as `a → b → a`.
fn circle(graph: &DiGraph<&TaskId, ()>, component: &[petgraph::graph::NodeIndex]) -> String {
    let mut path = vec![component[0]];
    loop {
        let last = path[path.len() - 1];
        let next = graph
            .neighbors(last)
            .find(|next| component.contains(next))
            .unwrap_or(component[0]);
        let start = path.iter().position(|node| *node == next);
        path.push(next);
        if let Some(start) = start {
            return path[start..]
                .iter()
                .map(|node| graph[*node].as_str())
                .collect::<Vec<_>>()
                .join(" → ");
        }
    }
}

#[cfg(test)]
mod tests {
    use ports::PlannedTask;

    use super::*;

    fn plan(tasks: &[(&str, &[&str])]) -> Plan {
        Plan {
            overview: "x".into(),
            tasks: tasks
                .iter()
                .map(|(id, on)| PlannedTask {
                    id: TaskId::new(*id),
                    title: "t".into(),
                    description: "d".into(),
                    scope: vec![],
                    acceptance: vec![],
                    depends_on: on.iter().map(|id| TaskId::new(*id)).collect(),
                })
                .collect(),
        }
    }

    #[test]
    fn a_plan_without_a_circle_passes() {
        assert_eq!(
            check(&plan(&[("a", &[]), ("b", &["a"]), ("c", &["a", "b"])])),
            Ok(())
        );
    }

    #[test]
    fn a_circle_is_named() {
        let error = check(&plan(&[
            ("a", &["c"]),
            ("b", &["a"]),
            ("c", &["b"]),
            ("d", &["a"]),
        ]))
        .unwrap_err()
        .to_string();
        assert!(
            ["a → c → b → a", "b → a → c → b", "c → b → a → c"]
                .iter()
                .any(|circle| error.contains(circle)),
            "{error}"
        );
        let own = check(&plan(&[("a", &["a"])])).unwrap_err().to_string();
        assert!(own.contains("a → a"), "{own}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let many: Vec<(String, Vec<&str>)> =
            (0..=MAX_TASKS).map(|n| (format!("t{n}"), vec![])).collect();
        let many: Vec<(&str, &[&str])> =
            many.iter().map(|(id, on)| (id.as_str(), &on[..])).collect();
        for (plan, says) in [
            (plan(&[]), "no tasks"),
            (plan(&many), "21 tasks"),
            (plan(&[("../x", &[])]), "\"../x\""),
            (plan(&[("a", &[]), ("a", &[])]), "two tasks"),
            (plan(&[("a", &["zz"])]), "\"zz\", which is not in the plan"),
        ] {
            let error = check(&plan).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
