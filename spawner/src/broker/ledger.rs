//! What a job used up and what it said, kept in a file so that a restart neither forgets a spent
//! token nor pays twice for the same answer.

use super::said::Said;
use crate::places::write_whole;
use ports::{LEAST_OUTPUT, WorkerTerms, fair_output};
use protocol::{SpawnRequest, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

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

/// What is held for an answer that nobody bounds, where the job has a budget.
const UNSAID_OUTPUT: u64 = 65_536;
/// How long a question waits for others to be answered that hold what is left of the budget.
const MAX_WAIT: Duration = Duration::from_mins(2);

/// A question that is about to be asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    /// Tokens that it has itself.
    pub(super) input: u64,
    /// The most output tokens that its sender wants.
    pub(super) most_output: Option<u64>,
    pub(super) terms: WorkerTerms,
}

impl Question {
    fn want(&self) -> u64 {
        let bounds = [self.most_output, self.terms.most_output];
        bounds.into_iter().flatten().min().unwrap_or(UNSAID_OUTPUT)
    }

    /// Fewer output tokens are of no use.
    fn least(&self) -> u64 {
        self.want().min(LEAST_OUTPUT)
    }

    fn cost_usd(&self, output: u64) -> f64 {
        usd(self.input, self.terms.input_token_usd) + usd(output, self.terms.output_token_usd)
    }
}

fn usd(tokens: u64, each: f64) -> f64 {
    // Counts of tokens stay far below the 2^52 that a double holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let tokens = tokens as f64;
    tokens * each
}

/// Why a question may not be asked.
#[derive(Debug, PartialEq)]
pub(super) enum Refused {
    /// The budget does not allow it any more.
    Spent(String),
    /// It would, if others did not hold what is left for a long time already.
    Held(String),
}

pub(super) struct Ledger {
    path: PathBuf,
    tokens: Option<u64>,
    cost_usd: Option<f64>,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Something that was held is free again.
    freed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    kept: Kept,
    /// What questions that are being answered may take at most.
    held: Hold,
    /// An answer of a former run that the worker may not have got: given once.
    unread: Option<Answered>,
    trouble: Option<(&'static str, String)>,
    /// What pays for the job is used up, whatever the job itself might still use.
    ended: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Hold {
    tokens: u64,
    cost_usd: f64,
}

/// A part of the budget that is held until a question is answered: to the last byte, so that many answers that are still
/// streaming cannot pass the limit together.
pub(super) struct Reserved {
    shared: Arc<Shared>,
    hold: Hold,
    /// The most output tokens that are held, and so may be asked for; none where the job has no limit.
    pub(super) most_output: Option<u64>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.held.tokens = state.held.tokens.saturating_sub(self.hold.tokens);
        state.held.cost_usd = (state.held.cost_usd - self.hold.cost_usd).max(0.0);
        drop(state);
        self.shared.freed.notify_waiters();
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
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    unread: kept.last.clone(),
                    kept,
                    held: Hold::default(),
                    trouble: None,
                    ended: false,
                }),
                freed: Notify::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
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

    /// Holds what a question and its answer may take of the job's own budget, or says that it does not allow this. The
    /// answer is bounded to what there is room for ([`fair_output`]). A question that would fit alone waits for those that are
    /// being answered.
    pub(super) async fn reserve(&self, question: &Question) -> Result<Reserved, Refused> {
        let until = Instant::now() + MAX_WAIT;
        loop {
            // Listening begins before looking, so that nothing is freed unheard in between.
            let mut freed = pin!(self.shared.freed.notified());
            freed.as_mut().enable();
            match self.try_reserve(question) {
                Err(Refused::Held(message)) => {
                    if timeout_at(until, freed).await.is_err() {
                        return Err(Refused::Held(message));
                    }
                }
                done => return done,
            }
        }
    }

