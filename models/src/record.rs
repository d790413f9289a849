//! Records what a model answers onto a tape, which then answers in the model's place.
//!
//! The file is complete after every answer, so that a run that was killed leaves a tape of what happened until then; a
//! recorder that finds its own file goes on with it. Every text passes a redactor on its way.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ports::{
    ModelAnswer, ModelCall, ModelError, Models, Role, Speaker, Usage, WireAnswer, WireCall,
    WireError, WireFormat, WorkerAnswer, WorkerCall, WorkerModels, WorkerTerms,
};
use serde_json::Value;
use tracing::warn;

use crate::sse;
use crate::tape::{self, RawEntry, RawThreads, RawToolCall, RawUsage, TapeError, TapeFile};
use crate::wire::{self, Completion, Tokens, ToolCall};

/// Takes known secrets out of a text.
pub type Redact = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// Passes questions on and writes down the answers. Cheap to clone.
#[derive(Clone)]
pub struct Recorder {
    models: Arc<dyn Models>,
    workers: Arc<dyn WorkerModels>,
    deck: Arc<Deck>,
}

struct Deck {
    path: PathBuf,
    redact: Redact,
    reel: Mutex<Reel>,
}

struct Reel {
    name: String,
    about: String,
    threads: BTreeMap<(Role, String), Vec<Take>>,
}

/// One recorded answer.
struct Take {
    turn: u32,
    /// How many answers of the model the question repeated: repairs of one turn have different numbers.
    repeated: u32,
    /// The last user message; `None` for what an earlier process recorded.
    asked: Option<String>,
    /// Its key was taken over by a later answer: it is known by its message.
    by_message: bool,
    entry: RawEntry,
}

/// What identifies an answer, and what it says.
struct Recording<'a> {
    role: Role,
    thread: &'a str,
    turn: u32,
    repeated: u32,
    asked: String,
    text: &'a str,
    tool_calls: &'a [ToolCall],
    tokens: Tokens,
}

impl Recorder {
    /// Records what `models` and `workers` answer into the file, going on where an earlier run stopped.
    pub fn new(
        models: Arc<dyn Models>,
        workers: Arc<dyn WorkerModels>,
        path: &Path,
        redact: Redact,
    ) -> Result<Self, TapeError> {
        let name = path.file_stem().map_or_else(
            || "recorded".to_owned(),
            |stem| stem.to_string_lossy().into_owned(),
        );
        let reel = if path.exists() {
            Reel::of(TapeFile::parse(
                &tape::read(path)?,
                &path.display().to_string(),
            )?)
        } else {
            Reel {
                name,
                about: format!("Recorded on {}.", jiff::Zoned::now().date()),
                threads: BTreeMap::new(),
            }
        };
        let deck = Deck {
            path: path.to_owned(),
            redact,
            reel: Mutex::new(reel),
        };
        // A file that cannot be written is found out now and not after the first answer was paid for.
        deck.write()?;
        Ok(Self {
            models,
            workers,
            deck: Arc::new(deck),
        })
    }
}

#[async_trait]
impl Models for Recorder {
    async fn ask(&self, call: &ModelCall) -> Result<ModelAnswer, ModelError> {
        let answer = self.models.ask(call).await?;
        let said = |speaker| {
            call.messages
                .iter()
                .filter(move |message| message.speaker == speaker)
        };
        let asked = said(Speaker::User).next_back();
        let repeated = said(Speaker::Assistant).count();
        self.deck.record(&Recording {
            role: call.role,
            thread: &call.thread,
            turn: call.turn,
            repeated: u32::try_from(repeated).unwrap_or(u32::MAX),
            asked: asked.map_or_else(String::new, |message| message.text.clone()),
            text: &answer.text,
            tool_calls: &[],
            tokens: Tokens {
                input: answer.usage.input_tokens,
                output: answer.usage.output_tokens,
            },
        });
        Ok(answer)
    }

    fn tape(&self) -> Option<String> {
        self.models.tape()
    }
}

