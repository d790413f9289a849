//! What is configured about models: the tables under `[models]` in `artel.toml`.
//!
//! ```toml
//! [models]
//! model = "a-model"                        # for every role that names none
//!
//! [models.endpoints.default]
//! base_url = "https://models.example/v1"
//! api_key_env = "OPENAI_API_KEY"           # the variable that holds the key; a key never stands here
//!
//! [models.endpoints.anthropic]             # for workers whose agent speaks Anthropic's Messages
//! base_url = "https://api.anthropic.com"
//! api_key_env = "ANTHROPIC_API_KEY"
//! speaks = ["messages"]
//! model = "a-claude"
//!
//! [models.roles.architect]
//! models = ["a-large-model", { endpoint = "backup", model = "another" }]   # tried in this order
//! temperature = 0.2
//! max_output_tokens = 16000
//!
//! [models.prices."a-model"]
//! input_per_million_usd = 1.25
//! output_per_million_usd = 10.0
//! cache_read_per_million_usd = 0.125       # of what agents send, most comes from the endpoint's cache
//! as_of = "2026-05-01"
//!
//! [models.budget]
//! cost_usd = 10.0
//! tokens = 10000000
//! ```

mod error;
mod price;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ports::{Plaintext, Role};
use serde::Deserialize;
use url::Url;

pub use error::ConfigError;
pub use price::Price;
pub(crate) use price::priced;

/// The endpoint that a model without an endpoint is asked at.
pub const DEFAULT_ENDPOINT: &str = "default";

/// The endpoint that `ANTHROPIC_BASE_URL`, `ANTHROPIC_API_KEY` and `ANTHROPIC_MODEL` describe.
pub const ANTHROPIC_ENDPOINT: &str = "anthropic";

/// Where it is when only a key is given.
const ANTHROPIC_BASE_URL: &str = "https://api.anthropic.com";

/// The most models that a chain may name.
const MAX_CHAIN: usize = 8;

/// Endpoints, roles, prices and budgets.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The model of every role that names none; asked at the endpoint `default`.
    pub model: Option<String>,
    /// Endpoints by name.
    pub endpoints: BTreeMap<String, EndpointConfig>,
    /// What is special about a role.
    pub roles: BTreeMap<Role, RoleConfig>,
    /// Prices by model name. A model that is not here has no known price, and its budget counts tokens.
    pub prices: BTreeMap<String, Price>,
    /// What a project may spend unless its owner raised it.
    pub budget: BudgetLimits,
    /// How long to wait for an endpoint.
    pub timeouts: TimeoutConfig,
    /// How often to try again.
    pub retry: RetryConfig,
}

/// A wire format that an endpoint speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaks {
    /// OpenAI's chat completions: what the crew itself and most agents use.
    Chat,
    /// OpenAI's Responses, for workers whose agent speaks them.
    Responses,
    /// Anthropic's Messages, likewise.
    Messages,
}

/// One endpoint.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// The address with `/v1`, such as `https://api.openai.com/v1`.
    pub base_url: String,
    /// The name of the environment variable that holds the key. A local server may need none.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// The key itself; never in a file, set by [`Config::resolve_keys`].
    #[serde(skip)]
    pub api_key: Option<ApiKey>,
    /// The wire formats that it speaks; empty: chat completions and Responses, as OpenAI-compatible endpoints do.
    #[serde(default)]
    pub speaks: Vec<Speaks>,
    /// The model for workers that ask here in a format for which the role's chain has none.
    #[serde(default)]
    pub model: Option<String>,
}

impl EndpointConfig {
    /// An OpenAI-compatible endpoint.
    pub fn new(base_url: impl Into<String>, api_key: Option<ApiKey>) -> Self {
        Self {
            base_url: base_url.into(),
            api_key_env: None,
            api_key,
            speaks: Vec::new(),
            model: None,
        }
    }

    /// Whether it speaks this format.
    pub fn speaks(&self, format: Speaks) -> bool {
        if self.speaks.is_empty() {
            format != Speaks::Messages
        } else {
            self.speaks.contains(&format)
        }
    }
}

/// A key to an endpoint: cannot be printed, serialized or compared.
#[derive(Clone)]
pub struct ApiKey(Arc<Plaintext>);

impl ApiKey {
    /// Takes a key.
    pub fn new(key: String) -> Self {
        Self(Arc::new(Plaintext::new(key)))
    }

