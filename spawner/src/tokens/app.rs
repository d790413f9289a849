//! Tokens of a GitHub App: for one repository, with the right to its contents alone, for an hour at most.
//!
//! The app proves who it is with a short text that its private key has signed (a JWT, RS256). With it GitHub is asked where the app
//! is installed for a repository, and for a token of that installation. Only the token goes to Git. It is kept in memory until
//! shortly before it expires. Neither is ever sent to another host than that of `GITHUB_API_URL`.

use super::refusal::{Question, refusal};
use super::{GitToken, GitTokens, Origin, TokenError, USER, is_local};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use ports::Plaintext;
use reqwest::{Method, StatusCode};
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::sign::SigningKey;
use rustls::{SignatureAlgorithm, SignatureScheme};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use url::Url;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long each of the two questions may take, its connection included. A mint has to end within half a minute.
const ANSWER: Duration = Duration::from_secs(12);
/// The longest answer that is read.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// The longest file that can be a key.
const MAX_KEY_BYTES: u64 = 64 * 1024;
/// The longest text that can be a token.
const MAX_TOKEN_BYTES: usize = 4096;
/// How far the clocks of two machines may differ.
const SKEW: SignedDuration = SignedDuration::from_secs(60);
/// How long our proof holds; GitHub takes none that holds for more than ten minutes.
const PROOF: SignedDuration = SignedDuration::from_mins(8);
/// A token that ends within this is not given any more: it is the longest that one command of Git takes.
const MARGIN: SignedDuration = SignedDuration::from_mins(10);

/// Why a GitHub App cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The address of the API.
    #[error(
        "GITHUB_API_URL is {url:?}, and a GitHub App's credentials are only sent over https (or to this machine); it looks like https://api.github.com, or https://HOST/api/v3"
    )]
    Address {
        /// What it is.
        url: String,
    },
    /// The id.
    #[error(
        "GITHUB_APP_ID is {id:?}, and the app's id (a number) or its client id (Iv…) is expected; both stand in the app's settings"
    )]
    Id {
        /// What it is.
        id: String,
    },
    /// The key's file.
    #[error(
        "GITHUB_APP_PRIVATE_KEY_FILE is {path}, which cannot be read; it is the file that GitHub gave for the app, readable for this user", path = .path.display()
    )]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// What is in it.
    #[error(
        "GITHUB_APP_PRIVATE_KEY_FILE is {path}, which holds no key that can be used ({reason}); make a private key in the app's settings, and name the file that GitHub gives", path = .path.display()
    )]
    NoKey {
        /// Which file.
        path: PathBuf,
        /// Why not, without what is in it.
        reason: &'static str,
    },
    /// The client for HTTP.
    #[error("no HTTP client for GitHub can be made")]
    Client(#[source] reqwest::Error),
}

/// A GitHub App, which mints tokens for repositories where it is installed; other hosts are reached without.
pub struct GitHubApp {
    origin: Origin,
    /// Without a slash at its end.
    api: String,
    id: String,
    key: Arc<dyn SigningKey>,
    http: reqwest::Client,
    patience: Duration,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
}

/// The token of one repository. Whoever mints it holds the lock, so that tasks that begin together ask once.
type Slot = tokio::sync::Mutex<Option<Kept>>;

struct Kept {
    secret: Arc<Plaintext>,
    until: Timestamp,
}

impl Kept {
    fn is_good(&self) -> bool {
        Timestamp::now() + MARGIN < self.until
    }
}

impl GitHubApp {
    /// The app with this id, whose private key is in a file (PEM, as GitHub gives it), on the GitHub whose API is at this address.
    pub fn new(api_url: &str, id: &str, key_file: &Path) -> Result<Self, AppError> {
        let address = || AppError::Address {
            url: api_url.to_owned(),
        };
        let url = Url::parse(api_url).map_err(|_| address())?;
        let origin = Origin::of_api(api_url).ok_or_else(address)?;
        let plain = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
        let safe = url.scheme() == "https" || url.scheme() == "http" && is_local(&url);
        if !plain || !safe || url.password().is_some() {
            return Err(address());
        }
        if !Self::is_id(id) {
            return Err(AppError::Id { id: id.to_owned() });
        }
        let key = read_key(key_file)?;
        // Whoever makes the first client of the process; another one of the same kind may be there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            // A credential is for this host and goes to no other one.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .user_agent(concat!("artel/", env!("CARGO_PKG_VERSION")));
        if is_local(&url) {
            http = http.no_proxy();
        }
        Ok(Self {
            origin,
            api: url.as_str().trim_end_matches('/').to_owned(),
            id: id.to_owned(),
            key,
            http: http.build().map_err(AppError::Client)?,
            patience: ANSWER,
            slots: Mutex::default(),
        })
    }

