//! What a pull request changes.

use ports::{Diff, PullRequestStatus, Sha};

use crate::pulls::{one, seen};
use crate::repo::Repo;
use crate::{Error, MAX_LISTED_FILES};

pub(crate) async fn diff(repo: &Repo, number: u64, max_bytes: usize) -> Result<Diff, Error> {
    let pull = one(repo, number).await?;
    let pull = seen(repo, &pull.stored).await?;
    let against = match (&pull.status, &pull.merged) {
        (PullRequestStatus::Merged, Some(merge)) => {
            let first = repo.reference(&format!("{merge}^1")).await?;
            first.ok_or_else(|| Error::NoCommit(merge.clone()))?
        }
        _ => repo.tip().await?,
    };
    let base = repo
        .merge_base(&against, &pull.head)
        .await?
        .ok_or(Error::Unrelated {
            branch: pull.branch,
        })?;
    let names = repo
        .git
        .call(args(
            &["--name-only", "-z", "--no-renames"],
            &base,
            &pull.head,
        ))
        .ok()
        .await?;
    let files = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .take(MAX_LISTED_FILES)
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    let answer = repo
        .git
        .call(args(&["--patch", "--find-renames"], &base, &pull.head))
        .cut_at(max_bytes)
        .run()
        .await?;
    if answer.code != 0 {
        return Err(answer.failed());
    }
    let (text, truncated) = (shown(answer.stdout, answer.cut, max_bytes), answer.cut);
    Ok(Diff {
        base,
        head: pull.head,
        files,
        text,
        truncated,
    })
}

fn args<'a>(options: &[&'a str], base: &'a Sha, head: &'a Sha) -> Vec<&'a str> {
    let mut args = vec![
        "diff-tree",
        "-r",
        "--no-commit-id",
        "--no-color",
        "--no-ext-diff",
        "--no-textconv",
        "--src-prefix=a/",
        "--dst-prefix=b/",
    ];
    args.extend(options);
    args.extend([base.as_str(), head.as_str()]);
    args
}

/// As text; a cut one ends with a whole line, when it has one, and never exceeds the size although bytes that are no text
/// grow when they are replaced.
fn shown(mut bytes: Vec<u8>, cut: bool, max_bytes: usize) -> String {
    if cut && let Some(end) = bytes.iter().rposition(|byte| *byte == b'\n') {
        bytes.truncate(end + 1);
    }
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_diff_ends_with_a_whole_line_and_keeps_to_its_size() {
        assert_eq!(shown(b"one\ntwo\nthr".to_vec(), true, 11), "one\ntwo\n");
        assert_eq!(shown("é".as_bytes()[..1].to_vec(), true, 1), "");
        assert!(shown(vec![0xff; 100], false, 100).len() <= 100);
    }
}
