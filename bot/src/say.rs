//! Says something at once, outside of the outbox: the answers to commands. They are kept by the update that they answer,
//! which counts as handled only when they were said.

use std::time::Duration;

use crate::{Shared, api, markdown};

/// The longest pause that a server gets when it asks for patience.
const LONGEST: Duration = Duration::from_hours(1);

/// The program ends before it could be said.
#[derive(Debug, thiserror::Error)]
#[error("the program is stopping")]
pub(crate) struct Stopping;

/// Says something, however long the server lets us wait; only the end of the program or the server's refusal ends it.
pub(crate) async fn say(shared: &Shared, chat: i64, markdown: &str) -> Result<(), Stopping> {
    for html in markdown::to_messages(markdown) {
        let mut tries = 0;
        loop {
            let pause = match shared.api.send(chat, &html, &[]).await {
                Ok(_) => break,
                Err(api::Error::RetryAfter { seconds }) => {
                    Duration::from_secs(seconds.max(1)).min(LONGEST)
                }
                Err(
                    error @ (api::Error::Unreachable { .. }
                    | api::Error::Conflict { .. }
                    | api::Error::Unauthorized),
                ) => {
                    tracing::warn!(%error, "an answer waits for the server");
                    shared.backoff(tries)
                }
                Err(error) => {
                    tracing::warn!(chat, %error, "an answer was refused");
                    return Ok(());
                }
            };
            tries += 1;
            if !shared.pause(pause).await {
                return Err(Stopping);
            }
        }
    }
    Ok(())
}

/// Says something once: when it does not arrive, nothing is lost.
pub(crate) async fn mention(shared: &Shared, chat: i64, markdown: &str) {
    for html in markdown::to_messages(markdown) {
        if let Err(error) = shared.api.send(chat, &html, &[]).await {
            tracing::debug!(chat, %error, "a remark did not arrive");
            return;
        }
    }
}

/// Ends the little clock on a button, with a word; otherwise it goes away by itself.
pub(crate) async fn acknowledge(shared: &Shared, callback: &str, text: &str) {
    if let Err(error) = shared.api.acknowledge(callback, text).await {
        tracing::debug!(%error, "a press was not acknowledged");
    }
}