    /// Whether an app can have this id: a number, or its client id, which begins with `Iv`.
    pub fn is_id(id: &str) -> bool {
        let is_number = id.bytes().all(|byte| byte.is_ascii_digit());
        let of_client = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
        !id.is_empty() && (is_number || id.starts_with("Iv") && id.bytes().all(of_client))
    }

    /// The same with another bound of each question, instead of twelve seconds.
    #[must_use]
    pub fn patient(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// A text that shows for a few minutes that we are the app.
    fn proof(&self) -> Result<Plaintext, TokenError> {
        let now = Timestamp::now();
        let header = json!({"alg": "RS256", "typ": "JWT"});
        let claims = json!({
            "iat": (now - SKEW).as_second(),
            "exp": (now + PROOF).as_second(),
            "iss": self.id,
        });
        let encoded = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let text = format!("{}.{}", encoded(&header), encoded(&claims));
        let signed = self
            .key
            .choose_scheme(&[SignatureScheme::RSA_PKCS1_SHA256])
            .and_then(|signer| signer.sign(text.as_bytes()).ok())
            .ok_or_else(|| {
                self.error(
                    "the app's key does not sign; name another one in GITHUB_APP_PRIVATE_KEY_FILE",
                )
            })?;
        Ok(Plaintext::new(format!(
            "{text}.{}",
            URL_SAFE_NO_PAD.encode(signed)
        )))
    }

    fn error(&self, reason: impl Into<String>) -> TokenError {
        TokenError {
            host: self.host(),
            reason: reason.into(),
            retryable: false,
        }
    }

    fn host(&self) -> String {
        self.origin.0.host_str().unwrap_or_default().to_owned()
    }

    /// Asks GitHub one question, as the app.
    async fn ask(
        &self,
        repository: &str,
        question: Question,
        (method, path): (Method, String),
        body: Option<Value>,
    ) -> Result<Vec<u8>, TokenError> {
        let unreachable = |error: reqwest::Error| TokenError {
            host: self.host(),
            reason: format!("{} does not answer: {}", self.api, causes(&error)),
            retryable: true,
        };
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.api))
            .timeout(self.patience)
            .bearer_auth(self.proof()?.expose())
            .header("accept", "application/vnd.github+json")
            .header("x-github-api-version", "2022-11-28");
        if let Some(body) = body {
            request = request.json(&body);
        }
        let mut answer = request.send().await.map_err(unreachable)?;
        let mut read = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(unreachable)? {
            if read.len() + piece.len() > MAX_ANSWER_BYTES {
                return Err(self.error(format!(
                    "{} answers with more than {MAX_ANSWER_BYTES} bytes; look at GITHUB_API_URL",
                    self.api
                )));
            }
            read.extend_from_slice(&piece);
        }
        if matches!(answer.status(), StatusCode::OK | StatusCode::CREATED) {
            return Ok(read);
        }
        let (status, headers) = (answer.status(), answer.headers());
        Err(refusal(
            &self.host(),
            repository,
            question,
            status,
            headers,
            &read,
        ))
    }

    async fn installation(&self, repository: &str) -> Result<u64, TokenError> {
        let ask = (Method::GET, format!("/repos/{repository}/installation"));
        let answer = self
            .ask(repository, Question::Installation, ask, None)
            .await?;
        let installation: Installation = self.understood(&answer)?;
        Ok(installation.id)
    }

    async fn token(&self, repository: &str, name: &str) -> Result<Kept, TokenError> {
        let installation = self.installation(repository).await?;
        let ask = (
            Method::POST,
            format!("/app/installations/{installation}/access_tokens"),
        );
        let body = json!({"repositories": [name], "permissions": {"contents": "write"}});
        let answer = self
            .ask(repository, Question::Token, ask, Some(body))
            .await?;
        let token: Token = self.understood(&answer)?;
        // It goes to Git in lines of text.
        if token.token.is_empty()
            || token.token.len() > MAX_TOKEN_BYTES
            || !token.token.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(self.error(format!(
                "{} gives a token that is none; look at GITHUB_API_URL",
                self.api
            )));
        }
        Ok(Kept {
            secret: Arc::new(Plaintext::new(token.token)),
            until: token.expires_at,
        })
    }

    fn understood<'a, T: Deserialize<'a>>(&self, answer: &'a [u8]) -> Result<T, TokenError> {
        // What is wrong with it is not said: it may be half a token.
        serde_json::from_slice(answer).map_err(|_| {
            self.error(format!(
                "{} does not answer as GitHub does; look at GITHUB_API_URL",
                self.api
            ))
        })
    }

    /// Where the token of a repository is kept. Those that nobody uses and that are over are forgotten.
    fn slot(&self, repository: &str) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot
                    .try_lock()
                    .is_ok_and(|kept| kept.as_ref().is_some_and(Kept::is_good))
        });
        Arc::clone(slots.entry(repository.to_lowercase()).or_default())
    }
}

