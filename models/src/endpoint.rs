//! One endpoint over HTTP: one try at a time, with its timeouts, and what its refusals mean.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use ports::{WireCall, WireFormat};
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};
use url::Url;

use crate::backoff::{TryError, is_passing, retry_after};
use crate::config::{
    ApiKey, ConfigError, EndpointConfig, TimeoutConfig, parse_base_url, without_credentials,
};
use crate::quirks::Quirks;
use crate::sse;
use crate::wire;

/// The longest answer that is read, as it comes over the wire; a stream wraps every word into a few hundred bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// The longest document that is read: taken apart it needs ten times as much memory, and more where it is made for that.
const MAX_DOCUMENT_BYTES: usize = 8 * 1024 * 1024;
/// How long the words of a refusal are waited for; after that it counts without them.
const WORDS_WITHIN: Duration = Duration::from_secs(10);
/// Longest address of a redirect that is told, in characters.
const MAX_TOLD_CHARS: usize = 300;
/// The longest error body that is read.
const MAX_ERROR_BYTES: usize = 64 * 1024;
/// How long an endpoint may take to say what an answer cost after the answer itself has ended.
const AFTER_FINISH: Duration = Duration::from_secs(5);

/// The HTTP client of an endpoint. It follows no redirect (which would turn a question into a GET) and tries nothing again.
///
/// `direct`: past any proxy that the environment names, for endpoints on this machine.
fn http_client(timeouts: &TimeoutConfig, direct: bool) -> Result<reqwest::Client, ConfigError> {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        return Err(ConfigError::Client {
            message:
                "no default crypto provider is installed; the program installs one at its start"
                    .to_owned(),
        });
    }
    let mut builder = reqwest::Client::builder();
    if direct {
        builder = builder.no_proxy();
    }
    builder
        .connect_timeout(Duration::from_secs(timeouts.connect_s))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .user_agent(concat!("artel/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| ConfigError::Client {
            message: chain(&error),
        })
}

/// An endpoint that can be asked.
pub(crate) struct Endpoint {
    http: reqwest::Client,
    base: Url,
    shown: String,
    key: Option<ApiKey>,
    idle: Duration,
    quirks: Mutex<HashMap<String, Quirks>>,
}

impl Endpoint {
    pub fn new(
        name: &str,
        config: &EndpointConfig,
        timeouts: &TimeoutConfig,
    ) -> Result<Self, ConfigError> {
        let base = parse_base_url(name, &config.base_url)?;
        if let (Some(variable), None) = (&config.api_key_env, &config.api_key) {
            return Err(ConfigError::MissingKey {
                endpoint: name.to_owned(),
                variable: variable.clone(),
            });
        }
        Ok(Self {
            http: http_client(timeouts, is_local(&base))?,
            base,
            shown: without_credentials(&config.base_url),
            key: config.api_key.clone(),
            idle: Duration::from_secs(timeouts.idle_s),
            quirks: Mutex::default(),
        })
    }

    /// The address without credentials.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// What is known of a model here.
    pub fn quirks(&self, model: &str) -> Quirks {
        let quirks = self.quirks.lock().unwrap_or_else(PoisonError::into_inner);
        quirks.get(model).cloned().unwrap_or_default()
    }

    /// Changes what is known of a model here.
    pub fn teach<T>(&self, model: &str, lesson: impl FnOnce(&mut Quirks) -> T) -> T {
        let mut quirks = self.quirks.lock().unwrap_or_else(PoisonError::into_inner);
        lesson(quirks.entry(model.to_owned()).or_default())
    }

    /// Sends a question and returns its answer as soon as it begins.
    pub async fn post(
        self: &Arc<Self>,
        body: &Value,
        deadline: Instant,
    ) -> Result<Answer, TryError> {
        let accept = if wire::wants_stream(body) {
            "text/event-stream, application/json"
        } else {
            "application/json"
        };
        let request = self
            .http
            .post(self.url("/chat/completions"))
            .header(ACCEPT, accept)
            .json(body);
        self.send(request, deadline).await
    }

    /// Reads the list of models, as a test of address and key.
    pub async fn models(self: &Arc<Self>, deadline: Instant) -> Result<Value, TryError> {
        let request = self.http.get(self.url("/models"));
        self.send(request, deadline).await?.json().await
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{path}", self.base.path().trim_end_matches('/')));
        url
    }

