//! Dead letters: what nobody can read or finish is kept with the reason, within bounds.

use super::queue::{Handed, Queue};
use super::{Entry, Shared};
use crate::{TransportError, decode, names, shortened};

/// Most that is kept of a dead letter's body, in bytes: what nobody can read may be of any size, and letters are many and stay.
const LETTER_BYTES: usize = 128 * 1024;
/// How long dead letters are kept after the last one, in seconds.
const LETTERS_S: u64 = 30 * names::KEEP_S;

impl Shared {
    /// Puts a message aside that cannot be read.
    pub async fn bury(
        &self,
        queue: &Queue,
        handed: &Handed,
        reason: &str,
    ) -> Result<(), TransportError> {
        tracing::error!(
            queue = queue.stream,
            reason,
            "a message is poison ({reason}) and was put aside"
        );
        self.keep_letter(&handed.data, reason).await?;
        let id = decode::named(&handed.data);
        queue.settle(&self.link, &handed.receipt(&id)).await
    }

    pub async fn keep_letter(&self, body: &[u8], reason: &str) -> Result<(), TransportError> {
        let body = &body[..body.len().min(LETTER_BYTES)];
        let kept = self.options.letters.max(1);
        let mut add = redis::cmd("XADD");
        add.arg(names::DEAD).arg("MAXLEN").arg(kept).arg("*");
        let reason = shortened(reason);
        add.arg("reason").arg(reason).arg(names::FIELD).arg(body);
        self.link.ask::<()>(&add).await?;
        self.link
            .ask(redis::cmd("EXPIRE").arg(names::DEAD).arg(LETTERS_S))
            .await
    }

    /// Reason and body of each letter, oldest first, at most `limit`.
    pub async fn letters(&self, limit: usize) -> Result<Vec<(String, String)>, TransportError> {
        let found: Vec<Entry> = self
            .link
            .ask(
                redis::cmd("XRANGE")
                    .arg(names::DEAD)
                    .arg("-")
                    .arg("+")
                    .arg("COUNT")
                    .arg(limit),
            )
            .await?;
        Ok(found
            .into_iter()
            .map(|(_, fields)| {
                let field = |wanted: &str| {
                    fields
                        .iter()
                        .find(|(name, _)| name == wanted)
                        .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
                        .unwrap_or_default()
                };
                (field("reason"), field(names::FIELD))
            })
            .collect())
    }
}
