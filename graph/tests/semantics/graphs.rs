//! Building, checking and drawing graphs.

use graph::{
    CompileError, CompiledGraph, Context, END, Fault, Goto, NodeError, START, SubgraphMemory,
};

use crate::lab::{Notes, notes, says};

fn faults(error: CompileError) -> Vec<Fault> {
    error.faults
}

#[test]
fn everything_that_is_wrong_with_a_graph_is_named_at_once() {
    let error = notes("g")
        .node("a", |_, _| says("a"))
        .node("a", |_, _| says("a"))
        .node("loop", |_, _| says("loop"))
        .node("island", |_, _| says("island"))
        .node("bad/name", |_, _| says("x"))
        .edge(START, "a")
        .edge("a", "nowhere")
        .edge("ghost", "a")
        .edge("a", "loop")
        .edge("loop", "loop")
        .edge("island", END)
        .edge("bad/name", END)
        .on_cancel("missing")
        .recursion_limit(0)
        .compile()
        .expect_err("is wrong");
    let text = error.to_string();
    let faults = faults(error);
    for expected in [
        Fault::DuplicateNode("a".into()),
        Fault::UnknownTarget {
            from: "a".into(),
            to: "nowhere".into(),
        },
        Fault::UnknownSource {
            from: "ghost".into(),
            to: "a".into(),
        },
        Fault::UnknownNode("missing".into()),
        Fault::NoSteps,
        Fault::Unreachable("island".into()),
        Fault::NoWayOut("loop".into()),
    ] {
        assert!(
            faults.contains(&expected),
            "{expected} is not in {faults:?}"
        );
        assert!(
            text.contains(&expected.to_string()),
            "{expected} is not in {text}"
        );
    }
    assert!(
        faults
            .iter()
            .any(|fault| matches!(fault, Fault::BadName { node, .. } if node == "bad/name"))
    );
}

#[test]
fn a_graph_without_an_entry_is_refused() {
    let error = notes("g")
        .node("a", |_, _| says("a"))
        .edge("a", END)
        .compile()
        .expect_err("has no entry");
    assert!(faults(error).contains(&Fault::NoEntry));
}

#[test]
fn a_node_reached_only_by_a_declared_command_is_reachable() {
    notes("g")
        .node("a", |_, _| says("a"))
        .node("b", |_, _| says("b"))
        .edge(START, "a")
        .goes("a", ["b", END])
        .edge("b", END)
        .compile()
        .expect("compiles");
}

#[test]
fn the_node_that_cleans_up_needs_no_edges() {
    notes("g")
        .node("a", |_, _| says("a"))
        .node("stopped", |_, _| says("stopped"))
        .edge(START, "a")
        .edge("a", END)
        .on_cancel("stopped")
        .compile()
        .expect("compiles");
}

#[test]
fn nodes_may_hand_back_updates_commands_or_nothing() {
    // Compiling this is the test.
    notes("g")
        .node("update", |_, _| says("x"))
        .node("nothing", |_, _| async { Ok(()) })
        .node("command", |_, _| async {
            Ok(graph::Command::<Notes>::goto("nothing").update(crate::lab::log("x")))
        })
        .node("several", |_, _| async {
            Ok(vec![
                graph::Command::<Notes>::end(),
                graph::Command::new().update(crate::lab::log("x")),
            ])
        })
        .node("fails", |_, _: Context| async {
            let number: u32 = "x".parse()?;
            let _ = number;
            Err::<(), _>(NodeError::msg("never reached"))
        })
        .edge(START, "update")
        .edge("update", "command")
        .edge("command", "several")
        .goes("command", ["nothing"])
        .edge("nothing", "several")
        .conditional("several", ["fails", END], |notes: &Notes| {
            if notes.log.is_empty() {
                Goto::node("fails")
            } else {
                Goto::end()
            }
        })
        .edge("fails", END)
        .compile()
        .expect("compiles");
}

