//! Whether an endpoint, a key and a model work together: for `artel init` and `artel doctor`.

use std::sync::Arc;
use std::time::Duration;

use ports::ModelError;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::backoff::TryError;
use crate::config::{ApiKey, EndpointConfig, TimeoutConfig, without_credentials};
use crate::endpoint::{Endpoint, Shape};
use crate::wire::Completion;

/// So many names of a list are taken.
const MAX_NAMES: usize = 1000;
/// Whatever is longer is no name of a model.
const MAX_NAME_BYTES: usize = 256;
/// How long the whole check may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// Reads the endpoint's list of models and asks the model for one token; says in one sentence what answered. Nothing is
/// tried twice, and the token is counted nowhere.
pub async fn live_check(
    base_url: &str,
    key: Option<&ApiKey>,
    model: &str,
) -> Result<String, ModelError> {
    let unavailable = |error: TryError| ModelError::Unavailable {
        endpoint: without_credentials(base_url),
        message: error.message,
        status: error.status,
        retryable: error.retryable,
    };
    let config = EndpointConfig::new(base_url, key.cloned());
    let timeouts = TimeoutConfig::default();
    let endpoint = Endpoint::new("check", &config, &timeouts)
        .map(Arc::new)
        .map_err(|error| unavailable(TryError::lasting(error.to_string())))?;
    let deadline = Instant::now() + PATIENCE;

    let listed = match endpoint.models(deadline).await {
        Ok(list) => list.get("data").and_then(Value::as_array).map(Vec::len),
        // Many servers have no such list; whether the key is taken and the model is known, the question below tells.
        Err(error)
            if error
                .status
                .is_some_and(|status| !matches!(status, 401 | 403)) =>
        {
            None
        }
        Err(error) => return Err(unavailable(error)),
    };
    ask_for_one_token(&endpoint, model, deadline)
        .await
        .map_err(unavailable)?;
    let count = match listed {
        Some(1) => " (1 model there)".to_owned(),
        Some(count) => format!(" ({count} models there)"),
        None => String::new(),
    };
    Ok(format!("{model} answers at {}{count}", endpoint.shown()))
}

/// The names of the models that an endpoint lists, at most a thousand of them; `None` when it has no such list.
pub async fn offered_models(
    base_url: &str,
    key: Option<&ApiKey>,
    within: Duration,
) -> Option<Vec<String>> {
    let config = EndpointConfig::new(base_url, key.cloned());
    let endpoint = Endpoint::new("list", &config, &TimeoutConfig::default())
        .map(Arc::new)
        .ok()?;
    let list = endpoint.models(Instant::now() + within).await.ok()?;
    let names = list.get("data")?.as_array()?.iter();
    Some(
        names
            .filter_map(|model| model.get("id")?.as_str())
            .filter(|name| name.len() <= MAX_NAME_BYTES)
            .take(MAX_NAMES)
            .map(ports::plain)
            .collect(),
    )
}

async fn ask_for_one_token(
    endpoint: &Arc<Endpoint>,
    model: &str,
    deadline: Instant,
) -> Result<(), TryError> {
    let messages = json!([{"role": "user", "content": "Answer with the word: yes"}]);
    // The limit has two names, and some models refuse one that is too small to think in.
    let bodies = [
        json!({"model": model, "messages": messages, "max_tokens": 1}),
        json!({"model": model, "messages": messages, "max_completion_tokens": 16}),
        json!({"model": model, "messages": messages}),
    ];
    let mut refused = TryError::lasting("it was not asked");
    for body in bodies {
        match endpoint.post(&body, deadline).await {
            Ok(mut answer) => {
                return match answer.shape().await? {
                    Shape::Stream(_) => Ok(()),
                    Shape::Body(body) => match Completion::from_body(&body) {
                        Some(Completion { error: None, .. }) => Ok(()),
                        Some(Completion {
                            error: Some((message, status)),
                            ..
                        }) => Err(TryError {
                            status,
                            ..TryError::lasting(message)
                        }),
                        None => Err(TryError::lasting(
                            "its answer is no chat completion: is this the address of an OpenAI-compatible endpoint, with /v1?",
                        )),
                    },
                };
            }
            Err(error) => {
                let about_limit =
                    matches!(error.status, Some(400 | 422)) && error.message.contains("token");
                refused = error;
                if !about_limit {
                    break;
                }
            }
        }
    }
    Err(refused)
}
