//! What a job used up and what it said, kept in a file so that a restart neither forgets a spent
//! token nor pays twice for the same answer.

use super::said::Said;
use crate::places::write_whole;
use protocol::{SpawnRequest, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The file, for one request; another request begins anew.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    request_id: String,
    input_tokens: u64,
    output_tokens: u64,
    cost_usd: Option<f64>,
    said: Option<Said>,
    last: Option<Answered>,
    /// SHA-256 of the job's key, so that a worker that outlives us is known to the next process. Nobody learns a key from it.
    #[serde(default)]
    key_hash: Option<String>,
}

/// The last answer of the model and the question that it answers.
#[derive(Clone, Serialize, Deserialize)]
struct Answered {
    question_hash: String,
    answer: Value,
}

/// Why nothing may be asked any more.
#[derive(Debug, PartialEq)]
pub(super) struct Spent {
    pub(super) message: String,
}

pub(super) struct Ledger {
    path: PathBuf,
    tokens: Option<u64>,
    cost_usd: Option<f64>,
    state: Arc<Mutex<State>>,
}

struct State {
    kept: Kept,
    /// Tokens of questions that are being answered, as far as they can be told beforehand.
    reserved: u64,
    /// An answer of a former run that the worker may not have got: given once.
    unread: Option<Answered>,
    trouble: Option<(&'static str, String)>,
}

/// A part of the budget that is held until a question is answered: to the last byte, so that many answers that are still
/// streaming cannot pass the limit together.
pub(super) struct Reserved {
    state: Arc<Mutex<State>>,
    tokens: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.reserved = state.reserved.saturating_sub(self.tokens);
    }
}

