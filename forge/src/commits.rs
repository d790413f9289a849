//! Commits of our own: files onto a branch, once per key.

use ports::{FileChange, Sha};

use crate::repo::{NewCommit, RefChange, Repo, branch_ref};
use crate::{Error, KEY_TRAILER, check_names};

/// The longest message of a commit, in bytes.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// How many commits that mention a key are looked at.
const MAX_CANDIDATES: u32 = 100;

pub(crate) async fn commit_files(
    repo: &Repo,
    branch: &str,
    base: &Sha,
    message: &str,
    files: &[FileChange],
    key: &str,
) -> Result<Sha, Error> {
    check_names::branch(branch)?;
    check_names::key(key)?;
    let now = repo.branch(branch).await?;
    if let Some(tip) = &now
        && let Some(made) = find(repo, tip, key).await?
    {
        return Ok(made);
    }
    repo.need_commit(base).await?;
    if now.as_ref().is_some_and(|now| now != base) {
        return Err(moved(branch, base, now));
    }
    let tree = repo.tree_with(base, files).await?;
    let message = format!("{}\n\n{KEY_TRAILER}: {key}\n", text(message));
    let commit = repo
        .write_commit(&NewCommit {
            tree: &tree,
            parents: &[base],
            message: &message,
        })
        .await?;
    let changed = repo
        .change_refs(&[RefChange::Move {
            name: branch_ref(branch),
            new: commit.to_string(),
            old: now.map(|sha| sha.to_string()),
        }])
        .await?;
    if changed {
        Ok(commit)
    } else {
        Err(moved(branch, base, repo.branch(branch).await?))
    }
}

fn moved(branch: &str, base: &Sha, now: Option<Sha>) -> Error {
    Error::BaseMoved {
        branch: branch.to_owned(),
        expected: base.clone(),
        now: now.map_or_else(|| "missing".to_owned(), |sha| sha.to_string()),
    }
}

/// The commit with this key in the branch's own history. Only first parents are followed: on the default branch these are
/// commits that the forge made, and nobody else's trailer counts there.
async fn find(repo: &Repo, tip: &Sha, key: &str) -> Result<Option<Sha>, Error> {
    let output = repo
        .git
        .call([
            "log",
            "--first-parent",
            "--fixed-strings",
            &format!("--grep={KEY_TRAILER}: {key}"),
            &format!("--max-count={MAX_CANDIDATES}"),
            &format!(
                "--format=%H%x00%(trailers:key={KEY_TRAILER},valueonly,unfold,separator=%x00)%x01"
            ),
            tip.as_str(),
            "--",
        ])
        .ok()
        .await?;
    let output = String::from_utf8_lossy(&output);
    Ok(output.split('\u{1}').find_map(|record| {
        let mut fields = record.trim().split('\0');
        let sha = fields.next()?;
        fields
            .next_back()
            .is_some_and(|last| last.trim() == key)
            .then(|| Sha::new(sha))
    }))
}

/// A message as it can stand in a commit: bounded, without characters that end it early, without somebody's own key.
pub(crate) fn text(message: &str) -> String {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let lines: Vec<String> = message[..end]
        .lines()
        .filter(|line| {
            let trailer = line.trim_start().get(..KEY_TRAILER.len());
            !trailer.is_some_and(|start| start.eq_ignore_ascii_case(KEY_TRAILER))
        })
        .map(|line| {
            line.chars()
                .filter(|c| !c.is_control() || *c == '\t')
                .collect()
        })
        .collect();
    let text = lines.join("\n");
    let text = text.trim();
    if text.is_empty() {
        "Change files".to_owned()
    } else {
        text.to_owned()
    }
}

/// A message that is one line.
pub(crate) fn line(message: &str) -> String {
    let plain: String = message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(200)
        .collect();
    plain.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_cannot_carry_somebody_elses_key() {
        let said = text("Title\n\nbody\u{0}\r\nArtel-Key: stolen\n artel-key: other\nend");
        assert_eq!(said, "Title\n\nbody\nend");
        assert_eq!(text(" \n\n"), "Change files");
        assert_eq!(line("a\nb\u{1b}[0m"), "a b [0m");
    }
}
