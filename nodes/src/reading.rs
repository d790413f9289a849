//! Reads a repository for a prompt: the list of its files, and as much of their contents as the bound allows.

use graph::Context;
use ports::{Failure, ProjectId, Sha};
use serde::{Deserialize, Serialize};

use crate::{
    Crew,
    effect::{Stop, effect},
};

/// The most paths that a prompt lists.
const MAX_PATHS: usize = 500;
/// The most of one file, in bytes.
const MAX_FILE_BYTES: usize = 16 * 1024;
/// The most files that are opened.
const MAX_FILES: usize = 200;

/// What was read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Reading {
    /// Paths of the repository.
    pub paths: Vec<String>,
    /// Files with their texts.
    pub files: Vec<FileText>,
    /// Whether something was left out.
    pub truncated: bool,
}

/// A file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FileText {
    /// Its path.
    pub path: String,
    /// Its text, cut to the bound.
    pub text: String,
}

impl Reading {
    /// Whether the repository has this file.
    pub fn has(&self, path: &str) -> bool {
        self.paths.iter().any(|known| known == path)
    }
}

/// Reads a repository at a commit, at most `max_bytes` of contents.
pub(crate) async fn read(
    crew: &Crew,
    ctx: &Context,
    project: &ProjectId,
    sha: &Sha,
    max_bytes: usize,
) -> Result<Reading, Stop> {
    effect(ctx, "read", || read_now(crew, project, sha, max_bytes)).await
}

async fn read_now(
    crew: &Crew,
    project: &ProjectId,
    sha: &Sha,
    max_bytes: usize,
) -> Result<Reading, Failure> {
    let mut paths = crew.forge.list_files(project, sha).await?;
    paths.sort_by_key(|path| (rank(path), path.clone()));
    let mut reading = Reading {
        truncated: paths.len() > MAX_PATHS,
        ..Reading::default()
    };
    let mut left = max_bytes;
    for path in paths.iter().take(MAX_FILES) {
        if left == 0 {
            reading.truncated = true;
            break;
        }
        let text = match crew.forge.read_file(project, sha, path).await {
            Ok(Some(text)) => text,
            Ok(None) => continue,
            // A file that is too large, or no text, is left out; anything else is worth a failure.
            Err(failure) if failure.kind == "too_large" || failure.kind == "not_text" => {
                reading.truncated = true;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let room = left.min(MAX_FILE_BYTES).min(text.len());
        let cut = text.floor_char_boundary(room);
        reading.truncated |= cut < text.len();
        left -= cut;
        reading.files.push(FileText {
            path: path.clone(),
            text: text[..cut].to_owned(),
        });
    }
    reading.truncated |= paths.len() > MAX_FILES;
    paths.truncate(MAX_PATHS);
    paths.sort();
    reading.paths = paths;
    Ok(reading)
}

/// What tells most comes first: the project's own words about itself, then sources, then the rest.
fn rank(path: &str) -> u8 {
    match path {
        "AGENTS.md" | "artel.yaml" | "README.md" => 0,
        _ if path.starts_with('.') || path.contains(".lock") => 3,
        _ if path.starts_with("tests/") || path.starts_with("test/") => 2,
        _ => 1,
    }
}