#[async_trait]
impl WorkerModels for Recorder {
    async fn complete(&self, call: WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError> {
        let mut heard = Heard {
            deck: self.deck.clone(),
            thread: call.thread.clone(),
            turn: wire::assistant_messages(&call.body),
            asked: wire::last_text(&call.body, "user"),
            most: Tokens {
                input: wire::estimate_tokens(call.body.to_string().len()),
                output: u64::MAX,
            },
            completion: Completion::default(),
            decoder: sse::Decoder::default(),
        };
        let (answer, usage) = self.workers.complete(call).await?;
        let answer = match answer {
            WorkerAnswer::Json(body) => {
                if let Some(completion) = Completion::from_body(&body) {
                    heard.completion = completion;
                    heard.record();
                }
                WorkerAnswer::Json(body)
            }
            WorkerAnswer::Stream(stream) => WorkerAnswer::Stream(heard.along(stream)),
        };
        Ok((answer, usage))
    }

    fn terms(&self, format: Option<WireFormat>) -> WorkerTerms {
        self.workers.terms(format)
    }

    /// Passed on and not written down: a tape holds chat completions.
    async fn native(&self, call: WireCall) -> Result<(WireAnswer, Usage), WireError> {
        warn!(
            thread = call.call.thread,
            format = call.format.name(),
            "an answer in {} is not on the tape, which holds chat completions only",
            call.format.name()
        );
        self.workers.native(call).await
    }
}

/// A worker's answer as it goes by.
struct Heard {
    deck: Arc<Deck>,
    thread: String,
    turn: u32,
    asked: String,
    most: Tokens,
    completion: Completion,
    decoder: sse::Decoder,
}

impl Heard {
    fn along(
        self,
        stream: BoxStream<'static, Result<Bytes, ModelError>>,
    ) -> BoxStream<'static, Result<Bytes, ModelError>> {
        stream::unfold((stream, Some(self)), |(mut stream, mut heard)| async move {
            let piece = stream.next().await?;
            let ended = match (&piece, &mut heard) {
                (Ok(bytes), Some(heard)) => heard.hear(bytes),
                _ => false,
            };
            if ended && let Some(heard) = heard.take() {
                // Written before the end is passed on: whoever has the whole answer finds it on the tape.
                heard.record();
            }
            Some((piece, (stream, heard)))
        })
        .boxed()
    }

    /// Takes a piece; whether the answer has ended.
    fn hear(&mut self, bytes: &[u8]) -> bool {
        let mut done = false;
        for data in self.decoder.feed(bytes).unwrap_or_default() {
            if data.trim() == "[DONE]" {
                done = true;
            } else if let Ok(chunk) = serde_json::from_str::<Value>(&data) {
                self.completion.absorb(&chunk);
            }
        }
        done
    }

    fn record(&self) {
        self.deck.record(&Recording {
            role: Role::Developer,
            thread: &self.thread,
            turn: self.turn,
            repeated: 0,
            asked: self.asked.clone(),
            text: &self.completion.text,
            tool_calls: &self.completion.tool_calls,
            tokens: self.completion.tokens_or_estimate(self.most),
        });
    }
}

impl Deck {
    /// Writes an answer down. A tape that cannot be written is no reason to lose the answer itself.
    fn record(&self, recording: &Recording<'_>) {
        let mut recorded = self.reel.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.add(recording, &self.redact);
        drop(recorded);
        if let Err(error) = self.write() {
            warn!(error = %error, cause = ?std::error::Error::source(&error).map(ToString::to_string), "an answer is not on the tape");
        }
    }

    fn write(&self) -> Result<(), TapeError> {
        let failed = |source| TapeError::Write {
            path: self.path.clone(),
            source,
        };
        // Held while writing, so that an older state never replaces a newer one.
        let reel = self.reel.lock().unwrap_or_else(PoisonError::into_inner);
        let text = serde_yaml_ng::to_string(&reel.file())
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let mut file = std::fs::File::create(&beside).map_err(failed)?;
        file.write_all(text.as_bytes()).map_err(failed)?;
        file.sync_data().map_err(failed)?;
        std::fs::rename(&beside, &self.path).map_err(failed)
    }
}

