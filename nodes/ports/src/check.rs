//! Checks that a machine can run, written with the specification and run after every deploy.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One acceptance check with its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AcceptanceCheck {
    /// What it shows, such as `a note can be stored`.
    pub name: String,
    /// What is done and what is expected.
    #[serde(flatten)]
    pub check: Check,
}

/// What is done and what is expected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Check {
    /// A request to the running service.
    Http {
        /// `GET`, `POST`, …
        #[serde(default = "get")]
        method: String,
        /// The path with its query, beginning with `/`.
        path: String,
        /// Headers to send.
        #[serde(default)]
        headers: BTreeMap<String, String>,
        /// The body to send: a JSON value is sent as JSON, a string as it is.
        #[serde(default)]
        body: Option<Value>,
        /// What must come back.
        expect: HttpExpectation,
    },
    /// A command in a sandbox, in the root of the released files. `SERVICE_URL` says where the service is.
    Command {
        /// Program and arguments.
        argv: Vec<String>,
        /// The exit code that means success.
        #[serde(default)]
        exit_code: i32,
    },
}

fn get() -> String {
    "GET".to_owned()
}

/// What an HTTP answer must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HttpExpectation {
    /// The status code.
    #[serde(default = "ok")]
    pub status: u16,
    /// Texts that the body must contain.
    #[serde(default)]
    pub body_contains: Vec<String>,
    /// A JSON value that must be part of the body's: objects by their named members, everything else equal.
    #[serde(default)]
    pub json: Option<Value>,
}

fn ok() -> u16 {
    200
}

/// How one check ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckResult {
    /// The name of the check.
    pub name: String,
    /// How it ended.
    pub status: CheckStatus,
    /// What was seen, in a line or a log's end.
    #[serde(default)]
    pub detail: String,
}

/// How a check can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// What was expected was seen.
    Passed,
    /// Something else was seen.
    Failed,
    /// It did not end within its bound.
    TimedOut,
}

/// Whether `actual` holds everything that `expected` names.
pub fn json_contains(actual: &Value, expected: &Value) -> bool {
    match (actual, expected) {
        (Value::Object(actual), Value::Object(expected)) => expected.iter().all(|(key, value)| {
            actual
                .get(key)
                .is_some_and(|found| json_contains(found, value))
        }),
        (actual, expected) => actual == expected,
    }
}

impl HttpExpectation {
    /// `Err` says in one line what was seen instead.
    pub fn verdict(&self, status: u16, body: &str) -> Result<(), String> {
        if status != self.status {
            return Err(format!(
                "expected status {}, got {status}: {}",
                self.status,
                head(body)
            ));
        }
        for text in &self.body_contains {
            if !body.contains(text.as_str()) {
                return Err(format!("the body lacks {text:?}: {}", head(body)));
            }
        }
        if let Some(expected) = &self.json {
            let actual: Value = serde_json::from_str(body)
                .map_err(|error| format!("the body is not JSON ({error}): {}", head(body)))?;
            if !json_contains(&actual, expected) {
                return Err(format!("the body lacks {expected}: {}", head(body)));
            }
        }
        Ok(())
    }
}

fn head(body: &str) -> String {
    crate::plain(body).chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_expectation_names_what_it_saw_instead() {
        let expect = HttpExpectation {
            status: 200,
            body_contains: vec!["hello".into()],
            json: Some(json!({"a": {"b": 1}})),
        };
        assert_eq!(
            expect.verdict(200, r#"{"a":{"b":1,"c":2},"x":"hello"}"#),
            Ok(())
        );
        assert!(
            expect
                .verdict(404, "nothing")
                .unwrap_err()
                .contains("got 404: nothing")
        );
        assert!(
            expect
                .verdict(200, "hello")
                .unwrap_err()
                .contains("not JSON")
        );
        assert!(
            expect
                .verdict(200, r#"{"a":{"b":2},"x":"hello"}"#)
                .unwrap_err()
                .contains("lacks")
        );
    }

    #[test]
    fn a_check_reads_like_a_sentence_in_json() {
        let check: AcceptanceCheck = serde_json::from_value(json!({
            "name": "health", "type": "http", "path": "/health", "expect": {"status": 200}
        }))
        .unwrap();
        assert!(matches!(check.check, Check::Http { ref method, .. } if method == "GET"));
    }
}