#[derive(Deserialize)]
struct Installation {
    id: u64,
}

#[derive(Deserialize)]
struct Token {
    token: String,
    expires_at: Timestamp,
}

/// Owner and name of a repository.
fn named(repository: &Url) -> Option<(&str, &str)> {
    let path = repository.path().strip_prefix('/')?;
    let path = path.strip_suffix('/').unwrap_or(path);
    let (owner, name) = path.split_once('/')?;
    let name = name.strip_suffix(".git").unwrap_or(name);
    let is_name = |text: &str| {
        !matches!(text, "" | "." | "..")
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    (is_name(owner) && is_name(name)).then_some((owner, name))
}

#[async_trait]
impl GitTokens for GitHubApp {
    async fn mint(&self, repository: &Url) -> Result<Option<GitToken>, TokenError> {
        if !self.origin.has(repository) {
            return Ok(None);
        }
        let (owner, name) = named(repository).ok_or_else(|| {
            self.error(format!(
                "{repository} names no repository of GitHub; an address like https://{}/owner/name.git is needed",
                self.host()
            ))
        })?;
        let whole = format!("{owner}/{name}");
        let slot = self.slot(&whole);
        let mut kept = slot.lock().await;
        let token = match kept.take().filter(Kept::is_good) {
            Some(token) => token,
            None => self.token(&whole, name).await?,
        };
        let secret = Plaintext::new(token.secret.expose().to_owned());
        *kept = Some(token);
        Ok(Some(GitToken {
            user: USER.to_owned(),
            secret,
        }))
    }

    fn refused(&self, repository: &Url) {
        if let Some((owner, name)) = named(repository) {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.remove(&format!("{owner}/{name}").to_lowercase());
        }
    }
}

/// The private key in a file.
fn read_key(path: &Path) -> Result<Arc<dyn SigningKey>, AppError> {
    let no_key = |reason| AppError::NoKey {
        path: path.to_owned(),
        reason,
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_KEY_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|source| AppError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
    if bytes.len() as u64 > MAX_KEY_BYTES {
        return Err(no_key("it is too long for one"));
    }
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| {
        no_key("it has no private key in PEM, which begins with -----BEGIN RSA PRIVATE KEY-----")
    })?;
    let key = any_supported_type(&key).map_err(|_| no_key("the key in it is damaged"))?;
    if key.algorithm() != SignatureAlgorithm::RSA {
        return Err(no_key("GitHub's keys are RSA, and this is another kind"));
    }
    Ok(key)
}

/// An error of the client with what led to it. Its address is ours and holds no secret.
fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_has_an_owner_and_a_name_and_nothing_that_leads_elsewhere() {
        let of = |url: &str| {
            let url: Url = url.parse().unwrap();
            named(&url).map(|(owner, name)| format!("{owner} {name}"))
        };
        for url in ["https://h/a/b.git", "https://h/a/b", "https://h/a/b/"] {
            assert_eq!(of(url).as_deref(), Some("a b"), "{url}");
        }
        assert_eq!(
            of("https://h/a.b/c_-d.e.git").as_deref(),
            Some("a.b c_-d.e")
        );
        for url in [
            "https://h/",
            "https://h/a",
            "https://h/a/",
            "https://h/a/.git",
            "https://h/a/b/c",
            "https://h//b",
            "https://h/a/%2e%2e%2fc",
            "https://h/a/b%3Fx",
            "https://h/a/%2e%2e",
        ] {
            assert_eq!(of(url), None, "{url}");
        }
    }
}
