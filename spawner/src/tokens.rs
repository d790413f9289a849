//! Credentials for repositories that are elsewhere: minted from the spawner's own configuration at the moment of use, for one
//! command of Git, and kept on no disk.

mod app;
mod refusal;

pub use app::{AppError, GitHubApp};

use async_trait::async_trait;
use ports::Plaintext;
use std::sync::Arc;
use url::Url;

/// Mints credentials for repositories.
#[async_trait]
pub trait GitTokens: Send + Sync {
    /// A credential for this repository, valid for the next minutes at least; none: it is reached without one. Asked before
    /// every command that reaches the host, so that one that expires is never kept.
    async fn mint(&self, repository: &Url) -> Result<Option<GitToken>, TokenError>;

    /// The host did not let somebody in who came with a credential for this repository: one that is kept is not given again.
    fn refused(&self, _repository: &Url) {}
}

/// A user name and the secret that goes with it.
pub struct GitToken {
    /// The name; hosts that only look at the secret take any.
    pub user: String,
    /// The secret: cannot be printed, serialized or compared.
    pub secret: Plaintext,
}

/// Why no credential could be minted.
#[derive(Debug, thiserror::Error)]
#[error("no token for {host} could be minted: {reason}")]
pub struct TokenError {
    /// The host that it would have been for.
    pub host: String,
    /// What happened and what to do, without the secret.
    pub reason: String,
    /// Whether waiting may help.
    pub retryable: bool,
}

/// No credential for anybody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTokens;

#[async_trait]
impl GitTokens for NoTokens {
    async fn mint(&self, _: &Url) -> Result<Option<GitToken>, TokenError> {
        Ok(None)
    }
}

/// What GitHub calls whoever comes with a token alone.
const USER: &str = "x-access-token";

/// The host of repositories that belongs to an API of GitHub.
#[derive(Clone, Debug)]
struct Origin(Url);

impl Origin {
    /// `https://api.github.com` stands for `github.com`, any other address for itself. None: that is no address.
    fn of_api(api_url: &str) -> Option<Self> {
        let mut origin = Url::parse(api_url).ok()?;
        if origin.host_str()? == "api.github.com" {
            origin.set_host(Some("github.com")).ok()?;
        }
        Some(Self(origin))
    }

    fn has(&self, repository: &Url) -> bool {
        self.0.scheme() == repository.scheme()
            && self.0.host_str() == repository.host_str()
            && self.0.port_or_known_default() == repository.port_or_known_default()
    }
}

/// Whether an address is on this machine, by its own words.
pub(crate) fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// One token for one host, as `GITHUB_TOKEN` is; other hosts are reached without.
#[derive(Clone)]
pub struct HostToken {
    origin: Origin,
    secret: Arc<Plaintext>,
}

impl HostToken {
    /// A token of GitHub, for the host whose API is at this address: `https://api.github.com` stands for `github.com`, any
    /// other one for itself. None: that is no address.
    pub fn github(api_url: &str, token: String) -> Option<Self> {
        Some(Self {
            origin: Origin::of_api(api_url)?,
            secret: Arc::new(Plaintext::new(token)),
        })
    }
}

#[async_trait]
impl GitTokens for HostToken {
    async fn mint(&self, repository: &Url) -> Result<Option<GitToken>, TokenError> {
        Ok(self.origin.has(repository).then(|| GitToken {
            user: USER.to_owned(),
            secret: Plaintext::new(self.secret.expose().to_owned()),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_for_its_own_host_only() {
        let token = |api: &str| HostToken::github(api, "t".to_owned()).unwrap();
        let is_for = |api: &str, url: &str| token(api).origin.has(&url.parse().unwrap());
        let github = "https://api.github.com";
        assert!(is_for(github, "https://github.com/a/b.git"));
        assert!(is_for(
            "https://ghe.example/api/v3",
            "https://ghe.example/a/b.git"
        ));
        for url in [
            "https://api.github.com/a/b.git",
            "http://github.com/a/b.git",
            "https://github.com:8443/a/b.git",
            "https://github.com.evil.example/a/b.git",
            "https://evil.example/github.com/b.git",
        ] {
            assert!(!is_for(github, url), "{url}");
        }
        assert!(HostToken::github("github", "t".to_owned()).is_none());
    }
}
