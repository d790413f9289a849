//! Keeps known values, and whatever looks like a token, out of texts.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};

use aho_corasick::{AhoCorasick, Input};
use parking_lot::RwLock;
use ports::{Plaintext, SecretHandle};
use regex::{Captures, Regex};
use zeroize::Zeroizing;

use crate::forms;

/// Shorter values are not looked for, in bytes: they would be found in every other word.
pub const SHORTEST_REDACTED_BYTES: usize = 6;

/// How many values a redactor knows at most. Beyond it, values that were replaced by newer ones are forgotten, the oldest
/// first.
pub const MAX_KNOWN_VALUES: usize = 20_000;

/// Replaces secrets in texts. Clones are cheap and share what they know; what is added later counts for all of them.
///
/// It is the last line, not the first: a value that is cut in two, encrypted or spelled backwards passes.
#[derive(Clone, Default)]
pub struct Redactor(Arc<RwLock<State>>);

#[derive(Default)]
struct State {
    known: Vec<Known>,
    /// Keyed hashes of the known values.
    fingerprints: HashSet<u64>,
    hasher: RandomState,
    finder: Option<Arc<Finder>>,
}

struct Known {
    value: Zeroizing<String>,
    replacement: Arc<str>,
}

/// Finds forms by how they begin, and compares the rest: an automaton of whole values would need megabytes for a long one.
struct Finder {
    beginnings: AhoCorasick,
    /// By pattern of the automaton: the forms that begin so, the longest first.
    forms: Vec<Vec<Form>>,
}

struct Form {
    text: Zeroizing<String>,
    replacement: Arc<str>,
}

impl Redactor {
    /// One that knows no value yet, only the shapes of well-known tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a value of our own configuration; it is replaced by `[redacted:label]`.
    pub fn add(&self, label: &str, value: &Plaintext) {
        self.learn([(format!("[redacted:{label}]"), value.expose())]);
    }

    /// Registers a secret of a project; it is replaced by its handle.
    pub fn add_secret(&self, handle: &SecretHandle, value: &Plaintext) {
        self.learn([(handle.to_string(), value.expose())]);
    }

