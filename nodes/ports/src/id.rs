//! A type for every identifier, so that none can stand in another's place.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Takes the text as it is; where it comes from outside, the caller has checked it.
            pub fn new(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// The text of the identifier.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    )*};
}

ids! {
    /// A project: `p` and 10 lower-case base-32 characters, the same in threads, folders, labels and tables.
    ProjectId;
    /// A job within its project: `job-1`, `job-2`, …
    JobId;
    /// A task within its job: a slug that the plan gave it, such as `storage`.
    TaskId;
    /// A person, whatever front end they came through: `telegram:12345`, `local:root`.
    PersonId;
    /// A wait for a person: opaque, as it stands in a button.
    WaitId;
    /// One attempt of a worker: see `protocol::SpawnRequest::request_id`.
    RequestId;
    /// A Git commit, 40 hexadecimal digits.
    Sha;
}

impl ProjectId {
    /// The project that a first message founds. The same message always founds the same project, so that a crash between
    /// storing the message and starting the project cannot found two.
    ///
    /// `key` is the message's unique key, such as `telegram:{update_id}`.
    pub fn founded_by(key: &str) -> Self {
        use sha2::Digest;
        const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let digest = sha2::Sha256::digest(key.as_bytes());
        let text: String = digest[..10]
            .iter()
            .map(|byte| char::from(ALPHABET[usize::from(byte % 32)]))
            .collect();
        Self(format!("p{text}"))
    }
}

/// A name for people and for URLs: lower-case letters, digits and single hyphens, 1 to 40 characters. Because it becomes
/// part of paths it can hold nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct Slug(String);

impl Slug {
    /// Checks a slug that somebody gave.
    pub fn parse(text: &str) -> Result<Self, SlugError> {
        let fits = !text.is_empty()
            && text.len() <= 40
            && !text.starts_with('-')
            && !text.ends_with('-')
            && !text.contains("--")
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(SlugError(text.chars().take(60).collect()))
        }
    }

    /// Makes a slug out of any title: `"My Notes!"` becomes `my-notes`; what has no letter or digit becomes `project`.
    pub fn from_title(title: &str) -> Self {
        let mut out = String::new();
        for c in title.chars() {
            if out.len() >= 40 {
                break;
            }
            if c.is_ascii_alphanumeric() {
                out.push(c.to_ascii_lowercase());
            } else if !out.is_empty() && !out.ends_with('-') {
                out.push('-');
            }
        }
        let out = out.trim_end_matches('-');
        Self(if out.is_empty() { "project" } else { out }.to_owned())
    }

    /// The text of the slug.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Slug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Slug {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// A text that cannot be a slug.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the name {0:?} cannot be used: write 1 to 40 lower-case letters, digits and single hyphens, like \"my-notes\""
)]
pub struct SlugError(String);

/// Names of the crew's threads. A child's thread is `{parent}/{name}`, so these follow from one another.
pub mod threads {
    use super::{JobId, ProjectId, TaskId};

    /// The conversation of a project.
    pub fn conversation(project: &ProjectId) -> String {
        project.to_string()
    }

    /// A job, child of the conversation.
    pub fn job(project: &ProjectId, job: &JobId) -> String {
        format!("{project}/{job}")
    }

    /// A task, child of its job.
    pub fn task(project: &ProjectId, job: &JobId, task: &TaskId) -> String {
        format!("{project}/{job}/{task}")
    }

    /// The thread's name inside its project, under which a tape knows it: `conversation`, `job-1`, `job-1/storage`.
    pub fn within_project(thread: &str) -> &str {
        thread
            .split_once('/')
            .map_or("conversation", |(_, rest)| rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slug_is_never_a_way_out_of_its_folder() {
        for bad in [
            "",
            "../x",
            "a/b",
            ".",
            "-a",
            "a-",
            "a--b",
            "A",
            "é",
            &"a".repeat(41),
        ] {
            assert!(Slug::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Slug::parse("my-notes-2").unwrap().as_str(), "my-notes-2");
    }

    #[test]
    fn every_title_gives_a_slug() {
        for (title, slug) in [
            ("My Notes!", "my-notes"),
            ("../../etc", "etc"),
            ("дом", "project"),
            ("", "project"),
        ] {
            assert_eq!(Slug::from_title(title).as_str(), slug);
        }
        let long = Slug::from_title(&"word ".repeat(50));
        assert!(Slug::parse(long.as_str()).is_ok(), "{long}");
    }

    #[test]
    fn one_message_founds_one_project() {
        assert_eq!(
            ProjectId::founded_by("telegram:1"),
            ProjectId::founded_by("telegram:1")
        );
        assert_ne!(
            ProjectId::founded_by("telegram:1"),
            ProjectId::founded_by("telegram:2")
        );
        assert_eq!(ProjectId::founded_by("x").as_str().len(), 11);
    }

    #[test]
    fn a_tape_knows_a_thread_by_its_name_within_the_project() {
        let p = ProjectId::founded_by("x");
        let job = JobId::new("job-1");
        assert_eq!(
            threads::within_project(&threads::conversation(&p)),
            "conversation"
        );
        assert_eq!(
            threads::within_project(&threads::task(&p, &job, &TaskId::new("api"))),
            "job-1/api"
        );
    }
}
