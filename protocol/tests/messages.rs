//! The messages: schemas that do not drift, examples that are read and written as they stand, and
//! refusals that name the field.

use protocol::{
    Agent, Check, CheckStatus, Control, ControlMessage, DecodeError, EventKind, Failure, Heartbeat,
    Limits, Network, Repository, ResultStatus, SealedSecret, Size, Source, SpawnRequest, TaskBrief,
    Usage, VERSION, WorkerEvent, WorkerResult, decode,
};
use serde_json::{Value, json};
use std::path::PathBuf;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Compares `text` with the file, or writes the file when `UPDATE=1`.
fn golden(path: &std::path::Path, text: &str) {
    if std::env::var("UPDATE").as_deref() == Ok("1") {
        std::fs::write(path, text).unwrap();
    }
    let kept = std::fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{}: {error}; run with UPDATE=1", path.display()));
    assert_eq!(
        kept,
        text,
        "{} drifted from the types; run with UPDATE=1 and review the change",
        path.display()
    );
}

fn pretty(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).unwrap();
    text.push('\n');
    text
}

fn request() -> SpawnRequest {
    SpawnRequest {
        version: VERSION,
        request_id: "0192f0c1-7a10-7000-8000-000000000001".into(),
        project_id: "p-todo".into(),
        job_id: "j-1".into(),
        task_id: "t-store".into(),
        attempt: 1,
        fencing_token: 1,
        repository: Repository {
            source: Source::Path("/home/artel/repos/todo.git".into()),
            base_sha: "3f786850e387550fdab836ed7e6dc881de23001b".into(),
            branch: "task/store".into(),
            workflows: false,
        },
        task: TaskBrief {
            title: "Keep items in a file".into(),
            body_markdown: "Write `store.py` with `add`, `list` and `remove`.".into(),
            acceptance: vec!["python3 -m unittest passes".into()],
        },
        agent: Agent {
            adapter: "artel-agent".into(),
            command: vec![],
            model: Some("gpt-5".into()),
        },
        limits: Limits {
            tokens: Some(200_000),
            cost_usd: Some(2.5),
            ..Limits::default()
        },
        docker: false,
        network: Network {
            allow: vec!["packages.example:443".into(), "*.files.example:443".into()],
        },
        secrets: vec![SealedSecret {
            name: "SMTP_TOKEN".into(),
            handle: "secret://project/p-todo/SMTP_TOKEN".into(),
            sealed: "-----BEGIN AGE ENCRYPTED FILE-----\n…\n-----END AGE ENCRYPTED FILE-----\n"
                .into(),
        }],
        trace_context: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        created_at: "2026-01-02T03:04:05Z".parse().unwrap(),
    }
}

fn success() -> WorkerResult {
    WorkerResult {
        head_sha: Some("89e6c98d92887913cadf06b2adb97f26cde4849b".into()),
        summary_markdown: "`store.py` keeps items in a JSON file.".into(),
        checks: vec![Check {
            name: "commit on the branch".into(),
            status: CheckStatus::Passed,
            detail: "1 commit, 2 files".into(),
        }],
        usage: Usage {
            input_tokens: 5120,
            output_tokens: 640,
            cost_usd: None,
            wall_s: 12.5,
            cpu_s: 3.25,
            peak_memory_mb: 48,
        },
        finished_at: "2026-01-02T03:05:05Z".parse().unwrap(),
        ..WorkerResult::of(
            &request(),
            ResultStatus::Succeeded,
            "2026-01-02T03:04:10Z".parse().unwrap(),
        )
    }
}

fn failure() -> WorkerResult {
    WorkerResult {
        failure: Some(Failure {
            kind: "limit_wall".into(),
            message: "The worker ran for 1800 s, which is its limit.".into(),
            evidence: "last phase: running: step 41".into(),
        }),
        finished_at: "2026-01-02T03:34:10Z".parse().unwrap(),
        ..WorkerResult::of(
            &request(),
            ResultStatus::TimedOut,
            "2026-01-02T03:04:10Z".parse().unwrap(),
        )
    }
}