    /// Registers many secrets, building the search once.
    pub fn add_secrets<'a>(
        &self,
        secrets: impl IntoIterator<Item = (&'a SecretHandle, &'a Plaintext)>,
    ) {
        self.learn(
            secrets
                .into_iter()
                .map(|(handle, value)| (handle.to_string(), value.expose())),
        );
    }

    fn learn<'a>(&self, values: impl IntoIterator<Item = (String, &'a str)>) {
        let mut state = self.0.write();
        let mut changed = false;
        for (replacement, value) in values {
            let fingerprint = state.hasher.hash_one(value);
            if value.trim().len() < SHORTEST_REDACTED_BYTES
                || !state.fingerprints.insert(fingerprint)
            {
                continue;
            }
            state.known.push(Known {
                value: Zeroizing::new(value.to_owned()),
                replacement: replacement.into(),
            });
            changed = true;
        }
        state.forget_excess();
        if changed {
            state.finder = Some(Arc::new(Finder::new(&state.known)));
        }
    }

    /// The text without secrets: known values become their handles, what looks like a token becomes `[redacted:kind]`.
    /// Borrowed when there is nothing to replace.
    pub fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let finder = self.0.read().finder.clone();
        let known = finder.map_or(Cow::Borrowed(text), |finder| finder.replace(text));
        match known {
            Cow::Borrowed(text) => shapes(text),
            Cow::Owned(text) => Cow::Owned(match shapes(&text) {
                Cow::Owned(replaced) => replaced,
                Cow::Borrowed(_) => text,
            }),
        }
    }

    /// Every string inside a JSON value, keys included, without secrets.
    pub fn redact_json(&self, value: &mut serde_json::Value) {
        use serde_json::Value;
        match value {
            Value::String(text) => {
                if let Cow::Owned(redacted) = self.redact(text) {
                    *text = redacted;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.redact_json(item)),
            Value::Object(members) => {
                for (key, mut member) in std::mem::take(members) {
                    self.redact_json(&mut member);
                    members.insert(self.redact(&key).into_owned(), member);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

impl State {
    fn forget_excess(&mut self) {
        let excess = self.known.len().saturating_sub(MAX_KNOWN_VALUES);
        if excess == 0 {
            return;
        }
        let newest: HashMap<Arc<str>, usize> = self
            .known
            .iter()
            .enumerate()
            .map(|(index, known)| (known.replacement.clone(), index))
            .collect();
        let mut replaced: HashSet<usize> = (0..self.known.len())
            .filter(|index| newest[&self.known[*index].replacement] != *index)
            .take(excess)
            .collect();
        // Only somebody who registers thousands of labels comes here.
        replaced.extend(0..excess - replaced.len());
        let mut index = 0;
        self.known.retain(|_| {
            index += 1;
            !replaced.contains(&(index - 1))
        });
        self.fingerprints = self
            .known
            .iter()
            .map(|known| self.hasher.hash_one(known.value.as_str()))
            .collect();
    }
}

impl std::fmt::Debug for Redactor {
    /// How many values it knows, and none of them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redactor")
            .field("known", &self.0.read().known.len())
            .finish_non_exhaustive()
    }
}

impl Finder {
    fn new(known: &[Known]) -> Self {
        let mut beginnings: Vec<[u8; SHORTEST_REDACTED_BYTES]> = Vec::new();
        let mut index = HashMap::new();
        let mut forms: Vec<Vec<Form>> = Vec::new();
        for Known { value, replacement } in known {
            for text in forms::of(value) {
                let Some(beginning) = text.as_bytes().first_chunk() else {
                    continue;
                };
                let at = *index.entry(*beginning).or_insert_with(|| {
                    beginnings.push(*beginning);
                    forms.push(Vec::new());
                    forms.len() - 1
                });
                forms[at].push(Form {
                    text,
                    replacement: replacement.clone(),
                });
            }
        }
        for same in &mut forms {
            same.sort_by_key(|form| std::cmp::Reverse(form.text.len()));
        }
        let beginnings = AhoCorasick::new(beginnings)
            .expect("patterns of six bytes, far fewer than the automaton can hold");
        Self { beginnings, forms }
    }

    fn replace<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut out = String::new();
        let mut copied = 0;
        let mut from = 0;
        while let Some(found) = self.beginnings.find(Input::new(text).range(from..)) {
            let start = found.start();
            let here = &text.as_bytes()[start..];
            let form = self.forms[found.pattern().as_usize()]
                .iter()
                .find(|form| here.starts_with(form.text.as_bytes()));
            if let Some(form) = form {
                // Both are UTF-8 and a form begins with a whole character, so these are boundaries.
                out.push_str(&text[copied..start]);
                out.push_str(&form.replacement);
                copied = start + form.text.len();
                from = copied;
            } else {
                from = start + 1;
            }
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        out.push_str(&text[copied..]);
        Cow::Owned(out)
    }
}

/// Kinds of tokens that are known by their shape; the groups' names are what is left of them.
static SHAPES: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(concat!(
        r"(?<private_key>-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|$))",
        r"|(?<age_key>AGE-SECRET-KEY-1[0-9A-Za-z]{20,})",
        r"|(?<github_token>github_pat_[0-9A-Za-z_]{22,}|\bgh[pousr]_[0-9A-Za-z]{20,})",
        r"|(?<telegram_token>[0-9]{8,10}:[0-9A-Za-z_-]{35})",
        r"|(?<aws_key>\b(?:AKIA|ASIA)[0-9A-Z]{16}\b)",
        r"|(?<api_key>\bsk-[0-9A-Za-z_-]{20,})",
    ))
    .expect("a pattern that tests compile")
});

const KINDS: [&str; 6] = [
    "private_key",
    "age_key",
    "github_token",
    "telegram_token",
    "aws_key",
    "api_key",
];

fn shapes(text: &str) -> Cow<'_, str> {
    SHAPES.replace_all(text, |found: &Captures<'_>| {
        let kind = KINDS
            .into_iter()
            .find(|kind| found.name(kind).is_some())
            .unwrap_or("token");
        let whole = &found[0];
        // `sk-` begins ordinary hyphenated names too; a key has digits.
        if kind == "api_key" && !whole.bytes().any(|byte| byte.is_ascii_digit()) {
            return whole.to_owned();
        }
        format!("[redacted:{kind}]")
    })
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use proptest::prelude::*;

    use super::*;

    fn knowing(value: &str) -> Redactor {
        let redactor = Redactor::new();
        let handle = SecretHandle {
            project: "pabc".into(),
            name: "KEY".to_owned(),
        };
        redactor.add_secret(&handle, &Plaintext::new(value.to_owned()));
        redactor
    }

    #[test]
    fn a_known_value_becomes_its_handle() {
        let redactor = knowing("hunter2!");
        assert_eq!(
            redactor.redact("login hunter2! and hunter2!."),
            "login secret://project/pabc/KEY and secret://project/pabc/KEY."
        );
        assert!(matches!(redactor.redact("nothing here"), Cow::Borrowed(_)));
    }

    #[test]
    fn what_is_added_later_counts_for_every_clone() {
        let redactor = Redactor::new();
        let clone = redactor.clone();
        redactor.add(
            "TELEGRAM_BOT_TOKEN",
            &Plaintext::new("quite-secret".to_owned()),
        );
        assert_eq!(
            clone.redact("a quite-secret b"),
            "a [redacted:TELEGRAM_BOT_TOKEN] b"
        );
    }

    #[test]
    fn encoded_forms_are_found() {
        let value = "p&ss wörd/\"x\"+1";
        let redactor = knowing(value);
        let engine = base64::engine::general_purpose::STANDARD;
        let mut texts = vec![
            serde_json::to_string(value).unwrap(),
            format!("{value:?}"),
            engine.encode(value),
            "p%26ss%20w%C3%B6rd%2F%22x%22%2B1".to_owned(),
            "p%26ss+w%c3%b6rd%2f%22x%22%2b1".to_owned(),
            r#"p&ss w\u00f6rd/\"x\"+1"#.to_owned(),
            "p&amp;ss wörd/\"x\"+1".to_owned(),
        ];
        for prefix in ["u:", "user:", "a:"] {
            texts.push(engine.encode(format!("{prefix}{value} and more")));
        }
        for text in texts {
            let redacted = redactor.redact(&text).into_owned();
            assert!(
                redacted.contains("secret://project/pabc/KEY"),
                "{text} -> {redacted}"
            );
        }
    }

    #[test]
    fn a_short_value_is_left_alone() {
        let redactor = knowing("12345");
        assert_eq!(redactor.redact("port 12345"), "port 12345");
    }

    #[test]
    fn the_longer_of_two_values_wins() {
        let redactor = knowing("abcdef");
        redactor.add("LONG", &Plaintext::new("abcdefghij".to_owned()));
        assert_eq!(redactor.redact("abcdefghij"), "[redacted:LONG]");
    }

    #[test]
    fn values_that_begin_alike_are_told_apart() {
        let redactor = knowing("postgres://one:first@host/db");
        redactor.add(
            "TWO",
            &Plaintext::new("postgres://two:second@host/db".to_owned()),
        );
        let text =
            "postgres://nobody postgres://two:second@host/db postgrpostgres://one:first@host/db";
        assert_eq!(
            redactor.redact(text),
            "postgres://nobody [redacted:TWO] postgrsecret://project/pabc/KEY"
        );
    }

    #[test]
    fn long_values_and_long_texts_take_no_time() {
        let started = std::time::Instant::now();
        let value = "y".repeat(64 * 1024);
        let redactor = knowing(&value);
        let text = format!("{} {value}", "yyyyyyy ".repeat(100_000));
        let redacted = redactor.redact(&text).into_owned();
        assert!(redacted.ends_with(" secret://project/pabc/KEY"));
        assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    }

    #[test]
    fn a_full_vault_is_searched_quickly() {
        let redactor = Redactor::new();
        let secrets: Vec<(SecretHandle, Plaintext)> = (0..crate::MAX_SECRETS)
            .map(|n| {
                let handle = SecretHandle {
                    project: "pabc".into(),
                    name: format!("KEY_{n}"),
                };
                (
                    handle,
                    Plaintext::new(format!("value-{n:05}-of-many-that-begin-alike")),
                )
            })
            .collect();
        let started = std::time::Instant::now();
        redactor.add_secrets(secrets.iter().map(|(handle, value)| (handle, value)));
        let text = format!(
            "{} value-09999-of-many-that-begin-alike",
            "an ordinary line of a log\n".repeat(1000)
        );
        assert!(
            redactor
                .redact(&text)
                .ends_with(" secret://project/pabc/KEY_9999")
        );
        assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    }

    #[test]
    fn well_known_tokens_are_found_by_their_shape() {
        let redactor = Redactor::new();
        let tail = "AAbbCCddEEffGGhhIIjjKKllMMnnOOpp_-9";
        assert_eq!(tail.len(), 35);
        for (text, left) in [
            (
                format!("https://api.telegram.org/bot123456789:{tail}/getMe"),
                "https://api.telegram.org/bot[redacted:telegram_token]/getMe",
            ),
            (
                "key sk-proj-abcDEF0123456789abcDEF01 end".to_owned(),
                "key [redacted:api_key] end",
            ),
            (
                format!("ghp_{}", "a1B2".repeat(9)),
                "[redacted:github_token]",
            ),
            (
                format!("github_pat_{}", "a1B2_".repeat(9)),
                "[redacted:github_token]",
            ),
            (
                format!("AGE-SECRET-KEY-1{}", "QWERTY09".repeat(7)),
                "[redacted:age_key]",
            ),
            (
                "id AKIAIOSFODNN7EXAMPLE.".to_owned(),
                "id [redacted:aws_key].",
            ),
            (
                "a -----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- b"
                    .to_owned(),
                "a [redacted:private_key] b",
            ),
            (
                "cut -----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl".to_owned(),
                "cut [redacted:private_key]",
            ),
        ] {
            assert_eq!(redactor.redact(&text), left);
        }
    }

    #[test]
    fn ordinary_texts_are_left_alone() {
        let redactor = knowing("hunter2!");
        for text in [
            "task-abcdefghijklmnopqrstuvwx0",
            "sk-learn-something-with-a-long-name",
            "2026-10-03T12:30:45.123456Z 10:20:30",
            "sha 3f786850e387550fdab836ed7e6dc881de23001b",
            "-----BEGIN CERTIFICATE-----",
            "",
        ] {
            assert!(
                matches!(redactor.redact(text), Cow::Borrowed(_)) || redactor.redact(text) == text,
                "{text}"
            );
        }
    }

    #[test]
    fn strings_inside_json_are_redacted() {
        let redactor = knowing("hunter2!");
        let mut value = serde_json::json!({"a": ["hunter2!", 1], "hunter2!": null});
        redactor.redact_json(&mut value);
        assert_eq!(
            value,
            serde_json::json!({"a": ["secret://project/pabc/KEY", 1], "secret://project/pabc/KEY": null})
        );
    }

    #[test]
    fn debug_shows_no_value() {
        assert!(!format!("{:?}", knowing("hunter2!")).contains("hunter2"));
    }

    proptest! {
        #[test]
        fn no_value_survives_in_any_surroundings(
            value in "[!-~é]{6,40}", before in ".{0,20}", after in ".{0,20}",
        ) {
            let text = format!("{before}{value}{after}");
            let redacted = knowing(&value).redact(&text).into_owned();
            prop_assert!(!redacted.contains(&value) || "secret://project/pabc/KEY".contains(&value), "{redacted}");
        }
    }
}
