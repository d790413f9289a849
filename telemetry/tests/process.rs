//! What is set up once a process.
#![allow(missing_docs)]

use std::sync::{Arc, Mutex};

use telemetry::{Format, Options, Output};

#[test]
fn a_panic_is_a_redacted_line_and_a_second_set_up_is_refused() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let options = Options {
        format: Format::Json,
        output: Output::Writer(lines.clone()),
        redact: Arc::new(|text| text.replace("canary", "(redacted)")),
        ..Options::new("test")
    };
    let _guard = telemetry::init(&options).unwrap();
    let died = std::thread::Builder::new()
        .name("doomed".to_owned())
        .spawn(|| panic!("lost the canary"))
        .unwrap()
        .join();
    assert!(died.is_err());
    assert!(telemetry::init(&options).is_err());
    let text = String::from_utf8(lines.lock().unwrap().clone()).unwrap();
    let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(line["level"], "ERROR");
    assert_eq!(line["fields"]["message"], "panicked: lost the (redacted)");
    assert_eq!(line["fields"]["os_thread"], "doomed");
    assert!(!text.contains("canary"));
}
