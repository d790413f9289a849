//! What a log line holds, and what it never does.
#![allow(missing_docs)]

use std::sync::{Arc, Mutex};

use telemetry::{Format, Options, Output, fields};
use tracing::{info, info_span, warn};

fn logged(format: Format, filter: Option<&str>, work: impl FnOnce()) -> String {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let options = Options {
        format,
        filter: filter.map(str::to_owned),
        output: Output::Writer(lines.clone()),
        redact: Arc::new(|text| {
            ["canary-1234", "two\n\"lines\"", "4217000000"]
                .iter()
                .fold(text.to_owned(), |text, secret| {
                    text.replace(secret, "(redacted)")
                })
        }),
        ..Options::new("test")
    };
    let (dispatch, guard) = telemetry::build(&options).unwrap();
    assert!(!guard.exports());
    tracing::dispatcher::with_default(&dispatch, work);
    let lines = lines.lock().unwrap();
    String::from_utf8(lines.clone()).unwrap()
}

fn leak() {
    let span = info_span!("step", token = "canary-1234", { fields::PROJECT } = "p1");
    let _entered = span.enter();
    info!(
        key = "x canary-1234 y",
        pin = 4_217_000_000_u64,
        "said canary-1234"
    );
    warn!(error = %"two\n\"lines\"", "failed");
    info!({ fields::ATTEMPT } = 2, "again");
}

#[test]
fn a_line_never_holds_a_redacted_value() {
    for format in [Format::Json, Format::Text] {
        let text = logged(format, Some("info"), leak);
        assert!(text.contains("(redacted)"), "{text}");
        for secret in ["canary-1234", "two\n", "two\\n", "4217000000"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}

#[test]
fn json_lines_are_json_and_name_what_they_are_about() {
    let text = logged(Format::Json, Some("info"), leak);
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    for line in &lines {
        assert_eq!(line["spans"][0]["project"], "p1");
        assert_eq!(line["spans"][0]["name"], "step");
        assert!(line["timestamp"].is_string() && line["level"].is_string());
    }
    assert_eq!(lines[2]["fields"]["attempt"], 2);
    assert_eq!(lines[2]["fields"]["message"], "again");
}

#[test]
fn the_filter_says_what_is_logged() {
    let work = || {
        info!(target: "sqlx", "noise");
        info!(target: "nodes::architect", "ours");
        warn!(target: "sqlx", "trouble");
    };
    let text = logged(Format::Text, None, work);
    assert!(!text.contains("noise") && text.contains("ours") && text.contains("trouble"));
    assert_eq!(logged(Format::Text, Some("off"), work), "");
    let options = Options {
        filter: Some("what=ever=this".to_owned()),
        ..Options::new("test")
    };
    let error = telemetry::build(&options).err().unwrap().to_string();
    assert!(error.contains("RUST_LOG"), "{error}");
}

#[test]
fn without_a_collector_there_is_no_trace_context() {
    let text = logged(Format::Text, Some("info"), || {
        let span = info_span!("step");
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(!telemetry::set_parent(&span, parent));
        let _entered = span.enter();
        assert_eq!(telemetry::current_traceparent(), None);
    });
    assert_eq!(text, "");
}