fn drawn() -> CompiledGraph<Notes> {
    notes("a <drawing>")
        .node("write", |_, _| says("write"))
        .node("review", |_, _| says("review"))
        .node("both", |_, _| says("both"))
        .node("stopped", |_, _| says("stopped"))
        .edge(START, "write")
        .edge("write", "review")
        .conditional("review", ["write", "both"], |_| "both")
        .join(["write", "review"], "both")
        .edge("both", END)
        .on_cancel("stopped")
        .compile()
        .expect("compiles")
}

#[test]
fn a_graph_is_drawn_as_mermaid() {
    assert_eq!(
        drawn().to_mermaid(),
        "flowchart TD\n  n_start([start])\n  n0[\"write\"]\n  n1[\"review\"]\n  n2[\"both\"]\n  n3[/\"stopped\"/]\n  n_end([end])\n  \
         n_start --> n0\n  n0 --> n1\n  n2 --> n_end\n  n0 --> n2\n  n1 --> n2\n  n1 -.-> n0\n  n1 -.-> n2\n"
    );
}

#[test]
fn a_graph_is_drawn_as_dot() {
    let dot = drawn().to_dot();
    assert!(dot.starts_with("digraph \"a <drawing>\" {\n"), "{dot}");
    assert!(
        dot.contains("\"review\" -> \"write\" [style=dashed];"),
        "{dot}"
    );
    assert!(dot.contains("\"write\" -> \"both\";"), "{dot}");
}

#[test]
fn a_graph_is_drawn_as_svg_with_every_node_and_edge() {
    let svg = drawn().to_svg();
    assert!(svg.contains("<title>a &lt;drawing&gt;</title>"), "{svg}");
    for node in ["start", "write", "review", "both", "stopped", "end"] {
        assert!(svg.contains(&format!(">{node}</text>")), "{node}: {svg}");
    }
    assert_eq!(
        svg.matches("marker-end").count(),
        drawn().shape().edges.len()
    );
    assert!(svg.ends_with("</svg>\n"));
}

#[test]
fn two_graphs_of_one_name_are_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let error = runtime
        .block_on(
            graph::Engine::builder(std::sync::Arc::new(graph::MemoryCheckpointer::new()))
                .graph(drawn())
                .graph(drawn())
                .build(),
        )
        .expect_err("is refused");
    assert!(matches!(error, graph::EngineError::DuplicateGraph(name) if name == "a <drawing>"));
}

fn with_handler() -> CompiledGraph<Notes> {
    notes("g")
        .node("work", |_, _| says("work"))
        .node("mend", |_, _| says("mend"))
        .edge(START, "work")
        .edge("work", END)
        .on_error(["work"], "mend")
        .edge("mend", END)
        .compile()
        .expect("compiles")
}

#[test]
fn an_error_handler_is_drawn_with_a_dashed_edge_that_says_error() {
    let mermaid = with_handler().to_mermaid();
    assert!(mermaid.contains("  n0 -.->|\"error\"| n1\n"), "{mermaid}");
    let dot = with_handler().to_dot();
    assert!(
        dot.contains("\"work\" -> \"mend\" [style=dashed, label=\"error\"];"),
        "{dot}"
    );
    let svg = with_handler().to_svg();
    assert_eq!(svg.matches("stroke-dasharray").count(), 1, "{svg}");
    assert_eq!(svg.matches(">error</text>").count(), 1, "{svg}");
}

