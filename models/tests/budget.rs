//! The budget holds however many ask at once.

mod support;

use std::sync::Arc;
use std::time::Duration;

use models::{BudgetLimits, Budgets, Estimate, Provider};
use ports::{ModelError, Models, WorkerModels};
use support::{
    Book, Reply, Server, call, config, delta, drain, error, eventually, project, says, worker_body,
    worker_call,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parallel_calls_of_crew_and_workers_never_pass_the_limit_together() {
    // Each call may cost up to 100 output tokens, 0.01 USD, and a little for its prompt; it does cost all of that.
    let server = Server::with(|_| says("a", 20, 100)).await;
    let mut config = config(&server.base_url);
    for role in [ports::Role::Architect, ports::Role::Developer] {
        let limits = models::RoleConfig {
            max_output_tokens: Some(100),
            ..models::RoleConfig::default()
        };
        config.roles.insert(role, limits);
    }
    config.budget = BudgetLimits {
        cost_usd: Some(0.105),
        tokens: None,
    };
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config, book.clone()).unwrap();

    let mut tasks = Vec::new();
    for n in 0..40 {
        let provider = provider.clone();
        tasks.push(tokio::spawn(async move {
            if n % 2 == 0 {
                provider.ask(&call(&format!("k{n}"), "hi")).await.map(drop)
            } else {
                let request = worker_call(&format!("r{n}"), worker_body(0, n % 4 == 1));
                match provider.complete(request).await {
                    Ok((answer @ ports::WorkerAnswer::Stream(_), _)) => {
                        assert!(drain(answer).await.1.is_none());
                        Ok(())
                    }
                    other => other.map(drop),
                }
            }
        }));
    }
    let mut refused = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(()) => {}
            Err(ModelError::Budget { spent, limit, .. }) => {
                assert!(
                    spent.ends_with("USD") && limit == "0.10 USD",
                    "{spent} {limit}"
                );
                refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    let (cost, _) = book.total();
    assert!(cost <= 0.105, "{cost}");
    assert!(cost > 0.05, "nothing is kept back for good: {cost}");
    assert!(refused >= 28 && server.count() == 40 - refused, "{refused}");

    // The owner raises the limit: the next call goes through without a restart.
    book.limits.lock().unwrap().0 = Some(1.0);
    provider.ask(&call("raised", "hi")).await.unwrap();
}

#[tokio::test]
async fn without_a_price_the_budget_counts_tokens() {
    let server = Server::with(|_| says("a", 20, 100)).await;
    let mut config = config(&server.base_url);
    config.prices.clear();
    config.budget = BudgetLimits {
        cost_usd: Some(0.0),
        tokens: Some(9000),
    };
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config, book.clone()).unwrap();
    let mut asked = 0;
    let error = loop {
        match provider.ask(&call(&format!("k{asked}"), "hi")).await {
            Ok(answer) => assert_eq!(answer.usage.cost_usd, None),
            Err(error) => break error,
        }
        asked += 1;
    };
    // 8192 of output are set aside: 120 a call until less than that is left.
    assert_eq!(asked, 7);
    let text = error.to_string();
    assert!(text.contains("840 tokens of 9000 tokens"), "{text}");
    assert_eq!(error.to_failure().actor, ports::Actor::Owner);
}

