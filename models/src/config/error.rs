//! What can be wrong with the configuration of models.

/// What is wrong with the configuration of models.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// An address that is none.
    #[error(
        "models.endpoints.{endpoint}.base_url is {base_url:?}, which is not an address: write one like https://api.openai.com/v1"
    )]
    BaseUrl {
        /// The endpoint's name.
        endpoint: String,
        /// What stands there.
        base_url: String,
    },
    /// A chain names an endpoint that is not configured.
    #[error(
        "{place} names the endpoint {endpoint:?}, which is not configured: add [models.endpoints.{endpoint}] with its base_url"
    )]
    UnknownEndpoint {
        /// Where in the configuration.
        place: String,
        /// The name.
        endpoint: String,
    },
    /// A chain of the crew's own names an endpoint that it cannot talk to.
    #[error(
        "{place} names the endpoint {endpoint:?}, which does not speak OpenAI's chat completions: only the developer's models may be there"
    )]
    NotChat {
        /// Where in the configuration.
        place: String,
        /// The name.
        endpoint: String,
    },
    /// The variable that should hold a key is not set.
    #[error(
        "models.endpoints.{endpoint}.api_key_env names {variable}, which is not set: set it to the endpoint's key"
    )]
    MissingKey {
        /// The endpoint's name.
        endpoint: String,
        /// The variable's name.
        variable: String,
    },
    /// A number that makes no sense.
    #[error("{place} is {value}: {expected}")]
    Number {
        /// Where in the configuration.
        place: String,
        /// What stands there.
        value: String,
        /// What should.
        expected: &'static str,
    },
    /// The HTTP client could not be made.
    #[error("the HTTP client for models cannot be made: {message}")]
    Client {
        /// Why.
        message: String,
    },
}