    /// From now on nothing is asked any more: the budget of the project is used up.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.shared.freed.notify_waiters();
    }

    fn try_reserve(&self, question: &Question) -> Result<Reserved, Refused> {
        let mut state = self.lock();
        if state.ended {
            let message = "the budget of the project is used up; it has to be raised first";
            return Err(Refused::Spent(message.to_owned()));
        }
        let least = question.least();
        let room = self.room(&state.kept, state.held, question)?;
        let Some(room) = room.filter(|room| *room >= least) else {
            let alone = self.room(&state.kept, Hold::default(), question)?;
            let message = self.spent(&state.kept, question);
            return Err(if alone.is_some_and(|room| room >= least) {
                Refused::Held(format!(
                    "{message}, which others hold that are being answered"
                ))
            } else {
                Refused::Spent(message)
            });
        };
        let output = fair_output(question.want(), room);
        let hold = Hold {
            tokens: question.input.saturating_add(output),
            cost_usd: question.cost_usd(output),
        };
        state.held.tokens = state.held.tokens.saturating_add(hold.tokens);
        state.held.cost_usd += hold.cost_usd;
        Ok(Reserved {
            shared: Arc::clone(&self.shared),
            hold,
            // Without a limit there is nothing to keep to.
            most_output: (room < u64::MAX).then_some(output),
        })
    }

    /// How many output tokens there is room for beside what is held; none when not even the question fits.
    fn room(&self, kept: &Kept, held: Hold, question: &Question) -> Result<Option<u64>, Refused> {
        let mut room = u64::MAX;
        if let Some(limit) = self.tokens {
            let taken = kept
                .input_tokens
                .saturating_add(kept.output_tokens)
                .saturating_add(held.tokens)
                .saturating_add(question.input);
            let Some(left) = limit.checked_sub(taken) else {
                return Ok(None);
            };
            room = left;
        }
        if let Some(limit) = self.cost_usd {
            let spent = kept.cost_usd.unwrap_or(0.0);
            if spent >= limit {
                return Err(Refused::Spent(format!(
                    "the job may cost {limit} USD; {spent:.4} USD are spent"
                )));
            }
            // A millionth of a dollar is below the resolution of what is summed up.
            let left = limit - spent - held.cost_usd - question.cost_usd(0) + 1e-6;
            if left < 0.0 {
                return Ok(None);
            }
            if question.terms.output_token_usd > 0.0 {
                // What is larger than a `u64` becomes the largest one.
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let tokens = (left / question.terms.output_token_usd).floor() as u64;
                room = room.min(tokens);
            }
        }
        Ok(Some(room))
    }

    /// What is said to a question that does not fit.
    fn spent(&self, kept: &Kept, question: &Question) -> String {
        let least = question.least();
        let tokens = question.input.saturating_add(least);
        let used = kept.input_tokens.saturating_add(kept.output_tokens);
        let cost = question.cost_usd(least);
        let spent = kept.cost_usd.unwrap_or(0.0);
        match (self.tokens, self.cost_usd) {
            (Some(limit), _) if used.saturating_add(tokens) > limit => format!(
                "the job may use {limit} tokens; {used} are used and this request needs about {tokens}"
            ),
            (_, Some(limit)) if spent + cost > limit => format!(
                "the job may cost {limit} USD; {spent:.4} USD are spent and this request needs about {cost:.4} USD"
            ),
            _ => format!(
                "this request needs about {tokens} tokens of the job's budget; {used} are used"
            ),
        }
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

    fn question(input: u64, most_output: u64) -> Question {
        Question {
            input,
            most_output: Some(most_output),
            terms: WorkerTerms::default(),
        }
    }

    #[tokio::test]
    async fn parallel_questions_share_one_budget() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = open(folder.path(), 100);
        let first = ledger.reserve(&question(50, 10)).await.unwrap();
        let Err(Refused::Held(held)) = ledger.try_reserve(&question(50, 10)) else {
            panic!("it would fit if the other one did not hold so much");
        };
        assert!(held.contains("60 tokens"), "{held}");
        // The next one waits until the first is answered, and not longer.
        let second = question(50, 10);
        let second = ledger.reserve(&second);
        let answer_first = async {
            ledger.answered(used(30, 0.1), None).unwrap();
            drop(first);
        };
        let (second, ()) = tokio::join!(second, answer_first);
        drop(second.unwrap());
        ledger.answered(used(0, 0.9), None).unwrap();
        let Err(Refused::Spent(spent)) = ledger.reserve(&question(1, 1)).await else {
            panic!("a dollar is spent");
        };
        assert!(spent.contains("USD"), "{spent}");
    }

    #[tokio::test]
    async fn when_the_projects_budget_is_used_up_no_question_is_asked_and_none_waits_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = open(folder.path(), 100);
        let first = ledger.reserve(&question(50, 10)).await.unwrap();
        let second = question(50, 10);
        let (second, ()) = tokio::join!(ledger.reserve(&second), async { ledger.end() });
        let Err(Refused::Spent(spent)) = second else {
            panic!("it waited for the first one");
        };
        assert!(spent.contains("budget of the project"), "{spent}");
        drop(first);
        let third = ledger.reserve(&question(1, 1)).await;
        assert!(matches!(third, Err(Refused::Spent(_))));
    }

    #[tokio::test]
    async fn an_answer_gets_what_is_left_and_leaves_half_of_much_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = open(folder.path(), 101_000);
        let mut held = Vec::new();
        let mut bounds = Vec::new();
        while let Ok(reserved) = ledger.try_reserve(&question(1_000, 64_000)) {
            bounds.extend(reserved.most_output);
            held.push(reserved);
        }
        assert_eq!(bounds, [50_000, 24_500, 11_750, 5_375, 4_096]);
        let asked: u64 = bounds.iter().map(|bound| bound + 1_000).sum();
        assert!(asked <= 101_000, "{asked}");
        held.clear();
        // Whoever wants little gets it, however much there is.
        let little = ledger.try_reserve(&question(1_000, 300)).unwrap();
        assert_eq!(little.most_output, Some(300));
    }

    #[tokio::test]
    async fn what_a_job_may_cost_bounds_its_answers_where_prices_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let mut request = protocol::suite::request("r");
        request.limits.tokens = None;
        request.limits.cost_usd = Some(0.1);
        let ledger = Ledger::open(&request, folder.path()).unwrap();
        let priced = Question {
            input: 2_000,
            most_output: Some(64_000),
            terms: WorkerTerms {
                most_output: None,
                input_token_usd: 1e-5,
                output_token_usd: 1e-5,
            },
        };
        // Two cents for the question, and half of the rest or the least that is shared, of eight thousand tokens.
        let first = ledger.try_reserve(&priced).unwrap();
        assert_eq!(first.most_output, Some(4_096));
        let second = ledger.try_reserve(&priced).unwrap();
        assert_eq!(second.most_output, Some(1_904));
        assert!(matches!(ledger.try_reserve(&priced), Err(Refused::Held(_))));
        drop((first, second));
        ledger.answered(used(2_000, 0.075), None).unwrap();
        let Err(Refused::Spent(said)) = ledger.try_reserve(&priced) else {
            panic!("two and a half cents are left, and a little more is needed");
        };
        assert!(
            said.contains("0.0750 USD are spent") && said.contains("0.0302 USD"),
            "{said}"
        );
        // Where nobody knows a price, what is spent is all that is known.
        let unpriced = ledger.try_reserve(&question(1_000_000, 64_000)).unwrap();
        assert_eq!(unpriced.most_output, None);
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