#[tokio::test]
async fn a_call_that_fails_or_is_dropped_gives_back_what_was_set_aside() {
    let book = Arc::new(Book::default());
    let limits = BudgetLimits {
        cost_usd: None,
        tokens: Some(100),
    };
    let budgets = Budgets::new(book.clone(), limits);
    let estimate = Estimate {
        tokens: 80,
        cost_usd: None,
    };
    let first = budgets.reserve(&project(), estimate).await.unwrap();
    assert!(budgets.reserve(&project(), estimate).await.is_err());
    let other = ports::ProjectId::founded_by("other");
    budgets.reserve(&other, estimate).await.unwrap();
    drop(first);
    budgets.reserve(&project(), estimate).await.unwrap();

    let server = Server::with(|_| error(404, "no")).await;
    let mut config = config(&server.base_url);
    config.prices.clear();
    config.budget.tokens = Some(9000);
    let provider = Provider::new(&config, book.clone()).unwrap();
    for n in 0..3 {
        let error = provider
            .ask(&call(&format!("k{n}"), "hi"))
            .await
            .unwrap_err();
        assert!(matches!(error, ModelError::Unavailable { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_cancelled_question_is_counted_for_what_came() {
    let many: Vec<_> = (0..5000).map(|_| delta("word ")).collect();
    let server = Server::scripted([Reply::Events(many)]).await;
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config(&server.base_url), book.clone()).unwrap();
    let question = call("k", "hi");
    let cancelled = tokio::time::timeout(Duration::from_millis(300), provider.ask(&question)).await;
    assert!(cancelled.is_err());
    eventually("the ledger has the line", || book.ids().len() == 1).await;
    assert!(book.ids()[0].starts_with("k#lost-"));
    assert!(book.total().1 > 0);
}

#[tokio::test]
async fn a_ledger_that_fails_is_tried_again_and_then_the_call_fails() {
    let server = Server::with(|_| says("ok", 1, 1)).await;
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config(&server.base_url), book.clone()).unwrap();
    *book.failing.lock().unwrap() = 2;
    provider.ask(&call("a", "hi")).await.unwrap();
    assert_eq!(book.ids(), ["a"]);
    *book.failing.lock().unwrap() = 100;
    let error = provider.ask(&call("b", "hi")).await.unwrap_err();
    assert!(error.to_string().contains("the disk is full"), "{error}");
    assert!(error.to_failure().retryable);
}

#[tokio::test]
async fn the_ledger_has_one_line_for_a_key() {
    let server = Server::with(|_| says("ok", 1, 1)).await;
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config(&server.base_url), book.clone()).unwrap();
    for _ in 0..2 {
        provider.ask(&call("same", "hi")).await.unwrap();
    }
    assert_eq!(book.ids(), ["same"]);
    assert_eq!(book.writes.lock().unwrap().len(), 2, "one write an answer");
}

/// What an endpoint may do to one call, and whether the caller waits for it.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answered,
    Refused,
    Cut,
    Cancelled,
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 12, failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_happens_to_calls_the_limit_holds_and_nothing_stays_set_aside(
        fates in proptest::collection::vec(
            proptest::sample::select(vec![Fate::Answered, Fate::Refused, Fate::Cut, Fate::Cancelled]), 1..24),
        limit in 200_u64..3000,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(through(fates, limit));
    }
}

async fn through(fates: Vec<Fate>, limit: u64) {
    let server = Server::with(|seen| {
        let text = seen.body["messages"].to_string();
        if text.contains("Refused") {
            error(404, "no")
        } else if text.contains("Cut") {
            Reply::Cut(vec![delta("some of it")])
        } else if text.contains("Cancelled") {
            Reply::Events(vec![delta("word "); 100])
        } else {
            says("a", 20, 100)
        }
    })
    .await;
    let mut config = config(&server.base_url);
    config.prices.clear();
    config.retry.tries = 2;
    config.budget.tokens = Some(limit);
    let limits = models::RoleConfig {
        max_output_tokens: Some(150),
        ..models::RoleConfig::default()
    };
    config.roles.insert(ports::Role::Architect, limits.clone());
    config.roles.insert(ports::Role::Developer, limits);
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config, book.clone()).unwrap();
    let calls = fates.iter().enumerate().map(|(n, fate)| {
        let provider = provider.clone();
        let text = format!("{fate:?}");
        let patience = match fate {
            Fate::Cancelled => Duration::from_millis(20),
            _ => Duration::from_secs(10),
        };
        tokio::spawn(tokio::time::timeout(patience, async move {
            if n % 2 == 0 {
                let _ = provider.ask(&call(&format!("k{n}"), &text)).await;
                return;
            }
            let mut body = worker_body(0, true);
            body["messages"][0]["content"] = text.into();
            let request = worker_call(&format!("r{n}"), body);
            if let Ok((answer, _)) = provider.complete(request).await {
                drain(answer).await;
            }
        }))
    });
    futures::future::join_all(calls.collect::<Vec<_>>()).await;
    let (_, spent) = book.total();
    assert!(spent <= limit, "{spent} of {limit}");

    // With room for one call more than what is spent, one call more goes through: nothing is left set aside.
    let mut tried = 0;
    loop {
        let (_, spent) = book.total();
        book.limits.lock().unwrap().1 = Some(spent + 250);
        match provider.ask(&call("last", "Answered")).await {
            Ok(_) => break,
            // A worker's stream that was cut off may still be counting.
            Err(error) if tried == 200 => panic!("{error}"),
            Err(_) => tried += 1,
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Says the same word for as long as it is allowed to, or endlessly; a word is a token.
fn obedient_or_not(obeys: bool) -> impl FnMut(&support::Seen) -> Reply + Send {
    move |seen| {
        let limit = seen.body["max_tokens"].as_u64().unwrap();
        let words = if obeys { limit } else { 100_000 };
        if !models_stream(&seen.body) {
            let body = serde_json::json!({"choices": [{"message": {"content": "word "}, "finish_reason": "length"}],
                "usage": {"prompt_tokens": 20, "completion_tokens": words}});
            return support::json_reply(200, &body);
        }
        let mut events: Vec<_> = (0..words.div_ceil(100))
            .map(|n| delta(&"word ".repeat(usize::try_from((words - n * 100).min(100)).unwrap())))
            .collect();
        events.push(support::finish("length"));
        events.push(support::usage(20, words));
        let pieces = events.iter().map(|data| format!("data: {data}\n\n"));
        Reply::Wire {
            pieces: vec![pieces.collect()],
            wait_ms: 0,
            cut: false,
        }
    }
}

fn models_stream(body: &serde_json::Value) -> bool {
    body["stream"] == serde_json::json!(true)
}

#[tokio::test]
async fn an_answer_is_bounded_by_what_its_job_has_left() {
    let server = Server::with(obedient_or_not(true)).await;
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config(&server.base_url), book.clone()).unwrap();
    for (stream, asked, left, choices, bound) in [
        (true, None, Some(2_000), 1, 2_000),
        (false, None, Some(2_000), 1, 2_000),
        (true, Some(500), Some(2_000), 1, 500),
        (true, Some(5_000), Some(2_000), 4, 500),
        (true, Some(5_000), None, 1, 5_000),
        // The role's own limit, where the job has more than that.
        (false, Some(50_000), Some(40_000), 1, 8_192),
    ] {
        let mut body = worker_body(0, stream);
        body["n"] = choices.into();
        if let Some(asked) = asked {
            body["max_tokens"] = asked.into();
        }
        let mut call = worker_call("r", body);
        call.most_output = left;
        match provider.complete(call).await.unwrap() {
            (answer @ ports::WorkerAnswer::Stream(_), _) => {
                assert!(drain(answer).await.1.is_none(), "what obeys is whole");
            }
            (_, usage) => assert_eq!(usage.output_tokens, bound),
        }
        let sent = server.seen().pop().unwrap().body;
        assert_eq!(sent["max_tokens"], bound, "{asked:?} of {left:?}");
        assert!(sent.get("most_output").is_none());
    }
}

#[tokio::test]
async fn a_stream_that_pays_no_heed_to_its_bound_is_cut_and_paid_for_what_came() {
    let server = Server::with(obedient_or_not(false)).await;
    let mut config = config(&server.base_url);
    config.retry.tries = 1;
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config, book.clone()).unwrap();
    let mut request = worker_call("r", worker_body(0, true));
    request.most_output = Some(2_000);
    let (answer, _) = provider.complete(request).await.unwrap();
    let (data, error) = drain(answer).await;
    let error = error.expect("it is cut");
    assert!(
        matches!(error, ModelError::TooLong { limit: 2_000, .. }),
        "{error}"
    );
    assert_eq!(error.to_failure().kind, "budget");
    let came: usize = data.iter().map(String::len).sum();
    assert!(
        came < 50_000,
        "a hundred thousand words were on their way: {came}"
    );
    let line = book.line("r:0");
    assert!(
        (2_000..10_000).contains(&line.usage.output_tokens),
        "{:?}",
        line.usage
    );

    // The crew's own question as well: it ends in an error that says so.
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    assert!(
        error.to_string().contains("limit of 8192 tokens"),
        "{error}"
    );
    let lost = book
        .ids()
        .into_iter()
        .find(|id| id.starts_with("k#lost"))
        .unwrap();
    assert_eq!(book.line(&lost).usage.output_tokens, 8_192);
}