    /// The key, for the one header that carries it.
    pub(crate) fn expose(&self) -> &str {
        self.0.expose()
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// What is special about a role.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoleConfig {
    /// The models to ask, each when the one before it gave no answer; empty: the configuration's `model`.
    pub models: Vec<ModelChoice>,
    /// Sampling temperature; none: the endpoint's own.
    pub temperature: Option<f64>,
    /// The most tokens of one answer; none: [`RoleConfig::DEFAULT_MAX_OUTPUT_TOKENS`].
    pub max_output_tokens: Option<u32>,
}

impl RoleConfig {
    /// Long enough for a plan or a file, short enough that a budget can reserve it.
    pub const DEFAULT_MAX_OUTPUT_TOKENS: u32 = 8192;
}

/// A model in a chain: its name alone, or with the endpoint to ask.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum ModelChoice {
    /// A model at the endpoint `default`.
    Name(String),
    /// A model at another endpoint.
    At {
        /// The endpoint's name in the configuration.
        endpoint: String,
        /// The model's name there.
        model: String,
    },
}

impl ModelChoice {
    /// The endpoint's name and the model's.
    pub fn parts(&self) -> (&str, &str) {
        match self {
            Self::Name(model) => (DEFAULT_ENDPOINT, model),
            Self::At { endpoint, model } => (endpoint, model),
        }
    }
}

/// What a project may spend. A call whose price is known is held to `cost_usd`, any other to `tokens`. A call with a known
/// price and no limit in US dollars is held to `tokens` as well.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetLimits {
    /// US dollars.
    pub cost_usd: Option<f64>,
    /// Tokens read and written.
    pub tokens: Option<u64>,
}

impl Default for BudgetLimits {
    /// 10 US dollars; 10 million tokens.
    fn default() -> Self {
        Self {
            cost_usd: Some(10.0),
            tokens: Some(10_000_000),
        }
    }
}

/// How long to wait for an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeoutConfig {
    /// For the connection, TLS included, in seconds.
    pub connect_s: u64,
    /// Between two pieces of an answer, and for the first one, in seconds.
    pub idle_s: u64,
    /// For one call with all its tries, waits and fallbacks, in seconds.
    pub total_s: u64,
}

impl Default for TimeoutConfig {
    /// 10 s, 3 minutes, 15 minutes.
    fn default() -> Self {
        Self {
            connect_s: 10,
            idle_s: 180,
            total_s: 900,
        }
    }
}

/// How often to try again after 429, 5xx, a timeout or a dropped connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfig {
    /// Tries for one model of a chain, the first one included; at least 1, at most 20.
    pub tries: u32,
    /// The wait before the second try, in milliseconds; it doubles with each further one, with jitter.
    pub first_wait_ms: u64,
    /// The longest wait, in seconds. An endpoint that asks for more in `Retry-After` is given up for the next in the chain.
    pub max_wait_s: u64,
}

impl Default for RetryConfig {
    /// 5 tries, from 500 ms to a minute apart.
    fn default() -> Self {
        Self {
            tries: 5,
            first_wait_ms: 500,
            max_wait_s: 60,
        }
    }
}

impl Config {
    /// One endpoint and one model for every role, as `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `ARTEL_MODEL` give them. An
    /// empty key means none.
    pub fn single(base_url: &str, api_key: Option<String>, model: &str) -> Self {
        let mut config = Self::default();
        config.overlay(
            Some(base_url.to_owned()),
            api_key,
            Some(model.to_owned()).filter(|model| !model.is_empty()),
        );
        config
    }