impl Ledger {
    pub(super) fn open(request: &SpawnRequest, state: &Path) -> io::Result<Self> {
        let path = state.join("broker.json");
        let kept = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "{} cannot be read; its counts begin anew", path.display());
                Kept::default()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Kept::default(),
            Err(error) => return Err(error),
        };
        let kept = if kept.request_id == request.request_id {
            kept
        } else {
            Kept {
                request_id: request.request_id.clone(),
                ..Kept::default()
            }
        };
        Ok(Self {
            path,
            tokens: request.limits.tokens,
            cost_usd: request.limits.cost_usd,
            state: Arc::new(Mutex::new(State {
                unread: kept.last.clone(),
                kept,
                reserved: 0,
                trouble: None,
            })),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, state: &State) -> io::Result<()> {
        write_whole(&self.path, &serde_json::to_vec(&state.kept)?)
    }

    /// The hash of the key that was given to a worker of this request before.
    pub(super) fn key_hash(&self) -> Option<[u8; 32]> {
        let state = self.lock();
        let mut hash = [0; 32];
        hex::decode_to_slice(state.kept.key_hash.as_ref()?, &mut hash).ok()?;
        Some(hash)
    }

    /// From now on this key, and no former one, is the job's.
    pub(super) fn keep_key(&self, hash: &[u8; 32]) -> io::Result<()> {
        let mut state = self.lock();
        state.kept.key_hash = Some(hex::encode(hash));
        self.save(&state)
    }

    pub(super) fn usage(&self) -> Usage {
        let state = self.lock();
        Usage {
            input_tokens: state.kept.input_tokens,
            output_tokens: state.kept.output_tokens,
            cost_usd: state.kept.cost_usd,
            ..Usage::default()
        }
    }

    /// Holds `tokens` of the job's own budget, or says that it does not allow this.
    pub(super) fn reserve(&self, tokens: u64) -> Result<Reserved, Spent> {
        let mut state = self.lock();
        let used = state
            .kept
            .input_tokens
            .saturating_add(state.kept.output_tokens);
        if let Some(limit) = self.tokens
            && used.saturating_add(state.reserved).saturating_add(tokens) > limit
        {
            return Err(Spent {
                message: format!(
                    "the job may use {limit} tokens; {used} are used and this request needs about {tokens}"
                ),
            });
        }
        if let (Some(limit), Some(cost)) = (self.cost_usd, state.kept.cost_usd)
            && cost >= limit
        {
            return Err(Spent {
                message: format!("the job may cost {limit} USD; {cost:.4} USD are spent"),
            });
        }
        state.reserved = state.reserved.saturating_add(tokens);
        Ok(Reserved {
            state: Arc::clone(&self.state),
            tokens,
        })
    }

    /// An answer to this question that a former run got and the worker perhaps did not.
    pub(super) fn unread(&self, question_hash: &str) -> Option<Value> {
        let mut state = self.lock();
        // Whatever is asked first after a restart decides; later questions are new ones.
        state
            .unread
            .take()
            .filter(|answered| answered.question_hash == question_hash)
            .map(|answered| answered.answer)
    }

    /// Counts an answer, and keeps it when it is whole, before the worker gets it.
    pub(super) fn answered(
        &self,
        usage: ports::Usage,
        answer: Option<(String, Value)>,
    ) -> io::Result<()> {
        let mut state = self.lock();
        state.trouble = None;
        let (input, output) = (usage.input_tokens, usage.output_tokens);
        state.kept.input_tokens = state.kept.input_tokens.saturating_add(input);
        state.kept.output_tokens = state.kept.output_tokens.saturating_add(output);
        if let Some(cost) = usage.cost_usd {
            state.kept.cost_usd = Some(state.kept.cost_usd.unwrap_or(0.0) + cost);
        }
        state.kept.last = answer.map(|(question_hash, answer)| Answered {
            question_hash,
            answer,
        });
        self.save(&state)
    }

    pub(super) fn failed(&self, kind: &'static str, message: &str) {
        self.lock().trouble = Some((kind, message.to_owned()));
    }

    pub(super) fn trouble(&self) -> Option<(&'static str, String)> {
        self.lock().trouble.clone()
    }

    pub(super) fn said(&self) -> Option<Said> {
        self.lock().kept.said.clone()
    }

    /// Keeps the report; false when there is one already.
    pub(super) fn say(&self, said: Said) -> io::Result<bool> {
        let mut state = self.lock();
        if state.kept.said.is_some() {
            return Ok(false);
        }
        state.kept.said = Some(said);
        self.save(&state).inspect_err(|_| state.kept.said = None)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn open(folder: &Path, tokens: u64) -> Ledger {
        let mut request = protocol::suite::request("r");
        request.limits.tokens = Some(tokens);
        request.limits.cost_usd = Some(1.0);
        Ledger::open(&request, folder).unwrap()
    }

    fn used(input_tokens: u64, cost_usd: f64) -> ports::Usage {
        ports::Usage {
            input_tokens,
            output_tokens: 0,
            cost_usd: Some(cost_usd),
        }
    }

    #[test]
    fn parallel_questions_share_one_budget() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = open(folder.path(), 100);
        let first = ledger.reserve(60).map_err(|spent| spent.message).unwrap();
        let refused = ledger.reserve(60).err().unwrap();
        assert!(
            refused.message.contains("100 tokens"),
            "{}",
            refused.message
        );
        drop(first);
        ledger.answered(used(30, 0.1), None).unwrap();
        drop(ledger.reserve(60).map_err(|spent| spent.message).unwrap());
        ledger.answered(used(0, 0.9), None).unwrap();
        let refused = ledger.reserve(1).err().unwrap();
        assert!(refused.message.contains("USD"), "{}", refused.message);
    }

    #[test]
    fn a_restart_remembers_what_was_spent_and_gives_an_unread_answer_once() {
        let folder = tempfile::tempdir().unwrap();
        let answer = json!({"choices": []});
        let ledger = open(folder.path(), 100);
        assert_eq!(ledger.unread("q"), None);
        ledger
            .answered(used(30, 0.1), Some(("q".into(), answer.clone())))
            .unwrap();
        assert_eq!(
            ledger.unread("q"),
            None,
            "asking again on purpose asks the model"
        );
        drop(ledger);
        let ledger = open(folder.path(), 100);
        assert_eq!(ledger.usage().input_tokens, 30);
        assert_eq!(ledger.unread("q"), Some(answer));
        assert_eq!(ledger.unread("q"), None);
        drop(ledger);
        assert_eq!(open(folder.path(), 100).unread("other"), None);
    }
}
