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
        let mut text = String::from("flowchart TD\n");
        text.push_str("  n_start([start])\n");
        for (index, node) in self.nodes.iter().enumerate() {
            let name = escape_mermaid(&node.name);
            let _ = if node.on_cancel {
                writeln!(text, "  n{index}[/\"{name}\"/]")
            } else if node.deferred {
                writeln!(text, "  n{index}{{{{\"{name}\"}}}}")
            } else {
                writeln!(text, "  n{index}[\"{name}\"]")
            };
        }
        text.push_str("  n_end([end])\n");
        for edge in &self.edges {
            let arrow = if edge.kind.is_dashed() { "-.->" } else { "-->" };
            let label = if edge.label.is_empty() {
                String::new()
            } else {
                format!("|\"{}\"|", escape_mermaid(&edge.label))
            };
            let _ = writeln!(
                text,
                "  {} {arrow}{label} {}",
                self.mermaid_id(&edge.from),
                self.mermaid_id(&edge.to)
            );
        }
        text
    }

    fn mermaid_id(&self, name: &str) -> String {
        match name {
            START => "n_start".to_owned(),
            END => "n_end".to_owned(),
            _ => {
                let index = self.nodes.iter().position(|node| node.name == name);
                format!("n{}", index.unwrap_or_default())
            }
        }
    }

    /// In Graphviz's language.
    pub fn to_dot(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "digraph {} {{", quote_dot(&self.name));
        text.push_str("  node [shape=box, style=rounded];\n");
        let _ = writeln!(
            text,
            "  {} [label=\"start\", shape=oval];",
            quote_dot(START)
        );
        let _ = writeln!(text, "  {} [label=\"end\", shape=oval];", quote_dot(END));
        for node in &self.nodes {
            let shape = if node.on_cancel {
                " [shape=parallelogram]"
            } else if node.deferred {
                " [shape=hexagon]"
            } else {
                ""
            };
            let _ = writeln!(text, "  {}{shape};", quote_dot(&node.name));
        }
        for edge in &self.edges {
            let mut attributes = Vec::new();
            if edge.kind.is_dashed() {
                attributes.push("style=dashed".to_owned());
            }
            if !edge.label.is_empty() {
                attributes.push(format!("label={}", quote_dot(&edge.label)));
            }
            let attributes = if attributes.is_empty() {
                String::new()
            } else {
                format!(" [{}]", attributes.join(", "))
            };
            let _ = writeln!(
                text,
                "  {} -> {}{attributes};",
                quote_dot(&edge.from),
                quote_dot(&edge.to)
            );
        }
        text.push_str("}\n");
        text
    }

    /// As an SVG picture.
    pub fn to_svg(&self) -> String {
        svg::draw(self)
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
