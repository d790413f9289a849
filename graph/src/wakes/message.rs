//! What processes tell each other.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{checkpoint::MAX_MESSAGE_BYTES, ids::ThreadId};

/// How many threads a message names before it says "all of them".
const MOST_THREADS: usize = 40;

/// Where to look. The short names keep it small; what a newer release adds is ignored.
#[allow(
    clippy::struct_excessive_bools,
    reason = "each says something about something else"
)]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Message {
    /// The engine that tells it.
    #[serde(rename = "f", default)]
    pub from: String,
    /// Threads of these graphs may be due.
    #[serde(rename = "d", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub due: BTreeSet<String>,
    /// Threads of some graph may be due.
    #[serde(rename = "a", default, skip_serializing_if = "is_false")]
    pub any: bool,
    /// The journal has grown.
    #[serde(rename = "j", default, skip_serializing_if = "is_false")]
    pub said: bool,
    /// Whoever runs these should look at their leases.
    #[serde(rename = "l", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub look: BTreeSet<ThreadId>,
    /// These have a new checkpoint, or their run is over.
    #[serde(rename = "m", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub moved: BTreeSet<ThreadId>,
    /// More threads than can be named: all that could be meant are.
    #[serde(rename = "x", default, skip_serializing_if = "is_false")]
    pub all: bool,
    /// What the engine cares for.
    #[serde(rename = "i", default, skip_serializing_if = "Option::is_none")]
    pub interests: Option<Interests>,
    /// It has begun to listen, and wants to know what the others care for.
    #[serde(rename = "h", default, skip_serializing_if = "is_false")]
    pub hello: bool,
}

/// What a process wants to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Interests {
    /// The graphs whose threads it runs.
    #[serde(rename = "g", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub serves: BTreeSet<String>,
    /// Whether it reads the journal.
    #[serde(rename = "j", default, skip_serializing_if = "is_false")]
    pub reads: bool,
    /// The threads that it follows.
    #[serde(rename = "t", default, skip_serializing_if = "BTreeSet::is_empty")]
    pub follows: BTreeSet<ThreadId>,
    /// It follows more than can be named.
    #[serde(rename = "x", default, skip_serializing_if = "is_false")]
    pub follows_all: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(it: &bool) -> bool {
    !*it
}

impl Message {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn look_at(&mut self, thread: &ThreadId) {
        if self.look.len() < MOST_THREADS {
            self.look.insert(thread.clone());
        } else {
            self.all = true;
        }
    }

    pub fn moved(&mut self, thread: &ThreadId) {
        if self.moved.len() < MOST_THREADS {
            self.moved.insert(thread.clone());
        } else {
            self.all = true;
        }
    }

    pub fn encode(mut self, from: &str) -> String {
        from.clone_into(&mut self.from);
        let mut text = self.text();
        if text.len() > MAX_MESSAGE_BYTES {
            self.all |= !self.look.is_empty() || !self.moved.is_empty();
            self.look.clear();
            self.moved.clear();
            text = self.text();
        }
        if text.len() > MAX_MESSAGE_BYTES {
            if let Some(interests) = &mut self.interests {
                interests.follows_all |= !interests.follows.is_empty();
                interests.follows.clear();
            }
            text = self.text();
        }
        if text.len() > MAX_MESSAGE_BYTES {
            // Very long names of graphs. Who hears nothing of an engine's interests polls.
            self.any |= !self.due.is_empty();
            self.due.clear();
            self.interests = None;
            text = self.text();
        }
        text
    }

    fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What cannot be read may be about anything.
    pub fn decode(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|_| Self {
            any: true,
            said: true,
            all: true,
            ..Self::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_never_longer_than_a_bell_must_carry() {
        let mut message = Message::default();
        for number in 0..1000 {
            let thread = ThreadId::from(format!("{number}{}", "\"".repeat(500)));
            message.look_at(&thread);
            message.moved(&thread);
            message.due.insert(format!("{number}{}", "g".repeat(500)));
            let interests = message.interests.get_or_insert_default();
            interests.follows.insert(thread);
        }
        let text = message.encode("me");
        assert!(text.len() <= MAX_MESSAGE_BYTES, "{}", text.len());
        let heard = Message::decode(&text);
        assert!(heard.all && heard.any, "{heard:?}");
    }

    #[test]
    fn what_cannot_be_read_may_be_about_anything() {
        let heard = Message::decode("{");
        assert!(heard.all && heard.any && heard.said);
    }
}
