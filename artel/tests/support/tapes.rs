//! Tapes that tests bend to their ends, and what else they look at.
#![allow(dead_code, reason = "each test file uses a part of it")]

use serde_json::{Value, json};

use super::support::Home;

/// The smallest project, as a value that can be changed.
pub fn one() -> Value {
    serde_yaml_ng::from_str(include_str!("one.yaml")).expect("a tape")
}

/// The architect's first answer.
pub fn plan(tape: &mut Value) -> &mut Value {
    &mut tape["answers"]["architect"]["job-1"][0]["json"]
}

/// The specification.
pub fn spec(tape: &mut Value) -> &mut Value {
    &mut tape["answers"]["brainstorm"]["conversation"][0]["json"]["spec"]
}

/// Lets the developer of the first job's task give this command to its shell and be done, as often as it is sent there.
pub fn works(tape: &mut Value, command: &str, times: usize) {
    let turns: Vec<Value> = (0..times)
        .flat_map(|_| {
            [
                json!({"tool_calls": [{"shell": command}]}),
                json!({"text": "Done."}),
            ]
        })
        .collect();
    tape["answers"]["developer"]["job-1/hello"] = Value::Array(turns);
}

/// Has the home's commands answered from a tape.
pub fn play(home: &mut Home, tape: &Value) {
    let file = home.file("tape.yaml");
    std::fs::write(&file, serde_yaml_ng::to_string(tape).unwrap()).unwrap();
    home.set("ARTEL_TAPE", &file.display().to_string());
}

/// A home in which this tape plays.
pub fn home(tape: &Value) -> Home {
    let mut home = Home::new();
    play(&mut home, tape);
    home
}

/// Sets policies of a home.
pub fn policy(home: &Home, lines: &str) {
    std::fs::write(home.file("artel.toml"), format!("[policy]\n{lines}\n")).unwrap();
}

/// The processes with this word in their command line, by id.
pub fn processes(word: &str) -> Vec<(i32, String)> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(word).then_some((pid, line))
        })
        .collect()
}
