//! A graph as plain data: for the check of its edges, and for drawings.

use std::{collections::HashMap, fmt::Write as _};

use petgraph::{
    graph::{DiGraph, NodeIndex},
    visit::{Dfs, Reversed},
};
use serde::{Deserialize, Serialize};

use crate::{
    builder::Fault,
    command::{END, START},
    svg,
};

/// Why one node may follow another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EdgeKind {
    /// Always.
    Static,
    /// When all sources of the join have run.
    Join,
    /// When the condition says so.
    Conditional,
    /// When a command of the node says so.
    Command,
    /// When a task of the node has failed for good.
    Error,
}

impl EdgeKind {
    pub(crate) fn is_dashed(self) -> bool {
        matches!(self, Self::Conditional | Self::Command | Self::Error)
    }
}

/// A node in a drawing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShapeNode {
    /// Its name.
    pub name: String,
    /// Whether it runs only when nothing else is left.
    pub deferred: bool,
    /// Whether it is the one that runs on cancellation.
    pub on_cancel: bool,
    /// The graph that the node is, if it is one ([`GraphBuilder::subgraph`](crate::GraphBuilder::subgraph)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside: Option<Box<Shape>>,
}

impl ShapeNode {
    /// What is drawn inside the node, when so many levels are drawn.
    pub(crate) fn opened(&self, depth: usize) -> Option<(&Shape, usize)> {
        Some((self.inside.as_deref()?, depth.checked_sub(1)?))
    }
}

/// An edge in a drawing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShapeEdge {
    /// Where it begins; may be [`START`].
    pub from: String,
    /// Where it leads; may be [`END`].
    pub to: String,
    /// Why it may be taken.
    pub kind: EdgeKind,
    /// A word for the drawing; usually empty.
    pub label: String,
}

/// Nodes and edges of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The graph's name.
    pub name: String,
    /// Its nodes, in the order in which they were added.
    pub nodes: Vec<ShapeNode>,
    /// Its edges.
    pub edges: Vec<ShapeEdge>,
}

impl Shape {
    /// START, the nodes, END, as a petgraph.
    fn digraph(&self) -> (DiGraph<&str, EdgeKind>, NodeIndex, NodeIndex) {
        let mut graph = DiGraph::new();
        let start = graph.add_node(START);
        let indices: HashMap<&str, NodeIndex> = self
            .nodes
            .iter()
            .map(|node| (node.name.as_str(), graph.add_node(node.name.as_str())))
            .collect();
        let end = graph.add_node(END);
        let find = |name: &str| match name {
            START => Some(start),
            END => Some(end),
            _ => indices.get(name).copied(),
        };
        for edge in &self.edges {
            if let (Some(from), Some(to)) = (find(&edge.from), find(&edge.to)) {
                graph.add_edge(from, to, edge.kind);
            }
        }
        (graph, start, end)
    }

    /// Adds what cannot be reached, and what cannot reach the end.
    pub(crate) fn check(&self, on_cancel: Option<&str>, faults: &mut Vec<Fault>) {
        let (mut graph, start, end) = self.digraph();
        if let Some(index) = graph
            .node_indices()
            .find(|index| Some(graph[*index]) == on_cancel)
        {
            // Cancelling is a way in and the thread's end a way out, though nobody draws them.
            graph.add_edge(start, index, EdgeKind::Static);
            graph.add_edge(index, end, EdgeKind::Static);
        }
        let mut reached = Dfs::new(&graph, start);
        while reached.next(&graph).is_some() {}
        // A node must have a way out when it does not fail, too.
        graph.retain_edges(|graph, edge| graph[edge] != EdgeKind::Error);
        let mut ending = Dfs::new(Reversed(&graph), end);
        while ending.next(Reversed(&graph)).is_some() {}
        for index in graph.node_indices() {
            if index == start || index == end {
                continue;
            }
            let name = graph[index].to_owned();
            if !reached.discovered.contains(index.index()) {
                faults.push(Fault::Unreachable(name));
            } else if !ending.discovered.contains(index.index()) {
                faults.push(Fault::NoWayOut(name));
            }
        }
    }

    /// As a Mermaid flowchart.
    pub fn to_mermaid(&self) -> String {
        self.to_mermaid_inside(0)
    }

    /// As a Mermaid flowchart with the insides of subgraphs, so many levels deep.
    pub fn to_mermaid_inside(&self, depth: usize) -> String {
        let mut text = String::from("flowchart TD\n");
        self.mermaid(&mut text, "", depth, 1);
        text
    }