    /// The same, read through a lookup such as `|name| std::env::var(name).ok()`.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let mut config = Self::default();
        config.overlay_env(lookup);
        config
    }

    /// Lets the environment's endpoints, keys and models win over what a file says about the endpoints `default` and
    /// `anthropic` and the model of all roles. Chains that a file gives to roles stay.
    pub fn overlay_env(&mut self, lookup: impl Fn(&str) -> Option<String>) {
        let get = |name| lookup(name).filter(|value: &String| !value.trim().is_empty());
        self.overlay(
            get("OPENAI_BASE_URL"),
            get("OPENAI_API_KEY"),
            get("ARTEL_MODEL"),
        );
        self.overlay_anthropic(
            get("ANTHROPIC_BASE_URL"),
            get("ANTHROPIC_API_KEY"),
            get("ANTHROPIC_MODEL"),
        );
    }

    /// A key alone means Anthropic's own endpoint; an address alone is one that needs no key.
    fn overlay_anthropic(
        &mut self,
        base_url: Option<String>,
        key: Option<String>,
        model: Option<String>,
    ) {
        let key = key.map(|key| ApiKey::new(key.trim().to_owned()));
        let known = self.endpoints.contains_key(ANTHROPIC_ENDPOINT);
        if base_url.is_some() || (key.is_some() && !known) {
            let base_url = base_url.unwrap_or_else(|| ANTHROPIC_BASE_URL.to_owned());
            let mut endpoint = EndpointConfig::new(base_url, key);
            endpoint.speaks = vec![Speaks::Messages];
            endpoint.model = self
                .endpoints
                .remove(ANTHROPIC_ENDPOINT)
                .and_then(|old| old.model);
            self.endpoints
                .insert(ANTHROPIC_ENDPOINT.to_owned(), endpoint);
        } else if let (Some(endpoint), Some(key)) =
            (self.endpoints.get_mut(ANTHROPIC_ENDPOINT), key)
        {
            endpoint.api_key = Some(key);
        }
        if let (Some(endpoint), Some(model)) = (self.endpoints.get_mut(ANTHROPIC_ENDPOINT), model) {
            endpoint.model = Some(model.trim().to_owned());
        }
    }

    fn overlay(&mut self, base_url: Option<String>, key: Option<String>, model: Option<String>) {
        let key = key
            .map(|key| key.trim().to_owned())
            .filter(|key| !key.is_empty());
        if let Some(base_url) = base_url {
            self.endpoints.insert(
                DEFAULT_ENDPOINT.to_owned(),
                EndpointConfig::new(base_url, key.map(ApiKey::new)),
            );
        } else if let (Some(endpoint), Some(key)) = (self.endpoints.get_mut(DEFAULT_ENDPOINT), key)
        {
            endpoint.api_key = Some(ApiKey::new(key));
        }
        if model.is_some() {
            self.model = model;
        }
    }

    /// Takes the keys that `api_key_env` names out of the environment, through a lookup.
    pub fn resolve_keys(
        &mut self,
        lookup: impl Fn(&str) -> Option<String>,
    ) -> Result<(), ConfigError> {
        for (name, endpoint) in &mut self.endpoints {
            let Some(variable) = &endpoint.api_key_env else {
                continue;
            };
            if endpoint.api_key.is_some() {
                continue;
            }
            let key = lookup(variable)
                .map(|key| key.trim().to_owned())
                .filter(|key| !key.is_empty())
                .ok_or_else(|| ConfigError::MissingKey {
                    endpoint: name.clone(),
                    variable: variable.clone(),
                })?;
            endpoint.api_key = Some(ApiKey::new(key));
        }
        Ok(())
    }

    /// Whether every role has a model to ask.
    pub fn is_complete(&self) -> bool {
        [
            Role::Brainstorm,
            Role::Architect,
            Role::Developer,
            Role::Reviewer,
        ]
        .into_iter()
        .all(|role| {
            let chain = self.chain(role);
            !chain.is_empty()
                && chain
                    .iter()
                    .all(|choice| self.endpoints.contains_key(choice.parts().0))
        })
    }

    /// The models of a role, in the order in which they are asked.
    pub fn chain(&self, role: Role) -> Vec<ModelChoice> {
        match self.roles.get(&role) {
            Some(role) if !role.models.is_empty() => role.models.clone(),
            _ => self.model.iter().cloned().map(ModelChoice::Name).collect(),
        }
    }

    /// The model that answers workers in a format first, if one is configured for it.
    pub fn worker_model(&self, speaks: Speaks) -> Option<String> {
        let (_, model) = self.worker_models(speaks).into_iter().next()?;
        Some(model)
    }

    /// The developer's models at endpoints of this format, each with its endpoint's name. Without one there: every endpoint of
    /// the format with its own model, or with the name that the developer's model has elsewhere.
    pub(crate) fn worker_models(&self, speaks: Speaks) -> Vec<(String, String)> {
        let speaking = |name: &str| {
            let endpoint = self.endpoints.get(name);
            endpoint.filter(|endpoint| endpoint.speaks(speaks))
        };
        let chain = self.chain(Role::Developer);
        let chosen: Vec<_> = chain
            .iter()
            .map(ModelChoice::parts)
            .filter(|(endpoint, _)| speaking(endpoint).is_some())
            .map(|(endpoint, model)| (endpoint.to_owned(), model.to_owned()))
            .collect();
        if !chosen.is_empty() {
            return chosen;
        }
        let elsewhere = chain.first().map(|choice| choice.parts().1);
        self.endpoints
            .keys()
            .filter_map(|name| {
                let model = speaking(name)?.model.as_deref().or(elsewhere)?;
                Some((name.clone(), model.to_owned()))
            })
            .collect()
    }

    /// The most tokens that an answer to a role may have.
    pub fn max_output_tokens(&self, role: Role) -> u32 {
        self.roles
            .get(&role)
            .and_then(|role| role.max_output_tokens)
            .unwrap_or(RoleConfig::DEFAULT_MAX_OUTPUT_TOKENS)
    }

    /// The temperature of a role, if it has one.
    pub fn temperature(&self, role: Role) -> Option<f64> {
        self.roles.get(&role).and_then(|role| role.temperature)
    }

    /// Says what is wrong with the configuration, if anything is.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (name, endpoint) in &self.endpoints {
            parse_base_url(name, &endpoint.base_url)?;
        }
        for (role, config) in &self.roles {
            let place = format!("models.roles.{role}");
            if config.models.len() > MAX_CHAIN {
                return Err(number(
                    format!("{place}.models"),
                    config.models.len(),
                    "at most 8 models can be in a chain",
                ));
            }
            for choice in &config.models {
                let (endpoint, _) = choice.parts();
                let Some(known) = self.endpoints.get(endpoint) else {
                    return Err(ConfigError::UnknownEndpoint {
                        place: format!("{place}.models"),
                        endpoint: endpoint.to_owned(),
                    });
                };
                // A developer's agent may speak anything; the crew itself speaks one format.
                if *role != Role::Developer && !known.speaks(Speaks::Chat) {
                    return Err(ConfigError::NotChat {
                        place: format!("{place}.models"),
                        endpoint: endpoint.to_owned(),
                    });
                }
            }
            if let Some(value) = config.temperature
                && !(0.0..=2.0).contains(&value)
            {
                let expected = "a temperature lies between 0 and 2";
                return Err(number(format!("{place}.temperature"), value, expected));
            }
            if config.max_output_tokens == Some(0) {
                let expected = "an answer needs at least 1 token";
                return Err(number(format!("{place}.max_output_tokens"), 0, expected));
            }
        }
        for (model, price) in &self.prices {
            let plain = price.input_per_million_usd;
            for (field, value) in [
                ("input_per_million_usd", plain),
                ("output_per_million_usd", price.output_per_million_usd),
                (
                    "cache_read_per_million_usd",
                    price.cache_read_per_million_usd.unwrap_or(plain),
                ),
                (
                    "cache_write_per_million_usd",
                    price.cache_write_per_million_usd.unwrap_or(plain),
                ),
            ] {
                if !value.is_finite() || value < 0.0 {
                    let place = format!("models.prices.{model:?}.{field}");
                    return Err(number(place, value, "a price is 0 or more US dollars"));
                }
            }
        }
        if let Some(value) = self.budget.cost_usd
            && (!value.is_finite() || value < 0.0)
        {
            let place = "models.budget.cost_usd".to_owned();
            return Err(number(place, value, "a budget is 0 or more US dollars"));
        }
        if !(1..=20).contains(&self.retry.tries) {
            let place = "models.retry.tries".to_owned();
            return Err(number(place, self.retry.tries, "write 1 to 20 tries"));
        }
        for (field, value) in [
            ("connect_s", self.timeouts.connect_s),
            ("idle_s", self.timeouts.idle_s),
            ("total_s", self.timeouts.total_s),
        ] {
            if !(1..=86_400).contains(&value) {
                let place = format!("models.timeouts.{field}");
                return Err(number(place, value, "write 1 to 86400 seconds"));
            }
        }
        Ok(())
    }
}

fn number(place: String, value: impl fmt::Display, expected: &'static str) -> ConfigError {
    ConfigError::Number {
        place,
        value: value.to_string(),
        expected,
    }
}

/// The address without a trailing slash; somebody who pasted the address of the call itself is understood.
pub(crate) fn parse_base_url(endpoint: &str, base_url: &str) -> Result<Url, ConfigError> {
    let wrong = || ConfigError::BaseUrl {
        endpoint: endpoint.to_owned(),
        base_url: without_credentials(base_url),
    };
    let text = base_url.trim().trim_end_matches('/');
    let text = ["/chat/completions", "/responses", "/messages"]
        .iter()
        .find_map(|call| text.strip_suffix(call))
        .unwrap_or(text)
        .trim_end_matches('/');
    let url = Url::parse(text).map_err(|_| wrong())?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(wrong());
    }
    Ok(url)
}

/// An address as it may be shown: no user, password or query.
pub(crate) fn without_credentials(base_url: &str) -> String {
    let Ok(mut url) = Url::parse(base_url.trim()) else {
        return base_url.chars().take(200).collect();
    };
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string().trim_end_matches('/').to_owned()
}
