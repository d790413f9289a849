//! Tapes in a model's place, and recording them.

mod support;

use std::path::Path;
use std::sync::Arc;

use models::{BudgetLimits, Player, Provider, Recorder, Redact, Tape};
use ports::{ModelCall, ModelError, Models, Speaker, WorkerAnswer, WorkerModels};
use serde_json::{Value, json};
use support::{
    Book, Reply, Server, call, config, delta, drain, finish, json_reply, message, says, usage,
    worker_body, worker_call,
};

const TAPE: &str = r"
tape: small
answers:
  architect:
    job-1:
      - json: {tasks: [{id: a}]}
        usage: {input_tokens: 10, output_tokens: 5}
      - text: second
  developer:
    job-1/api:
      - text: Looking.
        tool_calls: [{shell: cat README.md}]
      - text: Done.
";

fn player(yaml: &str) -> (Player, Arc<Book>) {
    let book = Arc::new(Book::default());
    let tape = Tape::parse(yaml, "test").unwrap();
    (
        Player::new(tape, book.clone(), BudgetLimits::default()),
        book,
    )
}

fn at(turn: u32, text: &str) -> ModelCall {
    ModelCall {
        turn,
        ..call(&format!("k{turn}{text}"), text)
    }
}

#[tokio::test]
async fn a_tape_answers_the_crew_through_ledger_and_budget() {
    let (player, book) = player(TAPE);
    let answer = player.ask(&at(0, "plan")).await.unwrap();
    assert_eq!(answer.text, r#"{"tasks":[{"id":"a"}]}"#);
    assert!(answer.from_tape && answer.usage.cost_usd.is_none());
    assert_eq!(Models::tape(&player).unwrap(), "small");
    assert_eq!(answer.model, "tape:small");
    assert_eq!(book.line("k0plan").usage.input_tokens, 10);
    book.limits.lock().unwrap().1 = Some(15);
    let error = player.ask(&at(1, "plan")).await.unwrap_err();
    assert!(matches!(error, ModelError::Budget { .. }), "{error}");
}

#[tokio::test]
async fn what_is_not_on_the_tape_is_said_with_its_key() {
    let (player, _) = player(TAPE);
    let error = player.ask(&at(7, "plan")).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "the tape small has no answer for role architect, thread job-1, turn 7: for this thread it has the turns 0, 1; a tape \
         only knows the run that it recorded: use a model, or record this run with --record FILE"
    );
}