fn events() -> Vec<WorkerEvent> {
    [
        EventKind::Started {
            spawner: "local".into(),
        },
        EventKind::Phase {
            name: "running: step 3".into(),
        },
        EventKind::Progress {
            text: "running the tests".into(),
            step: Some(3),
        },
        EventKind::Log {
            tail: "Ran 4 tests in 0.012s\nOK".into(),
        },
        EventKind::Usage {
            usage: Usage::default(),
        },
        EventKind::Refused {
            host: "169.254.169.254:80".into(),
            reason: "link-local addresses are never reachable".into(),
        },
    ]
    .into_iter()
    .zip(1..)
    .map(|(kind, seq)| WorkerEvent {
        at: "2026-01-02T03:04:11Z".parse().unwrap(),
        ..WorkerEvent::new(&request(), seq, kind)
    })
    .collect()
}

#[test]
fn schemas_are_those_of_the_types() {
    for (name, schema) in protocol::schemas::all() {
        golden(&folder("schemas").join(name), &pretty(&schema));
    }
}

#[test]
fn examples_are_written_and_read_as_they_stand() {
    let example = |name: &str, text: String| golden(&folder("examples").join(name), &text);
    example("spawn-request.json", pretty(&request()));
    example("worker-result.succeeded.json", pretty(&success()));
    example("worker-result.timed-out.json", pretty(&failure()));
    example("worker-events.json", pretty(&events()));
    let cancel = ControlMessage::from(Control::Cancel {
        request_id: request().request_id,
    });
    example("control.cancel.json", pretty(&cancel));
    let drain = ControlMessage::from(Control::Drain { spawner: None });
    example("control.drain.json", pretty(&drain));
    let heartbeat = Heartbeat {
        version: VERSION,
        spawner: "local".into(),
        capacity: 4,
        running: 1,
        size: Some(Size::new(8.0, 16_384)),
        used: Some(Size::new(2.0, 2048)),
        draining: false,
        versions: [("artel".to_owned(), "0.1.0".to_owned())].into(),
        at: "2026-01-02T03:04:11Z".parse().unwrap(),
    };
    example("heartbeat.json", pretty(&heartbeat));

    let read = |name: &str| std::fs::read(folder("examples").join(name)).unwrap();
    assert_eq!(
        decode::request(&read("spawn-request.json")).unwrap(),
        request()
    );
    assert_eq!(
        decode::result(&read("worker-result.succeeded.json")).unwrap(),
        success()
    );
    assert_eq!(
        decode::result(&read("worker-result.timed-out.json")).unwrap(),
        failure()
    );
    let listed: Vec<Value> = serde_json::from_slice(&read("worker-events.json")).unwrap();
    let listed: Vec<WorkerEvent> = listed
        .iter()
        .map(|event| decode::event(event.to_string().as_bytes()).unwrap())
        .collect();
    assert_eq!(listed, events());
    assert_eq!(
        decode::control(&read("control.cancel.json")).unwrap(),
        cancel
    );
    assert_eq!(decode::control(&read("control.drain.json")).unwrap(), drain);
    assert_eq!(
        decode::heartbeat(&read("heartbeat.json")).unwrap(),
        heartbeat
    );
}

fn edited(edit: impl FnOnce(&mut Value)) -> Result<SpawnRequest, DecodeError> {
    let mut value = serde_json::to_value(request()).unwrap();
    edit(&mut value);
    decode::request(value.to_string().as_bytes())
}

#[test]
fn unknown_fields_are_ignored() {
    let read = edited(|v| {
        v["colour"] = json!("red");
        v["limits"]["gpus"] = json!(4);
        v["repository"]["mirror"] = json!("x");
    })
    .unwrap();
    assert_eq!(read, request());
}

