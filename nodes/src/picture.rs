//! The crew as one picture: the three graphs, and which node of one starts threads of the next.

use graph::{EdgeKind, Shape, ShapeEdge, ShapeNode};

/// Draws the whole crew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    shape: Shape,
}

impl Picture {
    /// Joins three graphs; nodes of one name in two of them are told apart by the graph's name.
    pub(crate) fn of(conversation: &Shape, job: &Shape, task: &Shape) -> Self {
        let mut shape = Shape {
            name: "crew".to_owned(),
            nodes: Vec::new(),
            edges: Vec::new(),
        };
        for part in [conversation, job, task] {
            let shared = |name: &str| {
                [conversation, job, task]
                    .iter()
                    .filter(|other| other.nodes.iter().any(|node| node.name == name))
                    .count()
                    > 1
            };
            let name = |node: &str| {
                if shared(node) {
                    format!("{node} ({})", part.name)
                } else {
                    node.to_owned()
                }
            };
            let is_node = |name: &str| part.nodes.iter().any(|node| node.name == name);
            shape.nodes.extend(part.nodes.iter().map(|node| ShapeNode {
                name: name(&node.name),
                ..node.clone()
            }));
            // Where the parts begin and end is said by the edges between them.
            let inner = part
                .edges
                .iter()
                .filter(|edge| is_node(&edge.from) && is_node(&edge.to));
            shape.edges.extend(inner.map(|edge| ShapeEdge {
                from: name(&edge.from),
                to: name(&edge.to),
                ..edge.clone()
            }));
        }
        let between = [
            (graph::START, "brainstorm", "message"),
            ("brainstorm", "zavhoz", "starts job"),
            ("developers", "developer", "starts tasks"),
            ("reviewer", "developers", "merged"),
            ("devops", "brainstorm", "result"),
            ("brainstorm", graph::END, "archived"),
        ];
        shape
            .edges
            .extend(between.map(|(from, to, label)| ShapeEdge {
                from: from.to_owned(),
                to: to.to_owned(),
                kind: EdgeKind::Static,
                label: label.to_owned(),
            }));
        Self { shape }
    }

    /// As a Mermaid flowchart.
    pub fn to_mermaid(&self) -> String {
        self.shape.to_mermaid()
    }

    /// In Graphviz's language.
    pub fn to_dot(&self) -> String {
        self.shape.to_dot()
    }

    /// As an SVG picture.
    pub fn to_svg(&self) -> String {
        self.shape.to_svg()
    }
}
