//! Bad input of every kind, with the real binary: one clear sentence says what is wrong, where, and what to do, and nothing
//! is lost.

mod configuration;
mod machine;
mod people;
mod services;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/tapes.rs"]
mod tapes;
mod work;

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use support::{Home, Ran};
use tokio::io::AsyncWriteExt;

/// The text has all of these.
#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not said in: {text}");
    }
}

/// What `artel` said on standard error, in one line.
#[track_caller]
fn sentence(ran: &Ran) -> &str {
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one sentence: {ran:#?}");
    assert!(lines[0].starts_with("artel: "), "{ran:#?}");
    assert!(!lines[0].contains("panicked"), "{ran:#?}");
    lines[0]
}

/// Runs a command with something on its standard input.
async fn piped(home: &Home, args: &[&str], input: &[u8]) -> (i32, String) {
    let mut child = home
        .artel(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It may have read enough before all is written.
    let _ = stdin.write_all(input).await;
    drop(stdin);
    let output = tokio::time::timeout(Duration::from_mins(1), child.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Has a project built, all of it approved beforehand, which ends with this exit code.
async fn built(home: &Home, code: i32) -> Ran {
    home.run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(code)
}

/// The project of a command that did work.
#[track_caller]
fn id(ran: &Ran) -> String {
    ran.end()["project"].as_str().unwrap().to_owned()
}

/// What a command that did work ended with: its question.
#[track_caller]
fn question(ran: &Ran) -> String {
    let end = ran.end();
    assert_eq!(end["status"], "waiting", "{ran:#?}");
    end["wait"]["question"].as_str().unwrap().to_owned()
}

fn count(events: &[Value], name: &str) -> usize {
    events.iter().filter(|event| event["event"] == name).count()
}
