//! Draws a [`Shape`] as SVG: layers from the start to the end, edges as curves. Small graphs only; no layout program needed.

use std::{collections::BTreeMap, fmt::Write as _};

use petgraph::{
    algo::{greedy_feedback_arc_set, toposort},
    graph::{DiGraph, EdgeIndex, NodeIndex},
    visit::EdgeRef,
};

use crate::{
    command::{END, START},
    shape::{EdgeKind, Shape},
};

const BOX_HEIGHT: f64 = 36.0;
const LAYER_GAP: f64 = 48.0;
const COLUMN_GAP: f64 = 28.0;
const MARGIN: f64 = 20.0;

/// Above what is drawn inside a box.
const TITLE_HEIGHT: f64 = 24.0;

struct Placed<'a> {
    label: &'a str,
    layer: usize,
    x: f64,
    top: f64,
    width: f64,
    height: f64,
    /// What is drawn inside of it.
    inside: Option<String>,
}

impl Placed<'_> {
    fn bottom(&self) -> f64 {
        self.top + self.height
    }

    fn middle(&self) -> f64 {
        self.x + self.width / 2.0
    }
}

/// The picture as a complete SVG document.
pub(crate) fn draw(shape: &Shape, depth: usize) -> String {
    let Picture {
        body,
        width,
        height,
    } = picture(shape, depth);
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="sans-serif" font-size="14">"#
    );
    let _ = writeln!(svg, "<title>{}</title>", escape(&shape.name));
    svg.push_str(concat!(
        r#"<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">"#,
        r##"<path d="M0 0L10 5L0 10z" fill="#555"/></marker></defs>"##,
        "\n"
    ));
    svg.push_str(&body);
    svg.push_str("</svg>\n");
    svg
}

/// What is drawn, and how large it is.
struct Picture {
    body: String,
    width: f64,
    height: f64,
}

fn picture(shape: &Shape, depth: usize) -> Picture {
    let mut graph: DiGraph<&str, EdgeKind> = DiGraph::new();
    let mut indices: BTreeMap<&str, NodeIndex> = BTreeMap::new();
    for name in std::iter::once(START)
        .chain(shape.nodes.iter().map(|node| node.name.as_str()))
        .chain(std::iter::once(END))
    {
        indices.insert(name, graph.add_node(name));
    }
    // In the order of the edges' indices.
    let mut labels = Vec::new();
    for edge in &shape.edges {
        if let (Some(from), Some(to)) = (
            indices.get(edge.from.as_str()),
            indices.get(edge.to.as_str()),
        ) {
            graph.add_edge(*from, *to, edge.kind);
            labels.push(edge.label.as_str());
        }
    }
    let layers = layers(&graph);
    // In the order of the nodes' indices: the start has none, nor has the end.
    let insides = std::iter::once(None)
        .chain(shape.nodes.iter().map(|node| {
            let (inside, depth) = node.opened(depth)?;
            Some(picture(inside, depth))
        }))
        .chain(std::iter::once(None))
        .collect();
    let (placed, width) = place(&graph, &layers, insides);
    let height = placed.iter().map(Placed::bottom).fold(0.0, f64::max) + MARGIN;

    let mut svg = String::new();
    for edge in graph.edge_references() {
        let dash = if edge.weight().is_dashed() {
            r#" stroke-dasharray="5 4""#
        } else {
            ""
        };
        let (path, (x, y)) = curve(
            &placed[edge.source().index()],
            &placed[edge.target().index()],
        );
        let _ = writeln!(
            svg,
            r##"<path d="{path}" fill="none" stroke="#555"{dash} marker-end="url(#arrow)"/>"##
        );
        let label = labels[edge.id().index()];
        if !label.is_empty() {
            let _ = writeln!(
                svg,
                r##"<text x="{x:.1}" y="{y:.1}" text-anchor="middle" font-size="11" fill="#555">{}</text>"##,
                escape(label)
            );
        }
    }
    for node in &placed {
        let round = if matches!(node.label, "start" | "end") {
            BOX_HEIGHT / 2.0
        } else {
            6.0
        };
        let fill = if node.inside.is_some() {
            "none"
        } else {
            "#f4f6fb"
        };
        let _ = writeln!(
            svg,
            r##"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{}" rx="{round}" fill="{fill}" stroke="#334"/>"##,
            node.x, node.top, node.width, node.height
        );
        let _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" fill="#112">{}</text>"##,
            node.middle(),
            node.top + BOX_HEIGHT / 2.0 + 5.0,
            escape(node.label)
        );
        if let Some(inside) = &node.inside {
            let top = node.top + TITLE_HEIGHT;
            let _ = writeln!(svg, r#"<g transform="translate({:.1} {top:.1})">"#, node.x);
            svg.push_str(inside);
            svg.push_str("</g>\n");
        }
    }
    Picture {
        body: svg,
        width,
        height,
    }
}