#[test]
fn error_handlers_are_checked_like_all_nodes() {
    let error = notes("g")
        .node("a", |_, _| says("a"))
        .node("b", |_, _| says("b"))
        .node("c", |_, _| says("c"))
        .node("stuck", |_, _| says("stuck"))
        .edge(START, "a")
        .edge(START, "b")
        .edge("a", END)
        // It ends only when it fails.
        .on_error(["b"], "c")
        .on_error(["a"], "stuck")
        .on_error(["a"], "missing")
        .on_error(["ghost", START], "c")
        .on_error(["c"], "c")
        .on_error(["stuck"], END)
        .edge("c", END)
        .compile()
        .expect_err("is wrong");
    let unknown_source = |from: &str, to: &str| Fault::UnknownSource {
        from: from.into(),
        to: to.into(),
    };
    let unknown_target = |from: &str, to: &str| Fault::UnknownTarget {
        from: from.into(),
        to: to.into(),
    };
    assert_eq!(
        faults(error),
        [
            unknown_target("a", "missing"),
            Fault::TwoHandlers("a".into()),
            unknown_source("ghost", "c"),
            unknown_source(START, "c"),
            Fault::HandlesItself("c".into()),
            unknown_target("stuck", END),
            Fault::NoWayOut("b".into()),
            Fault::NoWayOut("stuck".into()),
        ]
    );
}

fn nested() -> CompiledGraph<Notes> {
    let lowest = notes("lowest")
        .node("deep", |_, _| says("deep"))
        .edge(START, "deep")
        .edge("deep", END)
        .compile()
        .expect("compiles");
    let middle = notes("middle")
        .subgraph_shared("inner", SubgraphMemory::Resumable, &lowest)
        .edge(START, "inner")
        .edge("inner", END)
        .compile()
        .expect("compiles");
    notes("g")
        .node("before", |_, _| says("before"))
        .subgraph_shared("sub", SubgraphMemory::Resumable, &middle)
        .edge(START, "before")
        .edge("before", "sub")
        .edge("sub", END)
        .compile()
        .expect("compiles")
}

#[test]
fn the_inside_of_a_subgraph_is_drawn_as_deep_as_asked() {
    let graph = nested();
    assert!(!graph.to_mermaid().contains("inner"));
    assert_eq!(
        graph.to_mermaid_inside(1),
        r#"flowchart TD
  n_start([start])
  n0["before"]
  subgraph n1["sub"]
    n1_n_start([start])
    n1_n0["inner"]
    n1_n_end([end])
    n1_n_start --> n1_n0
    n1_n0 --> n1_n_end
  end
  n_end([end])
  n_start --> n0
  n0 --> n1
  n1 --> n_end
"#
    );
    let deep = graph.to_mermaid_inside(usize::MAX);
    assert!(deep.contains("      n1_n0_n0[\"deep\"]\n"), "{deep}");

    assert!(!graph.to_dot().contains("inner"));
    let dot = graph.to_dot_inside(1);
    assert!(dot.contains("  compound=true;\n"), "{dot}");
    assert!(
        dot.contains("  subgraph \"cluster_sub\" {\n    label=\"sub\";\n"),
        "{dot}"
    );
    assert!(
        dot.contains("    \"sub/inner\" [label=\"inner\"];\n"),
        "{dot}"
    );
    assert!(
        dot.contains("  \"before\" -> \"sub/__start__\" [lhead=\"cluster_sub\"];\n"),
        "{dot}"
    );
    assert!(
        dot.contains("  \"sub/__end__\" -> \"__end__\" [ltail=\"cluster_sub\"];\n"),
        "{dot}"
    );
    assert!(graph.to_dot_inside(2).contains("\"cluster_sub/inner\""));

    for (depth, drawn) in [
        (0, vec!["before", "sub"]),
        (1, vec!["sub", "inner"]),
        (2, vec!["inner", "deep"]),
    ] {
        let svg = graph.to_svg_inside(depth);
        assert_eq!(svg.matches("<g transform").count(), depth, "{svg}");
        assert_eq!(svg.matches("</g>").count(), depth, "{svg}");
        for name in drawn {
            assert!(svg.contains(&format!(">{name}</text>")), "{name}: {svg}");
        }
        // Each opened graph has a start and an end of its own.
        assert_eq!(svg.matches(">start</text>").count(), depth + 1, "{svg}");
    }
    assert_eq!(graph.to_svg(), graph.to_svg_inside(0));
}