    async fn send(
        self: &Arc<Self>,
        mut request: reqwest::RequestBuilder,
        deadline: Instant,
    ) -> Result<Answer, TryError> {
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose());
        }
        self.send_signed(request, deadline)
            .await
            .map_err(|refused| refused.error)
    }

    /// Sends a worker's request as it is, in a format that is not chat completions, with our key in the place where this
    /// format has it.
    pub async fn post_native(
        self: &Arc<Self>,
        call: &WireCall,
        body: &Value,
        deadline: Instant,
    ) -> Result<Answer, Refused> {
        let (path, version) = match call.format {
            WireFormat::Messages => ("/messages", "/v1"),
            WireFormat::CountTokens => ("/messages/count_tokens", "/v1"),
            WireFormat::Responses => ("/responses", ""),
        };
        // Anthropic's addresses are written without the version, OpenAI's with it.
        let versioned = self.base.path().trim_end_matches('/').ends_with("/v1");
        let mut url = self.url(&format!("{}{path}", if versioned { "" } else { version }));
        if call.beta {
            url.set_query(Some("beta=true"));
        }
        let accept = if wire::wants_stream(body) {
            "text/event-stream, application/json"
        } else {
            "application/json"
        };
        let mut request = self.http.post(url).header(ACCEPT, accept).json(body);
        for (name, value) in &call.headers {
            request = request.header(name, value);
        }
        if let Some(key) = &self.key {
            request = match call.format {
                WireFormat::Responses => request.bearer_auth(key.expose()),
                WireFormat::Messages | WireFormat::CountTokens => {
                    let mut value = HeaderValue::from_str(key.expose()).map_err(|_| {
                        TryError::lasting(
                            "its key cannot be sent: it has a character that no header may have",
                        )
                    })?;
                    value.set_sensitive(true);
                    request.header("x-api-key", value)
                }
            };
        }
        self.send_signed(request, deadline).await
    }

    async fn send_signed(
        self: &Arc<Self>,
        request: reqwest::RequestBuilder,
        deadline: Instant,
    ) -> Result<Answer, Refused> {
        let until = deadline.min(Instant::now() + self.idle);
        let response = match timeout_at(until, request.send()).await {
            Err(_) => return Err(self.timed_out(until == deadline).into()),
            Ok(Err(error)) => return Err(self.dropped(&error).into()),
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        let headers = response.headers().clone();
        let answer = Answer {
            endpoint: self.clone(),
            response,
            deadline,
            finished_at: None,
            decoder: sse::Decoder::default(),
            read: 0,
        };
        if status.is_success() {
            return Ok(answer);
        }
        let answer = Answer {
            // Other models may be asked in the time that is left.
            deadline: deadline.min(Instant::now() + self.idle.min(WORDS_WITHIN)),
            ..answer
        };
        let body = answer.up_to(MAX_ERROR_BYTES).await;
        let said = self.without_key(&String::from_utf8_lossy(&body));
        Err(Refused {
            error: self.refused(status.as_u16(), &headers, &body),
            body: serde_json::from_str(&said).ok(),
        })
    }

    fn refused(&self, status: u16, headers: &HeaderMap, body: &[u8]) -> TryError {
        let said = match serde_json::from_slice::<Value>(body) {
            Ok(body) => wire::error_message(&body),
            Err(_) => String::from_utf8_lossy(body).chars().take(300).collect(),
        };
        let said = self.without_key(said.trim());
        let out_of_money = [
            "insufficient_quota",
            "exceeded your current quota",
            "billing",
        ]
        .iter()
        .any(|word| String::from_utf8_lossy(body).contains(word));
        let message = match status {
            401 | 403 => format!(
                "it refused the key ({status}): check the key that is configured for it ({said})"
            ),
            402 => format!("it wants to be paid first (402): {said}"),
            429 if out_of_money => {
                format!("the account behind the key has no money left (429): {said}")
            }
            300..=399 => {
                let to = headers
                    .get("location")
                    .and_then(|value| value.to_str().ok())
                    .map_or_else(|| "elsewhere".to_owned(), without_credentials);
                let to: String = to.chars().take(MAX_TOLD_CHARS).collect();
                format!("it redirects to {to} ({status}): set the base URL to that address")
            }
            404 => format!("it knows no such address or model (404): {said}"),
            _ => format!("it answered {status}: {said}"),
        };
        TryError {
            message,
            status: Some(status),
            retryable: is_passing(status) && !(status == 429 && out_of_money),
            retry_after: retry_after(headers, Timestamp::now()),
        }
    }

    fn timed_out(&self, total: bool) -> TryError {
        if total {
            TryError::transport("the time for the whole call is over")
        } else {
            TryError::transport(format!(
                "nothing came from it for {} s",
                self.idle.as_secs()
            ))
        }
    }

    fn dropped(&self, error: &reqwest::Error) -> TryError {
        let what = if error.is_connect() {
            "no connection to it"
        } else {
            "the connection to it broke"
        };
        TryError::transport(format!("{what}: {}", self.without_key(&chain(error))))
    }

    /// Some endpoints repeat the key in their refusal.
    fn without_key(&self, text: &str) -> String {
        match &self.key {
            Some(key) if key.expose().len() >= 4 => text.replace(key.expose(), "…"),
            _ => text.to_owned(),
        }
    }
}