/// The layer of each node: the longest way from the start when the edges that close loops are left out.
fn layers(graph: &DiGraph<&str, EdgeKind>) -> Vec<usize> {
    let back: Vec<EdgeIndex> = greedy_feedback_arc_set(graph)
        .map(|edge| edge.id())
        .collect();
    let forward = graph.filter_map(
        |_, name| Some(*name),
        |index, kind| (!back.contains(&index)).then_some(*kind),
    );
    let order = toposort(&forward, None).unwrap_or_default();
    let mut layers = vec![0; graph.node_count()];
    for node in order {
        for next in forward.neighbors(node) {
            layers[next.index()] = layers[next.index()].max(layers[node.index()] + 1);
        }
    }
    // The end is below everything.
    if let (Some(last), Some(deepest)) = (graph.node_count().checked_sub(1), layers.iter().max()) {
        let deepest = *deepest;
        let alone = layers.iter().filter(|layer| **layer == deepest).count() == 1;
        layers[last] = if layers[last] == deepest && alone {
            deepest
        } else {
            deepest + 1
        };
    }
    layers
}

fn place<'a>(
    graph: &DiGraph<&'a str, EdgeKind>,
    layers: &[usize],
    insides: Vec<Option<Picture>>,
) -> (Vec<Placed<'a>>, f64) {
    #[allow(clippy::cast_precision_loss, reason = "names are short")]
    let mut placed: Vec<Placed<'a>> = graph
        .node_indices()
        .zip(insides)
        .map(|(index, inside)| {
            let label = match graph[index] {
                START => "start",
                END => "end",
                name => name,
            };
            let width = label.chars().count() as f64 * 8.4 + 28.0;
            let (inner_width, height) = inside.as_ref().map_or((0.0, BOX_HEIGHT), |inside| {
                (inside.width, inside.height + TITLE_HEIGHT)
            });
            Placed {
                label,
                layer: layers[index.index()],
                x: 0.0,
                top: 0.0,
                width: width.max(inner_width),
                height,
                inside: inside.map(|inside| inside.body),
            }
        })
        .collect();
    let depth = layers.iter().max().map_or(0, |layer| layer + 1);
    let row_width = |placed: &[Placed<'_>], row: &[usize]| {
        let boxes: f64 = row.iter().map(|index| placed[*index].width).sum();
        #[allow(clippy::cast_precision_loss, reason = "a row is short")]
        let gaps = row.len().saturating_sub(1) as f64 * COLUMN_GAP;
        boxes + gaps
    };
    let rows: Vec<Vec<usize>> = (0..depth)
        .map(|layer| (0..placed.len()).filter(|i| layers[*i] == layer).collect())
        .collect();
    let mut top = MARGIN;
    for row in &rows {
        let heights = row.iter().map(|index| placed[*index].height);
        let height = heights.fold(BOX_HEIGHT, f64::max);
        for index in row {
            placed[*index].top = top + (height - placed[*index].height) / 2.0;
        }
        top += height + LAYER_GAP;
    }
    let widest = rows
        .iter()
        .map(|row| row_width(&placed, row))
        .fold(0.0, f64::max);
    // Room beside the boxes for the curves of loops.
    let width = widest + 2.0 * MARGIN + 80.0;
    for mut row in rows {
        // Boxes stand below the middle of what leads to them.
        let wish = |index: usize| {
            let above: Vec<f64> = graph
                .neighbors_directed(NodeIndex::new(index), petgraph::Direction::Incoming)
                .filter(|from| layers[from.index()] < layers[index])
                .map(|from| placed[from.index()].middle())
                .collect();
            if above.is_empty() {
                return width / 2.0;
            }
            #[allow(clippy::cast_precision_loss, reason = "few edges")]
            let count = above.len() as f64;
            above.iter().sum::<f64>() / count
        };
        row.sort_by(|a, b| wish(*a).total_cmp(&wish(*b)));
        let mut x = (width - row_width(&placed, &row)) / 2.0;
        for index in row {
            placed[index].x = x;
            x += placed[index].width + COLUMN_GAP;
        }
    }
    (placed, width)
}

/// The path of an edge, and its middle.
fn curve(from: &Placed<'_>, to: &Placed<'_>) -> (String, (f64, f64)) {
    if to.layer > from.layer {
        let (x1, y1) = (from.middle(), from.bottom());
        let (x2, y2) = (to.middle(), to.top);
        let bend = (y2 - y1) / 2.0;
        let path = format!(
            "M{x1:.1} {y1:.1}C{x1:.1} {:.1} {x2:.1} {:.1} {x2:.1} {y2:.1}",
            y1 + bend,
            y2 - bend
        );
        (path, (f64::midpoint(x1, x2), f64::midpoint(y1, y2)))
    } else {
        let (x1, y1) = (from.x + from.width, from.top + from.height / 2.0 - 4.0);
        let (x2, y2) = (to.x + to.width, to.top + to.height / 2.0 + 4.0);
        let side = x1.max(x2) + 36.0;
        let path = format!("M{x1:.1} {y1:.1}C{side:.1} {y1:.1} {side:.1} {y2:.1} {x2:.1} {y2:.1}");
        let middle = (side * 6.0 + x1 + x2) / 8.0;
        (path, (middle, f64::midpoint(y1, y2)))
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