#[tokio::test]
async fn a_tape_speaks_to_workers_as_an_endpoint_would() {
    let (player, book) = player(TAPE);
    let mut bodies = Vec::new();
    for _ in 0..2 {
        let request = worker_call("r1", worker_body(0, false));
        let (answer, cost) = WorkerModels::complete(&player, request).await.unwrap();
        let WorkerAnswer::Json(mut body) = answer else {
            panic!("asked for no stream")
        };
        assert_eq!(body["usage"]["prompt_tokens"], cost.input_tokens);
        assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
        body.as_object_mut().unwrap().remove("created");
        bodies.push(body);
    }
    assert_eq!(bodies[0], bodies[1], "the same each time");
    let tool = &bodies[0]["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(tool["function"]["name"], "shell");
    assert_eq!(
        tool["function"]["arguments"],
        r#"{"command":"cat README.md"}"#
    );
    assert!(tool["id"].as_str().unwrap().starts_with("call_"));

    let mut body = worker_body(1, true);
    body["stream_options"] = json!({"include_usage": true});
    let request = worker_call("r1", body);
    let (answer, _) = WorkerModels::complete(&player, request).await.unwrap();
    let (data, error) = drain(answer).await;
    assert!(error.is_none());
    assert!(data[0].contains("Done.") && data[1].contains("\"stop\""));
    assert!(data[2].contains("prompt_tokens") && data[3] == "[DONE]");
    assert_eq!(book.ids(), ["r1:0", "r1:0.2", "r1:1"]);
}

#[tokio::test]
async fn a_tape_waits_when_it_is_told_to() {
    let (player, _) = player(&TAPE.replace("answers:", "delay_ms: 60\nanswers:"));
    let before = std::time::Instant::now();
    player.ask(&at(0, "plan")).await.unwrap();
    assert!(before.elapsed().as_millis() >= 60);
}

fn recorder(server: &Server, path: &Path) -> Recorder {
    let book = Arc::new(Book::default());
    let provider = Arc::new(Provider::new(&config(&server.base_url), book).unwrap());
    let redact: Redact = Arc::new(|text| text.replace("hunter2", "secret://project/p/PASSWORD"));
    Recorder::new(provider.clone(), provider, path, redact).unwrap()
}

#[tokio::test]
async fn a_recorded_run_replays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.yaml");
    let tool = json!({"choices": [{"index": 0, "delta": {"content": "Look\nat it", "tool_calls": [{"index": 0, "id": "c",
        "function": {"name": "shell", "arguments": "{\"command\": \"echo hunter2\\nls\"}"}}]}}]})
    .to_string();
    let server = Server::scripted([
        says("It goes well (50%).", 9, 9),
        says("{\"tasks\": \"none\"}", 9, 9),
        says("{\"tasks\": []}", 9, 9),
        Reply::Events(vec![tool, finish("tool_calls"), usage(50, 5)]),
        json_reply(
            200,
            &json!({"choices": [{"message": {"content": "Done with hunter2."}}]}),
        ),
        says("first of the second attempt", 9, 9),
    ])
    .await;

    let repair = |bad: &str| {
        let mut question = at(0, "plan it");
        question.key = "repair".to_owned();
        question.messages.push(message(Speaker::Assistant, bad));
        question
            .messages
            .push(message(Speaker::User, "tasks: not a list"));
        question
    };
    let sent_back = {
        let mut body = worker_body(0, true);
        body["messages"][0]["content"] = json!("Sent back: mend it.");
        body
    };
    let recorder_ = recorder(&server, &path);
    // A question that takes no turn, then the turn, then its repair.
    for question in [
        at(0, "how far? (hunter2)"),
        at(0, "plan it"),
        repair("{\"tasks\": \"none\"}"),
    ] {
        recorder_.ask(&question).await.unwrap();
    }
    assert!(recorder_.tape().is_none());
    drop(recorder_);
    // Another process goes on with the file.
    let recorder_ = recorder(&server, &path);
    let request = worker_call("r1", worker_body(0, true));
    let (answer, _) = recorder_.complete(request).await.unwrap();
    assert!(drain(answer).await.1.is_none());
    let request = worker_call("r1", worker_body(1, false));
    recorder_.complete(request).await.unwrap();
    let request = worker_call("r2", sent_back.clone());
    let (answer, _) = recorder_.complete(request).await.unwrap();
    drain(answer).await;

    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("hunter2"), "{text}");
    assert!(text.contains("shell:") && text.contains("json:"), "{text}");

    let book = Arc::new(Book::default());
    let tape = Tape::load(&path).unwrap();
    assert_eq!(tape.name(), "notes");
    let player = Player::new(tape, book, BudgetLimits::default());
    let said = async |question: ModelCall| player.ask(&question).await.unwrap().text;
    assert_eq!(
        said(at(0, "how far? (secret://project/p/PASSWORD)")).await,
        "It goes well (50%)."
    );
    let bad = said(at(0, "plan it")).await;
    assert_eq!(bad, "{\"tasks\":\"none\"}");
    assert_eq!(said(repair(&bad)).await, "{\"tasks\":[]}");

    let work = async |turn: usize, user: Option<&Value>| {
        let body = user.cloned().unwrap_or_else(|| worker_body(turn, false));
        let mut body = body;
        body["stream"] = json!(false);
        let request = worker_call("r9", body);
        let (answer, _) = WorkerModels::complete(&player, request).await.unwrap();
        let WorkerAnswer::Json(body) = answer else {
            panic!("asked for no stream")
        };
        body["choices"][0]["message"].clone()
    };
    let first = work(0, None).await;
    assert_eq!(first["content"], "Look\nat it");
    assert_eq!(
        first["tool_calls"][0]["function"]["arguments"],
        "{\"command\":\"echo secret://project/p/PASSWORD\\nls\"}"
    );
    let second = work(1, None).await;
    assert_eq!(second["content"], "Done with secret://project/p/PASSWORD.");
    let again = work(0, Some(&sent_back)).await;
    assert_eq!(again["content"], "first of the second attempt");
}

#[tokio::test]
async fn every_answer_is_on_disk_when_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.yaml");
    let server = Server::scripted([
        says("one", 1, 1),
        says("two", 1, 1),
        Reply::Cut(vec![delta("ha")]),
        says("three", 1, 1),
    ])
    .await;
    let recorder = recorder(&server, &path);
    for (turn, text) in [(0, "one"), (1, "two"), (2, "three")] {
        recorder.ask(&at(turn, "go")).await.unwrap();
        let yaml = std::fs::read_to_string(&path).unwrap();
        assert!(yaml.contains(text), "{yaml}");
        Tape::parse(&yaml, "run").unwrap();
    }
    assert!(!std::fs::read_to_string(&path).unwrap().contains("ha\n"));
    let nowhere = dir.path().join("no/such/folder.yaml");
    let book = Arc::new(Book::default());
    let provider = Arc::new(Provider::new(&config(&server.base_url), book).unwrap());
    let redact: Redact = Arc::new(str::to_owned);
    assert!(Recorder::new(provider.clone(), provider, &nowhere, redact).is_err());
}