#[test]
fn unknown_versions_are_refused_before_anything_else_is_read() {
    let error = decode::request(br#"{"version": 2, "nothing": "else"}"#).unwrap_err();
    assert!(matches!(error, DecodeError::Version { found: 2, .. }));
    assert!(error.to_string().contains("version 2"));
    let error = decode::result(br#"{"version": 0}"#).unwrap_err();
    assert!(matches!(error, DecodeError::Version { found: 0, .. }));
    let error = decode::event(br#"{"version": "1"}"#).unwrap_err();
    assert!(matches!(error, DecodeError::Invalid { field, .. } if field == "version"));
}

#[test]
fn a_missing_field_is_named() {
    let remove = |field: &'static str| {
        edited(move |v| {
            v.as_object_mut().unwrap().remove(field);
        })
    };
    for field in ["version", "request_id", "fencing_token", "limits", "task"] {
        let error = remove(field).unwrap_err();
        assert!(
            matches!(&error, DecodeError::Missing { field: named } if named == field),
            "{field}: {error:?}"
        );
    }
    let error = edited(|v| {
        v["repository"].as_object_mut().unwrap().remove("path");
    })
    .unwrap_err();
    assert!(matches!(error, DecodeError::Missing { field } if field.contains("repository.path")));
}

#[test]
fn values_that_would_do_harm_are_refused() {
    type Edit = fn(&mut Value);
    let cases: [(&str, Edit); 11] = [
        ("request_id", |v| v["request_id"] = json!("../../etc")),
        ("request_id", |v| v["request_id"] = json!(".hidden")),
        ("task_id", |v| v["task_id"] = json!("")),
        ("attempt", |v| v["attempt"] = json!(0)),
        ("repository.base_sha", |v| {
            v["repository"]["base_sha"] = json!("--upload-pack=id");
        }),
        ("repository.branch", |v| {
            v["repository"]["branch"] = json!("--force");
        }),
        ("repository.branch", |v| {
            v["repository"]["branch"] = json!("a/../b");
        }),
        ("repository", |v| {
            v["repository"]["clone_url"] = json!("https://example.org/x.git");
        }),
        ("agent.command", |v| {
            v["agent"]["adapter"] = json!("command");
        }),
        ("limits.cpu", |v| v["limits"]["cpu"] = json!(0)),
        ("limits.wall_s", |v| v["limits"]["wall_s"] = json!(0)),
    ];
    for (expected, edit) in cases {
        let error = edited(edit).unwrap_err();
        assert!(
            matches!(&error, DecodeError::Invalid { field, .. } if field == expected),
            "{expected}: {error:?}"
        );
    }
}

#[test]
fn a_message_that_is_too_large_is_refused_unread() {
    let bytes = vec![b' '; decode::MAX_REQUEST_BYTES + 1];
    assert!(matches!(
        decode::request(&bytes),
        Err(DecodeError::TooLarge { .. })
    ));
}

#[test]
fn a_success_without_a_commit_is_not_a_result() {
    let mut value = serde_json::to_value(success()).unwrap();
    value["head_sha"] = Value::Null;
    let error = decode::result(value.to_string().as_bytes()).unwrap_err();
    assert!(matches!(error, DecodeError::Invalid { field, .. } if field == "head_sha"));
}

#[test]
fn a_message_with_a_field_twice_is_refused_with_the_fields_name() {
    let text = serde_json::to_string(&request()).unwrap();
    for (field, once, twice) in [
        ("request_id", "{", "{\"request_id\":\"another\","),
        ("version", "{", "{\"version\":1,"),
        ("memory_mb", "\"limits\":{", "\"limits\":{\"memory_mb\":1,"),
    ] {
        let text = text.replacen(once, twice, 1);
        let error = decode::request(text.as_bytes()).unwrap_err();
        let DecodeError::Invalid {
            field: found,
            reason,
        } = &error
        else {
            panic!("{error:?}");
        };
        assert_eq!((found.as_str(), reason.as_str()), (field, "is there twice"));
        // Nobody waits for the answer in vain.
        let answer = decode::refusal(text.as_bytes(), &error.to_string()).unwrap();
        assert_eq!(answer.attempt, request().attempt);
    }
}
