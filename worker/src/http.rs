//! The HTTP client: no proxy, no redirects, bounded waits, and TLS only where the address asks for it.

use std::time::Duration;

/// A client for `base`. `silence` bounds the wait for the next bytes of an answer.
pub(crate) fn client(base: &str, silence: Duration) -> Result<reqwest::Client, reqwest::Error> {
    // Another provider may be installed already; that one is used then.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs(15))
        .read_timeout(silence);
    if !base.starts_with("https:") {
        // Without certificates of the system, which a sandbox need not have.
        builder = builder.tls_certs_only([]);
    }
    builder.build()
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// At most `limit` bytes of an answer's body, as text.
pub(crate) async fn body(
    response: &mut reqwest::Response,
    limit: usize,
) -> Result<String, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        let room = limit - bytes.len();
        bytes.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if bytes.len() == limit {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