    /// The nodes and edges, with a prefix before each id.
    fn mermaid(&self, text: &mut String, prefix: &str, depth: usize, level: usize) {
        let space = "  ".repeat(level);
        let _ = writeln!(text, "{space}{prefix}n_start([start])");
        for (index, node) in self.nodes.iter().enumerate() {
            let name = escape_mermaid(&node.name);
            let id = format!("{prefix}n{index}");
            let _ = if let Some((inside, depth)) = node.opened(depth) {
                let _ = writeln!(text, "{space}subgraph {id}[\"{name}\"]");
                inside.mermaid(text, &format!("{id}_"), depth, level + 1);
                writeln!(text, "{space}end")
            } else if node.on_cancel {
                writeln!(text, "{space}{id}[/\"{name}\"/]")
            } else if node.deferred {
                writeln!(text, "{space}{id}{{{{\"{name}\"}}}}")
            } else {
                writeln!(text, "{space}{id}[\"{name}\"]")
            };
        }
        let _ = writeln!(text, "{space}{prefix}n_end([end])");
        let ids: HashMap<&str, String> = self
            .nodes
            .iter()
            .enumerate()
            .map(|(index, node)| (node.name.as_str(), format!("n{index}")))
            .chain([(START, "n_start".to_owned()), (END, "n_end".to_owned())])
            .collect();
        for edge in &self.edges {
            let (Some(from), Some(to)) = (ids.get(edge.from.as_str()), ids.get(edge.to.as_str()))
            else {
                continue;
            };
            let arrow = if edge.kind.is_dashed() { "-.->" } else { "-->" };
            let label = if edge.label.is_empty() {
                String::new()
            } else {
                format!("|\"{}\"|", escape_mermaid(&edge.label))
            };
            let _ = writeln!(text, "{space}{prefix}{from} {arrow}{label} {prefix}{to}");
        }
    }

    /// In Graphviz's language.
    pub fn to_dot(&self) -> String {
        self.to_dot_inside(0)
    }

    /// In Graphviz's language, with the insides of subgraphs as clusters, so many levels deep.
    pub fn to_dot_inside(&self, depth: usize) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "digraph {} {{", quote_dot(&self.name));
        if self.nodes.iter().any(|node| node.opened(depth).is_some()) {
            text.push_str("  compound=true;\n");
        }
        text.push_str("  node [shape=box, style=rounded];\n");
        self.dot(&mut text, "", depth, 1);
        text.push_str("}\n");
        text
    }

    /// The nodes and edges, with a path before each name.
    fn dot(&self, text: &mut String, path: &str, depth: usize, level: usize) {
        let space = "  ".repeat(level);
        let id = |name: &str| quote_dot(&format!("{path}{name}"));
        for (name, label) in [(START, "start"), (END, "end")] {
            let _ = writeln!(text, "{space}{} [label=\"{label}\", shape=oval];", id(name));
        }
        for node in &self.nodes {
            if let Some((inside, depth)) = node.opened(depth) {
                let cluster = quote_dot(&format!("cluster_{path}{}", node.name));
                let _ = writeln!(text, "{space}subgraph {cluster} {{");
                let _ = writeln!(text, "{space}  label={};", quote_dot(&node.name));
                inside.dot(text, &format!("{path}{}/", node.name), depth, level + 1);
                let _ = writeln!(text, "{space}}}");
                continue;
            }
            let mut attributes = Vec::new();
            if !path.is_empty() {
                attributes.push(format!("label={}", quote_dot(&node.name)));
            }
            if node.on_cancel {
                attributes.push("shape=parallelogram".to_owned());
            } else if node.deferred {
                attributes.push("shape=hexagon".to_owned());
            }
            let _ = writeln!(text, "{space}{}{};", id(&node.name), listed(&attributes));
        }
        let opened = |name: &str| {
            let node = self.nodes.iter().find(|node| node.name == name);
            node.is_some_and(|node| node.opened(depth).is_some())
        };
        for edge in &self.edges {
            let mut attributes = Vec::new();
            if edge.kind.is_dashed() {
                attributes.push("style=dashed".to_owned());
            }
            if !edge.label.is_empty() {
                attributes.push(format!("label={}", quote_dot(&edge.label)));
            }
            // Edges lead between nodes, and are cut off at the clusters around them.
            let mut end = |name: &str, inner: &str, cut: &str| {
                if !opened(name) {
                    return id(name);
                }
                let cluster = quote_dot(&format!("cluster_{path}{name}"));
                attributes.push(format!("{cut}={cluster}"));
                quote_dot(&format!("{path}{name}/{inner}"))
            };
            let from = end(&edge.from, END, "ltail");
            let to = end(&edge.to, START, "lhead");
            let _ = writeln!(text, "{space}{from} -> {to}{};", listed(&attributes));
        }
    }

    /// As an SVG picture.
    pub fn to_svg(&self) -> String {
        self.to_svg_inside(0)
    }

    /// As an SVG picture with the insides of subgraphs, so many levels deep.
    pub fn to_svg_inside(&self, depth: usize) -> String {
        svg::draw(self, depth)
    }
}

fn listed(attributes: &[String]) -> String {
    if attributes.is_empty() {
        String::new()
    } else {
        format!(" [{}]", attributes.join(", "))
    }
}

fn escape_mermaid(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('"', "&quot;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn quote_dot(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