impl Reel {
    fn of(file: TapeFile) -> Self {
        let mut threads: BTreeMap<_, Vec<Take>> = BTreeMap::new();
        for (role, of_role) in file.answers.unwrap_or_default() {
            for (thread, entries) in of_role.unwrap_or_default() {
                let mut next = 0;
                let takes = threads.entry((role, thread)).or_default();
                for entry in entries {
                    let by_message = entry.when.is_some();
                    let turn = entry.turn.unwrap_or(next);
                    if !by_message {
                        next = turn.saturating_add(1);
                    }
                    let repeated = takes
                        .iter()
                        .filter(|take| !take.by_message && take.turn == turn)
                        .count();
                    takes.push(Take {
                        turn,
                        repeated: u32::try_from(repeated).unwrap_or(u32::MAX),
                        asked: None,
                        by_message,
                        entry,
                    });
                }
            }
        }
        Self {
            name: file.tape,
            about: file.about,
            threads,
        }
    }

    fn add(&mut self, recording: &Recording<'_>, redact: &Redact) {
        let asked = redact(&recording.asked);
        let key = (recording.role, recording.thread.to_owned());
        let takes = self.threads.entry(key).or_default();
        let same = takes.iter().position(|take| {
            !take.by_message && take.turn == recording.turn && take.repeated == recording.repeated
        });
        if let Some(position) = same {
            let mut earlier = takes.remove(position);
            // The same question again is a try that was repeated after a crash; another one took no turn, and is known by
            // what was asked.
            if let Some(message) = earlier.asked.take().filter(|message| *message != asked) {
                let pattern = format!("^{}$", regex::escape(&message));
                // A worker that begins again at its first turn has new instructions: its earlier answers belong to them
                // and to their turn.
                earlier.entry.turn = (recording.role == Role::Developer).then_some(recording.turn);
                earlier.entry.when = Some(pattern);
                earlier.by_message = true;
                takes.retain(|take| {
                    !(take.by_message
                        && take.entry.when == earlier.entry.when
                        && take.entry.turn == earlier.entry.turn)
                });
                takes.push(earlier);
            }
        }
        takes.push(Take {
            turn: recording.turn,
            repeated: recording.repeated,
            asked: Some(asked),
            by_message: false,
            entry: recording.entry(redact),
        });
        takes.sort_by_key(|take| (!take.by_message, take.turn, take.repeated));
    }

    fn file(&self) -> TapeFile {
        let mut answers: BTreeMap<Role, Option<RawThreads>> = BTreeMap::new();
        for ((role, thread), takes) in &self.threads {
            answers
                .entry(*role)
                .or_default()
                .get_or_insert_default()
                .insert(
                    thread.clone(),
                    takes.iter().map(|take| take.entry.clone()).collect(),
                );
        }
        TapeFile {
            tape: self.name.clone(),
            about: self.about.clone(),
            delay_ms: 0,
            answers: Some(answers),
        }
    }
}

impl Recording<'_> {
    fn entry(&self, redact: &Redact) -> RawEntry {
        let text = redact(self.text);
        // A document is easier to read and to edit as one. Only crew answers: a developer's JSON may be part of its prose.
        let json = serde_json::from_str::<Value>(&text)
            .ok()
            .filter(|json| json.is_object() && self.role != Role::Developer);
        let tool_calls: Vec<_> = self
            .tool_calls
            .iter()
            .map(|call| tool_call(&call.name, &redact(&call.arguments)))
            .collect();
        let wordless = text.is_empty() && !tool_calls.is_empty();
        RawEntry {
            turn: Some(self.turn),
            when: None,
            text: (json.is_none() && !wordless).then_some(text),
            json,
            tool_calls,
            usage: Some(RawUsage {
                input_tokens: self.tokens.input,
                output_tokens: self.tokens.output,
            }),
        }
    }
}

fn tool_call(name: &str, arguments: &str) -> RawToolCall {
    let parsed = serde_json::from_str::<Value>(arguments);
    if let Ok(Value::Object(object)) = &parsed
        && name == "shell"
        && object.len() == 1
        && let Some(Value::String(shell)) = object.get("command")
    {
        return RawToolCall::Shell {
            shell: shell.clone(),
        };
    }
    RawToolCall::Named {
        name: name.to_owned(),
        arguments: match parsed {
            Ok(json @ Value::Object(_)) => json,
            _ => Value::String(arguments.to_owned()),
        },
    }
}
