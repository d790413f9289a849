//! What it means that GitHub does not do what it is asked, and who can mend it.

use super::TokenError;
use reqwest::StatusCode;
use reqwest::header::HeaderMap;

/// Longest that GitHub's own words are repeated, in characters.
const SAID: usize = 300;

/// One of the two questions that lead to a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// Where the app is installed.
    Installation,
    /// A token of that installation.
    Token,
}

/// An answer that is none of those that were hoped for.
pub(super) fn refusal(
    host: &str,
    repository: &str,
    question: Question,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> TokenError {
    let spent = ["retry-after", "x-ratelimit-remaining"].map(|name| headers.get(name));
    let limited = status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::FORBIDDEN
            && (spent[0].is_some() || spent[1].is_some_and(|left| left == "0"));
    let retryable = limited || status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT;
    let what = match (status.as_u16(), question) {
        _ if limited => "it was asked too often; it is tried again".to_owned(),
        (401, _) => "it does not know the app, or not by this key: compare GITHUB_APP_ID and GITHUB_APP_PRIVATE_KEY_FILE with the app's \
                     settings, and look at this machine's clock"
            .to_owned(),
        (403, _) => format!(
            "it does not let the app in for {repository}; whoever owns the app's installation has to look whether it is suspended"
        ),
        (404, _) => format!(
            "the app is not installed for {repository}, or there is no such repository; its owner has to install the app there"
        ),
        (422, Question::Token) => format!(
            "the app may not write to {repository}; the app needs the permission `contents: write`, and the owner of {repository} has to accept it"
        ),
        (300..=399, _) => format!(
            "{repository} is elsewhere now, and a credential follows nobody there; the project needs its new address"
        ),
        _ if retryable => "it fails; it is tried again".to_owned(),
        _ => "nobody expects that answer; look at GITHUB_API_URL".to_owned(),
    };
    let said = message(body);
    let said = if said.is_empty() {
        said
    } else {
        format!(" (it said: {said})")
    };
    TokenError {
        host: host.to_owned(),
        reason: format!("{what}: HTTP {status}{said}", status = status.as_u16()),
        retryable,
    }
}

/// The words of an error of GitHub, as one short line.
fn message(body: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let words = value["message"].as_str().unwrap_or_default();
    let plain = words.chars().filter(|c| !c.is_control());
    plain.take(SAID).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: u16, headers: &[(&'static str, &str)], body: &str) -> TokenError {
        let headers = headers
            .iter()
            .map(|(name, value)| ((*name).parse().unwrap(), value.parse().unwrap()))
            .collect();
        let status = StatusCode::from_u16(status).unwrap();
        refusal(
            "h",
            "a/b",
            Question::Token,
            status,
            &headers,
            body.as_bytes(),
        )
    }

    #[test]
    fn waiting_helps_against_limits_and_failures_and_nothing_else() {
        for (status, headers, retryable) in [
            (401, &[][..], false),
            (403, &[], false),
            (403, &[("retry-after", "60")], true),
            (403, &[("x-ratelimit-remaining", "0")], true),
            (403, &[("x-ratelimit-remaining", "12")], false),
            (404, &[], false),
            (408, &[], true),
            (418, &[], false),
            (422, &[], false),
            (429, &[], true),
            (301, &[], false),
            (500, &[], true),
            (503, &[], true),
        ] {
            let error = said(status, headers, "");
            assert_eq!(error.retryable, retryable, "{error}");
            assert!(error.to_string().contains(&status.to_string()), "{error}");
        }
    }

    #[test]
    fn what_the_host_says_is_repeated_as_one_short_line() {
        let long = format!(
            "{{\"message\": \"Bad\\ncredentials {}\"}}",
            "x".repeat(9999)
        );
        let error = said(401, &[], &long);
        assert!(
            error.reason.contains("it said: Badcredentials x"),
            "{error}"
        );
        assert!(error.reason.len() < 700 && !error.reason.contains('\n'));
        assert!(!said(401, &[], "<html>").reason.contains("html"));
    }
}