/// A try that gave no answer, with the endpoint's own words.
pub(crate) struct Refused {
    pub error: TryError,
    /// The body of the refusal, where it is JSON; without our key.
    pub body: Option<Value>,
}

impl From<TryError> for Refused {
    fn from(error: TryError) -> Self {
        Self { error, body: None }
    }
}

/// An answer that has begun.
pub(crate) struct Answer {
    endpoint: Arc<Endpoint>,
    response: reqwest::Response,
    deadline: Instant,
    finished_at: Option<Instant>,
    decoder: sse::Decoder,
    read: usize,
}

/// What an answer turned out to be.
pub(crate) enum Shape {
    /// Events; the data of the first ones.
    Stream(Vec<String>),
    /// One document.
    Body(Value),
}

impl Answer {
    /// Whether this is a stream or one document, by what it begins with: content types are not to be relied on.
    pub async fn shape(&mut self) -> Result<Shape, TryError> {
        let mut head = Vec::new();
        // What begins with anything else than a document is read as events, however it is cut into pieces.
        let mut is_stream = false;
        loop {
            let piece = self.piece().await?;
            let ended = piece.is_none();
            head.extend_from_slice(&piece.unwrap_or_default());
            // Signs of life count as well: so many, and nothing else, are no answer.
            if self.read > MAX_DOCUMENT_BYTES {
                return Err(too_long());
            }
            let start = head.iter().position(|byte| !byte.is_ascii_whitespace());
            match start.map(|start| head[start]) {
                Some(b'{' | b'[') if !is_stream => {
                    if ended {
                        return parse(&head).map(Shape::Body);
                    }
                    continue;
                }
                Some(_) => is_stream = true,
                None if is_stream => {}
                None if ended => return Err(TryError::transport("its answer is empty")),
                None => {}
            }
            // Blank space before an answer is a sign of life, which is not looked at again with each piece that follows.
            let mut events = self.decode(&std::mem::take(&mut head))?;
            if ended {
                events.extend(self.decoder.finish());
            }
            if !events.is_empty() {
                return Ok(Shape::Stream(events));
            }
            if ended {
                return Err(TryError::transport(
                    "its answer is neither JSON nor a stream of events",
                ));
            }
        }
    }

    /// The data of the next events; `None` at the end of the stream.
    pub async fn events(&mut self) -> Result<Option<Vec<String>>, TryError> {
        while let Some(piece) = self.piece().await? {
            let events = self.decode(&piece)?;
            if !events.is_empty() {
                return Ok(Some(events));
            }
        }
        let events = self.decoder.finish();
        Ok((!events.is_empty()).then_some(events))
    }

    /// Says that the answer itself has ended: what follows is its usage, and that is not waited for long.
    pub fn finished(&mut self) {
        self.finished_at.get_or_insert_with(Instant::now);
    }

    async fn json(mut self) -> Result<Value, TryError> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece().await? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_DOCUMENT_BYTES {
                return Err(too_long());
            }
        }
        parse(&body)
    }

    async fn up_to(mut self, bytes: usize) -> Vec<u8> {
        let mut body = Vec::new();
        while body.len() < bytes
            && let Ok(Some(piece)) = self.piece().await
        {
            body.extend_from_slice(&piece);
        }
        body.truncate(bytes);
        body
    }

    fn decode(&mut self, piece: &[u8]) -> Result<Vec<String>, TryError> {
        self.decoder
            .feed(piece)
            .map_err(|error| TryError::lasting(error.to_string()))
    }

    async fn piece(&mut self) -> Result<Option<Bytes>, TryError> {
        let patience = self
            .finished_at
            .map_or(Instant::now() + self.endpoint.idle, |at| at + AFTER_FINISH);
        let until = self.deadline.min(patience);
        match timeout_at(until, self.response.chunk()).await {
            Ok(Ok(piece)) => {
                self.read += piece.as_ref().map_or(0, Bytes::len);
                if self.read > MAX_ANSWER_BYTES {
                    return Err(TryError::lasting("its answer is longer than 64 MiB"));
                }
                Ok(piece)
            }
            // The answer is complete; how the connection ends does not matter any more.
            _ if self.finished_at.is_some() => Ok(None),
            Ok(Err(error)) => Err(self.endpoint.dropped(&error)),
            Err(_) => Err(self.endpoint.timed_out(until == self.deadline)),
        }
    }
}

fn too_long() -> TryError {
    TryError::lasting("its answer is longer than 8 MiB")
}

fn parse(body: &[u8]) -> Result<Value, TryError> {
    serde_json::from_slice(body)
        .map_err(|error| TryError::transport(format!("its answer is not JSON ({error})")))
}

fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// An error with its causes, without addresses (which may carry credentials).
fn chain(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = next {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&error.to_string());
        next = error.source();
    }
    if text.is_empty() {
        text = if error.is_decode() || error.is_body() {
            "it ended too early".to_owned()
        } else {
            "it failed".to_owned()
        };
    }
    text
}
